"""What stands in where a model is not cut or its head is more than a matrix product, and how that is found out.

Without a trunk, token ids take the place of its output, and the whole model is the tail. Legend: B batch, T tokens,
D width of the residual stream, V vocabulary.
"""

import copy
import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from kallm.errors import WrongConfiguration
from kallm.model.blocks import decoder_of, whole_names
from kallm.model.passage import FIRST_LENGTH, apart, trial_passage

__all__ = ["OwnHead", "TokenBody", "is_close", "mixes_documents", "read_tokens_"]

_NUM_STATES = 8
_OTHER_SHAPE = 10.0
"""Products of other shapes round otherwise, and more so on a GPU."""
_LARGE = 100.0
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}
_CLOSE_IN_16_BIT = 0.05


class TokenBody(nn.Module):
    """Stands where a trunk's blocks stand, and gives the token ids themselves, as a residual stream of width one.

    They are fp32, which holds every id below 2^24, whatever the precision of the model.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.config = copy.deepcopy(base.config)
        self.config.num_hidden_layers = 0
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = []
        self.config.hidden_size = 1
        device = next(base.parameters()).device
        self.place = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)  # tells device and dtype

    def forward(self, input_ids: Int[Tensor, "B T"], **rest: Any) -> BaseModelOutputWithPast:
        """Return the ids as last hidden state, [B, T, 1]; positions, masks and caches are the tail's business."""
        return BaseModelOutputWithPast(last_hidden_state=input_ids[..., None].to(self.place.dtype))


class _States(BaseModelOutputWithPast):
    """An output without what some heads look for: cross-attentions, router logits."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def read_tokens_(body: nn.Module) -> None:
    """Let a base model take embeddings of width one for token ids."""
    body.register_forward_pre_hook(_take_tokens, with_kwargs=True)


def _take_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    given = kwargs.get("inputs_embeds")
    if given is None or given.shape[-1] != 1:
        return args, kwargs
    rest = {name: value for name, value in kwargs.items() if name != "inputs_embeds"}
    return args, rest | {"input_ids": given[..., 0].long()}


class OwnHead(nn.Module):
    """What a causal language model does behind its last hidden states, where that is more than a matrix product.

    It is the model's own code: Gemma 2 caps its logits, Granite and Cohere scale them, Phi adds a bias.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.lm = copy.copy(model)
        self.lm._modules = dict(model._modules)
        given, base = _Given(), model.base_model
        for name, child in base.named_children():
            if child is decoder_of(model):
                given.add_module(name, _Given())  # OPT's head asks the decoder, past the base model
        setattr(self.lm, model.base_model_prefix, given)
        head = model.get_output_embeddings()
        self._name = whole_names(model)[2]
        self.lm.set_output_embeddings(copy.deepcopy(head))

    @property
    def linear(self) -> Any:
        """The matrix product within."""
        return self.lm.get_submodule(self._name)

    @property
    def weight(self) -> nn.Parameter:
        """The matrix, [V, D]."""
        weight: nn.Parameter = self.linear.weight
        return weight

    def forward(self, states: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Return logits."""
        logits: Tensor = self.lm(inputs_embeds=states.reshape(1, -1, states.shape[-1]), use_cache=False).logits
        return logits.reshape(*states.shape[:-1], -1)

    @torch.no_grad()
    def bends(self) -> bool:
        """Say whether it is more than a matrix product; tried on states whose logits reach 100, as real ones may."""
        weight = self.weight
        states = weight[:_NUM_STATES] * (_LARGE / (weight[:_NUM_STATES] @ weight.T).abs().max())
        return not is_close(self(states), nn.functional.linear(states, weight))


class _Given(nn.Module):
    """Stands where the base model stands, and gives what it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **rest: Any) -> "_States":
        return _States(last_hidden_state=inputs_embeds)


def is_close(found: Tensor, expected: Tensor, *, times: float = 1.0) -> bool:
    """Return whether two ways to compute the same differ by rounding alone; ``times`` widens what that may be."""
    close = _CLOSE.get(expected.dtype, _CLOSE_IN_16_BIT)
    if torch.is_autocast_enabled(expected.device.type):
        close = _CLOSE_IN_16_BIT
    return bool((found - expected).abs().max() <= times * close * expected.abs().max())


@torch.no_grad()
def mixes_documents(base: PreTrainedModel) -> bool:
    """Say whether packed documents see each other unless a mask forbids it, as OPT's do; tried on a few tokens.

    Raises:
        WrongConfiguration: they do, and no mask can forbid it: no position ids, or blocks that mask on their own.
    """
    name = type(base).__name__
    if not {"position_ids", "inputs_embeds"} <= inspect.signature(base.forward).parameters.keys():
        raise WrongConfiguration(
            f"{name} takes no position ids, so packed documents and trees of options would see each other: "
            "take a model whose forward pass takes position_ids"
        )
    ids, positions = _trial(base)
    alone = base(
        input_ids=ids[:, FIRST_LENGTH:], position_ids=positions[:, FIRST_LENGTH:], use_cache=False
    ).last_hidden_state

    def is_apart(mask: Tensor | None) -> bool:
        row = base(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
        return is_close(row[:, FIRST_LENGTH:], alone, times=_OTHER_SHAPE)

    if is_apart(None):
        return False
    if getattr(base.config, "sliding_window", None) or not is_apart(apart(positions)[:, None]):
        raise WrongConfiguration(
            f"{name} lets packed documents see each other, with a mask too: take a model that keeps them apart"
        )
    return True


def _trial(model: PreTrainedModel) -> tuple[Int[Tensor, "1 T"], Int[Tensor, "1 T"]]:
    passage, device = trial_passage(model.config.vocab_size), next(model.parameters()).device
    return passage.input_ids[None].to(device), passage.position_ids[None].to(device)
