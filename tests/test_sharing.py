"""How cells share the trunk: the estimate, as a table."""

from dataclasses import replace

import pytest

from kallm.run.sharing import Room, Work, choose_sharing, work_of
from kallm.study.plan import make_plan
from kallm.study.study import read_study

GB = 10**9
# SmolLM2-135M's tail of five blocks; 1,000 rows of 1,024 tokens take 2.36 GB
WORK = Work(
    trunk_blocks=25,
    seeds=[0, 0, 0, 1, 1, 1],
    epochs=2,
    num_rows=1000,
    length=1024,
    batch=8,
    width=576,
    tail_parameters=46_012_608,
    trainable=46_012_608,
)
ROOM = Room(disk_bytes=100 * GB, kept_bytes=0, bound_bytes=None, memory_bytes=20 * GB, folder="there")


@pytest.mark.parametrize(
    ("work", "room", "cached", "together", "told"),
    [
        ({}, {}, True, 1, "kept on disk, 2.36 GB in there, and run once instead of 12 times (6 cells, 2 epochs)"),
        ({"seeds": [0], "epochs": 1}, {}, False, 1, "1 cell and 1 epoch read it only once"),
        ({"seeds": [0], "epochs": 2}, {}, True, 1, "run once instead of 2 times (1 cell, 2 epochs)"),
        ({"seeds": [0, 1], "epochs": 1}, {}, True, 1, "run once instead of 2 times"),
        ({}, {"bound_bytes": 3 * GB}, True, 1, "kept on disk"),
        ({}, {"bound_bytes": 2 * GB}, False, 3, "for 3 cells in lockstep: its output would take 2.36 GB, but "
         "train.cache_gb allows 2; so the trunk goes over the corpus 4 times (6 cells, 2 epochs)"),
        ({}, {"bound_bytes": 0}, False, 3, "train.cache_gb allows 0"),
        ({}, {"disk_bytes": 2 * GB}, False, 3, "but the disk of there has room for 2"),
        ({}, {"disk_bytes": 2 * GB, "kept_bytes": GB}, True, 1, "kept on disk"),
        ({}, {"disk_bytes": 0, "kept_bytes": WORK.hidden_bytes}, True, 1, "kept on disk"),
        ({}, {"disk_bytes": 0, "memory_bytes": 2_600_000_000}, False, 2, "takes 0.552 GB and 2.6 GB of memory"),
        ({}, {"disk_bytes": 0, "memory_bytes": GB}, False, 1, "cell by cell: its output"),
        ({"seeds": [0, 1, 2]}, {"disk_bytes": 0, "memory_bytes": GB}, False, 1, "so the trunk goes over the corpus 6"),
        ({"alone": "wandb is one"}, {"disk_bytes": 0}, False, 1, "wandb is one; so the trunk goes over the corpus 12"),
        ({"alone": "wandb is one"}, {}, True, 1, "kept on disk"),
        ({"trunk_blocks": 0}, {}, False, 1, "the tail is the whole model"),
    ],
)  # fmt: skip
def test_the_choice_follows_from_cells_epochs_disk_and_memory(work, room, cached, together, told) -> None:
    found = choose_sharing(replace(WORK, **work), replace(ROOM, **room))
    assert (found.cached, found.together) == (cached, together)
    assert found.why.startswith("trunk: ")
    assert told in found.why
    assert "\n" not in found.why


def test_seeds_of_different_numbers_of_cells_share_as_many_passes_as_the_largest() -> None:
    assert replace(WORK, seeds=[0, 0, 0, 1]).num_passes(3) == 2 * 2
    assert replace(WORK, seeds=[0, 0, 0, 1]).num_passes(2) == 2 * 3
    assert choose_sharing(replace(WORK, seeds=[0, 0, 0, 1]), replace(ROOM, bound_bytes=0)).together == 3


@pytest.mark.parametrize("trainable", ["ffn", "tail", "tail+head"])
def test_a_plans_estimate_counts_what_its_tails_really_hold(study_text: str, trainable: str, model_folder) -> None:
    import torch

    from kallm.model.retrofit import RetrofitConfig, retrofit_
    from kallm.model.sources import load_model
    from kallm.model.start import freeze
    from kallm.model.trunk import split

    plan = make_plan(read_study(study_text, [f"trainable={trainable}", 'train.report_to=["tensorboard"]']))
    cell = next(each for each in plan.cells if each.name == "small-kan")
    tail = split(load_model(plan.model, torch.float32), plan.num_tail_blocks)[1]
    retrofit_(tail, RetrofitConfig(ffn=cell.variant.spec, layers="all"))
    freeze(tail, trainable)
    work = work_of(plan, [cell], num_rows=10, trunk_blocks=3)
    assert work.tail_parameters == sum(parameter.numel() for parameter in tail.parameters())
    assert work.trainable == sum(each.numel() for each in tail.parameters() if each.requires_grad)
    assert work.hidden_bytes == 10 * 64 * 48 * 4
    assert work.alone is None
    assert list(work.seeds) == [0]


def test_reporters_with_one_run_a_process_keep_cells_apart(study_text: str) -> None:
    plan = make_plan(read_study(study_text, ['train.report_to=["tensorboard","wandb"]']))
    work = work_of(plan, plan.cells[1:], num_rows=10, trunk_blocks=3)
    assert work.alone == "train.report_to names wandb, where one cell at a time reports"
