"""The chunked loss against the full logits in float64."""

import torch
from torch.nn import functional as F

from kallm.data.packing import IGNORED
from kallm.train.loss import CHUNK, summed_cross_entropy


def test_loss_and_gradients_equal_full_logits_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * CHUNK + 17, 24, generator=generator, requires_grad=True)
    head = torch.randn(301, 24, generator=generator, requires_grad=True)
    targets = torch.randint(0, 301, (len(hidden),), generator=generator)
    targets[::5] = IGNORED
    loss = summed_cross_entropy(hidden, head, targets)
    loss.backward()
    wide = [value.detach().double().requires_grad_() for value in (hidden, head)]
    reference = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=IGNORED, reduction="sum")
    reference.backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    for ours, theirs in zip((hidden, head), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_positions_without_a_target_get_no_gradient() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    targets = torch.tensor([1, IGNORED, 2, IGNORED, 3, IGNORED])
    summed_cross_entropy(hidden, torch.randn(9, 8), targets).backward()
    assert torch.equal(hidden.grad[1::2], torch.zeros(3, 8))
