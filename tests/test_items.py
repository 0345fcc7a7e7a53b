"""Two variants' answers side by side."""

from pathlib import Path

import pytest
import typer
from studies import SyntheticStudy
from typer.testing import CliRunner

from kallm.commands.items import attach_items
from kallm.errors import WrongConfiguration
from kallm.results.disagreement import compare_answers, find_suites, render_pair
from kallm.results.record import EvaluationRecord, Items, StudyDocument, evaluation_key, read_items, read_record
from kallm.store.local import FolderStore
from kallm.store.store import Store

Filled = tuple[Store, StudyDocument]


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    store = FolderStore(tmp_path)
    return store, SyntheticStudy(suites=("heldout", "bbh-chat", "bbh-choice"), seeds=(0, 1)).fill(store)


def read(filled: Filled, cell: str, suite: str) -> Items:
    store, document = filled
    (entry,) = find_suites(document, suite)
    (cell_id,) = (each.id for each in document.cells if each.id.startswith(cell))
    record = read_record(store, EvaluationRecord, evaluation_key(cell_id, entry.id))
    assert record is not None
    return read_items(store, record)


def test_differing_answers_are_those_of_the_items(filled: Filled) -> None:
    for suite, key in (("bbh-choice", "choice"), ("bbh-chat", "parsed")):
        found = list(compare_answers(*filled, "kan", "linear", find_suites(filled[1], suite)[0]))
        assert [(each.left, each.right) for each in found] == [(f"kan.seed-{n}", f"linear.seed-{n}") for n in (0, 1)]
        for comparison in found:
            pairs = list(zip(read(filled, comparison.left, suite), read(filled, comparison.right, suite), strict=True))
            assert comparison.num_items == len(pairs)
            if key == "choice":
                assert comparison.differing == [pair for pair in pairs if pair[0][key] != pair[1][key]]
            assert comparison.num_only_left == sum(a["correct"] and not b["correct"] for a, b in pairs)
            for pair in comparison.differing:
                assert pair[0]["id"] in render_pair(comparison, pair)


def test_untrained_variant_is_set_beside_every_seed_and_text_has_no_answers(filled: Filled) -> None:
    found = list(compare_answers(*filled, "baseline", "kan", find_suites(filled[1], "bbh-choice")[0]))
    assert [(each.left, each.right) for each in found] == [("baseline", "kan.seed-0"), ("baseline", "kan.seed-1")]
    assert list(compare_answers(*filled, "baseline", "kan", find_suites(filled[1], "heldout")[0])) == []


def test_command_shows_prompts_replies_and_likelihoods(filled: Filled) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    attach_items(app)
    store, document = filled
    arguments = ["items", f"{document.name}.{document.hash}", "--disagree", "kan", "linear", "--store", store.address]
    result = CliRunner().invoke(app, [*arguments, "--suite", "bbh-choice", "--limit", "1"])
    assert result.exit_code == 0, result.output
    assert "bbh-choice, kan.seed-0 and linear.seed-0: " in result.output
    assert "not shown: raise --limit" in result.output
    assert isinstance(CliRunner().invoke(app, [*arguments, "--suite", "bbh"]).exception, WrongConfiguration)


def test_choices_are_shown_with_their_probabilities(filled: Filled) -> None:
    (comparison,) = list(compare_answers(*filled, "kan", "linear", find_suites(filled[1], "bbh-choice")[0]))[:1]
    item = {
        "id": "snarks/0",
        "prompt": "Q: which one?\nA:",
        "options": ["(A)", "(B)"],
        "gold": 1,
        "choice": 1,
        "correct": True,
        "loglikelihoods": [-1.0, -0.5],
    }
    shown = render_pair(comparison, (item, item | {"choice": 0, "correct": False, "loglikelihoods": [-1.0, -1.0]}))
    assert shown.splitlines() == [
        "── snarks/0 (bbh-choice); right: (B)",
        "Q: which one?",
        "A:",
        "  kan.seed-0: (B), right; (B) 62% (-0.500), (A) 38% (-1.000)",
        "  linear.seed-0: (A), wrong; (A) 50% (-1.000), (B) 50% (-1.000)",
    ]


def test_unknown_variants_are_named(filled: Filled) -> None:
    with pytest.raises(WrongConfiguration, match=r"no variant 'kann'.*Did you mean 'kan'"):
        list(compare_answers(*filled, "kann", "linear", find_suites(filled[1], "bbh-choice")[0]))
