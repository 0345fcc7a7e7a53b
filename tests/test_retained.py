"""The divergence from the original model against the whole models' distributions in float64."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Count
from test_heldout import CONVERSATIONS, make_halves
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kallm.engine.subject import Subject
from kallm.errors import WrongConfiguration
from kallm.evaluate.suites import SUITES, Context, Evaluation
from kallm.model.trunk import Trunk, assembled, split

SUITE = SUITES["retained"]


def evaluate(trunk: Trunk, subject: Subject, folder: Path, *, max_tokens: int = 1024) -> Evaluation:
    context = Context(trunk, subject.tokenizer, f"tiny {subject.model.dtype}", folder, CONVERSATIONS)
    prepared, progress = SUITE.prepare(SUITE.settings(max_tokens=max_tokens), context), Count()
    evaluation = SUITE.evaluate(prepared, subject, progress, lambda: None)
    assert progress.done == prepared.num_items == len(evaluation.items)
    return evaluation


def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(ids).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [290, 1024])
def test_the_divergence_is_the_brute_force_sum_in_float64(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, max_tokens: int
) -> None:
    trunk, subject = make_halves(tokenizer, torch.float32)
    found = evaluate(trunk, subject, tmp_path, max_tokens=max_tokens)
    sums, counts = [], []
    for conversation, item in zip(CONVERSATIONS, found.items, strict=True):
        text = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]])
        log_p = log_probabilities(subject.model, ids)
        with assembled(subject.model, subject.tail) as whole:
            log_q = log_probabilities(whole, ids)
        sums.append(float((log_p.exp() * (log_p - log_q)).sum()))
        counts.append(ids.shape[1] - 1)
        assert (item["id"], item["tokens"]) == (conversation.id, counts[-1])
        assert item["kl"] == pytest.approx(sums[-1], rel=1e-4)
    mean = sum(sums) / sum(counts)
    assert mean > 0.01
    assert found.scores["kl"].value == pytest.approx(mean, rel=1e-4)
    assert found.scores["kl"].n == sum(counts)
    spread = np.sqrt(np.mean((np.array(sums) / counts - mean) ** 2))
    assert found.scores["kl_spread"].value == pytest.approx(spread, rel=1e-3)
    assert found.scores["kl_spread"].n == len(CONVERSATIONS)


@pytest.mark.parametrize("num_tail_blocks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untouched_model_is_at_zero_exactly(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, dtype: torch.dtype, num_tail_blocks: int
) -> None:
    model = make_halves(tokenizer, dtype)[1].model
    trunk, tail = split(model, num_tail_blocks)
    found = evaluate(trunk, Subject(model, tail, tokenizer), tmp_path)
    assert [item["kl"] for item in found.items] == [0.0] * len(CONVERSATIONS)
    assert found.scores["kl"].value == found.scores["kl_spread"].value == 0.0


def test_the_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trunk, subject = make_halves(tokenizer, torch.float32)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    first = evaluate(trunk, subject, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert evaluate(trunk, subject, tmp_path) == first


def test_dialogues_without_held_out_conversations_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trunk, _ = make_halves(tokenizer, torch.float32)
    with pytest.raises(WrongConfiguration, match="'retained' needs held-out conversations"):
        SUITE.prepare(SUITE.settings(), Context(trunk, tokenizer, "tiny", tmp_path, []))
