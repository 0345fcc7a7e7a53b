"""How a tail begins: fresh FFNs calibrated on real inputs, and which parameters train."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kallm.kan.spec import FFNSpec
from kallm.model.places import choose_ffns
from kallm.model.retrofit import Report, RetrofitConfig, find_ffns, retrofit_
from kallm.model.trunk import Tail

__all__ = ["freeze", "record_ffn_inputs", "start_tail"]


def record_ffn_inputs(
    tail: Tail, batch: Sequence[tuple[Float[Tensor, "T W"], Int[Tensor, " T"]]]
) -> list[Float[Tensor, "N D"]]:
    """Return what the tail's FFNs read on real text, one tensor per block.

    Args:
        tail: with its pretrained FFNs.
        batch: (what the trunk gave, positions) of some rows; N is their tokens together.
    """
    found: list[list[Tensor]] = [[] for _ in tail.blocks]
    hooks = [
        ffn.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0].detach().flatten(0, -2)))
        for ffn, kept in zip(_ffns_of(tail), found, strict=True)
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
    return retrofit_(tail, RetrofitConfig(ffn=spec, layers=tail.layers), generator=generator, inputs=inputs)


def freeze(tail: Tail, trainable: str) -> None:
    """Let train what the study says: ``ffn``, ``tail`` or ``tail+head``; a tied head is the embedding too."""
    tail.requires_grad_(False)
    if trainable == "ffn":
        for ffn in _ffns_of(tail):
            ffn.requires_grad_(True)
    else:
        for module in tail.trained:
            module.requires_grad_(True)
        tail.head.requires_grad_(trainable == "tail+head")


def _ffns_of(tail: Tail) -> Iterable[nn.Module]:
    """Return the FFNs of the blocks that train, first to last."""
    return choose_ffns(find_ffns(tail), tail.layers).values()
