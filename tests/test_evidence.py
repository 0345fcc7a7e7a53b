"""Records that are not what they should be are named, and never averaged."""

import re

import pytest
from studies import SyntheticStudy

from kallm.errors import DataMismatch
from kallm.results.record import cell_key, evaluation_key
from kallm.results.table import build_table
from kallm.store.local import FolderStore

SMALL = SyntheticStudy(variants=("baseline", "kan", "linear"), contrasts=(("kan", "linear"),), num_items=12)


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path)


def test_a_training_record_of_another_cell_is_a_mismatch(store):
    document = SMALL.fill(store)
    mine, other = (cell_key(SMALL.entry("kan", seed).id, "trained.json") for seed in (0, 1))
    store.put(mine, store.get(other))
    with pytest.raises(DataMismatch, match=rf"{mine} is a record of kan.seed-1\S*, expected one of kan.seed-0"):
        build_table(store, document)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cell": "linear.seed-0.f"}, "is a record of linear.seed-0.f, expected one of {cell}; restore or remove it"),
        ({"suite": "heldout.f"}, "is a record of heldout.f, expected one of {suite}; restore or remove it"),
        ({"format": 2}, "is no EvaluationRecord: format: Input should be 1"),
    ],
    ids=["cell", "settings", "version"],
)
def test_an_evaluation_of_another_cell_settings_or_version_is_a_mismatch(store, changes, told):
    document = SMALL.fill(store)
    record = SMALL.read_evaluation(store, "kan", 0, "heldout")
    key = evaluation_key(record.cell, record.suite)
    store.put(key, record.model_copy(update=changes).to_bytes())
    with pytest.raises(DataMismatch, match=re.escape(f"{key} {told.format(cell=record.cell, suite=record.suite)}")):
        build_table(store, document)


def test_another_number_of_items_is_a_mismatch(store):
    document = SMALL.fill(store)
    entry = SMALL.entry("kan", 1)
    SMALL.evaluate(store, entry, "heldout", SMALL.make_items(entry, "heldout")[:-1])
    with pytest.raises(DataMismatch, match=r"has 12 items, .* has 11"):
        build_table(store, document)


def test_other_questions_are_a_mismatch(store):
    document = SMALL.fill(store)
    entry = SMALL.entry("linear", 2)
    items = SMALL.make_items(entry, "bbh-choice")
    items[5]["num_options"] += 1
    SMALL.evaluate(store, entry, "bbh-choice", items)
    with pytest.raises(DataMismatch, match="differs between"):
        build_table(store, document)


def test_a_score_that_its_items_do_not_give_is_a_mismatch(store):
    document = SMALL.fill(store)
    record = SMALL.read_evaluation(store, "kan", 0, "heldout")
    worse = record.scores["cross_entropy"].model_copy(update={"value": 1.0})
    changed = record.model_copy(update={"scores": {**record.scores, "cross_entropy": worse}})
    store.put(evaluation_key(record.cell, record.suite), changed.to_bytes())
    with pytest.raises(DataMismatch, match="names cross_entropy 1, but its items give"):
        build_table(store, document)


def test_an_evaluation_of_other_weights_is_a_mismatch(store):
    document = SMALL.fill(store)
    SMALL.train(store, SMALL.entry("kan", 0), weights={"manifest": "m", "sha256": "f" * 64})
    with pytest.raises(DataMismatch, match="scored weights"):
        build_table(store, document)


def test_changed_items_are_a_mismatch(store):
    document = SMALL.fill(store)
    record = SMALL.read_evaluation(store, "kan", 0, "bbh-chat")
    store.put(record.items["key"], b"other")
    with pytest.raises(DataMismatch, match="another hash"):
        build_table(store, document)


def test_a_probe_of_another_request_is_a_mismatch(store):
    document = SMALL.fill(store)
    key = SMALL.measure(store, "kan")
    linear = SMALL.entry("linear", 0).probe
    store.put(key.replace(SMALL.entry("kan", 0).probe, linear), store.get(key))
    with pytest.raises(DataMismatch, match="is a record of request"):
        build_table(store, document)
