"""Every basis against SciPy, or against its formula in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.interpolate
import scipy.special
import torch
from kan_examples import EXAMPLES

from kallm.kan.bases import BASES, BSpline
from kallm.kan.layerspec import BASIS_SETTINGS
from kallm.kan.squashes import SQUASHES

Array = np.ndarray


def recurrence(name: str, *settings: float) -> Callable[[Array], Array]:
    function = getattr(scipy.special, name)
    return lambda t: np.stack([function(n, *settings, t) for n in range(1, 7)], axis=-1)


def fourier(t: Array) -> Array:
    return np.stack([f(np.pi * k * t) for k in range(1, 4) for f in (np.cos, np.sin)], axis=-1)


def bspline(t: Array, size: int = 7, order: int = 3) -> Array:
    intervals = size + 1 - order
    knots = -1 + np.arange(-order, intervals + order + 1) * 2 / intervals
    inside = np.clip(t, -1, 1)
    whole = [
        scipy.interpolate.BSpline(knots, np.eye(size + 1)[j], order, extrapolate=False)(inside)
        for j in range(1, size + 1)
    ]
    return np.stack(whole, axis=-1)


def bumps(shape: Callable[[Array], Array]) -> Callable[[Array], Array]:
    centres = np.linspace(-1, 1, 5)
    return lambda t: shape((t[..., None] - centres) / 0.5)


REFERENCES: dict[str, Callable[[Array], Array]] = {
    "bspline": bspline,
    "chebyshev1": recurrence("eval_chebyt"),
    "chebyshev2": recurrence("eval_chebyu"),
    "fourier": fourier,
    "gegenbauer": recurrence("eval_gegenbauer", 1.5),
    "hermite": recurrence("eval_hermitenorm"),
    "jacobi": recurrence("eval_jacobi", 1.0, 0.5),
    "legendre": recurrence("eval_legendre"),
    "monomial": lambda t: np.stack([t**n for n in range(1, 7)], axis=-1),
    "rbf": bumps(lambda z: np.exp(-(z**2))),
    "switch": bumps(lambda z: 1 - np.tanh(z) ** 2),
    "wavelet": bumps(lambda z: (1 - z**2) * np.exp(-(z**2) / 2)),
}


def test_every_basis_has_settings_an_example_and_a_reference() -> None:
    assert set(BASES) == set(BASIS_SETTINGS) == set(REFERENCES) == set(EXAMPLES)


@pytest.mark.parametrize("name", BASES)
def test_basis_equals_scipy(name: str) -> None:
    points = torch.linspace(-1, 1, 2001)
    basis = BASES[name](**EXAMPLES[name])
    expected = REFERENCES[name](points.double().numpy())
    found = basis(points)
    assert found.shape == (2001, basis.size)
    assert found.dtype == torch.float32
    scale = np.abs(expected).max(axis=0)
    assert (np.abs(found.double().numpy() - expected) / scale).max() <= 2e-6
    np.testing.assert_allclose(basis(points.double()).numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_basis_rounds_once_in_bfloat16(name: str) -> None:
    basis, points = BASES[name](**EXAMPLES[name]), torch.linspace(-1, 1, 501).bfloat16()
    assert torch.equal(basis(points), basis(points.float()).bfloat16())


@pytest.mark.parametrize("name", BASES)
def test_slopes_equal_autograd(name: str) -> None:
    basis = BASES[name](**EXAMPLES[name])
    points = torch.linspace(-1.3, 1.3, 1001, dtype=torch.float64, requires_grad=True)
    expected = [torch.autograd.grad(value.sum(), points, retain_graph=True)[0] for value in basis.values(points)]
    values, slopes = basis.with_slopes(points.detach())
    torch.testing.assert_close(torch.stack(list(values)), torch.stack(list(basis.values(points.detach()))))
    for slope, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close((slope * basis.unit).expand_as(other), other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "order"), [(1, 1), (4, 1), (2, 2), (5, 2), (3, 3), (6, 4), (5, 5), (9, 5)])
def test_splines_of_any_order_equal_scipy_and_clamp_outside(size: int, order: int) -> None:
    points = np.linspace(-1.5, 1.5, 1207)
    found = BSpline(size=size, order=order)(torch.from_numpy(points))
    np.testing.assert_allclose(found.numpy(), bspline(points, size, order), atol=1e-12)


def test_splines_without_an_order_are_cubic_where_the_size_allows() -> None:
    points = torch.linspace(-1, 1, 100)
    assert torch.equal(BSpline(size=8)(points), BSpline(size=8, order=3)(points))
    assert torch.equal(BSpline(size=2)(points), BSpline(size=2, order=2)(points))


@pytest.mark.parametrize("name", SQUASHES)
def test_squashes_pull_gradients_back_as_autograd_does(name: str) -> None:
    squash = SQUASHES[name]
    points = torch.linspace(-3, 3, 998, dtype=torch.float64, requires_grad=True)
    value = squash.value(points)
    upstream = torch.randn(998, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(value, points, upstream)
    torch.testing.assert_close(squash.pull_back(points.detach(), value.detach(), upstream), expected)
    assert name == "none" or float(value.detach().abs().max()) <= 1
