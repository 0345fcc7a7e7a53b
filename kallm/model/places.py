"""Where a model's FFNs are: found and chosen by module name, measured, and put."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN

__all__ = ["InlineFFN", "choose_ffns", "find_ffns", "linear_maps", "map_sizes", "put_ffn_"]

_FFN_NAMES = ("mlp", "feed_forward", "ffn")
_INLINE_NAMES = ("fc1", "activation_fn", "fc2")


class InlineFFN(nn.Sequential):
    """The FFN of a block that holds its parts itself, as OPT's does: fc1, activation_fn, fc2.

    It is a view: the block calls the parts and never this module, so its hooks are set on the parts.
    """

    def register_forward_pre_hook(self, hook: Any, **settings: Any) -> RemovableHandle:
        """Call the hook with what the FFN reads."""
        return self[0].register_forward_pre_hook(hook, **settings)

    def register_forward_hook(self, hook: Any, **settings: Any) -> RemovableHandle:
        """Call the hook with what the last part reads and what the FFN gives."""
        return self[-1].register_forward_hook(hook, **settings)


def find_ffns(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's FFNs by name, first block to last; where the blocks hold the parts, as ``InlineFFN``.

    Raises:
        WrongConfiguration: no block has an FFN that is known by its name, or more than one list of blocks has.
    """
    lists = {name: list(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, dict[str, nn.Module]] = {}
    for blocks_name, blocks in lists.items():
        for index, block in enumerate(blocks):
            for name, ffn in _ffn_of(block):
                found.setdefault(blocks_name, {})[f"{blocks_name}.{index}.{name}"] = ffn
    if not found:
        names = [name for name, _ in model.named_modules() if name]
        raise WrongConfiguration(
            f"no block of {type(model).__name__} has a module named {', '.join(_FFN_NAMES)}, "
            f"or {', '.join(_INLINE_NAMES)} side by side; its modules are {', '.join(names[:20])}"
        )
    if len(found) > 1:
        raise WrongConfiguration(f"{type(model).__name__} has FFNs in {' and in '.join(found)}; give one part of it")
    return next(iter(found.values()))


def choose_ffns(ffns: dict[str, nn.Module], layers: str | tuple[int, ...]) -> dict[str, nn.Module]:
    """Return the FFNs that are meant, first block to last: last:N, all, numbers, or a regex that names contain.

    Raises:
        WrongConfiguration: none is meant; the message names those that there are.
    """
    names = list(ffns)
    known = f"the FFNs are {', '.join(names)}"
    if layers == "all":
        return ffns
    if isinstance(layers, tuple):
        wrong = [number for number in layers if not -len(names) <= number < len(names)]
        if wrong or not layers:
            what = f"there is no block {wrong[0]}; the model has {len(names)}" if wrong else "no block is named"
            raise WrongConfiguration(f"layers: {what}: {known}")
        numbers = {number % len(names) for number in layers}
        return {name: ffns[name] for number, name in enumerate(names) if number in numbers}
    if match := re.fullmatch(r"last:(\d+)", layers):
        count = int(match[1])
        if not 0 < count <= len(names):
            raise WrongConfiguration(f"layers: last:{count} does not fit a model of {len(names)} blocks: {known}")
        return {name: ffns[name] for name in names[-count:]}
    if re.fullmatch(r"[-\d, ]*", layers):
        raise WrongConfiguration(
            f"layers: '{layers}' is text; give last:N, all, a tuple of numbers, or a regex: {known}"
        )
    try:
        chosen = {name: ffn for name, ffn in ffns.items() if re.search(layers, name)}
    except re.error as error:
        raise WrongConfiguration(f"layers: '{layers}' is neither last:N, all nor a regex: {error}") from error
    if not chosen:
        raise WrongConfiguration(f"layers: '{layers}' matches none of the FFNs {', '.join(names)}")
    return chosen


def put_ffn_(model: nn.Module, name: str, ffn: nn.Module) -> None:
    """Put a module in the place of the FFN of that name; where the block holds the parts, it takes the first's place.

    The other parts give way to ``nn.Identity``; an ``InlineFFN`` puts all its parts back.
    """
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if child != _INLINE_NAMES[0]:
        setattr(parent, child, ffn)
        return
    parts = ffn if isinstance(ffn, InlineFFN) else (ffn, nn.Identity(), nn.Identity())
    for part_name, part in zip(_INLINE_NAMES, parts, strict=True):
        setattr(parent, part_name, part)


def linear_maps(module: nn.Module) -> Iterator[Any]:
    """Yield the linear maps in a module: ``nn.Linear``, and GPT-2's ``Conv1D`` with a transposed weight."""
    return (part for part in module.modules() if isinstance(part, nn.Linear | Conv1D))


def map_sizes(linear: Any) -> tuple[int, int]:
    """Return a linear map's inputs and outputs."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def _ffn_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the name and module of a block's FFN, or nothing."""
    children = dict(block.named_children())
    for name in _FFN_NAMES:
        if name in children:
            return [(name, children[name])]
    parts = [children[name] for name in _INLINE_NAMES if name in children]
    if len(parts) < len(_INLINE_NAMES):
        return []
    return [(_INLINE_NAMES[0], parts[0] if isinstance(parts[0], FFN) else InlineFFN(*parts))]
