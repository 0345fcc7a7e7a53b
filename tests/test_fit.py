"""The closed-form start: what it recovers exactly, what it improves, and that it is the same every time."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, make_architecture
from conftest import make_model
from test_run import StopAfter, results, run
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kallm.errors import Preempted, WrongConfiguration
from kallm.kan.spec import parse_spec
from kallm.model.fit import CalibrationRow, fit_tail_
from kallm.model.places import find_ffns, put_ffn_
from kallm.model.trunk import Passage, Tail, split
from kallm.store.opening import open_store
from kallm.study.plan import make_plan
from kallm.study.study import read_study

SPECS: dict[str, dict[str, Any]] = {
    "affine": {"ffn": "affine"},
    "kan": {"ffn": "kan", "basis": "chebyshev2", "degree": 2},
    "kan deep": {"ffn": "kan", "basis": "bspline", "size": 3, "hidden": [20, 31]},
    "kan mix": {
        "ffn": "kan",
        "layers": [{"parallel": [{"basis": "legendre", "degree": 2}, {"basis": "rbf", "size": 2}]}],
    },
    "kan-384x3": {"ffn": "kan", "basis": "chebyshev2", "degree": 2, "hidden": 32, "constants": "stored"},
    "kat": {"ffn": "kat", "hidden": 32},
    "mlp": {"ffn": "mlp", "hidden": 64},
    "swiglu small": {"ffn": "swiglu", "hidden": 48},
    "swiglu large": {"ffn": "swiglu", "hidden": 120},
}


def make_text(
    model: PreTrainedModel, cut: int, rows: int = 6, vocabulary: int = 259
) -> tuple[list[CalibrationRow], Tail]:
    """Return rows of random tokens behind the trunk, and the tail."""
    trunk, tail = split(model, cut)
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(rows):
        passage = Passage(torch.randint(3, vocabulary, (40,), generator=generator), torch.arange(40))
        found.append(CalibrationRow(trunk(passage), passage.position_ids, torch.arange(40) < 37))
    return found, tail


def make_loud_model() -> PreTrainedModel:
    """Return a model whose FFNs change what it says."""
    model = make_model()
    for ffn in find_ffns(model).values():
        for parameter in ffn.parameters():
            parameter.data *= 10
    return model


def outputs(tail: Tail, rows: list[CalibrationRow]) -> Tensor:
    with torch.no_grad():
        return torch.cat([tail(row.hidden[None], row.position_ids[None])[0] for row in rows])


def fitted(tail: Tail, name: str, rows: list[CalibrationRow], seed: int = 0) -> Tail:
    student = copy.deepcopy(tail)
    fit_tail_(student, parse_spec(SPECS[name]), rows, seed=seed)
    return student


@pytest.mark.parametrize("name", SPECS)
def test_every_fresh_ffn_comes_nearer_to_the_teacher_than_none_does(name: str) -> None:
    rows, tail = make_text(make_loud_model(), 2)
    removed = copy.deepcopy(tail)
    fit_tail_(removed, parse_spec({"ffn": "removed"}), rows, seed=0)
    teacher = outputs(tail, rows)
    distance, without = (F.mse_loss(outputs(each, rows), teacher) for each in (fitted(tail, name, rows), removed))
    assert distance < 0.7 * without


def test_an_affine_teacher_is_recovered() -> None:
    rows, tail = make_text(make_model(), 2)
    torch.manual_seed(1)
    for name in find_ffns(tail):
        put_ffn_(tail, name, torch.nn.Linear(48, 48))
    teacher = {name: copy.deepcopy(ffn) for name, ffn in find_ffns(tail).items()}
    fit_tail_(tail, parse_spec(SPECS["affine"]), rows, seed=0)
    for name, ffn in find_ffns(tail).items():
        torch.testing.assert_close(ffn.linear.weight, teacher[name].weight, atol=2e-3, rtol=0)
        torch.testing.assert_close(ffn.linear.bias, teacher[name].bias, atol=2e-3, rtol=0)


@pytest.mark.parametrize("hidden", [96, 120])
def test_a_swiglu_that_keeps_all_neurons_is_the_teacher(hidden: int) -> None:
    rows, tail = make_text(make_loud_model(), 2)
    teacher = outputs(tail, rows)
    fit_tail_(tail, parse_spec({"ffn": "swiglu", "hidden": hidden}), rows, seed=0)
    torch.testing.assert_close(outputs(tail, rows), teacher, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["kan", "kat", "swiglu large"])
def test_a_fitted_start_depends_on_the_seed_alone(name: str) -> None:
    rows, tail = make_text(make_model(), 2)

    def weights() -> list[Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        return list(fitted(tail, name, rows).state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


def test_attention_and_norms_stay_and_every_parameter_may_train() -> None:
    rows, tail = make_text(make_model(), 2)
    student = fitted(tail, "kan", rows)
    ffns = tuple(find_ffns(student))
    kept = {name: value for name, value in student.named_parameters() if not name.startswith(ffns)}
    before = dict(tail.named_parameters())
    assert kept
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"opt"}))  # whose base model trunk and tail do not know
def test_the_tails_of_other_architectures_can_be_fitted(name: str) -> None:
    model = make_architecture(name, **({"final_logit_softcapping": None} if name == "gemma2" else {}))
    for ffn in find_ffns(model).values():
        for parameter in ffn.parameters():
            parameter.data *= 8
    rows, tail = make_text(model, 2, vocabulary=VOCABULARY)
    teacher = outputs(tail, rows)
    distances = []
    for spec in (SPECS["kan"], {"ffn": "removed"}):
        student = copy.deepcopy(tail)
        fit_tail_(student, parse_spec(spec), rows, seed=0)
        distances.append(F.mse_loss(outputs(student, rows), teacher))
    assert distances[0] < distances[1]


def test_text_without_a_token_that_counts_is_refused() -> None:
    rows, tail = make_text(make_model(), 2)
    with pytest.raises(WrongConfiguration, match="none of its tokens has a target"):
        fit_tail_(tail, parse_spec(SPECS["kan"]), [row._replace(counts=row.counts & False) for row in rows], seed=0)


def test_a_fitted_study_begins_nearer_and_is_another_cell(study_text: str, tmp_path: Path) -> None:
    drawn, plan = (make_plan(read_study(study_text, [f"start={start}"])) for start in ("random", "fitted"))
    assert {cell.id for cell in plan.cells} & {cell.id for cell in drawn.cells} == {plan.cells[0].id}
    assert plan.cells[1].identity["calibration_tokens"] == 32_768
    assert "calibration_tokens" not in drawn.cells[1].identity
    store = open_store(tmp_path / "whole", writable=True)
    run(plan, store)
    whole = results(plan, store)
    assert len(whole) == 5
    stopped = open_store(tmp_path / "stopped", writable=True)
    with pytest.raises(Preempted):
        run(plan, stopped, StopAfter(26))
    run(plan, stopped)
    assert results(plan, stopped) == whole
