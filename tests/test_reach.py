"""Tokens to reach a loss: on histories whose answer is known."""

from dataclasses import replace
from pathlib import Path

import pytest
from studies import SyntheticStudy

from kallm.report.reach import find_reach
from kallm.results.table import build_table
from kallm.store.local import FolderStore

STUDY = SyntheticStudy(variants=("baseline", "kan", "linear"), seeds=(0, 1), suites=("heldout",), contrasts=())


def reach(
    folder: Path,
    histories: dict[tuple[str, int], list[tuple[int, float]]],
    study: SyntheticStudy = STUDY,
    **changes: object,
):
    """Return the reach of a study with these training histories; 200 steps are 1,000,000 tokens."""
    store, trainings = FolderStore(folder), {}
    study.fill(store)
    for (variant, seed), history in histories.items():
        entry = study.entry(variant, seed)
        trainings[entry.id] = study.train(store, entry, loss_history=history, **changes)
    return find_reach(build_table(store, study.document), trainings)


def line(start: float, slope: float, points: int = 20) -> list[tuple[int, float]]:
    """Return a loss that falls by ``slope`` per point; each point is 10 steps, or 50,000 tokens."""
    return [(10 * (index + 1), start - slope * index) for index in range(points)]


def test_levels_are_the_leaders_and_tokens_are_counted_to_them(tmp_path: Path) -> None:
    curves = {("kan", 0): line(4.0, 0.1), ("kan", 1): line(4.0, 0.1), ("linear", 0): line(4.0, 0.05)}
    found = reach(tmp_path, curves | {("linear", 1): line(4.05, 0.05)})
    assert found is not None
    assert (found.pacer, found.is_control) == ("kan", False)
    # after 2, 5, 10, 15 and 20 of 20 points
    assert found.levels == (3.9, 3.6, 3.1, 2.6, 2.1)
    assert found.tokens["kan"] == tuple((pytest.approx(50_000 * n), 2) for n in (2, 5, 10, 15, 20))
    # 3.9 at points 3 and 4, 3.6 at points 9 and 10, 3.1 at point 19 and 20
    assert found.tokens["linear"][:3] == tuple((pytest.approx(50_000 * n), 2) for n in (3.5, 9.5, 19.5))
    assert found.tokens["linear"][3:] == ((None, 0), (None, 0))
    assert found.seeds == {"kan": 2, "linear": 2}


def test_levels_are_the_controls_where_a_contrast_names_one(tmp_path: Path) -> None:
    study = replace(STUDY, contrasts=(("kan", "linear"),))
    found = reach(tmp_path, {("kan", 0): line(4.0, 0.1), ("linear", 0): line(4.0, 0.05)}, study)
    assert found is not None
    assert (found.pacer, found.is_control) == ("linear", True)
    assert found.levels[-1] == 3.05
    assert [tokens[-1] for tokens in found.tokens.values()] == [(550_000, 1), (1_000_000, 1)]


def test_a_level_that_some_seeds_reach_says_how_many(tmp_path: Path) -> None:
    found = reach(tmp_path, {("kan", 0): line(4.0, 0.1), ("linear", 0): line(4.0, 0.1), ("linear", 1): line(4.0, 0.01)})
    assert found is not None
    assert found.tokens["linear"][-1] == (pytest.approx(1_000_000), 1)


def test_a_single_low_batch_does_not_count(tmp_path: Path) -> None:
    noisy = [(step, 4.0 - step / 200) for step in range(1, 201)]
    noisy[20] = (21, 0.5)
    found = reach(tmp_path, {("kan", 0): noisy})
    assert found is not None
    assert found.levels[-1] > 2.9


def test_a_rise_at_the_end_does_not_take_back_what_was_reached(tmp_path: Path) -> None:
    found = reach(tmp_path, {("kan", 0): [*line(4.0, 0.1, 15), *((step, 9.0) for step in range(160, 201, 10))]})
    assert found is not None
    assert found.levels[-1] == 2.6
    assert found.tokens["kan"][-1] == (pytest.approx(750_000), 1)


def test_short_histories_and_diverged_cells_have_no_ladder(tmp_path: Path) -> None:
    assert reach(tmp_path / "short", {("kan", 0): line(4.0, 0.1, 3)}) is None
    assert reach(tmp_path / "diverged", {("kan", 0): line(4.0, 0.1)}, outcome="diverged", cause="nan") is None
