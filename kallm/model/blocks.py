"""The inside of a base model: its list of blocks, what stands before and behind them, and copies with fewer blocks."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm.errors import WrongConfiguration

__all__ = [
    "blocks_name",
    "decoder_of",
    "drop_embedding_",
    "final_norm_name",
    "set_layer_index_",
    "whole_names",
    "with_blocks",
]

_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
_POSITIONS = {"wpe", "embed_positions"}
"""GPT-2 and OPT add learned positions to the tokens' embedding, before the first block."""
_EMBEDDING_DROPOUTS = {"drop", "emb_dropout", "embed_dropout"}
"""Of the embedding, which is frozen."""


def blocks_name(base: nn.Module) -> str:
    """Return the name of the list of blocks in a base model (``layers``, ``h``, …).

    Raises:
        WrongConfiguration: there is no list of blocks.
    """
    lists = {name: child for name, child in base.named_children() if isinstance(child, nn.ModuleList)}
    if not lists:
        raise WrongConfiguration(
            f"{type(base).__name__} has no list of blocks, so it cannot be split into trunk and tail; its children are "
            f"{[n for n, _ in base.named_children()]}"
        )
    return max(lists, key=lambda name: len(lists[name]))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that holds the list of blocks: the base model, or what it wraps, as OPT's does."""
    base: PreTrainedModel = model.base_model
    if not any(isinstance(child, nn.ModuleList) for child in base.children()):
        for child in base.children():
            if isinstance(child, PreTrainedModel):
                return child
    return base


def with_blocks(base: PreTrainedModel, low: int, high: int) -> PreTrainedModel:
    """Return a copy that shares all modules with ``base`` but has only the blocks from low to high."""
    name = blocks_name(base)
    half = copy.copy(base)
    half._modules = dict(base._modules)
    for key in [key for key in vars(base) if key.endswith(("_hooks", "_hooks_with_kwargs"))]:
        half.__dict__[key] = copy.copy(vars(base)[key])
    half.config = _sliced_config(base.config, low, high)
    setattr(half, name, nn.ModuleList(getattr(base, name)[low:high]))
    return half


def _sliced_config(config: object, low: int, high: int) -> object:
    """Cut every per-block list of a config; transformers does not refuse a wrong length, it masks wrongly."""
    num_blocks = config.num_hidden_layers  # type: ignore[attr-defined]
    sliced = copy.deepcopy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == num_blocks:
            setattr(sliced, key, value[low:high])
    sliced.num_hidden_layers = high - low  # type: ignore[attr-defined]
    return sliced


def final_norm_name(base: nn.Module) -> str:
    """Return the name of the norm behind the last block.

    Raises:
        WrongConfiguration: there is none by a known name.
    """
    for name in _FINAL_NORMS:
        if hasattr(base, name):
            return name
    raise WrongConfiguration(f"{type(base).__name__} has no final norm named one of {', '.join(_FINAL_NORMS)}")


def drop_embedding_(body: PreTrainedModel) -> None:
    """Take from a base model all that comes before its first block: it then takes the residual stream there."""
    body.set_input_embeddings(nn.Identity())
    for name in _POSITIONS & body._modules.keys():
        setattr(body, name, _NoPositions())
    for name in _EMBEDDING_DROPOUTS & body._modules.keys():
        setattr(body, name, nn.Identity())


def set_layer_index_(block: nn.Module, index: int) -> None:
    """Tell a block's attention which layer of the cache is its own."""
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]


def whole_names(model: PreTrainedModel) -> tuple[str, str, str]:
    """Return the names of the base model, of its list of blocks and of the head within the whole model."""
    head, base = model.get_output_embeddings(), decoder_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(base)], blocks_name(base), names[id(head)]


class _NoPositions(nn.Module):
    """Stands where learned positions are added: a tail's input has them already."""

    def forward(self, given: Tensor, *args: Any, **rest: Any) -> Float[Tensor, ""]:
        return torch.zeros((), device=given.device)
