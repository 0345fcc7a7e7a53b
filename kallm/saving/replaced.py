"""Which modules of a model are FFNs of ours, and from what description each is built again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN, build
from kallm.kan.spec import FFNSpec

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
    found = [Replaced(name, module.spec, module) for name, module in model.named_modules() if isinstance(module, FFN)]
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
