"""What the edges of a cell's KAN layers learned, on what these layers read of held-out conversations.

One item per layer holds the strongest functions, sampled, with histograms of their inputs; a cell without KAN layers
has none. Legend: N tokens, D inputs of a layer, P points.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kallm.data.packing import encode
from kallm.engine.passes import compute_states
from kallm.engine.subject import Subject
from kallm.evaluate.heldout import needs_chat_template
from kallm.evaluate.score import Score
from kallm.evaluate.suites import Context, EdgesSettings, Evaluation, Progress
from kallm.kan.edges import Edges
from kallm.kan.linear import KANLinear
from kallm.model.cache import HiddenCache
from kallm.model.trunk import Passage

__all__ = ["EdgesText", "choose_passages", "describe_edges", "find_layers", "prepare"]

_POINTS, _BINS = 65, 32
_OUTSIDE = 0.005
"""Share of the tokens whose inputs lie left, and as many right, of what is drawn: a few lie far out."""
_SHARES = (0.01, 0.1)


@dataclass(frozen=True)
class EdgesText:
    """Conversations that the layers read, and the trunk's output for them."""

    settings: EdgesSettings
    cache: HiddenCache

    @property
    def num_items(self) -> int:
        """How many conversations are read."""
        return len(self.cache)

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Describe one subject's layers; shares are in percent, and means over its layers."""
        layers = {subject.tail.whole_name(name): layer for name, layer in find_layers(subject.tail).items()}
        if not layers:
            progress.advance(self.num_items)
            return Evaluation({}, {}, [])

        def read(index: int) -> None:
            stop()
            compute_states(subject, self.cache.passages[index], self.cache[index])
            progress.advance(1)

        items = describe_edges(layers, map(read, range(len(self.cache))), self.settings)
        told = [item["explained"] for item in items]
        rows = int(items[0]["rows"])
        means = {name: sum(100 * each[name] for each in told) / len(told) for name in ("lines", "strongest_1")}
        means["strongest_10"] = sum(100 * each["strongest_10"] for each in told) / len(told)
        return Evaluation({name: Score(value=mean, unit="%", n=rows) for name, mean in means.items()}, {}, items)


def prepare(settings: EdgesSettings, context: Context) -> EdgesText:
    """Tokenise as many held-out conversations as are needed.

    Raises:
        WrongConfiguration: the tokenizer has no chat template.
    """
    needs_chat_template(context.tokenizer, "edges")
    passages = choose_passages(settings, context.tokenizer, context.heldout)
    return EdgesText(settings, HiddenCache(context.trunk, passages, context.folder, context.model_name))


def choose_passages(settings: EdgesSettings, tokenizer: Any, conversations: Iterable[Any]) -> list[Passage]:
    """Return the first conversations, until their tokens suffice; each is read from its start."""
    passages: list[Passage] = []
    left = settings.tokens
    for conversation in conversations:
        if left <= 0:
            break
        tokens = encode(tokenizer, conversation)[:left]
        passages.append(Passage(torch.tensor(tokens), torch.arange(len(tokens))))
        left -= len(tokens)
    return passages


def find_layers(model: nn.Module) -> dict[str, KANLinear]:
    """Return a model's KAN layers by name, first to last."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KANLinear)}


def describe_edges(
    layers: dict[str, KANLinear], passes: Iterable[object], settings: EdgesSettings
) -> list[dict[str, Any]]:
    """Return one item per layer: what its parts explain, and its strongest functions.

    Args:
        layers: by name.
        passes: each element is drawn while the layers are listened to, and drawing it runs the model.
        settings: how many functions are kept.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, to=kept[name]: to.append(inputs[0].detach().flatten(0, -2)))
        for name, layer in layers.items()
    ]
    try:
        for _ in passes:
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return [_describe_layer(name, layer, torch.cat(kept.pop(name)), settings) for name, layer in layers.items()]


def _describe_layer(name: str, layer: KANLinear, rows: Float[Tensor, "N D"], settings: EdgesSettings) -> dict[str, Any]:
    edges = Edges(layer, rows)
    explained = edges.explain(shares=_SHARES)
    strongest = edges.rank(settings.functions)
    low, high = torch.quantile(edges.rows, torch.tensor([_OUTSIDE, 1 - _OUTSIDE]).to(edges.rows), dim=0)
    grid = low + (high - low) * torch.linspace(0, 1, _POINTS).to(edges.rows)[:, None]
    functions = [
        {
            "output": edge.output,
            "input": edge.input,
            "variance": _round(edge.variance),
            "share": _round(edge.share),
            "low": _round(float(low[edge.input])),
            "high": _round(float(high[edge.input])),
            "curve": [_round(value) for value in curve.tolist()],
            "histogram": _count(edges.rows[:, edge.input], float(low[edge.input]), float(high[edge.input])),
        }
        for edge, curve in zip(strongest, edges.sample(strongest, grid), strict=True)
    ]
    return {
        "id": name,
        "inputs": layer.in_features,
        "outputs": layer.out_features,
        "rows": len(rows),
        "explained": {
            "lines": _round(explained.lines),
            "degrees": [_round(value) for value in explained.degrees],
            "strongest_1": _round(explained.strongest[0.01]),
            "strongest_10": _round(explained.strongest[0.1]),
        },
        "functions": functions,
    }


def _count(values: Float[Tensor, " N"], low: float, high: float) -> list[int]:
    """Return how many values lie in each of some equal bins."""
    inside = values[(values >= low) & (values <= high)]
    return [int(count) for count in torch.histc(inside.cpu(), bins=_BINS, min=low, max=high).tolist()]


def _round(value: float) -> float:
    return float(f"{value:.6g}")
