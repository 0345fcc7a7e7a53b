"""Held-out cross-entropy against the loss that transformers computes for each conversation."""

import math
from pathlib import Path

import pytest
import torch
from conftest import Count
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kallm.data.dialogues import Conversation
from kallm.engine.subject import Subject
from kallm.errors import WrongConfiguration
from kallm.evaluate.suites import SUITES, Context, Evaluation
from kallm.model.trunk import Trunk, assembled, split

SUITE = SUITES["heldout"]
CONVERSATIONS = [
    Conversation("short", ({"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello, ça va?"})),
    Conversation("long", tuple({"role": "user", "content": f"Number {n} is not {n + 1}."} for n in range(60))),
]


def make_halves(tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> tuple[Trunk, Subject]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        dtype=dtype,
    )
    model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    trunk, tail = split(model, 1)
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return trunk, Subject(model, tail, tokenizer)


def evaluate(trunk: Trunk, subject: Subject, folder: Path, *, max_tokens: int = 1024) -> Evaluation:
    context = Context(trunk, subject.tokenizer, f"tiny {subject.model.dtype}", folder, CONVERSATIONS)
    prepared = SUITE.prepare(SUITE.settings(max_tokens=max_tokens), context)
    progress = Count()
    evaluation = SUITE.evaluate(prepared, subject, progress, lambda: None)
    assert progress.done == prepared.num_items == len(evaluation.items)
    return evaluation


@pytest.mark.parametrize("max_tokens", [300, 1024])
def test_cross_entropy_equals_transformers_loss(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, max_tokens: int
) -> None:
    trunk, subject = make_halves(tokenizer, torch.float32)
    found = evaluate(trunk, subject, tmp_path, max_tokens=max_tokens)
    total, count, num_bytes = 0.0, 0, 0
    for conversation, item in zip(CONVERSATIONS, found.items, strict=True):
        text = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]])
        with assembled(subject.model, subject.tail) as model, torch.no_grad():
            loss = float(model(ids, labels=ids).loss)
        assert item["id"] == conversation.id
        assert item["tokens"] == ids.shape[1] - 1
        assert item["nll"] / item["tokens"] == pytest.approx(loss, abs=1e-4)
        if ids.shape[1] < max_tokens:
            assert item["bytes"] == len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode())
        total, count, num_bytes = total + loss * item["tokens"], count + item["tokens"], num_bytes + item["bytes"]
    assert found.scores["cross_entropy"].value == pytest.approx(total / count, abs=1e-4)
    assert found.scores["cross_entropy"].n == count
    assert found.scores["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found.scores["bits_per_byte"].value == pytest.approx(total / math.log(2) / num_bytes, rel=1e-4)
    assert found.tasks == {}


def test_tail_in_fp32_behind_a_narrow_trunk_is_scored_under_autocast(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trunk, subject = make_halves(tokenizer, torch.bfloat16)
    narrow = evaluate(trunk, subject, tmp_path)
    subject.tail.float()
    wide = evaluate(trunk, subject, tmp_path)
    assert wide.scores["cross_entropy"].value == pytest.approx(narrow.scores["cross_entropy"].value, rel=0.01)


def test_tokenizer_without_a_chat_template_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trunk, subject = make_halves(tokenizer, torch.float32)
    template = tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        for name in ("heldout", "bbh-chat"):
            context = Context(trunk, subject.tokenizer, "tiny", tmp_path, CONVERSATIONS)
            with pytest.raises(WrongConfiguration, match=f"'{name}' needs a tokenizer with a chat template"):
                SUITES[name].prepare(SUITES[name].settings(), context)
    finally:
        tokenizer.chat_template = template


def test_dialogues_without_held_out_conversations_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trunk, subject = make_halves(tokenizer, torch.float32)
    with pytest.raises(WrongConfiguration, match="needs held-out conversations"):
        SUITE.prepare(SUITE.settings(), Context(trunk, subject.tokenizer, "tiny", tmp_path, []))


def test_identity_follows_the_dialogues_and_the_settings() -> None:
    settings = [SUITE.settings(), SUITE.settings(max_tokens=512)]
    told = [{"dialogues": "a", "heldout": 8}, {"dialogues": "b", "heldout": 8}, {"dialogues": "a", "heldout": 9}]
    assert len({one.identity(**data) for one in settings for data in told}) == 6
    assert settings[0].identity(**told[0]) == SUITE.settings(max_tokens=1024).identity(**told[0])
