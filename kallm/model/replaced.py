"""Which modules of a model are FFNs of ours, and from what description each is built again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN, KAN, KAT, MLP, Affine, Removed, SwiGLU, build
from kallm.kan.linear import KANLinear
from kallm.kan.spec import FFNSpec, parse_spec

__all__ = ["Replaced", "find_replaced", "group_replaced"]

_PROBE_ROWS = 4


@dataclass(frozen=True)
class Replaced:
    """One FFN of ours in a model."""

    name: str
    spec: FFNSpec
    module: FFN

    def build(self, device: torch.device | str, dtype: torch.dtype) -> FFN:
        """Return a fresh module of the same description."""
        return build(self.spec, width=self.module.width, pretrained_hidden=1, device=device, dtype=dtype)


def find_replaced(model: nn.Module) -> list[Replaced]:
    """Return the FFNs of ours in a model, first to last.

    Raises:
        WrongConfiguration: one is not what its description builds.
    """
    found = [
        Replaced(name, _describe(name, module), module)
        for name, module in model.named_modules()
        if isinstance(module, FFN)
    ]
    for each in found:
        _check(each)
    return found


def group_replaced(found: list[Replaced]) -> list[dict[str, Any]]:
    """Return the descriptions as plain data, each with the names of the modules that it holds for."""
    groups: list[dict[str, Any]] = []
    for each in found:
        described = {"spec": each.spec.model_dump(mode="json"), "width": each.module.width}
        for group in groups:
            if {key: group[key] for key in described} == described:
                group["names"].append(each.name)
                break
        else:
            groups.append({**described, "names": [each.name]})
    return groups


def _describe(name: str, module: FFN) -> FFNSpec:
    for kind, describe in _DESCRIPTIONS.items():
        if type(module) is kind:
            return parse_spec(describe(module))
    raise WrongConfiguration(
        f"{name} is a {type(module).__name__}, which cannot be described: expected one of "
        f"{', '.join(kind.__name__ for kind in _DESCRIPTIONS)}"
    )


def _check(found: Replaced) -> None:
    """Build the module again from its description and see that it computes the same bits."""
    module = found.module
    tensors = module.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    weight = next(module.parameters(), torch.empty(0))
    again = found.build(weight.device, weight.dtype)
    rows = torch.linspace(-2, 2, _PROBE_ROWS * module.width, device=weight.device, dtype=weight.dtype)
    rows = rows.view(_PROBE_ROWS, module.width)
    own = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    same = own == {name: (tensor.shape, tensor.dtype) for name, tensor in again.state_dict().items()}
    if same:
        again.load_state_dict(tensors)
        with torch.no_grad():
            same = torch.allclose(again(rows), module(rows), rtol=0, atol=0, equal_nan=True)
    if not same:
        raise WrongConfiguration(
            f"{found.name} is not what its description builds: it was changed after it was put in; undo the change, "
            "or merge what wraps its layers (an adapter, a quantiser)"
        )


def _describe_kan(module: KAN) -> dict[str, Any]:
    layers = [layer for layer in module.layers if isinstance(layer, KANLinear)]
    described: dict[str, Any] = {"ffn": "kan", "layers": [layer.layer.model_dump(mode="json") for layer in layers]}
    if len(layers) > 1:
        described["hidden"] = [layer.out_features for layer in layers[:-1]]
    return described


def _describe_mlp(module: MLP) -> dict[str, Any]:
    names = [name for name, function in MLP._activations.items() if function is module._activation]
    return {"ffn": "mlp", "hidden": module.up_proj.out_features, "activation": names[0]}


_DESCRIPTIONS: dict[type[FFN], Callable[[Any], dict[str, Any]]] = {
    Affine: lambda module: {"ffn": "affine"},
    KAN: _describe_kan,
    KAT: lambda module: {"ffn": "kat", "hidden": module.fc1.out_features, "groups": module.act1.groups},
    MLP: _describe_mlp,
    Removed: lambda module: {"ffn": "removed"},
    SwiGLU: lambda module: {"ffn": "swiglu", "hidden": module.gate_proj.out_features},
}
