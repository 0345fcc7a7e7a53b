import csv
import hashlib
import io
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from studies import NOW, RECEIPT, TASKS, SyntheticStudy, beat, end_attempt, start_attempt

from kallm.results.items import find_references
from kallm.results.record import EvaluationRecord, cell_key, evaluation_key, read_items
from kallm.results.render import render_csv, render_latex, render_markdown, render_rich
from kallm.results.schema import Table
from kallm.results.table import build_table, is_complete, write_table
from kallm.store.local import FolderStore

SMALL = SyntheticStudy(variants=("baseline", "kan", "linear"), contrasts=(("kan", "linear"),), num_items=12)


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path)


def row_of(table, variant):
    return next(row for row in table.rows if row.variant == variant)


def cell_of(table, variant, seed):
    return next(cell for cell in table.cells if (cell.variant, cell.seed) == (variant, seed))


def test_a_full_table_leads_with_cross_entropy_and_is_complete(store):
    table = build_table(store, SMALL.fill(store))
    assert is_complete(table)
    assert table.columns[0].key == "heldout.cross_entropy"
    assert [row.variant for row in table.rows] == ["baseline", "kan", "linear"]
    assert [contrast.role for contrast in table.contrasts] == [
        "declared",
        "secondary",
        "secondary",
        *["exploratory"] * 2,
    ]
    assert {cell.state for cell in table.cells} == {"done"}


def test_a_rows_figures_are_scipys_interval_over_the_records(store):
    table = build_table(store, SMALL.fill(store))
    for key, suite, score in (
        ("heldout.cross_entropy", "heldout", "cross_entropy"),
        ("bbh-chat.acc", "bbh-chat", "acc"),
    ):
        values = [SMALL.read_evaluation(store, "kan", seed, suite).scores[score].value for seed in SMALL.seeds]
        found = row_of(table, "kan").scores[key]
        assert found.mean == pytest.approx(np.mean(values))
        assert found.half == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(values), rel=1e-6)
    assert row_of(table, "baseline").scores["heldout.cross_entropy"].half is None


def test_the_declared_difference_is_the_mean_of_the_paired_differences(store):
    table = build_table(store, SMALL.fill(store))
    losses = {
        variant: [
            SMALL.read_evaluation(store, variant, s, "heldout").scores["cross_entropy"].value for s in SMALL.seeds
        ]
        for variant in ("kan", "linear")
    }
    declared = table.contrasts[0]
    assert declared.difference == pytest.approx(np.mean(losses["kan"]) - np.mean(losses["linear"]))
    assert (declared.seeds, declared.items, declared.p_adjusted) == ([0, 1, 2], 12, None)
    assert declared.text.startswith(f"kan – linear: {declared.verdict}: difference ")
    assert "smallest detectable" in declared.text


def test_retained_ability_is_compared_as_held_out_text_is(store):
    study = SyntheticStudy(variants=("kan", "linear"), contrasts=(("kan", "linear"),), suites=("heldout", "retained"))
    table = build_table(store, study.fill(store))
    kl = {
        variant: np.mean([study.read_evaluation(store, variant, s, "retained").scores["kl"].value for s in study.seeds])
        for variant in ("kan", "linear")
    }
    found = next(contrast for contrast in table.contrasts if contrast.role == "secondary")
    assert (found.column, found.unit, found.margin) == ("retained.kl", "nats/token", None)
    assert found.difference == pytest.approx(kl["kan"] - kl["linear"])


def test_a_large_effect_is_different_and_none_is_equivalent(store):
    study = SyntheticStudy(
        variants=("kan", "linear", "swiglu-768"),
        effects={"linear": 0.2},
        seed_spread=0.0002,
        num_items=200,
        suites=("heldout",),
    )
    verdicts = {contrast.right: contrast.verdict for contrast in build_table(store, study.fill(store)).contrasts[:2]}
    assert verdicts == {"swiglu-768": "equivalent", "linear": "different"}


def test_a_baseline_without_a_seed_pairs_with_every_seed(store):
    table = build_table(store, SMALL.fill(store))
    found = next(contrast for contrast in table.contrasts if (contrast.left, contrast.right) == ("baseline", "kan"))
    assert (found.seeds, found.verdict, found.role) == ([0, 1, 2], "different", "exploratory")
    assert found.p_adjusted >= found.p


def test_references_are_counted_by_hand():
    items = [
        {"id": "1", "task": "a", "gold": 0, "choice": 0, "num_options": 2, "options": ["True", "False"]},
        {"id": "2", "task": "a", "gold": 1, "choice": 0, "num_options": 2, "options": ["True", "False"]},
        {"id": "3", "task": "a", "gold": 1, "choice": 0, "num_options": 2, "options": ["True", "False"]},
        {"id": "4", "task": "a", "gold": -1, "choice": 0, "num_options": 2, "options": ["True", "False"]},
        {"id": "5", "task": "b", "gold": 0, "choice": 0, "num_options": 4, "options": ["(A)", "(B)", "(C)", "(D)"]},
    ]
    assert find_references(items) == {"chance": {"a": 3 / 8, "b": 1 / 4}, "majority": {"a": 2 / 4, "b": 1.0}}
    replies = [
        {"id": str(i), "task": "sorting", "gold": gold, "status": "empty", "num_options": 0}
        for i, gold in enumerate(["a b", "a b", "c d", ""])
    ]
    found = find_references(replies)
    assert found == {"chance": {"sorting": 0.0}, "majority": {"sorting": 0.5}, "empty reply": {"sorting": 0.25}}


def test_the_table_shows_chance_as_the_mean_over_tasks(store):
    table = build_table(store, SMALL.fill(store))
    chance = next(reference for reference in table.references if reference.name == "chance")
    assert chance.scores["bbh-chat.acc"] == pytest.approx(np.mean([1 / n if n else 0 for n in TASKS.values()]))
    assert "heldout.cross_entropy" not in chance.scores


def test_unfinished_cells_are_shown_with_their_state(store):
    study = SyntheticStudy(variants=("kan", "linear"), seeds=tuple(range(7)), num_items=6, suites=("heldout",))
    document = study.fill(store, skip=tuple(("kan", seed) for seed in range(1, 7)))
    kan = [study.entry("kan", seed) for seed in range(7)]
    study.train(store, kan[1])
    study.train(store, kan[2], outcome="diverged", cause="loss is not a number at step 40")
    start_attempt(store, kan[3], "a", NOW)
    start_attempt(store, kan[4], "b", NOW - 5000)
    beat(store, kan[4], "b", NOW - 4000)
    start_attempt(store, kan[5], "c", NOW - 900)
    end_attempt(store, kan[5], "c", NOW - 800, 6, "out of memory: lower train.batch")
    table = build_table(store, document)
    assert [cell.state for cell in table.cells if cell.variant == "kan"] == [
        "done", "trained", "diverged", "running", "stale", "failed", "missing",
    ]  # fmt: skip
    assert (row_of(table, "kan").seeds_done, row_of(table, "kan").seeds_planned) == (1, 7)
    assert not is_complete(table)
    shown = render_markdown(table)
    assert "out of memory: lower train.batch" in shown
    assert "loss is not a number at step 40" in shown
    assert "8 of 14 cells done" in table.headline


def test_a_diverged_cell_is_an_end(store):
    document = SMALL.fill(store, skip=(("kan", 1),))
    SMALL.train(store, SMALL.entry("kan", 1), outcome="diverged", cause="nan", weights={})
    table = build_table(store, document)
    assert is_complete(table)
    assert any("kan, seed 1, diverged: nan" in note for note in table.notes)
    assert table.contrasts[0].seeds == [0, 2]


def test_an_empty_store_gives_a_table_of_missing_cells(store):
    table = build_table(store, SMALL.document)
    assert {cell.state for cell in table.cells} == {"missing"}
    assert [contrast.verdict for contrast in table.contrasts] == ["no data"]
    for render in (render_markdown, render_csv, render_latex):
        assert "kan" in render(table)


def test_one_seed_has_no_interval_anywhere(store):
    study = SyntheticStudy(
        variants=("baseline", "kan", "linear"), seeds=(3,), num_items=12, contrasts=(("kan", "linear"),)
    )
    table = build_table(store, study.fill(store))
    assert all(each.half is None for row in table.rows for each in row.scores.values())
    assert "one seed, so no interval" in table.contrasts[0].text
    assert {contrast.verdict for contrast in table.contrasts} == {"not distinguished"}


def test_pairs_from_other_hardware_precision_or_code_are_flagged(store):
    document = SMALL.fill(store)
    other = {
        "code": {"commit": "f" * 40, "dirty": True},
        "hardware": {**RECEIPT["hardware"], "device": "cuda"},
        "precision": "bfloat16",
    }
    for seed in SMALL.seeds:
        SMALL.train(store, SMALL.entry("linear", seed), receipt={**RECEIPT, **other})
    flags = build_table(store, document).contrasts[0].flags
    assert [flag.split(":")[0] for flag in flags] == [
        "precision differs", "device differs", "code differs", "code with uncommitted changes",
    ]  # fmt: skip


def test_any_other_suite_is_shown_as_it_is(store):
    study = SyntheticStudy(variants=("kan",), suites=("heldout",), contrasts=(), num_items=6)
    document = study.fill(store)
    suite = {"id": "hellaswag.1", "name": "hellaswag", "description": ""}
    extended = type(document).model_validate(
        {**document.model_dump(), "suites": [*document.model_dump()["suites"], suite]}
    )
    for seed in study.seeds:
        record = study.read_evaluation(store, "kan", seed, "heldout")
        scores = {"exact_match,none": {"value": 0.25, "unit": "", "n": 8}}
        told = record.model_dump() | {"suite": "hellaswag.1", "scores": scores, "items": {}}
        other = EvaluationRecord.model_validate(told)
        store.put(evaluation_key(record.cell, "hellaswag.1"), other.to_bytes())
    found = row_of(build_table(store, extended), "kan").scores["hellaswag.exact_match,none"]
    assert (found.mean, found.half) == (0.25, 0.0)


def test_writing_twice_changes_nothing(store):
    document = SMALL.fill(store)
    keys = write_table(store, document, build_table(store, document))
    assert sorted(key.rpartition("/")[2] for key in keys) == ["table.csv", "table.json", "table.md"]
    before = {entry.key: entry.modified for entry in store.list()}
    assert write_table(store, document, build_table(store, document)) == []
    assert {entry.key: entry.modified for entry in store.list()} == before


def test_the_table_survives_its_json(store):
    table = build_table(store, SMALL.fill(store))
    again = Table.model_validate_json(table.to_bytes())
    assert again.to_bytes() == table.to_bytes()
    assert render_markdown(again) == render_markdown(table)
    json.loads(table.to_bytes())


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.binary(max_size=20), max_size=4))
def test_order_of_writing_and_junk_change_no_byte(shuffler: random.Random, junk):
    study = SyntheticStudy(variants=("kan", "linear"), num_items=6, seeds=(0, 1), contrasts=(("kan", "linear"),))
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        one, other = FolderStore(Path(first)), FolderStore(Path(second))
        document = study.fill(one)
        objects = [(entry.key, one.get(entry.key)) for entry in one.list()]
        shuffler.shuffle(objects)
        for key, data in objects:
            other.put(key, data)
        for index, data in enumerate(junk):
            cell = shuffler.choice(document.cells).id
            folder = shuffler.choice(["attempts", "evaluations", "logs", "metrics", "checkpoints"])
            other.put(cell_key(cell, folder, f"junk-{index}.start.json"), data)
        assert build_table(other, document).to_bytes() == build_table(one, document).to_bytes()


@pytest.mark.parametrize("processors", [(), ("Test CPU",), ("Test CPU", "Another CPU")])
def test_the_terminal_rendering_fits_100_columns(store, processors):
    document = SMALL.fill(store)
    for processor in processors:
        SMALL.measure(store, "kan", processor, peak_bytes=3_123_456_789, step_s=[0.5])
    table = build_table(store, document)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_rich(table))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "majority" in text
    assert text.count("2.91 GiB") == len(processors)


def test_csv_holds_the_unrounded_figures(store):
    table = build_table(store, SMALL.fill(store))
    lines = list(csv.DictReader(io.StringIO(render_csv(table))))
    kan = next(line for line in lines if line["name"] == "kan")
    assert float(kan["heldout.cross_entropy"]) == row_of(table, "kan").scores["heldout.cross_entropy"].mean
    assert [line["name"] for line in lines if line["kind"] == "reference"] == ["chance", "majority", "empty reply"]


def test_memory_and_speed_are_the_probes_and_never_a_shared_runs(store):
    document = SMALL.fill(store)
    before = build_table(store, document)
    assert (before.hardware, [row.probes for row in before.rows]) == ([], [[], [], []])
    assert "'kallm probe synthetic' does" in before.notes[-1]
    shown = render_markdown(before)
    assert shown.count("not measured") == 2 * 3 + 1  # two figures and a line for each of two variants, and the note
    assert f"{before.cells[1].peak_bytes / 2**30:.3g} GiB" not in shown
    key = SMALL.measure(store, "kan")
    table = build_table(store, document)
    (probe,) = row_of(table, "kan").probes
    assert (probe.tokens_per_s, probe.peak_bytes, probe.counted.optimizer) == (2048.0, 3 * 2**30, 340 * 2**20)
    assert (probe.record, probe.sha256) == (key, hashlib.sha256(store.get(key)).hexdigest())
    assert probe.commit == RECEIPT["code"]["commit"]
    assert table.hardware[0].name == "Test CPU, 2 threads, torch 2"
    assert "| kan | A: Test CPU, 2 threads, torch 2 | 2,048 | 3 GiB | – | 1 GiB | 180 MiB |" in render_markdown(table)
    assert [note for note in table.notes if "not measured" in note] == [
        "Memory and speed of linear are not measured: 'kallm probe synthetic' does."
    ]


def test_figures_of_several_machines_each_name_theirs(store):
    document = SMALL.fill(store)
    SMALL.measure(store, "kan", "Slow CPU", step_s=[8.0])
    SMALL.measure(store, "kan", "Fast CPU", step_s=[2.0])
    SMALL.measure(store, "linear", "Fast CPU", step_s=[1.0])
    table = build_table(store, document)
    names = {machine.label: machine.processor for machine in table.hardware}
    assert sorted(names) == ["A", "B"]
    speeds = {(row.variant, names[probe.hardware]): probe.tokens_per_s for row in table.rows for probe in row.probes}
    assert speeds == {("kan", "Slow CPU"): 1024, ("kan", "Fast CPU"): 4096, ("linear", "Fast CPU"): 8192}
    (kan,) = [line for line in csv.DictReader(io.StringIO(render_csv(table))) if line["name"] == "kan"]
    for label, processor in names.items():
        assert float(kan[f"alone.{label}.tokens_per_s"]) == speeds["kan", processor]
        assert processor in kan[f"alone.{label}.hardware"]
    (shown,) = [line for line in render_markdown(table).splitlines() if line.startswith("| **linear**")]
    (fast,) = [label for label, processor in names.items() if processor == "Fast CPU"]
    assert f"| 8,192 {fast} |" in shown


def test_receipts_name_every_record_by_its_hash(store):
    table = build_table(store, SMALL.fill(store))
    cell = cell_of(table, "kan", 0)
    assert len(cell.records) == 4
    assert (cell.commit, cell.device, cell.precision) == (RECEIPT["code"]["commit"], "cpu", "float32")
    assert read_items(store, SMALL.read_evaluation(store, "kan", 0, "bbh-chat"))
