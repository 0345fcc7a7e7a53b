"""Trunk and tail against the whole model."""

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, make_architecture
from conftest import make_model
from torch import Tensor
from transformers import PreTrainedModel

from kallm.errors import WrongConfiguration
from kallm.model.cache import HiddenCache
from kallm.model.packed import masked
from kallm.model.passage import Passage
from kallm.model.trunk import assembled, split

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ARCHITECTURES]
CASES += [("gemma2", {"final_logit_softcapping": None}), ("qwen2", SLIDING), ("gpt2", {"embd_pdrop": 0.1})]


def packed(lengths: list[int], vocabulary: int = VOCABULARY) -> Passage:
    ids = torch.randint(0, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return Passage(ids, torch.cat([torch.arange(length) for length in lengths]))


def whole_logits(model: PreTrainedModel, passage: Passage, *, masks: bool = False) -> Tensor:
    """Return the whole model's logits with the attention that trunk and tail have."""
    ids, positions = passage.input_ids[None], passage.position_ids[None]
    with masked(model.config, positions, always=masks) as mask:
        return model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize(("name", "changes"), CASES)
@pytest.mark.parametrize("num_tail_blocks", [2, 5])
def test_trunk_and_tail_equal_the_whole_model_bitwise(name: str, changes: dict[str, Any], num_tail_blocks: int) -> None:
    model = make_architecture(name, num_blocks=5, **changes)
    trunk, tail = split(model, num_tail_blocks)
    passage = packed([5, 9])
    with torch.no_grad():
        whole = whole_logits(model, passage, masks=tail.masks)
        parts = tail.head(tail.eval()(trunk(passage)[None], passage.position_ids[None]))
    assert torch.equal(whole, parts)
    assert (trunk.cut, tail.masks) == (5 - num_tail_blocks, name == "opt")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("num_tail_blocks", [2, 5])
def test_a_document_in_a_row_gives_what_it_gives_alone(name: str, num_tail_blocks: int) -> None:
    trunk, tail = split(make_architecture(name, num_blocks=5), num_tail_blocks)
    row, alone = packed([5, 9]), packed([9])
    alone = Passage(row.input_ids[5:], alone.position_ids)
    with torch.no_grad():
        together, single = (tail(trunk(each)[None], each.position_ids[None])[0] for each in (row, alone))
    torch.testing.assert_close(together[5:], single, rtol=0, atol=1e-6)


def test_the_real_model_splits_bitwise(real_model) -> None:
    trunk, tail = split(real_model, 5)
    passage = packed([20, 13], vocabulary=49152)
    with torch.no_grad():
        whole = whole_logits(real_model, passage)
        parts = tail.head(tail.eval()(trunk(passage)[None], passage.position_ids[None]))
    assert torch.equal(whole, parts)
    assert sum(parameter.numel() for parameter in tail.parameters()) == 46_012_608


def test_a_tail_put_into_the_whole_model_generates_what_the_whole_model_generates() -> None:
    model = make_model()
    _, tail = split(model, 2)
    prompt = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 2}
    expected = model.generate(prompt, **settings)
    before = dict(model.named_parameters())
    with assembled(model, tail) as whole:
        assert torch.equal(whole.generate(prompt, **settings), expected)
    assert {name: id(value) for name, value in model.named_parameters()} == {n: id(v) for n, v in before.items()}


def test_training_a_tail_moves_neither_trunk_nor_embedding() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trunk, tail = split(model, 2)
    passage = packed([8], vocabulary=259)
    optimizer = torch.optim.SGD(tail.parameters(), lr=0.1)
    tail.head(tail(trunk(passage)[None], passage.position_ids[None])).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(tail.head.weight, model.lm_head.weight)


def test_whole_names_are_the_names_in_the_whole_model() -> None:
    model = make_model(tie_word_embeddings=False)
    _, tail = split(model, 2)
    whole = dict(model.named_parameters())
    for name, value in tail.named_parameters():
        assert torch.equal(value, whole[tail.whole_name(name)])


def test_the_cache_gives_the_trunks_output_and_runs_it_once(tmp_path) -> None:
    trunk, _ = split(make_model(), 2)
    passages = [packed([5, 3], 259), packed([11], 259)]
    first = HiddenCache(trunk, passages, tmp_path, "m")
    values = [first[index] for index in range(2)]
    assert torch.equal(values[1], trunk(passages[1]))
    again = HiddenCache(trunk, passages, tmp_path, "m")
    assert again.num_missing() == 0
    assert all(torch.equal(again[index], values[index]) for index in range(2))
    assert HiddenCache(trunk, passages, tmp_path, "another model").num_missing() == 2


def test_a_tail_longer_than_the_model_is_refused() -> None:
    with pytest.raises(WrongConfiguration, match="a tail of 6 blocks is longer than the model, which has 5"):
        split(make_model(), 6)
