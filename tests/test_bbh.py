"""BIG-Bench Hard against the official files and lm-eval's package."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kallm.data.bbh import SUBSETS, TASKS, content_hash, load_bbh, option_texts
from kallm.errors import DataMismatch, WrongConfiguration

OFFICIAL = Path(os.environ.get("KALLM_BBH", Path(__file__).parents[2] / "shared" / "data" / "bbh"))
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason=f"needs the official BBH files: KALLM_BBH names no folder, nor is there {OFFICIAL}"
)


def test_there_are_27_tasks_and_three_subsets() -> None:
    assert len(TASKS) == 27
    assert {name: len(members) for name, members in SUBSETS.items()} == {
        "all": 27,
        "leaderboard-24": 24,
        "dialogue-11": 11,
    }
    assert set(SUBSETS["all"]) == set(TASKS)
    assert set(TASKS) - set(SUBSETS["leaderboard-24"]) == {"dyck_languages", "multistep_arithmetic_two", "word_sorting"}
    assert all(len(set(members)) == len(members) and set(members) <= set(TASKS) for members in SUBSETS.values())


def test_exemplars_are_three_per_task_and_all_answerable() -> None:
    items, _ = load_bbh("exemplars", subset="all")
    assert Counter(item.task for item in items) == dict.fromkeys(TASKS, 3)
    assert all(item.answerable for item in items)
    assert len({item.id for item in items}) == 81


def test_exemplars_answers_are_plain() -> None:
    answers = {item.id: item.answer for item in load_bbh("exemplars", subset="all")[0]}
    assert answers["boolean_expressions/2"] == "True"
    assert answers["date_understanding/0"] == "(D)"
    assert answers["dyck_languages/0"] == "] } ]"
    assert answers["multistep_arithmetic_two/2"] == "-219"
    assert answers["word_sorting/0"] == "costume counterpart oven"
    assert not any("step by step" in answer for answer in answers.values())


def test_exemplars_load_without_lm_eval_or_torch() -> None:
    code = "import sys; from kallm.data.bbh import load_bbh; load_bbh('exemplars', subset='all'); "
    code += "print([m for m in ('torch', 'lm_eval', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_are_read_from_the_question() -> None:
    question = "Which?\nOptions: none here\nOptions:\n(A) a (B) b\n(B) \n(C) c"
    assert option_texts(question) == {"(A)": "a (B) b", "(B)": "", "(C)": "c"}
    assert option_texts("(A) no list") == {}


def test_subset_selects_items_and_changes_the_hash() -> None:
    everything, whole = load_bbh("exemplars", subset="all")
    part, other = load_bbh("exemplars", subset="dialogue-11")
    assert {item.task for item in part} == set(SUBSETS["dialogue-11"])
    assert set(part) < set(everything)
    assert len({whole, other}) == 2
    assert load_bbh("exemplars", subset="all")[1] == whole == content_hash(everything)


@needs_official
def test_official_files_hold_6511_items_and_three_answers_outside_the_options() -> None:
    items, _ = load_bbh(str(OFFICIAL), subset="all")
    assert len(items) == 6511
    assert Counter(item.task for item in items) == {task.name: task.num_items for task in TASKS.values()}
    assert [item.id for item in items if not item.answerable] == [
        "movie_recommendation/163",
        "ruin_names/99",
        "ruin_names/144",
    ]


@needs_official
def test_uniform_chance_of_the_dialogue_subset_is_44_percent() -> None:
    items, _ = load_bbh(str(OFFICIAL), subset="dialogue-11")
    means = [
        sum(1 / len(item.options) for item in items if item.task == name) / TASKS[name].num_items
        for name in SUBSETS["dialogue-11"]
    ]
    assert sum(means) / 11 == pytest.approx(0.440, abs=5e-4)


@needs_official
def test_altered_file_is_named(tmp_path: Path) -> None:
    shutil.copytree(OFFICIAL, tmp_path, dirs_exist_ok=True)
    (tmp_path / "snarks.json").chmod(0o644)
    (tmp_path / "snarks.json").write_bytes((OFFICIAL / "snarks.json").read_bytes().replace(b"(A)", b"(B)", 1))
    with pytest.raises(DataMismatch, match=r"snarks\.json is not the official file"):
        load_bbh(str(tmp_path), subset="all")


@needs_official
def test_missing_tasks_are_named_and_only_those_of_the_subset(tmp_path: Path) -> None:
    shutil.copytree(OFFICIAL, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dyck*", "word_sorting*"))
    with pytest.raises(WrongConfiguration, match="lacks dyck_languages, word_sorting"):
        load_bbh(str(tmp_path), subset="all")
    assert load_bbh(str(tmp_path), subset="leaderboard-24") == load_bbh(str(OFFICIAL), subset="leaderboard-24")


def test_unknown_subset_gets_a_suggestion() -> None:
    with pytest.raises(WrongConfiguration, match=r"known are all, .* Did you mean 'leaderboard-24'\?"):
        load_bbh("exemplars", subset="leaderboard24")


def test_unknown_source_says_what_is_expected() -> None:
    with pytest.raises(WrongConfiguration, match="expected 'exemplars', 'hub:ORG/NAME', or a folder"):
        load_bbh("no/such/folder", subset="all")


def test_hub_without_network_is_a_wrong_configuration() -> None:
    code = "from kallm.data.bbh import load_bbh\nfrom kallm.errors import WrongConfiguration\n"
    code += "try: load_bbh('hub:org/name@main', subset='all')\nexcept WrongConfiguration as error: print(error)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("cannot read BBH task boolean_expressions from 'hub:org/name@main'")
