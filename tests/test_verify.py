"""Whatever changes in what the records name is named, and nothing else is."""

import json
from pathlib import Path

import pytest
from finished_study import Finished, contents

from kallm.results.record import cell_key, study_key
from kallm.results.verify import verify_study
from kallm.store.sealed import seal, short_hash, unseal

pytest_plugins = ["finished", "stores"]

KINDS = {
    "cell.json": "cell.json",
    "trained.json": "trained.json",
    "evaluation": "evaluations/heldout.????????????.json",
    "items": "evaluations/*.jsonl.gz",
    "weights manifest": "weights/*/manifest.json",
    "weights": "weights/*/weights.safetensors",
    "checkpoint manifest": "checkpoints/*/manifest.json",
    "checkpoint": "checkpoints/*/weights.safetensors",
}


def damage(path: Path, place: float, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)


def test_a_finished_study_has_no_differences_and_nothing_is_changed(finished: Finished) -> None:
    before = contents(finished.folder)
    differences, num_objects = verify_study(finished.store, finished.document)
    assert differences == []
    # study, table; identity, start, end, heartbeat, evaluation and items of each; record, manifest and weights of two
    assert num_objects == 2 + 3 * 6 + 2 * 3
    assert contents(finished.folder) == before


@pytest.mark.parametrize("place", [0.0, 0.1, 0.37, 0.5, 0.81, 1.0])
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_flipped_bit_is_named_with_its_object(finished: Finished, kind: str, place: float) -> None:
    finished.add_checkpoint(finished.cell)
    path = finished.find(KINDS[kind])
    for bit in (0, 4):
        damage(path, place, bit)
        differences, _ = verify_study(finished.store, finished.document)
        # a manifest that names another size or hash speaks of its file, in the same folder
        named = path.parent.name if path.name == "manifest.json" else path.name
        assert [line for line in differences if named in line], differences
        damage(path, place, bit)
    assert verify_study(finished.store, finished.document)[0] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_object_is_named(finished: Finished, kind: str) -> None:
    finished.add_checkpoint(finished.cell)
    path = finished.find(KINDS[kind])
    path.write_bytes(path.read_bytes()[:-1])
    differences, _ = verify_study(finished.store, finished.document)
    assert [line for line in differences if path.name in line], differences


@pytest.mark.parametrize("kind", ["trained.json", "evaluation", "items", "weights manifest", "weights", "checkpoint"])
def test_a_missing_object_is_named(finished: Finished, kind: str) -> None:
    finished.add_checkpoint(finished.cell)
    path = finished.find(KINDS[kind])
    path.unlink()
    differences, _ = verify_study(finished.store, finished.document)
    assert any(path.name in line and "missing" in line for line in differences), differences


@pytest.mark.parametrize("name", ["study.json", "table.json", "table.csv", "table.md"])
@pytest.mark.parametrize("place", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_a_flipped_bit_in_a_studys_own_objects_is_named(finished: Finished, name: str, place: float) -> None:
    path = finished.folder / study_key(finished.document.name, finished.document.hash, name)
    damage(path, place, 1)
    differences, _ = verify_study(finished.store, finished.document)
    assert differences
    assert all("table" in line or name in line for line in differences)


def test_a_changed_figure_of_the_table_is_told_with_both_values(finished: Finished) -> None:
    path = finished.folder / study_key(finished.document.name, finished.document.hash, "table.json")
    table = json.loads(path.read_text())
    given = table["cells"][1]["scores"]["heldout.cross_entropy"]
    table["cells"][1]["scores"]["heldout.cross_entropy"] = 1.25
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    differences, _ = verify_study(finished.store, finished.document)
    told = f"cells[1].scores.heldout.cross_entropy is 1.25, but the records give {given}"
    assert [line.partition(": ")[2] for line in differences] == [told]


def test_a_record_that_is_well_formed_but_changed_is_told_by_the_table(finished: Finished) -> None:
    path = finished.find("trained.json")
    record = unseal(path.read_bytes(), path.name)
    record["loss_history"][0][1] += 0.5
    path.write_bytes(seal(record))
    (difference,) = verify_study(finished.store, finished.document)[0]
    assert difference.startswith(f"{cell_key(finished.cell, 'trained.json')}: its SHA-256 is ")


def test_an_unfinished_study_without_a_table_has_no_differences(finished: Finished) -> None:
    for path in finished.folder.glob(f"cells/{finished.cell}/evaluations/*"):
        path.unlink()
    for path in finished.folder.glob("studies/*/table.*"):
        path.unlink()
    assert verify_study(finished.store, finished.document)[0] == []


def test_the_hash_is_the_one_that_names_cells_and_studies(finished: Finished) -> None:
    identity = unseal(finished.find("cell.json").read_bytes(), "cell.json")
    del identity["variant"]
    assert short_hash(identity) == finished.cell.rpartition(".")[2]
