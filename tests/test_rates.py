"""The choice among learning rates is the best of trials that know nothing of each other, and is made once."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kallm.data.packing import IGNORED, encode, pack
from kallm.data.validation import split_validation
from kallm.errors import Diverged, Preempted
from kallm.model.start import start_tail
from kallm.progress import Reporter, Stop
from kallm.results.alone import tell_edge
from kallm.results.inventory import find_unnamed, list_steps
from kallm.results.record import ChoiceRecord, TrainingRecord, cell_key, choice_key, read_record, record_study
from kallm.results.render import render_markdown
from kallm.results.table import build_table, write_table
from kallm.results.verify import verify_study
from kallm.run.materials import Materials
from kallm.run.rates import Trials, choose_rate
from kallm.store.local import FolderStore
from kallm.study.plan import Cell, Plan, make_plan
from kallm.study.study import read_study
from kallm.train.loop import Progress, Trainer, make_optimizer

RATES = (0.0003, 0.003, 0.03)


@dataclass
class Place:
    """A plan with its materials, and an empty store."""

    plan: Plan
    materials: Materials
    store: FolderStore

    def cell(self, variant: str = "small-kan", seed: int = 0) -> Cell:
        return next(each for each in self.plan.cells if (each.name, each.seed) == (variant, seed))

    def choose(self, cell: Cell, stop: Stop | None = None) -> float:
        return choose_rate(cell, self.store, self.materials, self.materials.reporter, stop or Stop())

    def record(self, cell: Cell) -> ChoiceRecord:
        found = read_record(self.store, ChoiceRecord, choice_key(cell.choice or ""))
        assert found is not None
        return found


@pytest.fixture
def make_place(study_text: str, tmp_path: Path):
    def make(*overrides: str, name: str = "store") -> Place:
        settings = ["seeds=[0,1]", "train.lr_share=0.5", *overrides]
        plan = make_plan(read_study(study_text, settings))
        return Place(plan, Materials(plan, Reporter(quiet=True), lambda: None), FolderStore(tmp_path / name))

    return make


@pytest.fixture
def place(make_place) -> Place:
    return make_place(f"train.lr={[*RATES]}")


@pytest.fixture
def no_trials(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Trials, lr: float) -> None:
        raise AssertionError("a trial was made")

    return lambda: monkeypatch.setattr(Trials, "run", refuse)


def nats_by_hand(place: Place, lr: float) -> float:
    """Train one tail alone, and judge it by the whole logits in float64."""
    plan, materials = place.plan, place.materials
    recipe = plan.study.train.at(lr)
    rows = []
    for side in split_validation(plan.dialogues, materials.dialogues.train):
        rows.append(
            pack(side, lambda c: encode(materials.tokenizer, c), length=64, num_tokens=recipe.tokens // 2, padding_id=2)
        )
    trunk, tail = materials.trunk_pass.trunk, materials.new_tail()
    start_tail(tail, place.cell().variant.spec, materials.ffn_inputs, seed=0)
    hidden = [trunk(row.passage) for row in rows[0]]
    trainer = Trainer(tail, make_optimizer(tail, recipe), rows[0], hidden, recipe, seed=0, progress=Progress())
    while not trainer.is_done:
        trainer.advance(lambda: None)
    tail.eval()
    summed, count = 0.0, 0
    with torch.no_grad():
        for row in rows[1]:
            logits = tail.head(tail(trunk(row.passage)[None], row.passage.position_ids[None]))[0].double()
            summed += float(F.cross_entropy(logits, row.targets, ignore_index=IGNORED, reduction="sum"))
            count += row.num_supervised
    return summed / count


def test_the_choice_is_the_best_of_trials_run_alone(place: Place) -> None:
    expected = {lr: nats_by_hand(place, lr) for lr in RATES}
    chosen, record = place.choose(place.cell()), place.record(place.cell())
    assert {trial.lr: trial.nats for trial in record.trials} == pytest.approx(expected, rel=1e-5)
    assert chosen == record.lr == min(expected, key=lambda lr: expected[lr])
    assert [entry.key for entry in place.store.list("choices/")] == [choice_key(place.cell().choice)]


def test_a_second_cell_makes_no_trial(place: Place, no_trials) -> None:
    chosen = place.choose(place.cell())
    no_trials()
    assert place.choose(place.cell(seed=1)) == chosen
    with pytest.raises(AssertionError, match="a trial was made"):
        place.choose(place.cell("linear"))


def test_one_rate_makes_no_trial(make_place, no_trials) -> None:
    no_trials()
    other = make_place("train.lr=[0.01]", "train.lr_share=0.1")
    assert other.cell().choice is None
    assert other.choose(other.cell()) == 0.01
    assert list(other.store.list()) == []


def test_an_exploding_rate_is_never_chosen(make_place) -> None:
    place = make_place("train.lr=[0.003, 1e30]")
    assert place.choose(place.cell()) == 0.003
    exploded = place.record(place.cell()).trials[1]
    assert (exploded.lr, exploded.nats) == (1e30, None)
    assert exploded.cause


def test_where_every_rate_explodes_the_cells_diverge_and_say_so(make_place, no_trials) -> None:
    place = make_place("train.lr=[1e29, 1e30]")
    with pytest.raises(Diverged, match=r"every learning rate of train.lr diverged when it was tried \(1e\+29: "):
        place.choose(place.cell())
    no_trials()
    with pytest.raises(Diverged, match="every learning rate"):
        place.choose(place.cell(seed=1))
    for seed in (0, 1):
        record = read_record(place.store, TrainingRecord, cell_key(place.cell(seed=seed).id, "trained.json"))
        assert record is not None
        assert (record.outcome, record.choice) == ("diverged", choice_key(place.cell().choice))


def test_a_choice_that_was_stopped_goes_on_trial_by_trial_to_the_same_bytes(place: Place, make_place) -> None:
    whole = make_place(f"train.lr={[*RATES]}", name="whole")
    whole.choose(whole.cell())

    class Once(Stop):
        def __call__(self) -> None:
            if len(list(place.store.list("choices/"))) == 1:
                raise Preempted("stopped")

    with pytest.raises(Preempted):
        place.choose(place.cell(), Once())
    (done,) = place.store.list("choices/")
    before = place.store.get(done.key)
    place.choose(place.cell())
    key = choice_key(place.cell().choice)
    assert place.store.get(key) == whole.store.get(key)
    assert f'"lr": {RATES[0]}'.encode() in before


def test_the_global_random_state_is_left_alone(place: Place) -> None:
    before = torch.get_rng_state()
    place.choose(place.cell())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("lr", "told"),
    [
        (None, ""),
        (1e-3, ""),
        (3e-3, "; 0.003 is the highest that was tried, so a higher one may do better"),
        (3e-4, "; 0.0003 is the lowest that was tried, so a lower one may do better"),
    ],
)
def test_a_rate_at_an_end_of_the_list_is_said_to_be_one(lr: float | None, told: str) -> None:
    assert tell_edge(lr, [3e-4, 1e-3, 3e-3]) == told


def test_table_verify_gc_and_copy_know_the_choice(place: Place) -> None:
    document, store, cell = place.plan.document, place.store, place.cell()
    record_study(store, document)
    chosen = place.choose(cell)
    table = build_table(store, document)
    rows = {row.variant: row for row in table.rows}
    assert (rows["small-kan"].lr, rows["linear"].lr, rows["baseline"].lr) == (chosen, None, None)
    assert [lr for lr, _ in rows["small-kan"].choice.trials] == [*RATES]
    assert f"| {chosen:g} (chosen) |" in render_markdown(table)
    assert any(note.startswith(f"small-kan took learning rate {chosen:g}: {RATES[0]:g} gave ") for note in table.notes)
    write_table(store, document, table)
    assert verify_study(store, document)[0] == []
    assert find_unnamed(store) == ([], [])
    key = choice_key(cell.choice)
    assert [step.kind for step in list_steps(store, document) if step.key == key] == ["record"]
    store.put(f"choices/{cell.choice}/0.1.json", b"left behind")
    assert [entry.key for entry, _ in find_unnamed(store)[0]] == [f"choices/{cell.choice}/0.1.json"]
    store.put(key, store.get(key).replace(b'"steps": ', b'"steps": 1'))
    assert all(key in line for line in verify_study(store, document)[0])
    assert verify_study(store, document)[0]
    shutil.rmtree(store.root / "choices")
    assert verify_study(store, document)[0] == [f"{key}: is missing, but table.json names it"]
