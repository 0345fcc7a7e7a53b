"""The delta of a retrofitted model: the replaced FFNs and all that was trained, to be put onto the same base again."""

import copy
import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN, build
from kallm.model.guard import guard_save_
from kallm.model.places import find_ffns, put_ffn_
from kallm.model.retrofit import Replacement, Report
from kallm.saving.delta import (
    NOTE,
    Base,
    Delta,
    Group,
    check_tensors,
    describe_tensor,
    file_sha256,
    let_read_,
    read_delta,
    read_tensors,
)
from kallm.saving.replaced import find_replaced, group_replaced
from kallm.store.local import naming_disk_errors, replacing
from kallm.store.sealed import seal

__all__ = ["load", "save"]


def save(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, also: Iterable[str] | Literal["trained"] = "trained"
) -> None:
    """Write what a retrofitted model has that its base has not: ``kallm.json`` and one safetensors file.

    The folder may hold an older delta: until the last moment that one stands, then the new one does.

    Args:
        model: a causal LM of transformers after ``retrofit_``.
        folder: is made where it is missing.
        also: which tensors go along besides the replaced FFNs and an untied head: every parameter that requires a
            gradient, or those named here (``()``: none). Freeze what does not train, or the delta is the whole model.

    Raises:
        WrongConfiguration: no FFN of the model is replaced, or there is no tensor of such a name.
        StorageUnavailable: the disk does not take it.
    """
    found = find_replaced(model)
    if not found:
        raise WrongConfiguration(
            "no FFN of this model is replaced: kallm.retrofit_ replaces them, save_pretrained saves"
        )
    own = _tensors(model)
    inside = [f"{each.name}.{key}" for each in found for key in each.module.state_dict()]
    head = _head_names(model) if _has_own_head(model) and model.config.tie_word_embeddings else []
    trained = sorted({*_chosen(model, also, own), *head} - {*inside})
    held = {name: own[name].cpu().contiguous() for name in (*inside, *trained)}
    digest, file = _write_weights(held, Path(folder))
    delta = Delta(
        kallm=importlib.metadata.version("kallm"),
        base=Base(
            architecture=type(model).__name__, name=_base_name(model), sha256=_fingerprint(own, leave_out={*held})
        ),
        ffns=tuple(Group.model_validate(group) for group in group_replaced(found)),
        trained=tuple(trained),
        untied=_has_own_head(model) and not {*_head_names(model)}.isdisjoint(held),
        weights=file,
        weights_sha256=digest,
    )
    _write_note(delta, Path(folder))


def load(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Report:
    """Put a saved delta onto its base model, in place; the model then computes the same bits as the saved one.

    Args:
        model: the base model in the dtype that it was saved in, its FFNs replaced or not.
        folder: what ``save`` wrote.

    Returns:
        What was replaced; ``revert()`` puts the pretrained FFNs back, but no trained tensor of the base.

    Raises:
        WrongConfiguration: the folder holds no delta, or one of another base model; the model is unchanged.
        DataMismatch: the delta is damaged, or a tensor of it is missing, left over, or of another shape or dtype; the
            model is unchanged.
    """
    place = Path(folder)
    delta = read_delta(place)
    own = _tensors(model)
    loaded = read_tensors(place / delta.weights, delta)
    fresh = _build(delta, model)
    inside = {f"{name}.{key}": tensor for name, ffn in fresh.items() for key, tensor in ffn.state_dict().items()}
    expected = inside | _expected_of_base(model, delta, own)
    check_tensors(loaded, expected, place / delta.weights)
    pretrained = find_ffns(model)
    displaced = {id(tensor) for name in fresh for tensor in _tensors(pretrained[name]).values()}
    gone = {name for name, tensor in own.items() if id(tensor) in displaced}
    found = _fingerprint(own, leave_out={*expected, *gone})
    if found != delta.base.sha256:
        raise WrongConfiguration(
            f"'{folder}' was saved from {delta.base.name or delta.base.architecture}, and this is another model, or "
            "the same in another dtype, or trained since: load that base model as it was"
        )
    return _put(model, delta, fresh, loaded)


def _chosen(model: PreTrainedModel, also: Iterable[str] | Literal["trained"], own: Mapping[str, Tensor]) -> list[str]:
    """Return the first names of the tensors that go along."""
    if also == "trained":
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if isinstance(also, str):
        raise WrongConfiguration(f"also: expected 'trained' or a list of tensors' names, but got '{also}'")
    return [_first_name(model, name, own) for name in also]


def _write_weights(held: dict[str, Tensor], folder: Path) -> tuple[str, str]:
    """Write the tensors to a file that has their hash in its name; return hash and name."""
    with naming_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            written = Path(temporary) / "weights"
            save_file(held, written)
            let_read_(written, folder)
            digest = file_sha256(written)
            file = f"weights-{digest[:12]}.safetensors"
            os.replace(written, folder / file)
    return digest, file


def _write_note(delta: Delta, folder: Path) -> None:
    """Let the new delta stand, and remove the older one's weights."""
    with naming_disk_errors(folder):
        with replacing(folder / NOTE) as note:
            note.write(seal(delta.model_dump(mode="json")))
        for older in folder.glob("weights-*.safetensors"):
            if older.name != delta.weights:
                older.unlink()


def _put(model: PreTrainedModel, delta: Delta, fresh: Mapping[str, FFN], loaded: Mapping[str, Tensor]) -> Report:
    """Change the model; nothing can go wrong any more."""
    if delta.untied and not _has_own_head(model):
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
        model.config.tie_word_embeddings = False
    pretrained = find_ffns(model)
    replacements = [Replacement(name, pretrained[name], ffn.train(model.training)) for name, ffn in fresh.items()]
    for name, ffn in fresh.items():
        put_ffn_(model, name, ffn)
    guard_save_(model)
    with torch.no_grad():
        own = _tensors(model)
        for name, tensor in loaded.items():
            own[name].copy_(tensor)
    return Report(model, tuple(replacements))


def _build(delta: Delta, model: PreTrainedModel) -> dict[str, FFN]:
    """Build the FFNs beside the model, each where the one that it replaces is."""
    if type(model).__name__ != delta.base.architecture:
        raise WrongConfiguration(
            f"the delta belongs to a {delta.base.architecture}, but this is a {type(model).__name__}"
        )
    fresh: dict[str, FFN] = {}
    pretrained = find_ffns(model)
    for group in delta.ffns:
        for name in group.names:
            if name not in pretrained:
                raise WrongConfiguration(f"the delta replaces {name}, but the FFNs are {', '.join(pretrained)}")
            before = next(pretrained[name].parameters(), next(model.parameters()))
            fresh[name] = build(
                group.spec, width=group.width, pretrained_hidden=1, device=before.device, dtype=before.dtype
            )
    return fresh


def _expected_of_base(model: PreTrainedModel, delta: Delta, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's tensors that the delta holds, as they are now."""
    known = dict(own)
    if delta.untied:
        known |= zip(_head_names(model), model.get_output_embeddings().state_dict().values(), strict=True)
    unknown = [name for name in delta.trained if name not in known]
    if unknown:
        raise WrongConfiguration(f"the delta holds {', '.join(unknown[:3])}, but this model has no such tensor")
    return {name: known[name] for name in delta.trained}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer once, a tied one under its first name."""
    kept = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in kept.values()):
        raise WrongConfiguration("the model has no weights: part of it is on the meta device; load it whole")
    found: dict[str, Tensor] = dict(model.named_parameters())
    return found | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _first_name(model: nn.Module, name: str, own: Mapping[str, Tensor]) -> str:
    if name in own:
        return name
    tensor = model.state_dict(keep_vars=True).get(name)
    for first, other in own.items():
        if other is tensor:
            return first
    raise WrongConfiguration(f"also: the model has no tensor '{name}': model.named_parameters() tells the names")


def _has_own_head(model: PreTrainedModel) -> bool:
    """Say whether the head is a tensor of its own, and not the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is not embedding.weight


def _head_names(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [f"{_module_name(model, head)}.{key}" for key in head.state_dict()]


def _module_name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _base_name(model: PreTrainedModel) -> str:
    """Return the name that the model was loaded by; of a path, which is this machine's own, only its end."""
    name = str(model.config.name_or_path or "")
    return Path(name).name if Path(name).is_absolute() else name


def _fingerprint(tensors: Mapping[str, Tensor], *, leave_out: set[str]) -> str:
    """Return a hash over name, dtype, shape and bytes of the tensors that are not left out."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - leave_out):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {describe_tensor(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
