"""A trained cell that speaks: text and replies that appear on standard output as they are made."""

import sys

import torch
from transformers import TextStreamer

from kallm.engine.replies import make_generation
from kallm.errors import WrongConfiguration
from kallm.run.trained import TrainedCell

__all__ = ["Speaker"]


class Speaker:
    """Speaks on from a text, or in turns."""

    def __init__(self, trained: TrainedCell, *, max_new_tokens: int, temperature: float, seed: int) -> None:
        """``temperature`` 0 takes the likeliest token always; else tokens are drawn, from the seed on."""
        self._trained = trained
        self._turns: list[dict[str, str]] = []
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
        self._generation = make_generation(trained.model, trained.tokenizer, max_new_tokens=max_new_tokens, **drawn)
        torch.manual_seed(seed)

    def continue_text(self, text: str) -> str:
        """Print how the text goes on; return it.

        Raises:
            WrongConfiguration: the text has no tokens, or too many.
        """
        ids = self._trained.tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise WrongConfiguration("the prompt is empty: give some text to go on from")
        if ids.shape[1] > self._room():
            raise WrongConfiguration(
                f"the prompt has {ids.shape[1]} tokens, and {self._room()} fit beside --max-new-tokens "
                f"{self._generation.max_new_tokens}; shorten it"
            )
        return self._speak(ids)

    def begin(self) -> None:
        """Begin a conversation, forgetting the one before.

        Raises:
            WrongConfiguration: the tokenizer has no chat template.
        """
        if self._trained.tokenizer.chat_template is None:
            raise WrongConfiguration("the tokenizer of this model has no chat template: use 'kallm generate'")
        self._turns = []

    def reply(self, text: str) -> str:
        """Print the reply to a turn; return it.

        Of a conversation that is too long for the model the oldest turns are forgotten, and that is said.

        Raises:
            WrongConfiguration: the turn alone is too long.
        """
        self._turns.append({"role": "user", "content": text})
        ids = self._prompt()
        while ids.shape[1] > self._room():
            if len(self._turns) == 1:
                self._turns = []
                raise WrongConfiguration(f"the turn has {ids.shape[1]} tokens, but {self._room()} fit; shorten it")
            self._turns = self._turns[2:]
            print("(the oldest turn is forgotten: the conversation is too long for the model)", file=sys.stderr)
            ids = self._prompt()
        reply = self._speak(ids)
        self._turns.append({"role": "assistant", "content": reply})
        return reply

    def _prompt(self) -> torch.Tensor:
        tokenizer = self._trained.tokenizer
        text = tokenizer.apply_chat_template(self._turns, tokenize=False, add_generation_prompt=True)
        ids: torch.Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids

    def _speak(self, ids: torch.Tensor) -> str:
        model, tokenizer = self._trained.model, self._trained.tokenizer
        ids = ids.to(model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad(), self._trained.precision:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=self._generation, streamer=streamer
            )
        reply: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return reply

    def _room(self) -> int:
        """Return how many tokens of a prompt fit beside the longest reply."""
        length = getattr(self._trained.model.config, "max_position_embeddings", sys.maxsize)
        return int(length) - (self._generation.max_new_tokens or 0)
