"""One fresh FFN fitted in closed form to what it should give: inner maps taken over, the last map by ridge regression.

Legend: N tokens, D width of the residual stream, F features (what a linear map reads), O outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kallm.kan.calibration import root_mean_square
from kallm.kan.ffns import FFN, MLP, SwiGLU
from kallm.kan.linear import KANLinear
from kallm.kan.regression import RIDGES, LeastSquares, choose_ridge, compute_features, find_last_map
from kallm.kan.squashes import SQUASHES
from kallm.model.neurons import Neurons, read_neurons

__all__ = ["CHUNK", "Problem", "fit_ffn_"]

CHUNK = 2048
"""Tokens whose features are held at once."""
_HELD_BACK = 10
"""One of this many tokens chooses the ridge and the scales, and is then fitted too."""
_SAMPLE = 4096
"""Tokens on which fresh FFNs are calibrated, and neurons and scales compared."""
_SCALES = (1.0, 0.5, 0.25)
"""What a KAN layer's calibrated scale may be multiplied by; 1 fills the squashing's range."""
_RIDGE = 1e-3
"""The ridge under which scales of the last layer are compared."""


@dataclass(frozen=True)
class Problem:
    """What an FFN is fitted to.

    Attributes:
        x: what it reads, [N, D].
        y: what it should give, [N, D].
        weights: of the tokens, [N].
    """

    x: Float[Tensor, "N D"]
    y: Float[Tensor, "N O"]
    weights: Float[Tensor, " N"]

    @property
    def held(self) -> Bool[Tensor, " N"]:
        """The tokens that choose between fits: the last ones, for their neighbours would tell what they hold."""
        return torch.arange(len(self.x), device=self.x.device) >= len(self.x) * (_HELD_BACK - 1) // _HELD_BACK

    def sample(self) -> "Problem":
        """Return at most a few thousand of the tokens, evenly spread."""
        rows = slice(None, None, -(-len(self.x) // _SAMPLE))
        return Problem(self.x[rows], self.y[rows], self.weights[rows])

    def chunks(self, chosen: Bool[Tensor, " N"]) -> Iterator["Problem"]:
        """Yield the chosen tokens in pieces."""
        for rows in torch.split(chosen.nonzero()[:, 0], CHUNK):
            yield Problem(self.x[rows], self.y[rows], self.weights[rows])


@torch.no_grad()
def fit_ffn_(ffn: FFN, pretrained: nn.Module, problem: Problem, *, generator: torch.Generator) -> None:
    """Draw an FFN, take over what it can use of the pretrained one's neurons, and fit its last linear map.

    The ridge pulls the last map to zeros, or to what was taken over. An FFN without a linear map stays as it is.

    Raises:
        WrongConfiguration: the inputs are constant or not finite.
    """
    sample = problem.sample()
    ffn.reset_parameters(generator=generator, inputs=sample.x)
    last = find_last_map(ffn)
    if last is None:
        return
    last.weight.zero_()
    if last.bias is not None:
        last.bias.zero_()
    neurons = read_neurons(pretrained)
    if neurons is not None:
        _take_over(ffn, neurons.sort(sample.x, sample.weights), sample.x)
    layers = [module for module in ffn.modules() if isinstance(module, KANLinear)]
    if layers:
        read = sample.x
        for layer in layers[:-1]:
            read = layer(read)
        _fit_scale(layers[-1], Problem(read, sample.y, sample.weights), _RIDGE)
    fitted, held = _sums(last), _sums(last)
    for sums, chosen in ((fitted, ~problem.held), (held, problem.held)):
        for part in problem.chunks(chosen):
            features = compute_features(ffn, part.x)
            sums.add(features, part.y - _apply(last, features), part.weights)
    weight, bias = (fitted + held).solve(choose_ridge(fitted, held))
    last.weight.add_(weight.to(last.weight.dtype))
    if last.bias is not None:
        last.bias.add_(bias.to(last.bias.dtype))


def _take_over(ffn: FFN, neurons: Neurons, x: Float[Tensor, "N D"]) -> None:
    """Give the inner maps of a fresh FFN what they can use of neurons that are sorted by effect."""
    layers = [module for module in ffn.modules() if isinstance(module, KANLinear)]
    if isinstance(ffn, SwiGLU) and neurons.is_swiglu and neurons.up is not None:
        count = min(len(neurons.gate), ffn.gate_proj.out_features)
        ffn.gate_proj.weight[:count] = neurons.gate[:count]
        ffn.up_proj.weight[:count] = neurons.up[:count]
        ffn.down_proj.weight[:, :count] = neurons.down[:count].T
    elif isinstance(ffn, MLP):
        directions = neurons.directions(x, ffn.up_proj.out_features)
        ffn.up_proj.weight[: len(directions)] = directions / root_mean_square(x @ directions.T)[:, None]
    read = x
    for layer in layers[:-1]:
        targets = x @ neurons.directions(x, layer.out_features).T
        weight, bias = _fit_scale(layer, Problem(read, targets, x.new_ones(len(x))), RIDGES[0])
        layer.linear.weight[: len(weight)] = weight.to(layer.linear.weight.dtype)
        if layer.linear.bias is not None:
            layer.linear.bias[: len(bias)] = bias.to(layer.linear.bias.dtype)
        read = layer(read)


def _fit_scale(layer: KANLinear, problem: Problem, ridge: float) -> tuple[Tensor, Tensor]:
    """Give a KAN layer the scale, and centres to it, that fit held-back tokens best; return that fit."""
    spreads = [SQUASHES[branch.squash or layer.layer.squash].spread for branch in layer.layer.branches]
    widths = layer.layer.channels(layer.in_features)
    spread = torch.cat([problem.x.new_full((width,), s) for width, s in zip(widths, spreads, strict=True)])
    calibrated = spread / root_mean_square(problem.x)
    errors = []
    for factor in _SCALES:
        fitted, held = _functions_sums(layer, calibrated * factor, problem)
        errors.append(held.error(*fitted.solve(ridge)))
    best = _SCALES[errors.index(min(errors))]
    fitted, held = _functions_sums(layer, calibrated * best, problem)
    return (fitted + held).solve(ridge)


def _functions_sums(layer: KANLinear, scale: Tensor, problem: Problem) -> tuple[LeastSquares, LeastSquares]:
    """Set a layer's scale, centre its functions, and return the sums over tokens to fit and over those to choose."""
    layer.scale.copy_(scale)
    layer.mean.zero_()
    functions = layer.functions(problem.x)
    first = functions.shape[1] - len(layer.mean)
    layer.mean.copy_(functions[:, first:].mean(dim=0))
    functions[:, first:] -= layer.mean.float()
    fitted, held = (_sums(layer.linear, problem.y.shape[1]) for _ in range(2))
    for sums, rows in ((fitted, ~problem.held), (held, problem.held)):
        sums.add(functions[rows], problem.y[rows], problem.weights[rows])
    return fitted, held


def _sums(linear: nn.Linear, num_outputs: int | None = None) -> LeastSquares:
    return LeastSquares(
        linear.in_features,
        linear.out_features if num_outputs is None else num_outputs,
        bias=linear.bias is not None,
        device=linear.weight.device,
    )


def _apply(linear: nn.Linear, features: Float[Tensor, "N F"]) -> Float[Tensor, "N O"]:
    return F.linear(features, linear.weight.float(), None if linear.bias is None else linear.bias.float())
