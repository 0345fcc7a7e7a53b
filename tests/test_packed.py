"""Attention within packed documents against the mask that keeps them apart."""

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, make_architecture
from torch import Tensor

from kallm.model import packed
from kallm.model.packed import masked
from kallm.model.passage import apart

LENGTHS = [[14], [5, 9], [1, 6, 1, 6]]
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
WINDOWED = {"gemma2"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The documents' lengths of every attention that was taken over."""
    found: list[list[list[int]]] = []
    attend = packed._attend

    def told(heads: Any, lengths: list[list[int]], settings: dict[str, Any]) -> Tensor:
        found.append(lengths)
        return attend(heads, lengths, settings)

    monkeypatch.setattr(packed, "_attend", told)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_document_alone_gives_what_the_mask_gives_with_equal_gradients(
    name: str, calls: list[list[list[int]]]
) -> None:
    model = make_architecture(name, num_blocks=2).double().eval()
    ids = torch.randint(0, VOCABULARY, POSITIONS.shape, generator=torch.Generator().manual_seed(0))

    def outcome(mask: Tensor | None) -> list[Tensor]:
        model.zero_grad()
        logits = model(ids, position_ids=POSITIONS, attention_mask=mask, use_cache=False).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with masked(model.config, POSITIONS, always=name == "opt") as mask:
        found = outcome(mask)
    assert calls == ([] if name in WINDOWED else [LENGTHS] * 2)
    expected = outcome(None if name in WINDOWED else apart(POSITIONS)[:, None])
    assert len(calls) == (0 if name in WINDOWED else 2), "it is over outside of the block"
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def test_another_mask_and_a_single_document_are_left_to_the_model(calls: list[list[list[int]]]) -> None:
    model = make_architecture("llama", num_blocks=2)
    ids, own = torch.arange(14)[None], apart(POSITIONS[:1])
    with masked(model.config, POSITIONS[:1]) as mask:
        assert mask is None
    with masked(model.config, POSITIONS[1:2], own) as mask:
        assert torch.equal(mask[:, 0], own)
        model(ids, position_ids=POSITIONS[:1], attention_mask=mask, use_cache=False)
    with masked(model.config, POSITIONS[1:2]) as mask:
        model(ids, position_ids=POSITIONS[:1], attention_mask=mask.clone(), use_cache=False)
    assert not calls
