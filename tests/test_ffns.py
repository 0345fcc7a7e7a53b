"""The contracts of every FFN and basis."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from kan_examples import EXAMPLES, MIX
from torch import Tensor

from kallm.errors import WrongConfiguration
from kallm.kan.calibration import deviation
from kallm.kan.ffns import FFN, FFNS, build
from kallm.kan.rational import INITIAL, Rational
from kallm.kan.spec import parse_spec

WIDTH, HIDDEN = 24, 64

SPECS: dict[str, dict[str, Any]] = {
    "affine": {"ffn": "affine"},
    "kat": {"ffn": "kat", "hidden": 40, "groups": 8},
    "mlp gelu": {"ffn": "mlp", "hidden": 40},
    "mlp silu": {"ffn": "mlp", "hidden": 40, "activation": "silu"},
    "mlp relu": {"ffn": "mlp", "hidden": 40, "activation": "relu"},
    "removed": {"ffn": "removed"},
    "swiglu": {"ffn": "swiglu"},
    "swiglu small": {"ffn": "swiglu", "hidden": 32},
    **{f"kan {name}": {"ffn": "kan", "basis": name, **settings} for name, settings in EXAMPLES.items()},
    "kan stored": {"ffn": "kan", "basis": "chebyshev2", "degree": 2, "hidden": 16, "constants": "stored"},
    "kan learned": {"ffn": "kan", "basis": "chebyshev2", "degree": 2, "hidden": [16, 8], "scale": "learned"},
    "kan sequence": {"ffn": "kan", "layers": [{"basis": "chebyshev2", "degree": 2}, {"basis": "rbf", "size": 2}]},
    "kan mix": {"ffn": "kan", **MIX, "hidden": 16, "constants": "stored", "scale": "learned"},
    "kan clamp": {"ffn": "kan", "basis": "legendre", "degree": 3, "squash": "clamp"},
    "kan algebraic": {"ffn": "kan", "basis": "legendre", "degree": 3, "squash": "algebraic"},
    "kan none": {"ffn": "kan", "basis": "bspline", "size": 5, "squash": "none"},
}
DRAWN = [name for name in SPECS if name != "removed"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep two threads from waiting for each other over a few numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows() -> Tensor:
    """Return inputs with unequal channels, a shift and outliers, as behind a norm's weight."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(1000, WIDTH, generator=generator) * torch.linspace(0.05, 2, WIDTH) + 0.1
    values[::50, 3] *= 20
    return values


def made(name: str, dtype: torch.dtype = torch.float32, inputs: Tensor | None = None) -> FFN:
    module = build(parse_spec(SPECS[name]), width=WIDTH, pretrained_hidden=HIDDEN, dtype=dtype)
    module.reset_parameters(generator=torch.Generator().manual_seed(7), inputs=inputs)
    return module


def test_every_ffn_is_in_the_contracts() -> None:
    assert {data["ffn"] for data in SPECS.values()} == set(FFNS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_shape_and_dtype_are_kept(name: str, dtype: torch.dtype) -> None:
    module = made(name, dtype)
    for shape in ((WIDTH,), (3, WIDTH), (2, 5, WIDTH)):
        output = module(torch.randn(shape).to(dtype))
        assert output.shape == shape
        assert output.dtype == dtype


@pytest.mark.parametrize("name", SPECS)
def test_the_count_is_the_specs(name: str) -> None:
    counted = sum(parameter.numel() for parameter in made(name).parameters())
    assert counted == parse_spec(SPECS[name]).parameters(WIDTH, HIDDEN)


@pytest.mark.parametrize("name", DRAWN)
def test_the_gradient_reaches_every_parameter_and_the_input(name: str) -> None:
    module, x = made(name), rows()[:64].requires_grad_()
    module(x).square().sum().backward()
    assert bool((x.grad != 0).any())
    for label, parameter in module.named_parameters():
        assert bool((parameter.grad != 0).any(dim=-1).all()), label


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("squash", ["tanh", "algebraic", "clamp"])
@pytest.mark.parametrize("basis", EXAMPLES)
def test_kans_stay_finite_far_outside(basis: str, squash: str, dtype: torch.dtype) -> None:
    data = {"ffn": "kan", "basis": basis, **EXAMPLES[basis], "squash": squash, "hidden": 8, "scale": "learned"}
    module = build(parse_spec(data), width=4, pretrained_hidden=8, dtype=dtype)
    module.reset_parameters(generator=torch.Generator().manual_seed(0))
    sizes = (0.0, 1e-4, 1.0, 3.5, 9.1, 1e2, 1e4)
    x = torch.tensor([[size, -size, size, 0.0] for size in sizes], dtype=dtype, requires_grad=True)
    output = module(x)
    output.sum().backward()
    assert bool(output.isfinite().all())
    assert bool(x.grad.isfinite().all())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in module.parameters())


@pytest.mark.parametrize("name", SPECS)
def test_the_state_survives_saving(name: str) -> None:
    module, other, x = made(name, inputs=rows()), made(name), torch.randn(5, WIDTH)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("given", [True, False], ids=["real", "assumed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", DRAWN)
def test_the_output_deviates_as_the_input_does(name: str, dtype: torch.dtype, given: bool) -> None:
    inputs = rows() if given else torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(9))
    module = made(name, dtype, inputs if given else None)
    assert deviation(module(inputs.to(dtype)).float().detach()) == pytest.approx(deviation(inputs), rel=0.1)


@pytest.mark.parametrize("name", SPECS)
def test_equal_generators_draw_equal_weights(name: str) -> None:
    first, second = made(name, inputs=rows()), made(name, inputs=rows())
    for mine, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", SPECS)
def test_a_module_built_on_meta_is_drawn_alike(name: str) -> None:
    module = build(parse_spec(SPECS[name]), width=WIDTH, pretrained_hidden=HIDDEN, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu").reset_parameters(generator=torch.Generator().manual_seed(7), inputs=rows())
    expected = made(name, inputs=rows()).state_dict()
    for label, value in module.state_dict().items():
        assert torch.equal(value, expected[label]), label


@pytest.mark.parametrize("name", SPECS)
def test_a_token_does_not_see_the_others(name: str) -> None:
    module, x = made(name), torch.randn(2, 16, WIDTH)
    other = torch.randn(2, 16, WIDTH) * 50
    other[1, 3] = x[1, 3]
    assert torch.equal(module(other)[1, 3], module(x)[1, 3])


@pytest.mark.parametrize("name", [name for name in SPECS if name != "removed"])
def test_autocast_gives_its_dtype(name: str) -> None:
    module, x = made(name), torch.randn(4, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert x.grad.dtype == torch.float32


def saved_bytes(module: FFN, x: Tensor) -> int:
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        output = module(x)
    del output
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_kan_keeps_a_fifth_of_swiglus_activations(dtype: torch.dtype) -> None:
    x = torch.randn(32, 576).to(dtype).requires_grad_()
    specs = ({"ffn": "kan", "basis": "chebyshev2", "degree": 2}, {"ffn": "swiglu"})
    kan, swiglu = (build(parse_spec(data), width=576, pretrained_hidden=1536, dtype=dtype) for data in specs)
    assert saved_bytes(kan, x) <= 0.20 * saved_bytes(swiglu, x)


def test_the_pretrained_ffn_is_not_built() -> None:
    with pytest.raises(WrongConfiguration, match="ffn 'pretrained' is not built"):
        build(parse_spec({"ffn": "pretrained"}), width=8, pretrained_hidden=16)


def test_constant_inputs_are_refused() -> None:
    with pytest.raises(WrongConfiguration, match="at least 2 different rows"):
        made("swiglu", inputs=torch.ones(100, WIDTH))


def rational(points: np.ndarray, a: Any, b: Any) -> np.ndarray:
    return np.polyval(a[::-1], points) / (1 + np.abs(np.polyval([*b[::-1], 0.0], points)))


def test_rationals_start_as_the_functions_they_are_named_after() -> None:
    points = np.linspace(-6, 6, 4001)
    gelu = points * 0.5 * (1 + scipy.special.erf(points / math.sqrt(2)))
    assert np.abs(rational(points, *INITIAL["gelu"]) - gelu).max() <= 3.2e-3
    assert np.abs(rational(points, *INITIAL["identity"]) - points).max() <= 1e-12
    for start in ("gelu", "identity"):
        found = Rational(8, groups=8, start=start)(torch.from_numpy(points).float()[:, None].expand(-1, 8))
        expected = torch.from_numpy(rational(points, *INITIAL[start])).float()
        torch.testing.assert_close(found[:, 3], expected, rtol=2e-6, atol=2e-6)


def test_rationals_pass_gradcheck_and_stay_finite() -> None:
    module = Rational(6, groups=2, start="gelu", dtype=torch.float64)
    torch.nn.init.normal_(module.denominator, std=0.3)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    for dtype in (torch.float32, torch.bfloat16):
        far = torch.tensor([[1e4, -1e4, 0.0, 1.0, -3.5, 9.1]], dtype=dtype, requires_grad=True)
        again = Rational(6, groups=2, start="gelu", dtype=dtype)
        output = again(far)
        output.sum().backward()
        tensors = (output, far.grad, again.numerator.grad, again.denominator.grad)
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)
