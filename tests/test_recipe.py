"""The schedule and the order of the rows."""

import pytest
from pydantic import ValidationError

from kallm.train.recipe import Recipe


def test_the_learning_rate_is_transformers_cosine_with_warmup() -> None:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    recipe, num_steps = Recipe(tokens=1, lr=0.3, warmup=0.1), 40
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 4, num_steps)
    for step in range(num_steps):
        expected = scheduler.get_last_lr()[0] if step >= 4 else 0.3 * (step + 1) / 4  # ours starts above zero
        assert recipe.lr_at(step, num_steps) == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("num_rows", [1, 7, 8])
def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(num_rows: int) -> None:
    recipe = Recipe(tokens=1, epochs=2, batch=3)
    steps = recipe.num_steps(num_rows)
    assert steps == 2 * -(-num_rows // 3)
    rows = [recipe.rows_of(step, num_rows, seed=5) for step in range(steps)]
    for epoch in (rows[: steps // 2], rows[steps // 2 :]):
        assert sorted(index for batch in epoch for index in batch) == list(range(num_rows))
    if num_rows > 5:
        assert rows[: steps // 2] != rows[steps // 2 :]
        assert rows[0] != recipe.rows_of(0, num_rows, seed=6)


def test_a_budget_of_zero_is_refused() -> None:
    with pytest.raises(ValidationError):
        Recipe(tokens=0)


def test_what_changes_no_weight_is_not_in_a_cells_identity() -> None:
    plain = Recipe(tokens=8).identity()
    assert Recipe(tokens=8, cache_gb=1, checkpoint_s=1, report_to=["wandb"]).identity() == plain
    assert "compile" not in plain
    assert Recipe(tokens=8, compile=True).identity() == plain | {"compile": True}
    assert Recipe(tokens=8, long_documents="drop").identity() == plain | {"long_documents": "drop"}
    assert Recipe(tokens=8, lr=0.1).identity() == plain | {"lr": 0.1}


def test_a_list_of_learning_rates_is_one_grid_in_any_order() -> None:
    plain = Recipe(tokens=8, lr=0.1)
    assert Recipe(tokens=8, lr=[0.1]) == plain
    grid = Recipe(tokens=8, lr=[1, 0.1, 0.3])
    assert (grid.lr, grid.choice, plain.choice) == ((0.1, 0.3, 1.0), (0.1, 0.3, 1.0), None)
    assert grid.identity() == plain.identity() | {"lr": [0.1, 0.3, 1.0], "lr_share": 0.1}
    assert grid.identity() == Recipe(tokens=8, lr=[0.3, 1.0, 0.1]).identity()
    assert grid.at(0.1) == plain
    assert Recipe.model_validate(grid.model_dump(mode="json")) == grid


@pytest.mark.parametrize(
    "lr", [0, -1, [], [0.1, 0], [0.1, 0.1], [0.1, -0.2], "fast", None, True, [True, 0.1], float("nan"), [[0.1]]]
)
def test_a_learning_rate_that_trains_nothing_is_refused_in_one_sentence(lr: object) -> None:
    with pytest.raises(
        ValidationError, match="expected a learning rate above 0, or a list of different ones"
    ) as refused:
        Recipe(tokens=8, lr=lr)
    assert refused.value.error_count() == 1


def test_a_share_without_a_list_is_refused() -> None:
    with pytest.raises(ValidationError, match="lr_share is for a list of learning rates"):
        Recipe(tokens=8, lr=0.1, lr_share=0.2)


def test_a_report_to_nowhere_known_is_refused() -> None:
    with pytest.raises(ValidationError, match="report_to"):
        Recipe(tokens=8, report_to=["tensorbord"])
