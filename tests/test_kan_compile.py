"""KAN layers and FFNs under torch.compile, torch.export, autocast and gradient checkpointing."""

import copy
from typing import Any

import jaxtyping
import pytest
import torch
from kan_examples import EXAMPLES, MIX
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kallm.kan.ffns import FFN, build
from kallm.kan.spec import parse_spec

SPECS: dict[str, dict[str, Any]] = {
    **{name: {"ffn": "kan", "basis": name, **settings} for name, settings in EXAMPLES.items()},
    "chebyshev2 degree 2": {"ffn": "kan", "basis": "chebyshev2", "degree": 2},
    "jacobi degree 2": {"ffn": "kan", "basis": "jacobi", "degree": 2, "alpha": 1.0, "beta": 0.5},
    "mix": {"ffn": "kan", **MIX, "constants": "stored", "scale": "learned"},
    "kat": {"ffn": "kat", "hidden": 16},
}


@pytest.fixture(autouse=True)
def _no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def made(name: str) -> FFN:
    module = build(parse_spec(SPECS[name]), width=8, pretrained_hidden=16)
    module.reset_parameters(generator=torch.Generator().manual_seed(0))
    return module


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def outcome(run: Any, module: FFN, x: Tensor) -> list[Tensor]:
    """Return the output and all gradients."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    """Fail where they differ by more than a few roundings: a compiler rounds the steps of a recurrence elsewhere."""
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2**-18 * float(other.abs().max()))


@pytest.mark.parametrize("name", SPECS)
def test_one_graph_without_breaks_gives_what_eager_gives(name: str) -> None:
    module, x = made(name), inputs(2, 5, 8)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_alike(outcome(compiled, module, x), outcome(module, module, x))


@pytest.mark.slow
def test_generated_code_gives_what_eager_gives() -> None:
    """With the default backend, which needs a C++ compiler."""
    module, x = made("chebyshev2 degree 2"), inputs(2, 5, 8)
    torch.compiler.reset()
    assert_alike(outcome(torch.compile(module, fullgraph=True), module, x), outcome(module, module, x))


@pytest.mark.parametrize("name", SPECS)
def test_the_exported_program_gives_what_eager_gives_for_any_number_of_tokens(name: str) -> None:
    module = made(name).requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(module, (inputs(2, 5, 8),), dynamic_shapes=({1: tokens},))
    for length in (5, 17):
        x = inputs(2, length, 8)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", SPECS)
def test_gradient_checkpointing_changes_no_bit(name: str, reentrant: bool) -> None:
    module, x = made(name), inputs(2, 5, 8)
    again = outcome(lambda rows: checkpoint(module, rows, use_reentrant=reentrant), module, x)
    for mine, other in zip(again, outcome(module, module, x), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", SPECS)
def test_autocast_gives_its_dtype_and_keeps_the_parameters_gradients_in_float32(name: str, dtype: torch.dtype) -> None:
    module, x = made(name), inputs(4, 8)

    def run(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return module(rows)

    found = outcome(run, module, x)
    assert found[0].dtype == dtype
    assert {gradient.dtype for gradient in found[1:]} == {torch.float32}
    assert_close_in_norm(found[0].float(), outcome(module, module, x)[0])


def assert_close_in_norm(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) <= 0.03


@pytest.mark.parametrize("name", SPECS)
def test_a_copy_gives_equal_bits(name: str) -> None:
    module, x = made(name), inputs(3, 8)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
