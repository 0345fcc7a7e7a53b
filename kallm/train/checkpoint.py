"""What is saved of a cell in training, and how it comes back: tail, optimiser, random state, position, history."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kallm.errors import DataMismatch
from kallm.model.trunk import Tail
from kallm.store.commit import Manifest, commit, fetch
from kallm.store.store import Store
from kallm.train.loop import Progress

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint", "save_weights"]

_WEIGHTS, _STATE = "weights.safetensors", "state.safetensors"


def save_weights(store: Store, prefix: str, tail: Tail) -> Manifest:
    """Commit a tail's trained parameters, under the names they have in the whole model, and its buffers."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / _WEIGHTS
        save_file(_weights(tail), path)
        return commit(store, prefix, {_WEIGHTS: path}, {})


def load_weights(store: Store, manifest: Manifest, tail: Tail) -> None:
    """Put committed parameters into a tail, in place.

    Raises:
        DataMismatch: a tensor is missing, left over or of another shape, or the bytes are damaged.
    """
    with tempfile.TemporaryDirectory() as temporary:
        _put_weights(tail, load_file(fetch(store, manifest, Path(temporary))[_WEIGHTS]), manifest.prefix)


def save_checkpoint(
    store: Store, prefix: str, tail: Tail, optimizer: torch.optim.AdamW, progress: Progress
) -> Manifest:
    """Commit all that training needs to go on as if it had never stopped."""
    state: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for name, values in zip(_trainable(tail), optimizer.state_dict()["state"].values(), strict=True):
        state |= {f"{key}.{name}": value for key, value in values.items()}
    meta: dict[str, Any] = dict(vars(progress))
    with tempfile.TemporaryDirectory() as temporary:
        weights, rest = Path(temporary) / _WEIGHTS, Path(temporary) / _STATE
        save_file(_weights(tail), weights)
        save_file(state, rest)
        return commit(store, prefix, {_WEIGHTS: weights, _STATE: rest}, meta)


def load_checkpoint(store: Store, manifest: Manifest, tail: Tail, optimizer: torch.optim.AdamW) -> Progress:
    """Restore tail, optimiser and random state in place; return the progress.

    Raises:
        DataMismatch: the bytes are damaged, or belong to another tail.
    """
    with tempfile.TemporaryDirectory() as temporary:
        paths = fetch(store, manifest, Path(temporary))
        _put_weights(tail, load_file(paths[_WEIGHTS]), manifest.prefix)
        state = load_file(paths[_STATE])
    torch.set_rng_state(state.pop("rng"))
    keys = sorted({name.partition(".")[0] for name in state})
    restored = optimizer.state_dict()
    restored["state"] = {
        index: {key: state[f"{key}.{name}"] for key in keys} for index, name in enumerate(_trainable(tail))
    }
    optimizer.load_state_dict(restored)
    meta = manifest.meta
    return Progress(**{**meta, "history": [(int(step), float(loss)) for step, loss in meta["history"]]})


def _trainable(tail: Tail) -> list[str]:
    return [tail.whole_name(name) for name, value in tail.named_parameters() if value.requires_grad]


def _weights(tail: Tail) -> dict[str, Tensor]:
    """Return what differs between cells: trained parameters, and the buffers that a state dict keeps."""
    kept = tail.state_dict()
    found: dict[str, Tensor] = {name: value for name, value in tail.named_buffers() if name in kept}
    found |= {name: value for name, value in tail.named_parameters() if value.requires_grad}
    return {tail.whole_name(name): value.detach().cpu().contiguous() for name, value in found.items()}


def _put_weights(tail: Tail, loaded: dict[str, Tensor], place: str) -> None:
    expected = _weights(tail)
    if loaded.keys() != expected.keys():
        wrong = sorted(loaded.keys() ^ expected.keys())
        raise DataMismatch(f"{place} holds other tensors than this cell has: {', '.join(wrong[:3])}")
    own = {tail.whole_name(name): value for name, value in tail.state_dict().items()}
    for name, value in loaded.items():
        if own[name].shape != value.shape:
            raise DataMismatch(
                f"{place}: {name} was expected to be {list(own[name].shape)}, but is {list(value.shape)}"
            )
        own[name].copy_(value)
