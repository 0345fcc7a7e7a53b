"""Trunk and tail: the frozen first blocks, run once for every cell, and the last blocks that a cell trains.

Both halves are shallow copies of the pretrained model with fewer blocks, so every architecture keeps its own forward
pass, masks and position encoding. Legend: B batch, T tokens, D width of the residual stream, V vocabulary.
"""

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm.errors import WrongConfiguration

__all__ = ["HiddenCache", "Passage", "Tail", "Trunk", "assembled", "blocks_name", "split"]

_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


@dataclass(frozen=True)
class Passage:
    """One sequence that goes through the model alone.

    Attributes:
        input_ids: token ids, [T].
        position_ids: positions, [T]; documents packed into one passage each start at 0 and do not see each other.
        mask: which token (row) sees which (column), [T, T]; None means causal within each document.
    """

    input_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]
    mask: Bool[Tensor, "T T"] | None = None

    def fingerprint(self) -> str:
        """Return a hash of the passage's content."""
        digest = hashlib.sha256(self.input_ids.numpy().tobytes())
        digest.update(self.position_ids.numpy().tobytes())
        if self.mask is not None:
            digest.update(self.mask.numpy().tobytes())
        return digest.hexdigest()


class Trunk(nn.Module):
    """The frozen embedding and first blocks; its output is the residual stream before block ``cut``."""

    def __init__(self, base: PreTrainedModel, cut: int) -> None:
        super().__init__()
        self.cut = cut
        self.body = _with_blocks(base, 0, cut)
        setattr(self.body, _final_norm_name(base), nn.Identity())
        self.body.requires_grad_(False)
        self.body.eval()

    @torch.no_grad()
    def forward(self, passage: Passage) -> Float[Tensor, "T D"]:
        """Return the residual stream before the tail for one passage, [T, D]."""
        device = next(self.body.parameters()).device
        hidden: Tensor = self.body(
            input_ids=passage.input_ids[None].to(device),
            position_ids=passage.position_ids[None].to(device),
            attention_mask=None if passage.mask is None else passage.mask[None, None].to(device),
            use_cache=False,
        ).last_hidden_state
        return hidden[0]


class Tail(nn.Module):
    """A copy of the last blocks, the final norm and an untied head: what a cell trains."""

    def __init__(self, model: PreTrainedModel, cut: int) -> None:
        super().__init__()
        self.cut = cut
        base = model.base_model
        body = _with_blocks(base, cut, model.config.num_hidden_layers)
        body.set_input_embeddings(nn.Identity())
        if hasattr(body, "wpe"):  # GPT-2 adds its positions to the tokens' embedding, before the first block
            body.wpe = _NoPositions()
        self.body = copy.deepcopy(body)
        for index, block in enumerate(getattr(self.body, blocks_name(base))):
            _set_layer_index(block, index)
        self.head = copy.deepcopy(model.get_output_embeddings())
        self.requires_grad_(True)
        self._prefixes = _whole_names(model)

    @property
    def blocks(self) -> nn.ModuleList:
        """The tail's blocks, first to last."""
        found: nn.ModuleList = getattr(self.body, blocks_name(self.body))
        return found

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        position_ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the normalised last hidden states, [B, T, D]; multiply by ``head.weight`` for logits."""
        out: Tensor = self.body(
            inputs_embeds=hidden,
            position_ids=position_ids,
            attention_mask=None if mask is None else mask[:, None],
            use_cache=False,
        ).last_hidden_state
        return out

    def whole_name(self, name: str) -> str:
        """Return the name that a tail's parameter has in the whole model (``model.layers.25.…``)."""
        body_prefix, blocks, head_name = self._prefixes
        if name.startswith("head."):
            return f"{head_name}.{name.removeprefix('head.')}"
        parts = name.removeprefix("body.").split(".")
        if parts[0] == blocks:
            parts[1] = str(int(parts[1]) + self.cut)
        return ".".join((body_prefix, *parts))


class _NoPositions(nn.Module):
    """Stands where learned positions are added: a tail's input has them already."""

    def forward(self, position_ids: Int[Tensor, "*B T"]) -> Float[Tensor, ""]:
        return torch.zeros((), device=position_ids.device)


def split(model: PreTrainedModel, num_tail_blocks: int) -> tuple[Trunk, Tail]:
    """Split a causal language model into a trunk that shares its weights and a tail with weights of its own.

    Raises:
        WrongConfiguration: the model has fewer blocks than the tail, or does more behind them than a norm and a head.
    """
    if getattr(model.config, "final_logit_softcapping", None):
        raise WrongConfiguration(
            f"{type(model).__name__} bends its logits (final_logit_softcapping), which a tail's head does not: "
            "set it to null in the model's config, or take another model"
        )
    cut = model.config.num_hidden_layers - num_tail_blocks
    if cut < 0:
        raise WrongConfiguration(
            f"a tail of {num_tail_blocks} blocks is longer than the model, which has {model.config.num_hidden_layers}"
        )
    return Trunk(model.base_model, cut), Tail(model, cut)


@contextlib.contextmanager
def assembled(model: PreTrainedModel, tail: Tail) -> Iterator[PreTrainedModel]:
    """Put a tail's modules into the whole model, for ``generate``, and take them out again."""
    base, name = model.base_model, blocks_name(model.base_model)
    blocks, norm_name = getattr(base, name), _final_norm_name(base)
    before = (blocks, getattr(base, norm_name), model.get_output_embeddings())
    for index, block in enumerate(tail.blocks):
        _set_layer_index(block, tail.cut + index)
    setattr(base, name, nn.ModuleList([*blocks[: tail.cut], *tail.blocks]))
    setattr(base, norm_name, getattr(tail.body, norm_name))
    model.set_output_embeddings(tail.head)
    try:
        yield model
    finally:
        setattr(base, name, before[0])
        setattr(base, norm_name, before[1])
        model.set_output_embeddings(before[2])
        for index, block in enumerate(tail.blocks):
            _set_layer_index(block, index)


class HiddenCache:
    """The trunk's output for a list of passages, computed once and kept in a memory-mapped file.

    A passage always goes through the trunk alone, so its values depend neither on the batch it is used in nor on
    whether they were cached. Several processes may fill one file: they write equal bytes.
    """

    def __init__(self, trunk: Trunk, passages: Sequence[Passage], folder: Path, model: str) -> None:
        """``model`` names the frozen weights, so that caches of different models never meet."""
        self.trunk, self.passages = trunk, passages
        weight = next(trunk.body.parameters())
        width = trunk.body.config.hidden_size
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise WrongConfiguration(f"the trunk's dtype must be float32 or bfloat16, but it is {weight.dtype}")
        self._dtype = weight.dtype
        content = hashlib.sha256(f"{model} {trunk.cut} {weight.dtype} {torch.__version__}".encode())
        for passage in passages:
            content.update(passage.fingerprint().encode())
        self._starts = np.cumsum([0, *(len(p.input_ids) for p in passages)])
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / content.hexdigest()[:24]
        stored = np.float32 if weight.dtype is torch.float32 else np.int16
        self._values = _mapped(stem.with_suffix(".hidden"), stored, (int(self._starts[-1]), width))
        self._present = _mapped(stem.with_suffix(".present"), np.uint8, (len(passages),))

    def __len__(self) -> int:
        return len(self.passages)

    def num_missing(self) -> int:
        """Return how many passages have not been through the trunk yet."""
        return int((self._present == 0).sum())

    def __getitem__(self, index: int) -> Float[Tensor, "T D"]:
        """Return the residual stream before the tail for one passage, [T, D]."""
        place = slice(int(self._starts[index]), int(self._starts[index + 1]))
        if not self._present[index]:
            hidden = self.trunk(self.passages[index]).cpu()
            self._values[place] = (hidden if self._dtype is torch.float32 else hidden.view(torch.int16)).numpy()
            self._values.flush()
            self._present[index] = 1
        values = torch.from_numpy(np.array(self._values[place]))
        return values if self._dtype is torch.float32 else values.view(torch.bfloat16)


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


def _with_blocks(base: PreTrainedModel, low: int, high: int) -> PreTrainedModel:
    """Return a copy that shares all modules with ``base`` but has only the blocks from low to high."""
    name = blocks_name(base)
    half = copy.copy(base)
    half._modules = dict(base._modules)
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


def _final_norm_name(base: nn.Module) -> str:
    for name in _FINAL_NORMS:
        if hasattr(base, name):
            return name
    raise WrongConfiguration(f"{type(base).__name__} has no final norm named one of {', '.join(_FINAL_NORMS)}")


def _set_layer_index(block: nn.Module, index: int) -> None:
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]


def _whole_names(model: PreTrainedModel) -> tuple[str, str, str]:
    """Return the names of the base model, of its list of blocks and of the head within the whole model."""
    head = model.get_output_embeddings()
    head_name = next(name for name, module in model.named_modules() if module is head)
    return model.base_model_prefix, blocks_name(model.base_model), head_name


def _mapped(
    path: Path, dtype: type[np.generic], shape: tuple[int, ...]
) -> "np.memmap[tuple[int, ...], np.dtype[np.generic]]":
    """Map a file of zeros, made sparse where it is new."""
    with open(path, "ab") as file:
        if file.tell() == 0:
            file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
