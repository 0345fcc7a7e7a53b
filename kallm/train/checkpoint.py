"""What is saved of a cell in training, and how it comes back: tail, optimiser, random state, position, history."""

import json
import tempfile
from dataclasses import dataclass
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

__all__ = ["Snapshot", "load_checkpoint", "load_weights", "save_checkpoint", "save_weights", "take_snapshot"]

_WEIGHTS, _STATE, _PROGRESS = "weights.safetensors", "state.safetensors", "progress.json"


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


@dataclass(frozen=True)
class Snapshot:
    """All that training needs to go on as if it had never stopped, copied to this machine's memory."""

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    progress: dict[str, Any]


def take_snapshot(tail: Tail, optimizer: torch.optim.AdamW, progress: Progress) -> Snapshot:
    """Copy a cell in training as it stands; the copy shares no memory with what trains on."""
    state: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for name, values in zip(_trainable(tail), optimizer.state_dict()["state"].values(), strict=True):
        state |= {f"{key}.{name}": _copied(value) for key, value in values.items()}
    weights = {name: _copied(value) for name, value in _kept(tail).items()}
    return Snapshot(weights, state, vars(progress) | {"history": list(progress.history)})


def save_checkpoint(store: Store, prefix: str, snapshot: Snapshot) -> Manifest:
    """Commit a snapshot; any thread may do it."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: Path(temporary) / name for name in (_WEIGHTS, _STATE, _PROGRESS)}
        save_file(snapshot.weights, paths[_WEIGHTS])
        save_file(snapshot.state, paths[_STATE])
        paths[_PROGRESS].write_text(json.dumps(snapshot.progress, sort_keys=True))
        return commit(store, prefix, paths, {})


def load_checkpoint(store: Store, manifest: Manifest, tail: Tail, optimizer: torch.optim.AdamW) -> Progress:
    """Restore tail, optimiser and random state in place; return the progress.

    Raises:
        DataMismatch: the bytes are damaged, or belong to another tail.
    """
    with tempfile.TemporaryDirectory() as temporary:
        paths = fetch(store, manifest, Path(temporary))
        if paths.keys() != {_WEIGHTS, _STATE, _PROGRESS}:
            raise DataMismatch(f"{manifest.prefix} is no checkpoint: it holds {', '.join(sorted(paths))}")
        _put_weights(tail, load_file(paths[_WEIGHTS]), manifest.prefix)
        state = load_file(paths[_STATE])
        progress = json.loads(paths[_PROGRESS].read_text())
    torch.set_rng_state(state.pop("rng"))
    keys = sorted({name.partition(".")[0] for name in state})
    restored = optimizer.state_dict()
    restored["state"] = {
        index: {key: state[f"{key}.{name}"] for key in keys} for index, name in enumerate(_trainable(tail))
    }
    optimizer.load_state_dict(restored)
    return Progress(**progress | {"history": [(int(step), float(loss)) for step, loss in progress["history"]]})


def _trainable(tail: Tail) -> list[str]:
    return [tail.whole_name(name) for name, value in tail.named_parameters() if value.requires_grad]


def _kept(tail: Tail) -> dict[str, Tensor]:
    """Return what differs between cells: trained parameters, and the buffers that a state dict keeps."""
    kept = tail.state_dict()
    found: dict[str, Tensor] = {name: value for name, value in tail.named_buffers() if name in kept}
    found |= {name: value for name, value in tail.named_parameters() if value.requires_grad}
    return {tail.whole_name(name): value.detach() for name, value in found.items()}


def _weights(tail: Tail) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in _kept(tail).items()}


def _copied(value: Tensor) -> Tensor:
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format)


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
    for name, value in loaded.items():
        own[name].copy_(value)
