"""Replies in padded batches against one reply at a time."""

from pathlib import Path

import pytest
import torch
from conftest import Count
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kallm.data.bbh import TASKS, load_bbh
from kallm.engine.replies import cut_batches
from kallm.engine.subject import Subject
from kallm.evaluate.conversation import ask
from kallm.evaluate.parse import is_correct, parse_answer
from kallm.evaluate.suites import SUITES, Context, Evaluation
from kallm.model.trunk import Trunk, assembled, split

SUITE = SUITES["bbh-chat"]


@pytest.fixture(scope="module")
def halves(tokenizer: PreTrainedTokenizerBase) -> tuple[Trunk, Subject]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    model.generation_config.repetition_penalty = 5.0
    trunk, tail = split(model, 1)
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return trunk, Subject(model, tail, tokenizer)


def evaluate(halves: tuple[Trunk, Subject], folder: Path, **settings: object) -> Evaluation:
    trunk, subject = halves
    context = Context(trunk, subject.tokenizer, "tiny", folder, [])
    prepared = SUITE.prepare(SUITE.settings(subset="dialogue-11", max_new_tokens=4, **settings), context)
    progress = Count()
    evaluation = SUITE.evaluate(prepared, subject, progress, lambda: None)
    assert progress.done == prepared.num_items == 33
    return evaluation


@pytest.fixture(scope="module")
def evaluation(halves: tuple[Trunk, Subject], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate(halves, tmp_path_factory.mktemp("hidden"))


def test_replies_equal_the_greedy_choice_token_by_token(halves: tuple[Trunk, Subject], evaluation: Evaluation) -> None:
    _, subject = halves
    with assembled(subject.model, subject.tail) as model, torch.no_grad():
        for item in evaluation.items[::4]:
            ids = subject.tokenizer(item["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            for _ in range(4):
                following = model(ids, logits_to_keep=1, use_cache=False).logits[0, -1].argmax()
                ids = torch.cat([ids, following[None, None]], dim=1)
                if following == subject.tokenizer.eos_token_id:
                    break
            assert item["reply"] == subject.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_replies_do_not_depend_on_the_batch_and_neither_does_the_identity(
    halves: tuple[Trunk, Subject], evaluation: Evaluation, tmp_path: Path
) -> None:
    assert evaluate(halves, tmp_path, batch_size=7) == evaluation
    told = {"dialogues": "d", "heldout": 1}
    assert SUITE.settings(batch_size=7).identity(**told) == SUITE.settings().identity(**told)
    assert SUITE.settings(normaliser="published").identity(**told) != SUITE.settings().identity(**told)


def test_scores_follow_from_the_items(evaluation: Evaluation) -> None:
    known = {item.id: item for item in load_bbh("exemplars", subset="dialogue-11")[0]}
    for item in evaluation.items:
        asked = known[item["id"]]
        assert ask(asked) in item["prompt"]
        assert (item["gold"], item["num_options"]) == (asked.answer, len(asked.options))
        assert (item["parsed"], item["status"]) == parse_answer(item["reply"], asked)
        assert item["correct"] == is_correct(item["parsed"], asked)
    failed = sum(item["status"] != "parsed" for item in evaluation.items)
    assert evaluation.scores["parse_failures"].value == pytest.approx(failed / 33)
    shares = [of["acc"].value for of in evaluation.tasks.values()]
    assert evaluation.scores["acc"].value == pytest.approx(sum(shares) / 11)


def test_every_question_ends_with_the_form_of_its_answer() -> None:
    last_lines = {item.task: ask(item).splitlines()[-1] for item in load_bbh("exemplars", subset="all")[0]}
    assert set(last_lines) == set(TASKS)
    assert all(line.startswith("Answer with") and line.endswith(".") for line in last_lines.values())
    assert last_lines["web_of_lies"] == "Answer with one word only: Yes or No."
    assert "(A)" in last_lines["snarks"]


def test_model_is_whole_again_after_a_stop(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    trunk, subject = halves
    before = [*subject.model.modules()]
    context = Context(trunk, subject.tokenizer, "tiny", tmp_path, [])

    def stop() -> None:
        raise KeyboardInterrupt

    prepared = SUITE.prepare(SUITE.settings(), context)
    with pytest.raises(KeyboardInterrupt):
        SUITE.evaluate(prepared, subject, Count(), stop)
    assert [*map(id, subject.model.modules())] == [*map(id, before)]


def test_batches_hold_prompts_of_like_length_longest_first() -> None:
    lengths = [10, 100, 71, 69, 70, 9, 8, 7]
    assert cut_batches(lengths, 3) == [[1, 2, 4], [3], [0, 5, 6], [7]]
    assert cut_batches(lengths, 1) == [[1], [2], [4], [3], [0], [5], [6], [7]]
    assert cut_batches([], 3) == []
