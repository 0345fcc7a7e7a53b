"""The suite ``edges``: what it keeps of each KAN layer, against the layers themselves on what they read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Count
from test_heldout import CONVERSATIONS, make_halves
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kallm.engine.subject import Subject
from kallm.evaluate.edges import find_layers
from kallm.evaluate.suites import SUITES, Context, Evaluation
from kallm.kan.edges import Edges
from kallm.kan.spec import parse_spec
from kallm.model.retrofit import RetrofitConfig, retrofit_
from kallm.model.trunk import Trunk, assembled

SUITE = SUITES["edges"]
SPEC = parse_spec({"ffn": "kan", "basis": "chebyshev2", "degree": 2, "hidden": 16})


def evaluate(trunk: Trunk, subject: Subject, folder: Path, **settings: int) -> Evaluation:
    context = Context(trunk, subject.tokenizer, "tiny", folder, CONVERSATIONS)
    prepared, progress = SUITE.prepare(SUITE.settings(**settings), context), Count()
    evaluation = SUITE.evaluate(prepared, subject, progress, lambda: None)
    assert progress.done == prepared.num_items
    return evaluation


@pytest.fixture(scope="module")
def halves(tokenizer: PreTrainedTokenizerBase) -> tuple[Trunk, Subject]:
    trunk, subject = make_halves(tokenizer, torch.float32)
    retrofit_(subject.tail, RetrofitConfig(ffn=SPEC, layers="all"), generator=torch.Generator().manual_seed(1))
    return trunk, subject


def read_inputs(subject: Subject, tokens: int) -> dict[str, Tensor]:
    """Return what the layers of the whole model read, by their names there."""
    found: dict[str, list[Tensor]] = {}
    text = [subject.tokenizer.apply_chat_template(list(each.messages), tokenize=False) for each in CONVERSATIONS]
    rows = [subject.tokenizer(each, add_special_tokens=False)["input_ids"] for each in text]
    with assembled(subject.model, subject.tail) as whole, torch.no_grad():
        layers = find_layers(whole)
        hooks = [
            layer.register_forward_pre_hook(lambda _, given, name=name: found.setdefault(name, []).append(given[0][0]))
            for name, layer in layers.items()
        ]
        for ids in rows:
            whole(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts)[:tokens] for name, parts in found.items()}


def test_items_tell_what_the_layers_do_on_what_they_read(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    trunk, subject = halves
    found = evaluate(trunk, subject, tmp_path, tokens=300, functions=4)
    inputs = read_inputs(subject, 300)
    layers = find_layers(subject.tail)
    assert (
        [item["id"] for item in found.items]
        == list(inputs)
        == ["model.layers.2.mlp.layers.0", "model.layers.2.mlp.layers.1"]
    )
    for item, layer in zip(found.items, layers.values(), strict=True):
        rows = inputs[item["id"]]
        edges = Edges(layer, rows)
        explained = edges.explain(shares=(0.01, 0.1))
        assert item["rows"] == 300
        assert item["explained"]["lines"] == pytest.approx(explained.lines, abs=1e-4)
        assert item["explained"]["degrees"] == pytest.approx(explained.degrees, abs=1e-4)
        assert item["explained"]["strongest_10"] == pytest.approx(explained.strongest[0.1], abs=1e-4)
        strongest = edges.rank(4)
        assert [(f["output"], f["input"]) for f in item["functions"]] == [(e.output, e.input) for e in strongest]
        for function in item["functions"]:
            values = rows[:, function["input"]].numpy()
            low, high = function["low"], function["high"]
            assert [low, high] == pytest.approx(np.quantile(values, [0.005, 0.995]), rel=1e-3, abs=1e-3)
            counts, _ = np.histogram(values, bins=len(function["histogram"]), range=(low, high))
            assert np.abs(np.array(function["histogram"]) - counts).sum() <= 6  # values at the edge of a bin
            grid = torch.zeros(len(function["curve"]), rows.shape[1])
            grid[:, function["input"]] = torch.linspace(low, high, len(grid))
            (edge,) = [e for e in strongest if (e.output, e.input) == (function["output"], function["input"])]
            assert function["curve"] == pytest.approx(edges.sample([edge], grid)[0].tolist(), abs=1e-3)


def test_scores_are_means_over_layers_in_percent(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    found = evaluate(*halves, tmp_path)
    assert set(found.scores) == {"lines", "strongest_1", "strongest_10"}
    for name, score in found.scores.items():
        assert score.value == pytest.approx(100 * np.mean([item["explained"][name] for item in found.items]))
        assert score.unit == "%"


def test_a_tail_without_kan_layers_has_nothing_to_tell(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = evaluate(*make_halves(tokenizer, torch.float32), tmp_path)
    assert found == Evaluation({}, {}, [])


def test_items_are_small_and_the_same_again(halves: tuple[Trunk, Subject], tmp_path: Path) -> None:
    first, second = evaluate(*halves, tmp_path), evaluate(*halves, tmp_path)
    assert first == second
    assert len(json.dumps(first.items[0])) < 10_000
