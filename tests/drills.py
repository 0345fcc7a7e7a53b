"""What the tests of faults and scripts/drill-store share: a tiny study, runs in forked processes, what must hold."""

import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import make_model, make_tokenizer
from faults import LEFT, FaultStore, Moment, leave, refuse

from kallm.errors import ExitCode, KallmError
from kallm.progress import Reporter, Stop
from kallm.results.record import EvaluationRecord, TrainingRecord, cell_key, evaluation_key, read_items, read_record
from kallm.run.local import run_cells
from kallm.store.commit import fetch, list_manifests, read_manifest
from kallm.store.local import FolderStore
from kallm.store.store import Store
from kallm.study.plan import Plan, make_plan
from kallm.study.study import read_study

__all__ = [
    "Crash",
    "assert_whole",
    "committed_steps",
    "crash_and_continue",
    "flipped",
    "in_child",
    "make_sources",
    "plan_tiny",
    "refuse_and_continue",
    "results",
    "run_in_child",
    "tiny_text",
    "trained_steps",
    "warm_up",
]

_LONGEST_S = 120


def make_sources(folder: Path) -> tuple[Path, Path]:
    """Write a tiny model and some dialogues; return their folders."""
    model, dialogues = folder / "model", folder / "dialogues"
    make_model(num_hidden_layers=2).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    dialogues.mkdir()
    for split, count in (("train", 12), ("heldout", 3)):
        said = [[("user", f"is {number} {split}?"), ("assistant", f"no, {number + 1}")] for number in range(count)]
        lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) for turns in said]
        (dialogues / f"{split}.jsonl").write_text("\n".join(lines))
    return model, dialogues


def tiny_text(sources: tuple[Path, Path], *, steps: int) -> str:
    """Return a study of one cell that trains and one that does not, with checkpoints as often as can be."""
    model, dialogues = sources
    return f"""
name: drill
model: {model}
tail: 1
dialogues: {{source: {dialogues}, heldout: 2}}
variants:
  - baseline
  - small-kan: {{ffn: kan, basis: chebyshev2, degree: 2, hidden: 8}}
seeds: [0]
train: {{tokens: {32 * steps}, length: 32, batch: 1, micro_batch: 1, lr: 0.01, checkpoint_s: 1.0e-9}}
suites: [heldout]
"""


def plan_tiny(sources: tuple[Path, Path], *, steps: int = 4) -> Plan:
    """Plan that study."""
    return make_plan(read_study(tiny_text(sources, steps=steps)))


def warm_up(plan: Plan) -> None:
    """Run a study once in this process, so that forked ones find all modules and the trunk's cache ready."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Reporter(quiet=True) as reporter:
        run_cells(plan, list(plan.cells), FolderStore(Path(folder)), reporter, Stop())
    torch.set_num_threads(threads)


def in_child(action: Callable[[], None]) -> int:
    """Do something in a forked process with one thread; return how it ended, as a shell would tell."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code if code >= 0 else 128 - code
    code = 70
    try:
        signal.alarm(_LONGEST_S)
        gc.freeze()  # what the parent left is never garbage here, and looking for it costs a third of a second
        torch.set_num_threads(1)
        action()
        code = 0
    except KallmError as error:
        code = int(error.code)
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_in_child(plan: Plan, store: Store, said: Path) -> int:
    """Run a whole study in a forked process, leave its lines and its error in a file, and return how it ended."""

    def action() -> None:
        with said.open("w") as file, Reporter(quiet=True) as reporter:
            try:
                run_cells(plan, list(plan.cells), store, reporter, Stop())
            except KallmError as error:
                reporter.say(f"{type(error).__name__}: {error}")
                raise
            finally:
                file.write("".join(f"{line}\n" for line in reporter.lines))

    return in_child(action)


def results(plan: Plan, store: Store) -> dict[str, object]:
    """Return all that must not depend on interruptions: weights by hash, losses, counts and scores."""
    found: dict[str, object] = {}
    for cell in plan.cells:
        record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        if cell.variant.trained:
            assert record is not None, f"{cell.id} is not trained"
            found[cell.id] = (record.weights["sha256"], record.loss_history, record.tokens, record.supervised_tokens)
        for suite in plan.suites:
            evaluation = read_record(store, EvaluationRecord, evaluation_key(cell.id, suite))
            assert evaluation is not None, f"{cell.id} is not evaluated"
            found[f"{cell.id} {suite}"] = (evaluation.scores, evaluation.weights, evaluation.items["sha256"])
    return found


def assert_whole(plan: Plan, store: Store) -> None:
    """Check that what counts as committed is there with its hashes: manifests, records, items."""
    for prefix in list_manifests(store, "cells"):
        manifest = read_manifest(store, prefix)
        assert manifest is not None
        with tempfile.TemporaryDirectory() as folder:
            fetch(store, manifest, Path(folder))
    for cell in plan.cells:
        record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        if record is not None:
            manifest = read_manifest(store, record.weights["manifest"])
            assert manifest is not None
            assert [file.sha256 for file in manifest.files.values()] == [record.weights["sha256"]]
        for suite in plan.suites:
            evaluation = read_record(store, EvaluationRecord, evaluation_key(cell.id, suite))
            if evaluation is not None:
                assert len(read_items(store, evaluation)) == evaluation.items["count"]


def committed_steps(plan: Plan, store: Store) -> dict[str, int]:
    """Return for each cell the last step that need never be repeated."""
    found: dict[str, int] = {}
    for cell in plan.cells:
        record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        names = [name.rpartition("/")[2] for name in list_manifests(store, cell_key(cell.id, "checkpoints"))]
        steps = [int(name.partition("-")[0]) for name in names]
        found[cell.id] = record.steps if record is not None else max(steps, default=0)
    return found


def trained_steps(plan: Plan, store: Store) -> dict[str, list[int]]:
    """Return the steps that each attempt's metrics tell of, by the metrics' key."""
    found: dict[str, list[int]] = {}
    for cell in plan.cells:
        for entry in store.list(cell_key(cell.id, "metrics/")):
            lines = (store.get(entry.key) or b"").decode().splitlines()
            found[entry.key] = [int(json.loads(line)["step"]) for line in lines]
    return found


def flipped(data: bytes, bit: int) -> bytes:
    """Return bytes with one bit turned over, counted from the first byte's lowest."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@dataclass(frozen=True)
class Crash:
    """One place of a matrix: whether the process met its fault, and which call it was."""

    met: bool
    call: str


def crash_and_continue(plan: Plan, expected: dict[str, object], folder: Path, *, at: int, moment: Moment) -> Crash:
    """End a study's process at its n-th call to the store, run it again, and check that nothing tells the difference.

    Raises:
        AssertionError: the second run fails, ends differently, or repeats a step that was committed.
    """
    store = FolderStore(folder / "store")
    faulty = FaultStore(store, leave, at=at, moment=moment, log=folder / "calls.txt")
    code = run_in_child(plan, faulty, folder / "first.txt")
    calls = (folder / "calls.txt").read_text().splitlines()
    if code == 0:
        return Crash(met=False, call="")
    assert code == LEFT, f"the first run ended with {code}"
    place = f"{moment} call {at}: {calls[at]}"
    committed, told = committed_steps(plan, store), trained_steps(plan, store)
    again = run_in_child(plan, store, folder / "again.txt")
    assert again == 0, f"{place}: the second run ended with {again}"
    assert results(plan, store) == expected, f"{place}: the results differ"
    assert_whole(plan, store)
    for key, steps in trained_steps(plan, store).items():
        if key not in told and steps:
            last = committed[key.split("/")[1]]
            assert steps[0] == last + 1, f"{place}: step {last} was committed, but the second run began at {steps[0]}"
    return Crash(met=True, call=calls[at])


def refuse_and_continue(plan: Plan, expected: dict[str, object], folder: Path, *, at: int, lasting: bool) -> Crash:
    """Let the n-th call of a study fail (and all later ones), run it again, and check that nothing is half-committed.

    Raises:
        AssertionError: the first run does not end with 76, what is left is not whole, or the second ends differently.
    """
    store = FolderStore(folder / "store")
    faulty = FaultStore(store, refuse, at=at, lasting=lasting, log=folder / "calls.txt")
    code = run_in_child(plan, faulty, folder / "first.txt")
    calls = (folder / "calls.txt").read_text().splitlines()
    if len(calls) <= at:
        return Crash(met=False, call="")
    place = f"call {at}: {calls[at]}"
    assert code == ExitCode.STORAGE_UNAVAILABLE, f"{place}: the run ended with {code}"
    assert_whole(plan, store)
    again = run_in_child(plan, store, folder / "again.txt")
    assert again == 0, f"{place}: the second run ended with {again}"
    assert results(plan, store) == expected, f"{place}: the results differ"
    return Crash(met=True, call=calls[at])
