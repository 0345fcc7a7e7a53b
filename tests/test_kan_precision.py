"""How exact the functions, layers and FFNs are, and that exactness survives extreme inputs and other rows."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from kan_examples import EXAMPLES, MIX
from torch import Tensor

from kallm.kan.bases import BASES, build_basis
from kallm.kan.calibration import deviation
from kallm.kan.ffns import FFN, build
from kallm.kan.layerspec import BasisSpec
from kallm.kan.spec import parse_spec

POLYNOMIALS = ("chebyshev1", "chebyshev2", "gegenbauer", "hermite", "jacobi", "legendre", "monomial")

WIDTH, HIDDEN = 32, 96

SPECS: dict[str, dict[str, Any]] = {
    "affine": {"ffn": "affine"},
    "kat": {"ffn": "kat", "hidden": 48},
    "mlp": {"ffn": "mlp", "hidden": 48},
    "swiglu": {"ffn": "swiglu"},
    **{f"kan {name}": {"ffn": "kan", "basis": name, **settings} for name, settings in EXAMPLES.items()},
    "kan mix": {"ffn": "kan", **MIX, "constants": "stored", "scale": "learned"},
    "kan sequence": {"ffn": "kan", "layers": [{"basis": "chebyshev2", "degree": 2}, {"basis": "rbf", "size": 4}]},
}


def made(data: dict[str, Any], dtype: torch.dtype = torch.float32, width: int = WIDTH) -> FFN:
    module = build(parse_spec(data), width=width, pretrained_hidden=HIDDEN, dtype=dtype)
    module.reset_parameters(generator=torch.Generator().manual_seed(3))
    return module


def ordered(values: Tensor) -> Tensor:
    """Return bfloat16 numbers as integers that count upwards with them: neighbours differ by 1."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("name", BASES)
def test_bfloat16_functions_are_within_one_step_of_the_rounded_exact_value(name: str) -> None:
    basis, points = BASES[name](**EXAMPLES[name]), torch.linspace(-1, 1, 4001).bfloat16()
    exact = torch.stack(list(basis.values(points.double())), dim=-1)
    steps = (ordered(basis(points)) - ordered(exact.bfloat16())).abs()
    # where a function crosses 0, steps are finer than any float32 can follow: there, the float32 bound holds
    near_zero = exact.abs() < 1e-3 * exact.abs().amax(dim=0)
    assert int(steps[~near_zero].max()) <= 1
    error = (basis(points).double() - exact).abs() * near_zero
    assert float(error.max()) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("name", BASES)
def test_float32_functions_are_within_two_millionths_of_their_largest_value(name: str) -> None:
    basis, points = BASES[name](**EXAMPLES[name]), torch.linspace(-1, 1, 4001)
    exact = torch.stack(list(basis.values(points.double())), dim=-1)
    error = (basis(points).double() - exact).abs().amax(dim=0) / exact.abs().amax(dim=0)
    assert float(error.max()) <= 2e-6


@pytest.mark.parametrize("name", SPECS)
def test_ffns_are_within_a_hundred_thousandth_of_float64(name: str) -> None:
    module, x = made(SPECS[name]), torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(4))
    exact = copy.deepcopy(module).double()(x.double())
    error = (module(x).double() - exact).abs().max() / exact.abs().max()
    assert float(error.detach()) <= 1e-5


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("squash", ["tanh", "algebraic", "clamp"])
@pytest.mark.parametrize("basis", EXAMPLES)
def test_layers_stay_finite_up_to_ten_thousand(basis: str, squash: str, dtype: torch.dtype) -> None:
    data = {"ffn": "kan", "basis": basis, **EXAMPLES[basis], "squash": squash, "hidden": 8, "scale": "learned"}
    module = made(data, dtype, width=4)
    sizes = (0.0, 1e-4, 1.0, 3.47, 4.51, 9.1, 1e2, 1e4)
    x = torch.tensor([[size, -size, size, 0.0] for size in sizes], dtype=dtype, requires_grad=True)
    output = module(x)
    output.sum().backward()
    found = [output, x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(bool(tensor.isfinite().all()) for tensor in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_a_tokens_bits_do_not_depend_on_the_other_tokens(name: str, dtype: torch.dtype) -> None:
    """In a batch of the same shape; a matrix product of another shape may add in another order."""
    module, x = made(SPECS[name], dtype), torch.randn(70, WIDTH).to(dtype)
    before = module(x)
    for place in (0, 33, 69):
        others = (torch.randn(70, WIDTH) * 30).to(dtype)
        others[place] = x[place]
        assert torch.equal(module(others)[place], before[place])
    assert torch.equal(module(x[torch.arange(69, -1, -1)])[torch.arange(69, -1, -1)], before)


@pytest.mark.parametrize("name", SPECS)
def test_a_tokens_value_does_not_depend_on_the_batchs_size(name: str) -> None:
    module, x = made(SPECS[name]), torch.randn(70, WIDTH)
    alone = torch.cat([module(row[None]) for row in x])
    torch.testing.assert_close(alone, module(x), rtol=1e-5, atol=1e-5 * float(alone.detach().abs().max()))


def settings_of(name: str, degree: int) -> BasisSpec:
    extra = {key: value for key, value in EXAMPLES[name].items() if key in ("alpha", "beta")}
    return BasisSpec(basis=name, degree=degree, **extra)


@pytest.mark.parametrize("degree", [1, 2, 5])
@pytest.mark.parametrize("target", POLYNOMIALS)
@pytest.mark.parametrize("source", POLYNOMIALS)
def test_polynomial_families_of_one_degree_span_one_space(source: str, target: str, degree: int) -> None:
    points = torch.linspace(-1, 1, 201, dtype=torch.float64)
    mine, theirs = (build_basis(settings_of(name, degree))(points).numpy() for name in (source, target))
    ones = np.ones((len(points), 1))
    solved = np.linalg.lstsq(np.hstack([ones, theirs]), mine, rcond=None)[0]
    assert np.abs(np.hstack([ones, theirs]) @ solved - mine).max() <= 1e-10 * np.abs(mine).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_the_output_deviates_as_a_real_ffns_input_does(name: str, real_model: Any, tokenizer: Any) -> None:
    block = real_model.model.layers[-3].mlp
    seen: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    text = "The sea was calm that morning, and the old man counted his seven coins twice before he bought bread. "
    with torch.no_grad():
        real_model(**tokenizer(text * 12, return_tensors="pt"))
    hook.remove()
    rows = seen[0]
    data = {**SPECS[name], "groups": 8} if SPECS[name]["ffn"] == "kat" else SPECS[name]
    module = build(parse_spec(data), width=576, pretrained_hidden=1536)
    module.reset_parameters(generator=torch.Generator().manual_seed(0), inputs=rows)
    assert deviation(module(rows).detach()) == pytest.approx(deviation(rows), rel=0.1)
