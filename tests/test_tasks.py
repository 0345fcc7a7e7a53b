"""Suites named lm-eval:NAME, on BIG-Bench Hard's exemplars and on a data set of our own, against stock lm-eval."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Count, make_model, make_tokenizer
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from kallm.engine.subject import Subject
from kallm.errors import WrongConfiguration
from kallm.evaluate.lookup import find_suite, read_suite
from kallm.evaluate.suites import SUITES, Context, Evaluation
from kallm.evaluate.tasks import Tasks, load_tasks
from kallm.evaluate.tasksettings import TaskSettings, find_entries
from kallm.model.trunk import Trunk, assembled, split

HERE = {"dialogues": "d", "heldout": 1}
CHOICE, REPLY = "leaderboard_bbh_snarks", "bbh_zeroshot_navigate"


@pytest.fixture(scope="module")
def halves() -> tuple[Trunk, Subject]:
    model = make_model(initializer_range=0.2, max_position_embeddings=4096)
    trunk, tail = split(model, 2)
    return trunk, Subject(model, tail, make_tokenizer())


def run(halves: tuple[Trunk, Subject], folder: Path, task: str, **settings: object) -> tuple[Tasks, Evaluation]:
    trunk, subject = halves
    suite = find_suite(f"lm-eval:{task}")
    context = Context(trunk, subject.tokenizer, "tiny", folder, [])
    prepared = suite.prepare(read_suite(f"lm-eval:{task}", {"data": "exemplars", **settings}), context)
    progress = Count()
    evaluation = suite.evaluate(prepared, subject, progress, lambda: None)
    assert isinstance(prepared, Tasks)
    assert progress.done == prepared.num_items > 0
    return prepared, evaluation


def test_choices_and_scores_equal_lm_evals(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    prepared, evaluation = run(halves, tmp_path, CHOICE)
    subject = halves[1]
    with assembled(subject.model, subject.tail) as model:
        judge = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=8)
        theirs = evaluate(judge, load_tasks(prepared.settings), bootstrap_iters=0)
    assert theirs is not None
    assert evaluation.scores["acc_norm"].value == theirs["results"][CHOICE]["acc_norm,none"]
    for item, sample in zip(evaluation.items, theirs["samples"][CHOICE], strict=True):
        assert item["prompt"] == sample["arguments"][0][0]
        expected = [response[0][0] for response in sample["resps"]]
        np.testing.assert_allclose(item["loglikelihoods"], expected, rtol=0, atol=1e-4)
        assert item["correct_norm"] == bool(sample["acc_norm"])
        assert item["options"][item["gold"]] == sample["doc"]["target"]


def test_second_subject_reuses_the_trunk_and_scores_the_same(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    prepared, evaluation = run(halves, tmp_path, CHOICE)
    before = {path: path.stat().st_size for path in tmp_path.iterdir()}
    again = find_suite(f"lm-eval:{CHOICE}").evaluate(prepared, halves[1], Count(), lambda: None)
    assert again == evaluation
    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_replies_equal_lm_evals_and_do_not_depend_on_the_batch(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    prepared, evaluation = run(halves, tmp_path, REPLY)
    subject = halves[1]
    with assembled(subject.model, subject.tail) as model:
        judge = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=2)
        theirs = evaluate(judge, load_tasks(prepared.settings), bootstrap_iters=0)
    assert theirs is not None
    strict = [sample for sample in theirs["samples"][REPLY] if sample["filter"] == "strict-match"]
    assert [item["reply"] for item in evaluation.items] == [sample["resps"][0][0] for sample in strict]
    told = theirs["results"][REPLY]["exact_match,flexible-extract"]
    assert evaluation.scores["exact_match (flexible-extract)"].value == told
    assert run(halves, tmp_path, REPLY, batch_size=1)[1] == evaluation


def test_group_is_averaged_over_tasks_and_as_it_says_itself(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    _, evaluation = run(halves, tmp_path, "leaderboard_bbh", per_task=1, num_fewshot=0)
    assert len(evaluation.items) == len(evaluation.tasks) == 24
    mean = np.mean([scores["acc_norm"].value for scores in evaluation.tasks.values()])
    assert evaluation.scores["acc_norm"].value == pytest.approx(mean)
    assert evaluation.scores["acc_norm by lm-eval's group"].value == pytest.approx(mean)  # one item of each


def test_own_data_replaces_the_hubs_and_is_part_of_the_identity(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {
            "ctx": "A boy",
            "ctx_a": "A boy",
            "ctx_b": "he",
            "activity_label": "Play",
            "label": "1",
            "endings": list("abcd"),
        }
    ]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, evaluation = run(halves, tmp_path, "hellaswag", data=str(folder))
    assert (len(evaluation.items), evaluation.items[0]["gold"], evaluation.tasks) == (1, 1, {})
    settings = read_suite("lm-eval:hellaswag", {"data": str(folder)})
    before = settings.identity(**HERE)
    assert settings.model_copy(update={"batch_size": 3}).identity(**HERE) == before
    (folder / "validation.jsonl").write_text(json.dumps(rows[0] | {"label": "2"}))
    assert settings.identity(**HERE) != before


def test_data_that_cannot_be_had_is_named_before_anything_is_computed() -> None:
    settings = read_suite("lm-eval:hellaswag", {})
    with pytest.raises(WrongConfiguration, match="lm-eval:hellaswag asks questions of the data set 'Rowan/hellaswag'"):
        settings.identity(**HERE)
    pinned = read_suite("lm-eval:hellaswag", {"revisions": {"Rowan/hellaswag": "0" * 40}})
    assert pinned.identity(**HERE)
    with pytest.raises(WrongConfiguration, match="data: expected a folder"):
        read_suite("lm-eval:hellaswag", {"data": "nowhere"}).identity(**HERE)


def test_unknown_tasks_and_suites_are_named_with_the_nearest() -> None:
    with pytest.raises(WrongConfiguration, match=r"no task or group 'helaswag'.*did you mean 'hellaswag'"):
        read_suite("lm-eval:helaswag", {}).identity(**HERE)
    with pytest.raises(ValueError, match=r"unknown suite 'bbh-choise'.*Did you mean 'bbh-choice'"):
        find_suite("bbh-choise")
    with pytest.raises(ValueError, match="the suite's name says 'hellaswag'"):
        read_suite("lm-eval:hellaswag", {"task": "arc_easy"})
    assert {find_suite(name) is suite for name, suite in SUITES.items()} == {True}


def test_groups_and_tags_lead_to_their_tasks() -> None:
    assert len(list(TaskSettings(task="leaderboard_bbh").leaves())) == 24
    assert len(find_entries("leaderboard_bbh")) == 25
    assert len(list(TaskSettings(task="ai2_arc").leaves())) == 2
    assert {entry.name for entry in TaskSettings(task="hellaswag").leaves()} == {"hellaswag"}
