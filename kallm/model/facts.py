"""What a plan needs to know of a model: its sizes and parameter counts, from its config and headers alone."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kallm.errors import WrongConfiguration

__all__ = ["ModelFacts", "count_parameters", "read_headers"]

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk)\.(\d+)\.")
_FFN = re.compile(r"\.(?:mlp|feed_forward|ffn|fc1|fc2|ffn_(?:gate|up|down))\.")
_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embd)\.")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_DEPTH = ("num_hidden_layers", "n_layer")
_HIDDEN = ("intermediate_size", "n_inner", "ffn_dim")


class ModelFacts(BaseModel):
    """What a plan needs to know of a model, read from its headers alone.

    Attributes:
        source: the source with its revision resolved.
        identity: hash of the weights, or the hub's commit.
        blocks, ffns: parameters of each block, and of its FFN.
        other: parameters that are neither embedding, block nor head (the final norm).
        positions: parameters of learned positions, which are added to the embedding and stay with it.
        kind: the config's ``model_type``; None where the source names none.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    identity: str
    note: str | None
    num_blocks: int
    width: int
    ffn_hidden: int
    vocabulary: int
    tied: bool
    blocks: tuple[int, ...]
    ffns: tuple[int, ...]
    other: int
    positions: int = 0
    kind: str | None = None

    @property
    def head(self) -> int:
        """Parameters of the head (and of the embedding): V × D."""
        return self.vocabulary * self.width

    @property
    def total(self) -> int:
        """Parameters of the whole model, a tied matrix counted once."""
        return sum(self.blocks) + self.other + self.positions + self.head * (1 if self.tied else 2)


def read_headers(folder: Path, weights: list[Path]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return a folder's config, and the shapes of its tensors by name."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in weights:
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    return json.loads((folder / "config.json").read_text()), shapes


def count_parameters(
    source: str, identity: str, note: str | None, config: dict[str, Any], shapes: Mapping[str, Iterable[int]]
) -> ModelFacts:
    """Return a model's facts from its config and the shapes of its tensors.

    Raises:
        WrongConfiguration: the config tells no width or depth.
    """

    def setting(names: tuple[str, ...], default: int | None = None) -> int:
        for name in names:
            if config.get(name) is not None:
                return int(config[name])
        if default is None:
            raise WrongConfiguration(f"the config of '{source}' has none of {', '.join(names)}")
        return default

    width, num_blocks = setting(_WIDTH), setting(_DEPTH)
    head = width * int(config["vocab_size"])
    blocks, ffns, rest, positions = [0] * num_blocks, [0] * num_blocks, 0, 0
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= int(size)
        match = _BLOCK.search(name)
        if _POSITIONS.search(name):
            positions += count
        elif match is None:
            rest += count
        else:
            blocks[int(match[1])] += count
            ffns[int(match[1])] += count if _FFN.search(name) else 0
    tied = rest < 2 * head
    return ModelFacts(
        source=source,
        identity=identity,
        note=note,
        num_blocks=num_blocks,
        width=width,
        ffn_hidden=setting(_HIDDEN, 4 * width),
        vocabulary=int(config["vocab_size"]),
        tied=tied,
        blocks=tuple(blocks),
        ffns=tuple(ffns),
        other=rest - head * (1 if tied else 2),
        positions=positions,
        kind=config.get("model_type"),
    )
