"""A layer converted to another family of polynomials is the same function."""

import pytest
import torch
from kan_examples import EXAMPLES, MIX

from kallm.errors import WrongConfiguration
from kallm.kan.conversion import convert
from kallm.kan.layerspec import BasisSpec, LayerSpec
from kallm.kan.linear import KANLinear

POLYNOMIALS = ("chebyshev1", "chebyshev2", "gegenbauer", "hermite", "jacobi", "legendre", "monomial")


def settings(name: str, degree: int) -> dict[str, object]:
    extra = {key: value for key, value in EXAMPLES[name].items() if key in ("alpha", "beta")}
    return {"basis": name, "degree": degree, **extra}


def made(**changes: object) -> KANLinear:
    layer = KANLinear(6, 5, layer=LayerSpec(**changes))
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    layer.reset_parameters(generator=torch.Generator().manual_seed(2), inputs=rows)
    return layer


@pytest.mark.parametrize(("degree", "dtype"), [(1, torch.float32), (2, torch.float32), (6, torch.float64)], ids=str)
@pytest.mark.parametrize("target", POLYNOMIALS)
@pytest.mark.parametrize("source", POLYNOMIALS)
def test_a_converted_layer_is_the_same_function(source: str, target: str, degree: int, dtype: torch.dtype) -> None:
    """In float32 the conversion of high degrees costs digits, because powers of one number are nearly alike."""
    layer, x = made(**settings(source, degree)).to(dtype), torch.randn(50, 6, dtype=dtype)
    expected = layer(x).detach()
    found = convert(layer, BasisSpec(**settings(target, degree)))(x).detach()
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-6


def test_constants_scale_and_squashing_are_kept() -> None:
    layer = made(**settings("legendre", 3), constants="stored", scale="learned", squash="algebraic")
    torch.nn.init.normal_(layer.linear.weight)
    x, new = torch.randn(50, 6), convert(layer, BasisSpec(**settings("chebyshev2", 3)))
    assert (new.layer.constants, new.layer.scale, new.layer.squash) == ("stored", "learned", "algebraic")
    torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "basis", "words"),
    [
        (settings("legendre", 2), {"basis": "rbf", "size": 2}, "basis to convert to must be one of .* but it is rbf"),
        ({"basis": "rbf", "size": 2}, settings("legendre", 2), "the layer's basis must be one of"),
        ({**MIX, "parallel": MIX["parallel"][::2]}, settings("legendre", 2), "but it is a mix"),
        (settings("legendre", 2), settings("monomial", 3), "keeps the degree, but the layer's is 2"),
    ],
)
def test_what_cannot_be_converted_is_refused(layer: dict, basis: dict, words: str) -> None:
    with pytest.raises(WrongConfiguration, match=words):
        convert(made(**layer), BasisSpec(**basis))
