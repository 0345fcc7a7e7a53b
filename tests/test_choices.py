"""Options in one tree against one forward pass per option, and against lm-eval."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Count
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kallm.data.bbh import SUBSETS, TASKS, BBHItem, load_bbh
from kallm.engine.subject import Subject
from kallm.errors import WrongConfiguration
from kallm.evaluate.choices import Choices, build_tree, encode_options, prompt_of
from kallm.evaluate.suites import SUITES, Context, Evaluation
from kallm.model.trunk import Trunk, assembled, split

SUITE = SUITES["bbh-choice"]
TASKS_TRIED = (
    "boolean_expressions",
    "formal_fallacies",
    "snarks",
    "object_counting",
    "reasoning_about_colored_objects",
)


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
    trunk, tail = split(model, 2)
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return trunk, Subject(model, tail, tokenizer)


@pytest.fixture(scope="module")
def scored(halves: tuple[Trunk, Subject], tmp_path_factory: pytest.TempPathFactory) -> tuple[Choices, Evaluation]:
    trunk, subject = halves
    context = Context(trunk, subject.tokenizer, "tiny", tmp_path_factory.mktemp("hidden"), [])
    prepared = SUITE.prepare(SUITE.settings(), context)
    progress = Count()
    evaluation = SUITE.evaluate(prepared, subject, progress, lambda: None)
    assert isinstance(prepared, Choices)
    assert progress.done == prepared.num_items
    return prepared, evaluation


def tried_items() -> list[BBHItem]:
    exemplars = load_bbh("exemplars", subset="leaderboard-24")[0]
    return [item for item in exemplars if item.task in TASKS_TRIED and item.id.endswith("/0")]


def options_of(item: BBHItem) -> tuple[str, ...]:
    return item.options or TASKS[item.task].counts


def test_tree_equals_one_forward_per_option(halves: tuple[Trunk, Subject], scored: tuple[Choices, Evaluation]) -> None:
    _, subject = halves
    found = {item["id"]: item["loglikelihoods"] for item in scored[1].items}
    with assembled(subject.model, subject.tail) as model, torch.no_grad():
        for item in tried_items():
            for option, value in zip(options_of(item), found[item.id], strict=True):
                context, (continuation,) = encode_options(subject.tokenizer, prompt_of(item), [f" {option}"])
                ids = torch.tensor([context + continuation])
                logits = model(ids, logits_to_keep=len(continuation) + 1).logits[0, :-1]
                alone = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
                assert value == pytest.approx(float(alone), abs=1e-4)


def test_log_likelihoods_and_choices_equal_lm_evals(
    halves: tuple[Trunk, Subject], scored: tuple[Choices, Evaluation]
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    _, subject = halves
    found = {item["id"]: item for item in scored[1].items}
    items = tried_items()
    requests = [
        Instance("loglikelihood", {}, (prompt_of(item), f" {option}"), index)
        for index, item in enumerate(items)
        for option in options_of(item)
    ]
    with assembled(subject.model, subject.tail) as model:
        judge = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=8, max_length=2048)
        answers = iter(judge.loglikelihood(requests, disable_tqdm=True))
    for item in items:
        theirs = np.array([next(answers)[0] for _ in options_of(item)])
        np.testing.assert_allclose(found[item.id]["loglikelihoods"], theirs, atol=1e-4)
        assert found[item.id]["choice"] == theirs.argmax()
        assert found[item.id]["choice_norm"] == (theirs / [len(option) for option in options_of(item)]).argmax()


def test_scores_are_means_over_tasks(scored: tuple[Choices, Evaluation]) -> None:
    _, evaluation = scored
    assert len(evaluation.items) == 72
    assert set(evaluation.tasks) == set(SUBSETS["leaderboard-24"])
    for name, key in (("acc", "correct"), ("acc_norm", "correct_norm")):
        shares = [np.mean([i[key] for i in evaluation.items if i["task"] == task]) for task in evaluation.tasks]
        assert evaluation.scores[name].value == pytest.approx(np.mean(shares))
        assert evaluation.scores[name].n == 72
    for item in evaluation.items:
        assert item["options"][item["gold"]] == next(i.answer for i in scored[0].items if i.id == item["id"])
        assert item["num_options"] == len(item["options"]) == len(item["loglikelihoods"])


def test_second_subject_reuses_the_trunk_and_scores_the_same(
    halves: tuple[Trunk, Subject], scored: tuple[Choices, Evaluation]
) -> None:
    prepared, evaluation = scored
    assert prepared.cache.num_missing() == 0
    assert SUITE.evaluate(prepared, halves[1], Count(), lambda: None) == evaluation


def test_stop_is_heard_between_items(halves: tuple[Trunk, Subject], scored: tuple[Choices, Evaluation]) -> None:
    progress = Count()

    def stop() -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    halves[1].tail.train()
    with pytest.raises(KeyboardInterrupt):
        SUITE.evaluate(scored[0], halves[1], progress, stop)
    assert progress.done == 3
    assert halves[1].tail.training
    halves[1].tail.eval()


def test_option_sees_the_question_and_itself() -> None:
    tree = build_tree([7, 8], [[1, 2, 3], [4], [5, 6]])
    assert tree.passage.input_ids.tolist() == [7, 8, 1, 2, 5]
    assert tree.passage.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert tree.passage.mask is not None
    assert tree.passage.mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert (tree.rows + tree.first_row).tolist() == [1, 2, 3, 1, 1, 4]
    assert tree.targets.tolist() == [1, 2, 3, 4, 5, 6]
    assert build_tree([7, 8], [[1], [2]]).passage.mask is None


def test_spaces_at_the_end_of_a_context_belong_to_the_option(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_options(tokenizer, "Q: x\nA: ", ["(A)"]) == encode_options(tokenizer, "Q: x\nA:", [" (A)"])


def test_identity_follows_the_items_and_not_where_they_came_from(tmp_path: Path) -> None:
    here = {"dialogues": "d", "heldout": 1}
    everything, leaderboard, dialogue = (
        SUITE.settings(subset=name).identity(**here) for name in ("all", "leaderboard-24", "dialogue-11")
    )
    assert everything == leaderboard != dialogue
    assert everything == SUITE.settings().identity(dialogues="other", heldout=2)
    assert everything != SUITES["bbh-chat"].settings().identity(**here)
    with pytest.raises(WrongConfiguration):
        SUITE.settings(source=str(tmp_path)).identity(**here)


def test_unknown_subset_is_refused_when_settings_are_read() -> None:
    with pytest.raises(ValueError, match="Did you mean 'dialogue-11'"):
        SUITE.settings(subset="dialogue11")
