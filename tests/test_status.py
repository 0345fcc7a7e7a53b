import io

import pytest
from rich.console import Console
from studies import NOW, SyntheticStudy, beat, end_attempt, start_attempt

from kallm.errors import DataMismatch
from kallm.results.record import cell_key
from kallm.results.status import read_status, render_status
from kallm.store.local import FolderStore

STUDY = SyntheticStudy(variants=("baseline", "kan"), seeds=(0,), suites=("heldout",), contrasts=())
KAN = STUDY.entry("kan", 0)


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path)


def state_of(store, variant="kan"):
    return next(status for status in read_status(store, STUDY.document, NOW) if status.variant == variant)


def test_nothing_in_the_store_is_missing(store):
    assert [(s.state, s.trained) for s in read_status(store, STUDY.document, NOW)] == [
        ("missing", True),
        ("missing", False),
    ]


def test_a_filled_store_is_done(store):
    document = STUDY.fill(store)
    start_attempt(store, KAN, "a", NOW - 50)
    assert {status.state for status in read_status(store, document, NOW)} == {"done"}


def test_a_young_heartbeat_runs_and_an_old_one_is_stale(store):
    start_attempt(store, KAN, "a", NOW - 1000)
    beat(store, KAN, "a", NOW - 119)
    found = state_of(store)
    assert (found.state, found.phase, found.step, found.total, found.eta_s, found.attempts) == (
        "running", "training", 50, 200, 90.0, 1,
    )  # fmt: skip
    beat(store, KAN, "a", NOW - 120)
    assert state_of(store).state == "stale"


def test_a_start_without_a_heartbeat_counts_as_one(store):
    start_attempt(store, KAN, "a", NOW - 5)
    assert state_of(store).state == "running"


def test_a_trained_cell_at_work_is_evaluating_and_at_rest_says_what_is_owed(store):
    STUDY.train(store, KAN)
    assert (state_of(store).state, state_of(store).detail) == ("missing", "trained; to evaluate: heldout")
    start_attempt(store, KAN, "a", NOW - 5)
    assert state_of(store).state == "evaluating"


def test_a_failure_names_its_exit_and_reason_until_somebody_tries_again(store):
    start_attempt(store, KAN, "a", NOW - 500)
    beat(store, KAN, "a", NOW - 420)
    end_attempt(store, KAN, "a", NOW - 400, 6, "out of memory: lower train.batch")
    assert (state_of(store).state, state_of(store).detail) == ("failed", "exit 6: out of memory: lower train.batch")
    start_attempt(store, KAN, "b", NOW - 10)
    assert (state_of(store).state, state_of(store).attempts) == ("running", 2)


def test_an_end_without_a_failure_leaves_the_cell_missing(store):
    start_attempt(store, KAN, "a", NOW - 500)
    end_attempt(store, KAN, "a", NOW - 400, 75, "stopped by SIGTERM")
    assert (state_of(store).state, state_of(store).detail) == ("missing", "stopped by SIGTERM")


def test_a_failure_after_a_killed_attempt_is_no_stale_cell(store):
    start_attempt(store, KAN, "killed", NOW - 5000)
    start_attempt(store, KAN, "b", NOW - 500)
    end_attempt(store, KAN, "b", NOW - 400, 3, "a hash differs")
    assert state_of(store).state == "failed"


def test_divergence_is_told_with_its_cause(store):
    STUDY.train(store, KAN, outcome="diverged", cause="loss is not a number at step 40")
    assert (state_of(store).state, state_of(store).detail) == ("diverged", "loss is not a number at step 40")


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b'{"nonce": 3}', b"\xff\x00"])
def test_junk_among_the_notes_changes_nothing(store, junk):
    start_attempt(store, KAN, "a", NOW - 5)
    before = read_status(store, STUDY.document, NOW)
    for name in ("attempts/x.start.json", "attempts/x.end.json", "attempts/readme", "heartbeat.json", "logs/a.txt"):
        store.put(cell_key(KAN.id, name), junk)
    assert read_status(store, STUDY.document, NOW) == before


def test_a_broken_training_record_is_refused(store):
    store.put(cell_key(KAN.id, "trained.json"), b"{}")
    with pytest.raises(DataMismatch, match=r"trained\.json is damaged: it carries no hash of its own"):
        read_status(store, STUDY.document, NOW)


def test_the_status_fits_a_narrow_terminal(store):
    start_attempt(store, KAN, "a", NOW - 50)
    beat(store, KAN, "a", NOW - 10)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_status(read_status(store, STUDY.document, NOW)))
    text = console.export_text()
    assert "running" in text
    assert "25%" in text
    assert "1 min 30 s left" in text
    assert max(map(len, text.splitlines())) <= 80
