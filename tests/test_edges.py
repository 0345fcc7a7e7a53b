"""The edges of KAN layers: their functions, variances and shares against slow sums over single edges."""

from typing import Any

import numpy as np
import pytest
import torch
from kan_examples import EXAMPLES, MIX
from torch import Tensor

from kallm.kan.edges import Edges
from kallm.kan.layerspec import LayerSpec
from kallm.kan.linear import KANLinear

NUM_INPUTS, NUM_OUTPUTS, NUM_ROWS = 8, 3, 200
LAYERS: dict[str, dict[str, Any]] = {
    **{name: {"basis": name, **settings} for name, settings in EXAMPLES.items()},
    "mix": MIX,
    "stored": {"basis": "chebyshev2", "degree": 2, "constants": "stored"},
    "stored mix": {**MIX, "constants": "stored"},
    "learned": {"basis": "legendre", "degree": 2, "scale": "learned", "squash": "none"},
}


def make_layer(**settings: Any) -> tuple[KANLinear, Tensor]:
    """Return a layer in float64 and inputs that depend on each other, none of them centred."""
    generator = torch.Generator().manual_seed(3)
    rows = (
        torch.randn(NUM_ROWS, NUM_INPUTS, generator=generator)
        @ torch.randn(NUM_INPUTS, NUM_INPUTS, generator=generator)
        + 0.3
    )
    layer = KANLinear(NUM_INPUTS, NUM_OUTPUTS, layer=LayerSpec(**settings)).double()
    layer.reset_parameters(generator=generator, inputs=rows.flip(0) + 0.1)
    with torch.no_grad():
        layer.linear.weight += 0.1 * torch.randn(layer.linear.weight.shape, generator=generator)
    return layer, rows.double()


def single_edges(layer: KANLinear, rows: Tensor) -> np.ndarray:
    """Return what every edge adds, [N, O, D]: the layer called with all other inputs' weights at zero."""
    columns = layer.functions(rows, torch.float64).shape[1]
    added = np.zeros((len(rows), NUM_OUTPUTS, NUM_INPUTS))
    probe = torch.randn(64, NUM_INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for column in range(columns):
        # which input a column reads: the one whose change changes it; a stored constant reads none, in order
        changed = [
            i
            for i in range(NUM_INPUTS)
            if not torch.equal(
                layer.functions(probe, torch.float64)[:, column],
                layer.functions(probe + 0.7 * torch.eye(NUM_INPUTS, dtype=torch.float64)[i], torch.float64)[:, column],
            )
        ]
        source = changed[0] if changed else column
        part = layer.functions(rows, torch.float64)[:, column, None] * layer.linear.weight[:, column]
        added[:, :, source] += part.detach().numpy()
    return added


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[KANLinear, Tensor, Edges, np.ndarray]:
    layer, rows = make_layer(**LAYERS[request.param])
    return layer, rows, Edges(layer, rows), single_edges(layer, rows)


def explained(added: np.ndarray, part: np.ndarray) -> float:
    """Return 1 - Var(y - ŷ) / Var(y), summed over the outputs."""
    whole = added.sum(axis=2)
    return 1 - np.var(whole - part, axis=0).sum() / np.var(whole, axis=0).sum()


def test_edges_and_bias_add_up_to_the_layer(case) -> None:
    layer, rows, _, added = case
    bias = 0 if layer.linear.bias is None else layer.linear.bias.detach().numpy()
    np.testing.assert_allclose(added.sum(axis=2) + bias, layer(rows).detach().numpy(), atol=1e-10)


def test_variances_and_ranking_are_those_of_single_edges(case) -> None:
    _, _, edges, added = case
    np.testing.assert_allclose(edges.variances.numpy(), np.var(added, axis=0), atol=1e-12)
    ranked = edges.rank(NUM_OUTPUTS * NUM_INPUTS)
    assert [edge.variance for edge in ranked] == sorted((edge.variance for edge in ranked), reverse=True)
    outputs = np.var(added.sum(axis=2), axis=0)
    for edge in ranked:
        assert edge.variance == pytest.approx(np.var(added[:, edge.output, edge.input]))
        assert edge.share == pytest.approx(edge.variance / outputs[edge.output])
    assert len({(edge.output, edge.input) for edge in ranked}) == NUM_OUTPUTS * NUM_INPUTS


def test_sampled_functions_are_what_edges_add(case) -> None:
    _, rows, edges, added = case
    strongest = edges.rank(5)
    for edge, curve in zip(strongest, edges.sample(strongest, rows), strict=True):
        expected = added[:, edge.output, edge.input]
        np.testing.assert_allclose(curve.numpy(), expected - expected.mean(), atol=1e-12)


def test_strongest_edges_explain_what_their_sum_explains(case) -> None:
    _, _, edges, added = case
    order = np.argsort(-np.var(added, axis=0).ravel(), kind="stable")
    found = edges.explain(shares=(0.01, 0.25, 1.0)).strongest
    for share, count in ((0.01, 1), (0.25, NUM_OUTPUTS * NUM_INPUTS // 4), (1.0, NUM_OUTPUTS * NUM_INPUTS)):
        kept = np.isin(np.arange(NUM_OUTPUTS * NUM_INPUTS), order[:count]).reshape(NUM_OUTPUTS, NUM_INPUTS)
        assert found[share] == pytest.approx(explained(added, (added * kept).sum(axis=2)), abs=1e-9)
    assert found[1.0] == pytest.approx(1)


def test_lines_are_every_edges_least_squares_line(case) -> None:
    _, rows, edges, added = case
    part = fitted(added, np.stack([rows.numpy()], axis=2))
    assert edges.explain(shares=()).lines == pytest.approx(explained(added, part), abs=1e-9)


def test_degrees_are_every_edges_least_squares_polynomial(case) -> None:
    layer, rows, edges, added = case
    z = rows * layer.scale.detach()
    squashed = torch.cat([branch.squash.value(branch.inputs(z)) for branch in layer._branches], dim=1).numpy()
    for degree, share in enumerate(edges.explain(shares=()).degrees, start=1):
        powers = np.stack([squashed**power for power in range(1, degree + 1)], axis=2)
        assert share == pytest.approx(explained(added, fitted(added, powers)), abs=1e-6)


def fitted(added: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """Return the sum over inputs of each edge's least-squares fit on powers [N, D, P] and a constant."""
    part = np.zeros(added.shape[:2])
    for source in range(NUM_INPUTS):
        table = np.column_stack([np.ones(len(added)), powers[:, source]])
        part += table @ np.linalg.lstsq(table, added[:, :, source], rcond=None)[0]
    return part


@pytest.mark.parametrize("name", ["chebyshev2", "legendre", "monomial", "stored"])
def test_a_polynomial_layer_is_explained_by_its_own_degree(name: str) -> None:
    layer, rows = make_layer(**LAYERS[name])
    degrees = Edges(layer, rows).explain(shares=()).degrees
    assert len(degrees) == LAYERS[name]["degree"]
    assert degrees[-1] == pytest.approx(1, abs=1e-9)


def test_a_dead_input_and_a_dead_layer_explain_nothing() -> None:
    layer, rows = make_layer(basis="chebyshev2", degree=2)
    rows[:, 0] = 0.5
    edges = Edges(layer, rows)
    assert float(edges.variances[:, 0].max()) < 1e-20
    assert np.isfinite([edges.explain(shares=(0.1,)).lines, *edges.explain(shares=()).degrees]).all()
    with torch.no_grad():
        layer.linear.weight.zero_()
    still = Edges(layer, rows)
    assert still.explain(shares=(0.1,)).lines == 0
    assert still.rank(1)[0].share == 0
