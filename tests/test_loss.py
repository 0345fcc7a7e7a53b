"""The chunked loss against the full logits in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kallm.data.packing import IGNORED
from kallm.train.loss import CHUNK, _ChunkedLoss, summed_cross_entropy


def example(num: int, width: int = 24, vocabulary: int = 301) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, width, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (num,), generator=generator)
    targets[::5] = IGNORED
    return hidden, head, targets


def full_logits(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return loss and gradients by the full logits in float64."""
    wide = [value.detach().double().requires_grad_() for value in (hidden, head)]
    loss = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=IGNORED, reduction="sum")
    loss.backward()
    return loss, [value.grad for value in wide]


def test_loss_and_gradients_equal_full_logits_in_float64() -> None:
    hidden, head, targets = example(2 * CHUNK + 17)
    loss = summed_cross_entropy(hidden, head, targets)
    loss.backward()
    expected, gradients = full_logits(hidden, head, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip((hidden.grad, head.grad), gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_under_autocast_only_the_products_are_rounded(chunk: int) -> None:
    hidden, head, targets = example(193)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_cross_entropy(hidden, head, targets, chunk=chunk)
    (3 * loss).backward()
    assert loss.dtype is hidden.grad.dtype is head.grad.dtype is torch.float32
    expected, gradients = full_logits(hidden.bfloat16(), head.bfloat16(), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)
    for ours, theirs in zip((hidden.grad, head.grad), gradients, strict=True):
        assert (ours / 3 - theirs).norm() < 0.01 * theirs.norm()


def test_the_low_precision_path_is_exact_where_nothing_is_rounded() -> None:
    hidden, head, targets = example(193)
    for value in (hidden, head):
        value.data = value.data.double()
    keep = targets != IGNORED
    loss = _ChunkedLoss.apply(hidden[keep], head, targets[keep], torch.float64, 50)
    loss.backward()
    expected, gradients = full_logits(hidden, head, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip((hidden.grad, head.grad), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_positions_without_a_target_get_no_gradient(low: bool) -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    targets = torch.tensor([1, IGNORED, 2, IGNORED, 3, IGNORED])
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = summed_cross_entropy(hidden, torch.randn(9, 8), targets)
    loss.backward()
    assert torch.equal(hidden.grad[1::2], torch.zeros(3, 8))


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return made


@pytest.mark.parametrize("low", [False, True])
def test_the_logits_of_more_than_one_chunk_never_exist(low: bool) -> None:
    hidden, head, targets = example(500, width=4, vocabulary=600)
    with torch.autocast("cpu", torch.bfloat16, enabled=low), LargestTensor() as sizes:
        summed_cross_entropy(hidden, head, targets, chunk=32).backward()
    assert sizes.largest <= 32 * 600


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, targets = example(20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_cross_entropy(hidden, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()
