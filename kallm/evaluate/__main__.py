"""lm-eval's own command line, with the model ``kallm``: ``python -m kallm.evaluate run --model kallm …``."""

import sys

from lm_eval.__main__ import cli_evaluate

import kallm.evaluate.harness  # noqa: F401 - registers the model
from kallm.errors import KallmError

if __name__ == "__main__":
    try:
        cli_evaluate()
    except KallmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
