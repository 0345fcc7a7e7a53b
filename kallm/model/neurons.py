"""The neurons of a pretrained FFN, and fresh FFNs whose inner maps begin as those that matter most.

Legend: N rows (tokens), D width of the residual stream, M neurons, H hidden channels of the fresh FFN.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Neurons", "read_neurons"]


@dataclass(frozen=True)
class Neurons:
    """A pretrained FFN as a sum over neurons: Σ_j down_j act(gate_j · x) (up_j · x), or without the factor up.

    Attributes:
        gate: what the activation reads, [M, D]; the first map of an FFN without a gate.
        up: the other factor, [M, D]; None for an FFN without a gate.
        down: what each neuron adds to the residual stream, [M, D].
        activation: the pretrained one.
    """

    gate: Float[Tensor, "M D"]
    up: Float[Tensor, "M D"] | None
    down: Float[Tensor, "M D"]
    activation: Any

    @property
    def is_swiglu(self) -> bool:
        """Whether a SwiGLU can take these neurons over as they are."""
        probe = torch.linspace(-4, 4, 9)
        return self.up is not None and torch.allclose(self.activation(probe), F.silu(probe), atol=1e-5)

    def sort(self, x: Float[Tensor, "N D"], weights: Float[Tensor, " N"]) -> "Neurons":
        """Return the neurons by their effect, largest first: the mean square of what each adds on these inputs."""
        values = self.activation(x @ self.gate.T)
        if self.up is not None:
            values = values * (x @ self.up.T)
        effects = (weights @ values.square()) * self.down.square().sum(dim=1)
        order = effects.argsort(descending=True, stable=True)
        up = None if self.up is None else self.up[order]
        return Neurons(self.gate[order], up, self.down[order], self.activation)

    def directions(self, x: Float[Tensor, "N D"], count: int) -> Float[Tensor, "H D"]:
        """Return directions of x whose squares hold the first neurons: g u is ((g + u)² - (g - u)²)/4.

        The factors are made equally large on these inputs, sums and differences alternate; without a gate, the
        directions are those of the activation. There are at most ``count``.
        """
        if self.up is None:
            return self.gate[:count]
        pairs = -(-count // 2)
        gate, up = self.gate[:pairs], self.up[:pairs]
        ratio = ((x @ up.T).square().mean(dim=0) / (x @ gate.T).square().mean(dim=0)).pow(0.25)[:, None]
        gate, up = gate * ratio, up / ratio
        return torch.stack([gate + up, gate - up], dim=1).flatten(0, 1)[:count]


def read_neurons(ffn: nn.Module) -> Neurons | None:
    """Return the neurons of a pretrained FFN, without biases; None where its parts are not known.

    Known are a gated FFN (``gate_proj``, ``up_proj``, ``down_proj``; or ``gate_up_proj``) and two linear maps around
    one activation.
    """
    maps = [part for part in ffn.modules() if isinstance(part, nn.Linear | Conv1D)]
    acts = [child for name, child in ffn.named_children() if name.startswith("act")]
    if len(acts) != 1:
        return None
    named = dict(ffn.named_children())
    if {"gate_proj", "up_proj", "down_proj"} <= set(named):
        gate, up, down = (_weight(named[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        return Neurons(gate, up, down.T, acts[0])
    if {"gate_up_proj", "down_proj"} <= set(named):
        gate, up = _weight(named["gate_up_proj"]).chunk(2)
        return Neurons(gate, up, _weight(named["down_proj"]).T, acts[0])
    if len(maps) == 2:
        return Neurons(_weight(maps[0]), None, _weight(maps[1]).T, acts[0])
    return None


def _weight(linear: nn.Module) -> Float[Tensor, "O D"]:
    """Return a linear map's weight in float32, outputs first."""
    weight = linear.get_parameter("weight").detach().float()
    return weight.T if isinstance(linear, Conv1D) else weight
