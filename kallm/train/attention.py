"""Which attention a tail trains with: flash attention where a GPU has it, torch's own elsewhere.

transformers' flash attention keeps packed documents apart in one long row only, and in a batch of rows it lets them see
each other without a word. So it is used on flattened rows, and only after documents were seen to stay apart.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from kallm.data.packing import IGNORED, Row
from kallm.model.trunk import Tail

__all__ = ["measure_leak", "training_attention"]

_FLASH = "flash_attention_2"
_TOLERATED = 0.05


@contextlib.contextmanager
def training_attention(
    tail: Tail, row: Row, hidden: Float[Tensor, "T D"], *, low: bool, say: Callable[[str], None]
) -> Iterator[bool]:
    """Let a tail train with flash attention where that can be; evaluation, which has masks, gets torch's own back.

    Args:
        tail: on the device it trains on.
        row: of the corpus, to see that documents stay apart.
        hidden: the trunk's output for it.
        low: whether training runs in bfloat16; flash attention knows no fp32.
        say: is told what is used on a GPU, and why.

    Returns:
        Whether rows are to be flattened into one.
    """
    if tail.head.weight.device.type != "cuda" or not low:
        yield False
        return
    if not is_flash_attn_2_available():
        say("attention: torch's own; install flash-attn for flash attention")
        yield False
        return
    before = _set_attention(tail, _FLASH)
    try:
        leak = measure_leak(tail, row, hidden)
        flat = leak < _TOLERATED
        if flat:
            say("attention: flash attention on flattened rows")
        else:
            say(f"attention: torch's own; with flash attention documents change each other by {leak:.0%}")
            _restore(before)
        yield flat
    finally:
        _restore(before)


@torch.no_grad()
def measure_leak(tail: Tail, row: Row, hidden: Float[Tensor, "T D"]) -> float:
    """Return how far the last document of two flattened copies of a row is from itself alone, relative to its norm."""
    device, positions = tail.head.weight.device, row.passage.position_ids
    first = int(((positions == 0) & (row.targets != IGNORED)).nonzero()[-1])  # padding has no targets
    training = tail.training
    tail.eval()
    both = tail(hidden.repeat(2, 1)[None].to(device), positions.repeat(2)[None].to(device))[0]
    alone = tail(hidden[None, first:].to(device), positions[None, first:].to(device))[0]
    tail.train(training)
    return float((both[len(positions) + first :] - alone).float().norm() / alone.float().norm())


def _set_attention(tail: Tail, name: str) -> list[tuple[Any, str]]:
    """Set the attention of every config in a tail; return what each had. The trunk's configs are others."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in tail.modules() if hasattr(module, "config")
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation = name
    return before


def _restore(before: list[tuple[Any, str]]) -> None:
    for config, name in before:
        config._attn_implementation = name
