"""lm-eval's own command line, with the model ``kallm``: ``python -m kallm.evaluate run --model kallm …``."""

from lm_eval.__main__ import cli_evaluate

import kallm.evaluate.harness  # noqa: F401 - registers the model

if __name__ == "__main__":
    cli_evaluate()
