"""The loop against a plain one, several processes against one, and the rule of divergence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.nn import functional as F
from training import RECIPE, make_rows, make_trainer

from kallm.data.packing import IGNORED
from kallm.errors import Diverged, Preempted, WrongConfiguration
from kallm.train.attention import measure_leak
from kallm.train.loop import Progress, Trainer, _check_history, train
from kallm.train.workers import Workers


def finish(trainer: Trainer) -> list[tuple[int, float]]:
    train(trainer, after_step=lambda progress, figures: None, stop=lambda: None)
    return trainer.progress.history


def run_training(folder: Path, *, num: int, batch: int) -> list[subprocess.CompletedProcess[str]]:
    """Run the training in several processes on this machine's CPU."""
    return run_processes(
        [sys.executable, str(Path(__file__).with_name("training.py")), str(folder), str(batch)], num=num
    )


def test_training_equals_a_plain_loop_over_full_logits_and_whole_batches() -> None:
    tail, trainer = make_trainer()
    losses = [loss for _, loss in finish(trainer)]
    other, _ = make_trainer()
    rows, hidden = make_rows(), trainer._hidden
    optimizer = torch.optim.AdamW(other.parameters(), lr=RECIPE.lr, betas=RECIPE.betas, weight_decay=0)
    other.train()
    for step in range(trainer.num_steps):
        batch = RECIPE.rows_of(step, len(rows), 4)
        positions = torch.stack([rows[i].passage.position_ids for i in batch])
        logits = other.head(other(torch.stack([hidden[i] for i in batch]), positions))
        targets = torch.stack([rows[i].targets for i in batch])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), RECIPE.clip)
        optimizer.param_groups[0]["lr"] = RECIPE.lr_at(step, trainer.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(tail.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)


def test_the_loss_does_not_depend_on_how_a_batch_is_divided() -> None:
    whole = finish(make_trainer(RECIPE.model_copy(update={"micro_batch": 3}))[1])
    parts = finish(make_trainer(RECIPE.model_copy(update={"micro_batch": 1}))[1])
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-4)


def test_flattened_rows_give_what_a_batch_of_rows_gives() -> None:
    batch, flat = (make_trainer(flat=flat)[1] for flat in (False, True))
    torch.testing.assert_close(flat.forward([0, 3, 5]), batch.forward([0, 3, 5]), rtol=1e-5, atol=0)


def test_a_leak_between_documents_is_seen() -> None:
    tail, trainer = make_trainer()
    row, hidden = trainer._rows[0], trainer._hidden[0]
    assert measure_leak(tail, row, hidden) < 1e-5
    forward = tail.forward
    tail.forward = lambda values, positions: forward(values, torch.arange(values.shape[1])[None])
    assert measure_leak(tail, row, hidden) > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("KALLM_SLOW"), reason="compiles C++: set KALLM_SLOW=1")
def test_a_compiled_tail_keeps_documents_apart_and_gives_the_same_loss() -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    plain, compiled = (make_trainer(RECIPE.model_copy(update={"compile": c}))[1] for c in (False, True))
    torch.testing.assert_close(compiled.forward([0, 1]), plain.forward([0, 1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [3, 4])
def test_two_processes_give_the_loss_and_the_weights_of_one(tmp_path: Path, batch: int) -> None:
    done = run_training(tmp_path, num=2, batch=batch)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    tail, trainer = make_trainer(RECIPE.model_copy(update={"batch": batch}))
    alone = finish(trainer)
    assert first["num"] == 2
    assert first["history"] == second["history"]
    assert [loss for _, loss in first["history"]] == pytest.approx([loss for _, loss in alone], rel=1e-4)
    for name, value in tail.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-2, atol=2e-3)


def test_more_processes_than_rows_of_a_batch_are_refused_before_training(tmp_path: Path) -> None:
    done = run_training(tmp_path, num=2, batch=1)
    for process in done:
        assert process.returncode != 0
        assert "2 processes cannot share a batch of 1 rows: start at most 1, or raise train.batch" in process.stderr


def test_a_stop_in_the_middle_of_a_step_leaves_the_next_try_equal() -> None:
    undisturbed = finish(make_trainer()[1])
    _, trainer = make_trainer()
    polls = iter([False, True])

    def stop() -> None:
        if next(polls, False):
            raise Preempted("stopped")

    with pytest.raises(Preempted):
        trainer.advance(stop)
    assert trainer.progress == Progress()
    assert finish(trainer) == undisturbed


def test_a_step_tells_its_batch_and_cells_of_one_seed_see_the_same() -> None:
    hashes = []
    for lr in (0.02, 0.001):
        _, trainer = make_trainer(RECIPE.model_copy(update={"lr": lr}))
        hashes.append([trainer.advance(lambda: None)["batch"] for _ in range(trainer.num_steps)])
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) > len(hashes[0]) // 2


def test_several_tails_in_lockstep_equal_each_alone() -> None:
    recipes = [RECIPE, RECIPE.model_copy(update={"lr": 0.005})]
    alone = [finish(make_trainer(recipe)[1]) for recipe in recipes]
    together = [make_trainer(recipe)[1] for recipe in recipes]
    while not together[0].is_done:
        for trainer in together:
            trainer.advance(lambda: None)
    assert [trainer.progress.history for trainer in together] == alone


def test_a_loss_above_its_start_for_long_is_divergence() -> None:
    def history(losses: list[float]) -> list[tuple[int, float]]:
        return list(enumerate(losses, start=1))

    for losses in ([3.0] + [3.9] * 40, [3.0] + [9.0] * 9, [3.0] + [9.0] * 2 + [2.0] * 20, [12.0] + [11.0] * 30):
        for end in range(1, len(losses) + 1):
            _check_history(history(losses[:end]), 100)
    with pytest.raises(Diverged, match=r"4\.1 nats on the mean of the 10 steps to step 11, 3 at the first step"):
        _check_history(history([3.0] + [4.1] * 10), 100)
    _check_history(history([3.0] + [4.1] * 10), 1000)  # a tenth of this training is longer


def test_a_loss_out_of_the_numbers_is_divergence() -> None:
    _, trainer = make_trainer(RECIPE.model_copy(update={"lr": 1e30}))
    with pytest.raises(Diverged, match="the loss is nan"):
        finish(trainer)


def test_one_process_alone_sends_nothing() -> None:
    workers = Workers()
    assert (workers.num, workers.is_main, workers.share([5, 6]), workers.sum_value(2.5)) == (1, True, [5, 6], 2.5)
    with pytest.raises(WrongConfiguration, match="1 processes cannot share a batch of 0 rows"):
        workers.check(0)
