"""The closed form of the last map: against textbook solutions, and in any number of batches."""

import numpy as np
import pytest
import torch
from kan_examples import EXAMPLES, MIX

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import build
from kallm.kan.linear import KANLinear
from kallm.kan.regression import (
    RIDGES,
    LeastSquares,
    choose_ridge,
    compute_features,
    find_last_map,
)
from kallm.kan.spec import parse_spec

SPECS = {
    "affine": {"ffn": "affine"},
    "kat": {"ffn": "kat", "hidden": 16},
    "mlp": {"ffn": "mlp", "hidden": 20},
    "swiglu": {"ffn": "swiglu", "hidden": 20},
    **{f"kan {name}": {"ffn": "kan", "basis": name, **settings} for name, settings in EXAMPLES.items()},
    "kan mix": {"ffn": "kan", **MIX, "constants": "stored", "scale": "learned"},
    "kan sequence": {"ffn": "kan", "layers": [{"basis": "rbf", "size": 2}, {"basis": "chebyshev2", "degree": 2}]},
    "kan one": {"ffn": "kan", "layers": [{"basis": "chebyshev2", "degree": 2, "squash": "algebraic"}]},
}


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 7, generator=generator) * torch.tensor([1, 3, 0.1, 1, 1, 2, 1]) + 0.5
    targets = features @ torch.randn(7, 4, generator=generator) + torch.randn(300, 4, generator=generator) - 2
    return features, targets, torch.rand(300, generator=generator) + 0.1


def sums(*data: torch.Tensor, bias: bool) -> LeastSquares:
    found = LeastSquares(data[0].shape[1], data[1].shape[1], bias=bias)
    found.add(*data)
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_a_faint_ridge_is_numpys_least_squares(bias: bool) -> None:
    features, targets, weights = data()
    root = weights.double().sqrt()[:, None].numpy()
    table = torch.cat([features, torch.ones(300, 1)], dim=1) if bias else features
    expected = np.linalg.lstsq(root * table.double().numpy(), root * targets.double().numpy(), rcond=None)[0].T
    weight, offset = sums(features, targets, weights, bias=bias).solve(1e-13)
    found = torch.cat([weight, offset[:, None]], dim=1) if bias else weight
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-9)


def test_the_ridge_is_the_closed_form_of_centred_data() -> None:
    features, targets, _ = (each.double() for each in data())
    centred, wanted = features - features.mean(dim=0), targets - targets.mean(dim=0)
    strength = 0.3 * centred.square().sum(dim=0).mean()
    expected = torch.linalg.solve(centred.T @ centred + strength * torch.eye(7), centred.T @ wanted).T
    weight, bias = sums(features, targets, bias=True).solve(0.3)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(bias, targets.mean(dim=0) - expected @ features.mean(dim=0))


def test_batches_give_what_one_batch_gives() -> None:
    features, targets, weights = data()
    one = sums(features, targets, weights, bias=True)
    parts = [sums(features[i::3], targets[i::3], weights[i::3], bias=True) for i in range(3)]
    for found, expected in zip((parts[0] + parts[1] + parts[2]).solve(1e-3), one.solve(1e-3), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_the_error_is_the_weighted_mean_of_squares(bias: bool) -> None:
    features, targets, weights = (each.double() for each in data())
    found = sums(features, targets, weights, bias=bias)
    weight, offset = found.solve(1e-2)
    squares = (targets - features @ weight.T - offset).square().sum(dim=1)
    assert found.error(weight, offset) == pytest.approx(float(weights @ squares / weights.sum()), rel=1e-10)


def test_the_chosen_ridge_is_weak_without_noise_and_strong_with_nothing_else() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 40, generator=generator)
    exact, noise = features @ torch.randn(40, 3, generator=generator), torch.randn(200, 3, generator=generator)
    for targets, ridge in ((exact, RIDGES[0]), (noise, RIDGES[-1])):
        fitted, held = (sums(features[half], targets[half], bias=True) for half in (slice(150), slice(150, None)))
        assert choose_ridge(fitted, held) == ridge


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_features_that_tell_nothing_are_refused(value: float) -> None:
    with pytest.raises(WrongConfiguration, match="features that vary and are finite"):
        sums(torch.full((5, 3), value), torch.ones(5, 2), bias=True).solve(1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_the_last_map_of_the_features_is_the_ffn(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 24, generator=generator)
    ffn = build(parse_spec(SPECS[name]), width=24, pretrained_hidden=48)
    ffn.reset_parameters(generator=generator, inputs=x)
    last = find_last_map(ffn)
    assert last is not None
    torch.testing.assert_close(last(compute_features(ffn, x)), ffn(x), rtol=1e-5, atol=1e-5)


def test_an_ffn_without_weights_has_no_last_map() -> None:
    assert find_last_map(build(parse_spec({"ffn": "removed"}), width=24, pretrained_hidden=48)) is None


def test_a_kan_layers_functions_are_centred() -> None:
    spec = parse_spec(SPECS["kan chebyshev2"])
    ffn = build(spec, width=24, pretrained_hidden=48)
    x = torch.randn(500, 24, generator=torch.Generator().manual_seed(3))
    ffn.reset_parameters(generator=torch.Generator().manual_seed(0), inputs=x)
    layer = next(module for module in ffn.modules() if isinstance(module, KANLinear))
    torch.testing.assert_close(layer.functions(x).mean(dim=0), torch.zeros_like(layer.mean), atol=1e-5, rtol=0)
