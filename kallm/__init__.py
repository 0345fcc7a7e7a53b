"""Replace the last feed-forward networks of a pretrained language model by KAN layers, and measure what it does."""

import importlib
from typing import Any

__all__ = ["BASES", "FFNS", "KANLinear", "RetrofitConfig", "export", "load", "retrofit_", "save"]

_HOMES = {
    "BASES": "kallm.kan.bases",
    "FFNS": "kallm.kan.ffns",
    "KANLinear": "kallm.kan.linear",
    "RetrofitConfig": "kallm.model.retrofit",
    "export": "kallm.saving.exported",
    "load": "kallm.saving.saved",
    "retrofit_": "kallm.model.retrofit",
    "save": "kallm.saving.saved",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the program starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kallm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
