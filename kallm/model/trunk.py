"""Trunk and tail: the frozen first blocks, run once for every cell, and the last blocks that a cell trains.

Both halves are shallow copies of the pretrained model with fewer blocks, so every architecture keeps its own forward
pass, masks and position encoding. Legend: B batch, T tokens, D width of the residual stream, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm.errors import WrongConfiguration
from kallm.model.blocks import (
    blocks_name,
    decoder_of,
    drop_embedding_,
    final_norm_name,
    set_layer_index_,
    whole_names,
    with_blocks,
)
from kallm.model.packed import masked
from kallm.model.passage import Passage, apart, trial_passage
from kallm.model.whole import (
    OwnHead,
    TokenBody,
    is_close,
    mixes_documents,
    read_tokens_,
)

__all__ = ["Passage", "Tail", "Trunk", "WholeTail", "assembled", "split"]


class Trunk(nn.Module):
    """The frozen embedding and first blocks; its output is the residual stream before block ``cut``.

    Before block 0 it gives the token ids instead: the tail is then a ``WholeTail``, which embeds them.

    Attributes:
        masks: whether packed documents need a mask to stay apart.
        note: one sentence where something hinders sharing; else empty.
    """

    def __init__(self, base: PreTrainedModel, cut: int, *, masks: bool = False, note: str = "") -> None:
        super().__init__()
        self.cut, self.masks, self.note = cut, masks, note
        self.body: Any = TokenBody(base)
        if cut:
            self.body = with_blocks(base, 0, cut)
            setattr(self.body, final_norm_name(base), nn.Identity())
        self.body.requires_grad_(False)
        self.body.eval()

    @torch.no_grad()
    def forward(self, passage: Passage) -> Float[Tensor, "T D"]:
        """Return the residual stream before the tail for one passage, [T, D], or its token ids, [T, 1]."""
        device = next(self.body.parameters()).device
        positions = passage.position_ids[None].to(device)
        mask = None if passage.mask is None else passage.mask[None].to(device)
        with masked(self.body.config, positions, mask, always=self.masks) as given:
            hidden: Tensor = self.body(
                input_ids=passage.input_ids[None].to(device),
                position_ids=positions,
                attention_mask=given,
                use_cache=False,
            ).last_hidden_state
        return hidden[0]


class Tail(nn.Module):
    """A copy of the last blocks, the final norm and the head: what a cell trains.

    Attributes:
        cut: the number of its first block in the whole model.
        head: gives logits; a ``Linear`` without bias, or an ``OwnHead`` where the model does more.
        masks: whether packed documents need a mask to stay apart.
    """

    def __init__(self, model: PreTrainedModel, cut: int, *, masks: bool = False) -> None:
        super().__init__()
        self.cut, self.masks = cut, masks
        self.body = self._copied_body(model)
        head = OwnHead(model)
        self.head: Any = head if head.bends() else head.linear
        self.requires_grad_(True)
        self._prefixes = whole_names(model)

    def _copied_body(self, model: PreTrainedModel) -> PreTrainedModel:
        base = decoder_of(model)
        body = with_blocks(base, self.cut, model.config.num_hidden_layers)
        drop_embedding_(body)
        body = copy.deepcopy(body)
        for index, block in enumerate(getattr(body, blocks_name(base))):
            set_layer_index_(block, index)
        return body

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that train, first to last."""
        found: nn.ModuleList = getattr(self.body, blocks_name(self.body))
        return found

    @property
    def layers(self) -> str:
        """The blocks that train, as a ``RetrofitConfig`` names them."""
        return f"last:{len(self.blocks)}"

    @property
    def trained(self) -> list[nn.Module]:
        """What trains beside the head."""
        return [self.body]

    @property
    def linear(self) -> Any:
        """The matrix product in the head."""
        return self.head.linear if isinstance(self.head, OwnHead) else self.head

    def forward(
        self,
        hidden: Float[Tensor, "B T W"],
        position_ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the normalised last hidden states, [B, T, D], of a trunk's output; ``head`` makes logits of them."""
        with masked(self.body.config, position_ids, mask, always=self.masks) as given:
            out: Tensor = self.body(
                inputs_embeds=hidden, position_ids=position_ids, attention_mask=given, use_cache=False
            ).last_hidden_state
        return out

    def pretrained(self, model: PreTrainedModel) -> "Tail":
        """Return a tail of the same form with the model's own weights, bit for bit."""
        return Tail(model, self.cut, masks=self.masks)

    def whole_name(self, name: str) -> str:
        """Return the name that a tail's parameter has in the whole model (``model.layers.25.…``)."""
        body_prefix, blocks, head_name = self._prefixes
        if name.startswith("head.lm."):
            return name.removeprefix("head.lm.")
        if name.startswith("head."):
            return f"{head_name}.{name.removeprefix('head.')}"
        parts = name.removeprefix("body.").split(".")
        if parts[0] == blocks:
            parts[1] = str(int(parts[1]) + self.cut)
        return ".".join((body_prefix, *parts))


class WholeTail(Tail):
    """A whole model as a tail, for token ids: only its last blocks, final norm and head train, and are copied.

    All else is frozen and shared with the model and with the other tails. A tied head is the embedding too, one matrix
    that trains through both its uses.
    """

    def __init__(self, model: PreTrainedModel, num_trained: int, *, tied: bool, masks: bool = False) -> None:
        self._num_trained = num_trained
        super().__init__(model, 0, masks=masks)
        self._tied = tied
        if tied:
            embedding: Any = copy.deepcopy(model.get_input_embeddings())
            self.body.set_input_embeddings(embedding)
            self.linear.weight = embedding.weight
        for frozen in self._frozen:
            frozen.requires_grad_(False)

    def _copied_body(self, model: PreTrainedModel) -> PreTrainedModel:
        base = decoder_of(model)
        num_blocks = model.config.num_hidden_layers
        body = with_blocks(base, 0, num_blocks)
        blocks, norm_name = getattr(body, blocks_name(body)), final_norm_name(body)
        for index in range(num_blocks - self._num_trained, num_blocks):
            blocks[index] = copy.deepcopy(blocks[index])
        setattr(body, norm_name, copy.deepcopy(getattr(body, norm_name)))
        read_tokens_(body)
        return body

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that train, first to last."""
        found: nn.ModuleList = super().blocks[-self._num_trained :]
        return found

    @property
    def trained(self) -> list[nn.Module]:
        """What trains beside the head."""
        norm = getattr(self.body, final_norm_name(self.body))
        return [*self.blocks, *([] if norm is None else [norm])]  # a small OPT has none

    @property
    def _frozen(self) -> list[nn.Module]:
        """What never trains: all of the body but what trains, and but the embedding where that is the head."""
        own = {id(module) for module in self.trained}
        if self._tied:
            own.add(id(self.body.get_input_embeddings()))
        name = blocks_name(self.body)
        parts = [module for key, module in self.body.named_children() if key != name]
        return [module for module in (*parts, *getattr(self.body, name)) if id(module) not in own]

    def pretrained(self, model: PreTrainedModel) -> "WholeTail":
        """Return a tail of the same form with the model's own weights."""
        return WholeTail(model, self._num_trained, tied=self._tied, masks=self.masks)

    def train(self, mode: bool = True) -> "WholeTail":
        """Set the mode of what trains; frozen blocks are always evaluated, as a trunk's are."""
        super().train(mode)
        for frozen in self._frozen:
            frozen.eval()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "WholeTail":
        for frozen in self._frozen:
            memo[id(frozen)] = frozen
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin


def split(
    model: PreTrainedModel, num_tail_blocks: int, *, head: Literal["untied", "tied"] = "untied"
) -> tuple[Trunk, Tail]:
    """Split a causal language model into a trunk that shares its weights and a tail with weights of its own.

    The model is put into evaluation mode, and what it does is tried on a few tokens. There is no trunk, and the
    whole model is the tail, where the tail is all of it, where a tied head trains the embedding, or where trunk and
    tail are found not to compute what the whole model does; ``Trunk.note`` says so.

    Raises:
        WrongConfiguration: the model has fewer blocks than the tail, no embedding that is its head, or lets packed
            documents see each other.
    """
    cut = model.config.num_hidden_layers - num_tail_blocks
    if cut < 0:
        raise WrongConfiguration(
            f"a tail of {num_tail_blocks} blocks is longer than the model, which has {model.config.num_hidden_layers}"
        )
    base, name = decoder_of(model.eval()), type(model).__name__
    if head == "tied" and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise WrongConfiguration(f"head: tied needs a model whose embedding is its head, but {name} has two matrices")
    masks = mixes_documents(base)
    if head == "tied":
        note = "head: tied: the embedding trains, so each cell runs the whole model, and no trunk is shared"
    elif cut == 0:
        note = "tail: all: each cell runs the whole model, and no trunk is shared"
    else:
        trunk, tail = Trunk(base, cut, masks=masks), Tail(model, cut, masks=masks)
        if _is_exact(base, trunk, tail):
            return trunk, tail
        note = f"{name} cannot be cut between its blocks, so each cell runs the whole model, and no trunk is shared"
    return Trunk(base, 0, note=note), WholeTail(model, num_tail_blocks, tied=head == "tied", masks=masks)


@torch.no_grad()
def _is_exact(base: PreTrainedModel, trunk: Trunk, tail: Tail) -> bool:
    """Try on a few tokens whether trunk and tail give what the whole model gives."""
    passage, device = trial_passage(base.config.vocab_size), next(base.parameters()).device
    ids, positions = passage.input_ids[None].to(device), passage.position_ids[None].to(device)
    mask = apart(positions)[:, None] if tail.masks else None
    whole = base(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
    parts = tail(trunk(passage)[None], positions)
    return parts.shape == whole.shape and is_close(parts, whole)


@contextlib.contextmanager
def assembled(model: PreTrainedModel, tail: Tail) -> Iterator[PreTrainedModel]:
    """Put a tail's modules into the whole model, for ``generate``, and take them out again."""
    base = decoder_of(model)
    name, norm_name = blocks_name(base), final_norm_name(base)
    blocks, own = getattr(base, name), getattr(tail.body, name)
    before = (getattr(base, norm_name), model.get_input_embeddings(), model.get_output_embeddings())
    for index, block in enumerate(own):
        set_layer_index_(block, tail.cut + index)
    setattr(base, name, nn.ModuleList([*blocks[: tail.cut], *own]))
    setattr(base, norm_name, getattr(tail.body, norm_name))
    if isinstance(tail, WholeTail):
        model.set_input_embeddings(tail.body.get_input_embeddings())
    model.set_output_embeddings(tail.linear)
    try:
        yield model
    finally:
        setattr(base, name, blocks)
        setattr(base, norm_name, before[0])
        model.set_input_embeddings(before[1])
        model.set_output_embeddings(before[2])
        for index, block in enumerate(own):
            set_layer_index_(block, index)
