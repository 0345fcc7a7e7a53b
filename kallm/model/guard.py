"""The warning at a plain ``save_pretrained``, whose folder would open as the pretrained architecture."""

import warnings
from typing import Any

from torch import nn

from kallm.kan.ffns import FFN

__all__ = ["guard_save_"]


def guard_save_(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` warn as long as the model has FFNs of ours; without any, undo that.

    A model without ``save_pretrained`` stays as it is. Only this model is guarded: neither its parts nor what is built
    around it, such as a ``PeftModel``, whose own ``save_pretrained`` writes the adapters alone.
    """
    guarded = isinstance(vars(model).get("save_pretrained"), _GuardedSave)
    if not _num_ffns(model):
        if guarded:
            del model.save_pretrained
    elif not guarded and hasattr(model, "save_pretrained"):
        model.save_pretrained = _GuardedSave(model)  # type: ignore[assignment]


class _GuardedSave:
    """A model's ``save_pretrained`` after a warning; copied and pickled with its model, it saves the copy."""

    # An object of a class at module level: a closure would be shared by copies, and a bound method cannot be pickled.
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if count := _num_ffns(self._model):
            warnings.warn(
                f"save_pretrained writes a config that knows nothing of the {count} replaced FFNs: from_pretrained "
                "will build the pretrained ones with random weights. Use kallm.save(model, folder) to keep the "
                "retrofit, or kallm.export(model, folder) for a folder that opens without kallm",
                UserWarning,
                stacklevel=2,
            )
        return type(self._model).save_pretrained(self._model, *args, **kwargs)


def _num_ffns(model: nn.Module) -> int:
    return sum(isinstance(module, FFN) for module in model.modules())
