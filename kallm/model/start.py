"""How a tail begins: fresh FFNs calibrated on real inputs, and which parameters train."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kallm.kan.spec import FFNSpec
from kallm.model.retrofit import Report, RetrofitConfig, find_ffns, retrofit_
from kallm.model.trunk import Tail

__all__ = ["freeze", "record_ffn_inputs", "start_tail"]


def record_ffn_inputs(
    tail: Tail, batch: Sequence[tuple[Float[Tensor, "T D"], Int[Tensor, " T"]]]
) -> list[Float[Tensor, "N D"]]:
    """Return what the tail's FFNs read on real text, one tensor per block.

    Args:
        tail: with its pretrained FFNs.
        batch: (residual stream before the tail, positions) of some rows; N is their tokens together.
    """
    found: list[list[Tensor]] = [[] for _ in tail.blocks]
    hooks = [
        ffn.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0].detach().flatten(0, -2)))
        for ffn, kept in zip(find_ffns(tail).values(), found, strict=True)
    ]
    device = tail.head.weight.device
    with torch.no_grad():
        for hidden, position_ids in batch:
            tail(hidden[None].to(device), position_ids[None].to(device))
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept).cpu() for kept in found]


def start_tail(tail: Tail, spec: FFNSpec, inputs: Sequence[Float[Tensor, "N D"]], *, seed: int) -> Report:
    """Replace a tail's FFNs by fresh ones, drawn by the seed and calibrated on what the pretrained ones read."""
    generator = torch.Generator().manual_seed(seed)
    return retrofit_(tail, RetrofitConfig(ffn=spec, layers="all"), generator=generator, inputs=inputs)


def freeze(tail: Tail, trainable: str) -> None:
    """Let train what the study says: ``ffn``, ``tail`` or ``tail+head``."""
    tail.requires_grad_(False)
    if trainable == "ffn":
        for ffn in find_ffns(tail).values():
            ffn.requires_grad_(True)
    else:
        tail.body.requires_grad_(True)
        tail.head.requires_grad_(trainable == "tail+head")
