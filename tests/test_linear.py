"""The KAN layer against its formula in plain autograd."""

import copy
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from kan_examples import EXAMPLES, MIX
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kallm.errors import WrongConfiguration
from kallm.kan.bases import build_basis
from kallm.kan.layerspec import LayerSpec
from kallm.kan.linear import KANLinear
from kallm.kan.squashes import SQUASHES

LAYERS: dict[str, dict[str, Any]] = {
    **{name: {"basis": name, **settings} for name, settings in EXAMPLES.items()},
    "mix": MIX,
    "stored": {"basis": "chebyshev2", "degree": 2, "constants": "stored"},
    "learned": {"basis": "legendre", "degree": 3, "scale": "learned", "squash": "algebraic"},
    "stored mix": {**MIX, "constants": "stored", "scale": "learned"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep two threads from waiting for each other over a few numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(layer: dict[str, Any], dtype: torch.dtype = torch.float32, inputs: int = 12, outputs: int = 10) -> KANLinear:
    module = KANLinear(inputs, outputs, layer=LayerSpec(**layer), dtype=dtype)
    rows = torch.randn(200, inputs, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, inputs)
    module.reset_parameters(generator=torch.Generator().manual_seed(2), inputs=rows)
    if module.linear.bias is not None:
        torch.nn.init.normal_(module.linear.bias)
    return module


def plain(module: KANLinear, x: Tensor) -> Tensor:
    """State the layer's formula function by function, for autograd."""
    layer, start, column = module.layer, 0, 0
    constants = module.in_features if layer.constants == "stored" else 0
    y = module.linear.weight[:, :constants].sum(1) if constants else module.linear.bias
    for branch, width in zip(layer.branches, layer.channels(module.in_features), strict=True):
        own = slice(start, start + width)
        t = SQUASHES[branch.squash].value(x[..., own] * module.scale[own])
        for function in build_basis(branch)(t).unbind(-1):
            place = slice(column, column + width)
            weight = module.linear.weight[:, constants + column : constants + column + width]
            y = y + (function - module.mean[place]) @ weight.T
            column += width
        start += width
    return y


def gradients(module: KANLinear, x: Tensor, y: Tensor) -> list[Tensor]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return list(torch.autograd.grad(y, [x, *module.parameters()], upstream))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_its_formula_in_plain_autograd(name: str) -> None:
    module, x = made(LAYERS[name], torch.float64), torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    expected = plain(module, x)
    found = module(x)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(gradients(module, x, found), gradients(module, x, expected), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_in_float64(name: str) -> None:
    module, x = made(LAYERS[name], torch.float64, 8, 3), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_is_the_rounded_float64(name: str) -> None:
    module, x = made(LAYERS[name]), torch.randn(64, 12)
    exact = copy.deepcopy(module).double()(x.double()).detach()
    error = (module(x).detach().double() - exact).abs().max() / exact.abs().max()
    assert float(error) <= 2e-6


def test_bfloat16_rounds_the_functions_once() -> None:
    module, x = made(LAYERS["chebyshev2"], torch.bfloat16), torch.randn(64, 12).bfloat16()
    exact = copy.deepcopy(module).double()(x.double()).detach()
    found = module(x).detach()
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max() / exact.abs().max()) <= 2**-7


@pytest.mark.parametrize("name", ["chebyshev2", "stored mix"])
def test_rows_in_chunks_equal_rows_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = made(LAYERS[name]), torch.randn(50, 12, requires_grad=True)
    whole = module(x)
    expected = gradients(module, x, whole)
    monkeypatch.setattr("kallm.kan.linear._CHUNK_ELEMENTS", {"cpu": 200})
    chunked = module(x)
    assert torch.equal(chunked, whole)
    for mine, other in zip(gradients(module, x, chunked), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_an_empty_batch_passes() -> None:
    assert made(LAYERS["mix"])(torch.empty(0, 12)).shape == (0, 10)


def test_autograd_keeps_the_input_alone() -> None:
    module, x = made(LAYERS["rbf"]), torch.randn(6, 12, requires_grad=True)
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        module(x)
    assert kept - own == {x.data_ptr()}


@pytest.mark.parametrize("name", ["chebyshev2", "bspline", "stored mix"])
def test_layer_compiles_as_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    module, x = made(LAYERS[name]), torch.randn(2, 5, 12, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), module(x)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(gradients(module, x, found), gradients(module, x, expected), strict=True):
        torch.testing.assert_close(mine, other)


def test_gradient_checkpointing_changes_nothing() -> None:
    module, x = made(LAYERS["mix"]), torch.randn(2, 5, 12, requires_grad=True)
    again = checkpoint(module, x, use_reentrant=False)
    for mine, other in zip(gradients(module, x, again), gradients(module, x, module(x)), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["chebyshev2", "stored mix"])
def test_autocast_gives_its_dtype_and_float32_gradients(name: str) -> None:
    module, x = made(LAYERS[name]), torch.randn(4, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    for gradient in gradients(module, x, y):
        assert gradient.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


def test_centred_functions_have_the_bias_as_their_mean() -> None:
    module = KANLinear(12, 10, layer=LayerSpec(**MIX))
    rows = torch.randn(300, 12)
    outputs = module.reset_parameters(generator=torch.Generator().manual_seed(0), inputs=rows, deviation=2.0)
    torch.testing.assert_close(outputs, module(rows).detach())
    torch.testing.assert_close(outputs.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    assert float(outputs.square().mean().sqrt()) == pytest.approx(2.0, rel=1e-4)


def test_a_dead_channel_is_calibrated_and_constant_inputs_are_refused() -> None:
    module, rows = KANLinear(4, 3, layer=LayerSpec(basis="rbf", size=2)), torch.randn(50, 4)
    rows[:, 1] = 0
    assert bool(module.reset_parameters(generator=torch.Generator().manual_seed(0), inputs=rows).isfinite().all())
    with pytest.raises(WrongConfiguration, match="at least 2 different rows"):
        module.reset_parameters(generator=torch.Generator().manual_seed(0), inputs=torch.ones(50, 4))


def test_shares_that_do_not_divide_are_refused() -> None:
    with pytest.raises(WrongConfiguration, match=r"shares 1 \+ 2 \+ 1 of parallel must divide"):
        KANLinear(13, 4, layer=LayerSpec(**MIX))
