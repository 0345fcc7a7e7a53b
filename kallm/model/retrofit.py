"""Surgery: put other modules in the place of a model's FFNs, by module name, in place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import build
from kallm.kan.spec import FFNSpec
from kallm.model.trunk import blocks_name

__all__ = ["Replacement", "Report", "RetrofitConfig", "find_ffns", "retrofit_"]

_FFN_NAMES = ("mlp", "feed_forward", "ffn")


class RetrofitConfig(BaseModel):
    """Which FFNs are replaced, and by what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ffn: FFNSpec = Field(description="the module that stands in")
    layers: str | tuple[int, ...] = Field("last:5", description="last:N, all, block numbers, or a regex on names")


@dataclass(frozen=True)
class Replacement:
    """One FFN that was replaced: its name in the model, what stood there and what stands there now."""

    name: str
    before: nn.Module
    after: nn.Module


@dataclass(frozen=True)
class Report:
    """What a retrofit did; ``str()`` is a table of parameters before and after."""

    model: nn.Module
    replacements: tuple[Replacement, ...]

    def revert(self) -> None:
        """Put the pretrained FFNs back."""
        for replacement in self.replacements:
            _put(self.model, replacement.name, replacement.before)

    @property
    def _counts(self) -> list[tuple[str, int, int]]:
        return [(r.name, _count(r.before), _count(r.after)) for r in self.replacements]

    @property
    def _total(self) -> tuple[str, int, int]:
        return "all", sum(before for _, before, _ in self._counts), sum(after for _, _, after in self._counts)

    @property
    def summary(self) -> str:
        """One line: how many FFNs, and their parameters before and after."""
        if not self.replacements:
            return "the pretrained FFNs stay"
        _, before, after = self._total
        return f"{len(self.replacements)} FFNs of {before:,} parameters replaced by {after:,}"

    def __str__(self) -> str:
        lines = [f"{name:40s} {old:12,d} {new:12,d}" for name, old, new in (*self._counts, self._total)]
        return "\n".join([f"{'FFN':40s} {'before':>12s} {'after':>12s}", *lines])


def find_ffns(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's FFNs by name, first block to last.

    Raises:
        WrongConfiguration: no block has a module named ``mlp``, ``feed_forward`` or ``ffn``.
    """
    for holder_name, holder in model.named_modules():
        if any(isinstance(child, nn.ModuleList) for child in holder.children()):
            prefix = f"{holder_name}." if holder_name else ""
            blocks = blocks_name(holder)
            found = {
                f"{prefix}{blocks}.{index}.{name}": getattr(block, name)
                for index, block in enumerate(getattr(holder, blocks))
                for name in _FFN_NAMES
                if isinstance(getattr(block, name, None), nn.Module)
            }
            if found:
                return found
    names = [name for name, _ in model.named_modules() if name]
    raise WrongConfiguration(
        f"no block of {type(model).__name__} has a module named {', '.join(_FFN_NAMES)}; its modules are {names[:20]}"
    )


def retrofit_(
    model: nn.Module,
    config: RetrofitConfig,
    *,
    generator: torch.Generator | None = None,
    inputs: Sequence[Float[Tensor, "N D"]] | None = None,
) -> Report:
    """Replace FFNs in place by fresh modules of the same dtype and device.

    Args:
        model: a Hugging Face causal LM, its base model, or a tail.
        config: which FFNs, and what stands in; ``pretrained`` changes nothing.
        generator: draws the fresh weights; without one, they are drawn from seed 0.
        inputs: what each replaced FFN reads on real text, to calibrate its successor on; N rows each.

    Raises:
        WrongConfiguration: nothing matches; the model is then unchanged.
    """
    chosen = _choose(find_ffns(model), config.layers)
    if config.ffn.ffn == "pretrained":
        return Report(model, ())
    drawn = generator or torch.Generator().manual_seed(0)
    replacements = []
    for index, (name, before) in enumerate(chosen.items()):
        after = _stand_in(before, config.ffn)
        after.reset_parameters(generator=drawn, inputs=inputs[index] if inputs else None)  # type: ignore[operator]
        replacements.append(Replacement(name, before, after))
    for replacement in replacements:
        _put(model, replacement.name, replacement.after)
    return Report(model, tuple(replacements))


def _choose(ffns: dict[str, nn.Module], layers: str | tuple[int, ...]) -> dict[str, nn.Module]:
    names = list(ffns)
    if layers == "all":
        return ffns
    if isinstance(layers, tuple):
        wrong = [index for index in layers if not -len(names) <= index < len(names)]
        if wrong:
            raise WrongConfiguration(f"layers: there is no block {wrong[0]}; the model has {len(names)}")
        return {names[index]: ffns[names[index]] for index in layers}
    if match := re.fullmatch(r"last:(\d+)", layers):
        count = int(match[1])
        if not 0 < count <= len(names):
            raise WrongConfiguration(f"layers: last:{count} does not fit a model of {len(names)} blocks")
        return {name: ffns[name] for name in names[-count:]}
    try:
        chosen = {name: ffn for name, ffn in ffns.items() if re.search(layers, name)}
    except re.error as error:
        raise WrongConfiguration(f"layers: '{layers}' is neither last:N, all nor a regex: {error}") from error
    if not chosen:
        raise WrongConfiguration(f"layers: '{layers}' matches none of the FFNs {', '.join(names)}")
    return chosen


def _stand_in(before: nn.Module, spec: FFNSpec) -> nn.Module:
    """Build a fresh FFN with the width, hidden size, dtype and device of another."""
    linears = [module for module in before.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise WrongConfiguration(f"{type(before).__name__} has no nn.Linear to take its sizes from")
    weight = linears[0].weight
    width, hidden = linears[-1].out_features, linears[-1].in_features
    return build(spec, width=width, pretrained_hidden=hidden, device=weight.device, dtype=weight.dtype)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
