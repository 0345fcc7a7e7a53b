"""Surgery: put other modules in the place of a model's FFNs, by module name, in place.

Legend: N rows (tokens), D width of the residual stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN, build
from kallm.kan.layerspec import Spec
from kallm.kan.spec import FFNSpec
from kallm.model.guard import guard_save_
from kallm.model.places import InlineFFN, choose_ffns, find_ffns, linear_maps, map_sizes, put_ffn_

__all__ = ["Replacement", "Report", "RetrofitConfig", "find_ffns", "retrofit_"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RetrofitConfig(Spec):
    """Which FFNs are replaced, and by what."""

    ffn: FFNSpec = Field(description="the module that stands in")
    layers: str | tuple[int, ...] = Field(
        default="last:5", description="last:N, all, numbers (negative: from the end), or a regex that names contain"
    )


@dataclass(frozen=True)
class Replacement:
    """One FFN that was replaced: its name in the model, what stood there and what stands there now."""

    name: str
    before: nn.Module
    after: nn.Module


@dataclass(frozen=True, repr=False)
class Report:
    """What a retrofit did; ``str()`` is a table of parameters before and after.

    It keeps the pretrained FFNs for ``revert``; dropping it frees their memory.
    """

    model: nn.Module
    replacements: tuple[Replacement, ...]

    def revert(self) -> None:
        """Put the pretrained FFNs back, with the device, dtype and mode of what stands there now; again does nothing.

        Raises:
            WrongConfiguration: something else stands there now, or a pretrained FFN was never loaded; nothing changes.
        """
        standing = [r for r in self.replacements if not _stands(self.model, r)]
        for replacement in standing:
            self._check_revertible(replacement)
        for name, before, after in ((r.name, r.before, r.after) for r in standing):
            weight = _weight_at(self.model, name)
            before.to(weight.device).train(after.training)
            if next(linear_maps(before)).weight.dtype is not weight.dtype:
                before.to(weight.dtype)
            put_ffn_(self.model, name, before)
        guard_save_(self.model)

    def _check_revertible(self, replacement: Replacement) -> None:
        name, before, after = replacement.name, replacement.before, replacement.after
        if self.model.get_submodule(name) is not after:
            raise WrongConfiguration(f"{name} is not what this retrofit put there; revert first what came after it")
        if next(linear_maps(before)).weight.is_meta and not _weight_at(self.model, name).is_meta:
            raise WrongConfiguration(f"the pretrained {name} stayed on the meta device; load the pretrained model anew")

    @property
    def _counts(self) -> list[tuple[int, int]]:
        """Parameters before and after of every FFN, and their sums at the end."""
        counts = [(_count(r.before), _count(r.after)) for r in self.replacements]
        return [*counts, (sum(before for before, _ in counts), sum(after for _, after in counts))]

    @property
    def summary(self) -> str:
        """One line: how many FFNs, and their parameters before and after."""
        if not self.replacements:
            return "the pretrained FFNs stay"
        before, after = self._counts[-1]
        return f"{len(self.replacements)} FFNs of {before:,} parameters replaced by {after:,}"

    def __repr__(self) -> str:
        return f"<Report: {self.summary}>"

    def __str__(self) -> str:
        if not self.replacements:
            return self.summary
        names = [(r.name, type(r.before).__name__, type(r.after).__name__) for r in self.replacements]
        rows = [("FFN", "before", "parameters", "after", "parameters")]
        for (name, was, now), (before, after) in zip([*names, ("all", "", "")], self._counts, strict=True):
            rows.append((name, was, f"{before:,}", now, f"{after:,}"))
        a, b, c, d, e = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{v:{a}}  {w:{b}}  {x:>{c}}  {y:{d}}  {z:>{e}}" for v, w, x, y, z in rows)


def retrofit_(
    model: nn.Module,
    config: RetrofitConfig,
    *,
    generator: torch.Generator | None = None,
    inputs: Sequence[Float[Tensor, "N D"]] | None = None,
) -> Report:
    """Replace FFNs in place by fresh modules of the same dtype, device and mode, whose parameters all train.

    On the meta device nothing is drawn. Afterwards ``save_pretrained`` of the model warns that it loses the retrofit.

    Args:
        model: a Hugging Face causal LM, its base model, or a tail.
        config: which FFNs, and what stands in; ``pretrained`` changes nothing.
        generator: draws the fresh weights, on the CPU; without one, they are drawn from seed 0.
        inputs: what each replaced FFN reads on real text, to calibrate its successor on: N rows each, first block
            to last.

    Raises:
        WrongConfiguration: nothing matches, or what matches cannot be replaced; the model is then unchanged.
    """
    chosen = choose_ffns(find_ffns(model), config.layers)
    if config.ffn.ffn == "pretrained":
        return Report(model, ())
    replacements = [Replacement(name, ffn, _stand_in(name, ffn, config.ffn)) for name, ffn in chosen.items()]
    _draw(replacements, generator or torch.Generator().manual_seed(0), inputs)
    for replacement in replacements:
        put_ffn_(model, replacement.name, replacement.after)
    guard_save_(model)
    return Report(model, tuple(replacements))


def _stand_in(name: str, before: nn.Module, spec: FFNSpec) -> FFN:
    """Build an FFN with the width, hidden size, dtype, device and mode of another."""
    if isinstance(before, FFN):
        raise WrongConfiguration(f"{name} is replaced already; call revert() of that retrofit's report first")
    modules = list(before.modules())
    if any(hasattr(module, "base_layer") for module in modules):
        raise WrongConfiguration(f"{name} carries adapters, which would be lost; retrofit first, then add adapters")
    maps = list(linear_maps(before))
    sizes = [map_sizes(each) for each in maps]
    hidden = [inputs for inputs, outputs in sizes if outputs == sizes[0][0]]
    if not hidden:
        raise WrongConfiguration(
            f"{name} is a {type(before).__name__} whose linear maps do not lead from its inputs back to as many "
            f"outputs (inputs and outputs: {sizes}); such an FFN cannot be replaced"
        )
    weight = maps[0].weight
    if weight.dtype not in _DTYPES:
        raise WrongConfiguration(f"{name} is quantised to {weight.dtype}; load the model in bfloat16 or float32")
    if weight.is_meta and any(hasattr(module, "_hf_hook") for module in modules):
        raise WrongConfiguration(f"{name} is offloaded; load the model without a device map, and offload it afterwards")
    after = build(spec, width=sizes[0][0], pretrained_hidden=hidden[-1], device=weight.device, dtype=weight.dtype)
    return after.train(before.training)


def _draw(
    replacements: Sequence[Replacement], generator: torch.Generator, inputs: Sequence[Float[Tensor, "N D"]] | None
) -> None:
    widths = [map_sizes(next(linear_maps(r.before)))[0] for r in replacements]
    if inputs is not None and [rows.shape[-1] for rows in inputs] != widths:
        raise WrongConfiguration(
            f"inputs must be one tensor for each of the {len(widths)} FFNs, of widths {widths}, but their shapes are "
            f"{[tuple(rows.shape) for rows in inputs]}"
        )
    if next(linear_maps(replacements[0].before)).weight.is_meta:
        if inputs is not None:
            raise WrongConfiguration("inputs calibrate nothing on the meta device; leave them out")
        return
    for index, replacement in enumerate(replacements):
        rows = None if inputs is None else inputs[index]
        replacement.after.reset_parameters(generator=generator, inputs=rows)  # type: ignore[operator]


def _stands(model: nn.Module, replacement: Replacement) -> bool:
    """Whether the pretrained FFN is in its place."""
    before = replacement.before
    return model.get_submodule(replacement.name) is (before[0] if isinstance(before, InlineFFN) else before)


def _weight_at(model: nn.Module, name: str) -> Tensor:
    """Return a weight of the FFN's, or where it has none, of a linear map beside it."""
    own = next(model.get_submodule(name).parameters(), None)
    return own if own is not None else next(linear_maps(model.get_submodule(name.rpartition(".")[0]))).weight


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
