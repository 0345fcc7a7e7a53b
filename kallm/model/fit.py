"""``start: fitted``: fresh FFNs fitted in closed form, block after block over the tail.

The fit corrects errors: a block's FFN is fitted on what the *student's* residual stream holds there, and aims at what
is missing to the *teacher's* residual stream behind that block. Legend: T tokens of a row, N tokens of all rows that
count, D width of the residual stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN
from kallm.kan.spec import FFNSpec
from kallm.model.ffnfit import CHUNK, Problem, fit_ffn_
from kallm.model.places import put_ffn_
from kallm.model.retrofit import Replacement, Report, RetrofitConfig, retrofit_
from kallm.model.trunk import Tail

__all__ = ["CalibrationRow", "fit_tail_"]


class CalibrationRow(NamedTuple):
    """One row of text: the residual stream before the tail [T, D], positions [T], and which tokens count [T]."""

    hidden: Float[Tensor, "T D"]
    position_ids: Int[Tensor, " T"]
    counts: Bool[Tensor, " T"]


_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside the residual stream."""


@torch.no_grad()
def fit_tail_(
    tail: Tail,
    spec: FFNSpec,
    rows: Sequence[CalibrationRow],
    *,
    seed: int,
    stop: Callable[[], None] = lambda: None,
    after_block: Callable[[], None] = lambda: None,
) -> Report:
    """Replace a tail's FFNs by fresh ones, and fit them to the pretrained ones.

    Depends on the tail, the rows and the seed alone; computes in float32, its sums in float64.

    Args:
        tail: with its pretrained FFNs, the teacher.
        spec: what stands in; ``pretrained`` changes nothing.
        rows: calibration text.
        seed: draws the inner maps that take nothing over from the pretrained FFN.
        stop: polled before each block; may raise.
        after_block: called when a block is fitted.

    Raises:
        WrongConfiguration: no token counts.
    """
    if spec.ffn == "pretrained":
        return Report(tail, ())
    if not any(bool(row.counts.any()) for row in rows):
        raise WrongConfiguration("start: fitted needs calibration text, but none of its tokens has a target")
    tail.eval()
    with torch.autocast(tail.head.weight.device.type, enabled=False):
        calls, streams, aims = _run_teacher(tail, rows)
        generator = torch.Generator().manual_seed(seed)
        report = retrofit_(tail, RetrofitConfig(ffn=spec, layers=tail.layers), generator=generator)
        for block, replacement, call, aim in zip(tail.blocks, report.replacements, calls, aims, strict=True):
            stop()
            work = _Block(tail, block, replacement, call, [row.counts for row in rows])
            streams = work.fit_(streams, aim, generator)
            after_block()
    return report


@dataclass(frozen=True)
class _Block:
    """One block of the student while its FFN is fitted; ``calls`` are its other arguments, row by row."""

    tail: Tail
    block: nn.Module
    replacement: Replacement
    calls: list[_Call]
    counts: list[Bool[Tensor, " T"]]

    def fit_(self, streams: list[Tensor], aims: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Fit the block's FFN and return the student's residual stream behind it, row by row."""
        ffn = self.replacement.after
        assert isinstance(ffn, FFN)
        probe = _Silent()
        put_ffn_(self.tail, self.replacement.name, probe)
        residuals = [_through(self.block, *each) for each in zip(streams, self.calls, strict=True)]
        inputs, adds = probe.inputs, self._adds_plainly(streams[0], residuals[0], probe)
        put_ffn_(self.tail, self.replacement.name, ffn)
        x, before, after = (self._counted(each) for each in (inputs, residuals, aims))
        # behind a norm of its own, an FFN cannot aim at the stream: it follows the pretrained FFN on the same inputs
        y = after - before if adds else torch.cat([self.replacement.before(part) for part in torch.split(x, CHUNK)])
        # the next norm divides a token by its size: so does the fit, else a few huge tokens decide it
        weights = 1 / after.square().mean(dim=1).clamp_min(1e-12)
        problem = Problem(x.float(), y.float(), (weights / weights.mean()).float())
        fit_ffn_(ffn, self.replacement.before, problem, generator=generator)
        if adds:
            return [residual + ffn(read) for residual, read in zip(residuals, inputs, strict=True)]
        return [_through(self.block, *each) for each in zip(streams, self.calls, strict=True)]

    def _adds_plainly(self, stream: Tensor, residual: Tensor, probe: "_Silent") -> bool:
        """Tell whether the block adds what its FFN gives to the stream, unscaled and without a norm between."""
        probe.answer = torch.sin(torch.arange(residual.shape[-1], device=residual.device, dtype=residual.dtype))
        added = _through(self.block, stream, self.calls[0]) - residual
        probe.inputs.pop()
        return torch.allclose(added, probe.answer.expand_as(added), atol=1e-2)

    def _counted(self, parts: list[Tensor]) -> Float[Tensor, "N D"]:
        return torch.cat([part[counts.to(part.device)] for part, counts in zip(parts, self.counts, strict=True)])


class _Silent(nn.Module):
    """Keeps what an FFN reads, and answers zeros, or the same to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.answer: Tensor | None = None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return zeros, or the answer."""
        self.inputs.append(x.flatten(0, -2))
        return torch.zeros_like(x) if self.answer is None else self.answer.expand_as(x)


def _run_teacher(
    tail: Tail, rows: Sequence[CalibrationRow]
) -> tuple[list[list[_Call]], list[Tensor], list[list[Tensor]]]:
    """Return, block by block and row by row, a block's other arguments and the residual stream behind it.

    Between them: the residual stream before the first block that trains, row by row.
    """
    entering: list[Tensor] = []
    calls: list[list[_Call]] = [[] for _ in tail.blocks]
    streams: list[list[Tensor]] = [[] for _ in tail.blocks]
    hooks = [tail.blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0][0]))]
    for block, called, behind in zip(tail.blocks, calls, streams, strict=True):
        hooks.append(
            block.register_forward_pre_hook(lambda _, a, k, to=called: to.append((a[1:], dict(k))), with_kwargs=True)
        )
        hooks.append(block.register_forward_hook(lambda _, inputs, out, to=behind: to.append(_stream(out))))
    for row in rows:
        tail(_placed(tail, row.hidden)[None], row.position_ids[None].to(tail.head.weight.device))
    for hook in hooks:
        hook.remove()
    return calls, entering, streams


def _through(block: nn.Module, stream: Float[Tensor, "T D"], call: _Call) -> Float[Tensor, "T D"]:
    args, kwargs = call
    return _stream(block(stream[None], *args, **kwargs))


def _stream(out: Any) -> Float[Tensor, "T D"]:
    """Return the residual stream of one row from what a block gave: a tensor, or a tuple that it begins."""
    found: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
    return found


def _placed(tail: Tail, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    return hidden.to(tail.head.weight.device, tail.head.weight.dtype)
