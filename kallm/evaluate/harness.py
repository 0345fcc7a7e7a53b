"""Our engine as a model of lm-eval: ``python -m kallm.evaluate run --model kallm --model_args path=… --tasks …``.

Importing this module registers the model ``kallm``; lm-eval 0.4.13 looks for no entry points. Equal beginnings are
computed once, the options of a question in one pass, the head only where an answer is predicted, softmax in fp32.
"""

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kallm.engine.likelihoods import Engine, Likelihood, WholeModel, score_segments, takes_trees
from kallm.engine.replies import (
    count_shared,
    cut_batches,
    generate,
    make_generation,
    pad_left,
    padding_token,
    share_beginning,
)
from kallm.engine.segments import Pair
from kallm.errors import WrongConfiguration
from kallm.evaluate.opening import choose_device, open_model, parse_batch_size, refuse_unknown
from kallm.progress import Reporter
from kallm.saving.saved import load

__all__ = ["KallmLM"]

_PASS_TOKENS = {"cpu": 256}
"""Tokens of a forward pass; elsewhere than on a CPU, more of them cost no more."""
_MANY_TOKENS = 4096
_REPLIES = 16


@register_model("kallm")
class KallmLM(TemplateLM):
    """Any causal language model of transformers, asked by lm-eval."""

    def __init__(
        self,
        path: str | None = None,
        *,
        delta: str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        engine: Engine | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        trust_remote_code: bool = False,
        done: Callable[[int], None] | None = None,
        **unknown: object,
    ) -> None:
        """Take a model by its source, or as it stands in memory.

        Args:
            path: ``hub:ORG/NAME[@revision]``, ``package:NAME`` or a folder.
            delta: a folder that ``kallm.save`` wrote, to be put onto it.
            model: instead of ``path``; its device stays.
            tokenizer: the model's.
            engine: how likelihoods are computed; by default by the whole model.
            dtype: float32, bfloat16 or float16.
            device: by default a GPU if there is one; cuda:0 without a GPU means the CPU, with a warning.
            batch_size: contexts of a forward pass, and replies at a time; ``auto`` fills passes by tokens.
            max_batch_size: replies at a time where batch_size is ``auto``.
            max_length: the longest text in tokens; by default what the model was made for.
            max_gen_toks: longest reply where a task says nothing.
            prefix_token_id: what stands before a text without context.
            trust_remote_code: run the Python code that a folder or repository brings along.
            done: told how many requests are answered, instead of a progress bar.
            unknown: nothing; lm-eval hands on whatever stands in ``--model_args``.

        Raises:
            WrongConfiguration: no such argument, source, dtype, device or batch size.
        """
        super().__init__()
        refuse_unknown(unknown, inspect.signature(KallmLM).parameters.keys() - {"unknown"})
        if model is None or tokenizer is None:
            model, tokenizer = open_model(path, dtype, trust_remote_code=trust_remote_code)
            model.to(choose_device(device))
        if delta is not None:
            load(model, delta)
        self.model, self.tokenizer = model.eval(), tokenizer
        self._device, count = model.device, parse_batch_size(batch_size)
        self._replies = count or max_batch_size or _REPLIES
        self.trees = engine is None and takes_trees(model)
        tokens = _PASS_TOKENS.get(model.device.type, _MANY_TOKENS)
        self._engine = engine or WholeModel(model, trees=self.trees, max_tokens=tokens, max_contexts=count)
        self.max_length: int = max_length or resolve_max_length(model.config, tokenizer)
        self._max_gen_toks, self._prefix_token_id, self._done = max_gen_toks, prefix_token_id, done

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        known = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(token for token in known if token is not None)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for lm-eval's cache of requests."""
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's own template writes it.

        Raises:
            WrongConfiguration: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise WrongConfiguration("this model's tokenizer has no chat template: leave --apply_chat_template out")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's token ids, with the special tokens that the tokenizer adds unless the text has them."""
        return self._encode([string], add_special_tokens)[string]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Likelihood]:
        """Return for each (context, continuation) the continuation's log-likelihood, and whether it is the greedy one.

        Raises:
            WrongConfiguration: the tokenizer joins a continuation to its context.
        """
        split = [_move_spaces(*request.args) for request in requests]
        known = self._encode({text for pair in split for text in (pair[0], "".join(pair)) if pair[0]})
        pairs = []
        for context, continuation in split:
            if context:
                pairs.append((known[context], known[context + continuation][len(known[context]) :]))
            else:
                pairs.append(self._without_context(continuation))
        whole = [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)]
        return self._loglikelihood_tokens(whole, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, those that are too long in windows that do not overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return replies that end before the first of a request's stop texts.

        Raises:
            WrongConfiguration: a request's longest reply leaves no room for its prompt.
        """
        alike: dict[tuple[str | None, str], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[request.task_name, json.dumps(request.args[1], sort_keys=True)].append(number)
        replies = [""] * len(requests)
        with self._told(len(requests), disable_tqdm, "replies") as done:
            for numbers in alike.values():
                settings = requests[numbers[0]].args[1]
                prompts = self._encode({requests[number].args[0] for number in numbers})
                asked = [prompts[requests[number].args[0]] for number in numbers]
                for place, reply in self._reply_all(asked, settings):
                    number = numbers[place]
                    replies[number] = reply
                    self.cache_hook.add_partial("generate_until", requests[number].args, reply)
                    done(1)
        return replies

    def generate_batch(
        self,
        ids: Int[Tensor, "B T"],
        mask: Int[Tensor, "B T"],
        config: GenerationConfig,
        stops: list[str],
        start: Callable[[int], Cache] | None,
    ) -> list[str]:
        """Return the replies to one padded batch; ``start`` gives keys and values of what all prompts begin with."""
        cache = start(len(ids)) if start else None
        return generate(self.model, self.tokenizer, ids, mask, config, cache=cache, stops=stops)

    def _reply_all(self, prompts: list[list[int]], settings: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Yield numbers of prompts and replies, longest prompts first."""
        wanted = dict(normalize_gen_kwargs(settings, self._max_gen_toks))
        stops, max_new_tokens = [text for text in wanted.pop("until") if text], int(wanted.pop("max_gen_toks"))
        room = self.max_length - max_new_tokens
        if room < 1:
            raise WrongConfiguration(
                f"replies of {max_new_tokens} tokens leave no room for a prompt in the {self.max_length} tokens that "
                "this model reads: lower max_gen_toks"
            )
        if not wanted["do_sample"]:
            wanted.pop("temperature", None)
        prompts = [prompt[-room:] for prompt in prompts]
        config = make_generation(self.model, self.tokenizer, max_new_tokens=max_new_tokens, **wanted)
        shared = count_shared(prompts) if self.trees else 0
        start = share_beginning(self.model, prompts[0][:shared]) if shared else None
        for batch in cut_batches([len(prompt) for prompt in prompts], self._replies):
            ids, mask = pad_left(
                [prompts[number] for number in batch], padding_token(self.model, self.tokenizer), shared=shared
            )
            found = self.generate_batch(ids, mask, config, stops, start)
            yield from zip(batch, (postprocess_generated_text(text, stops, None) for text in found), strict=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Likelihood]:
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        with self._told(len(pairs), disable_tqdm, "likelihoods") as done:
            found = score_segments(self._engine, self._engine.plan(pairs), len(pairs), done)
        for (names, _, _), answer in zip(requests, found, strict=True):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, answer)
        return found

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Return a pair whose context is cut on the left where the model reads no more."""
        if not 1 <= len(continuation) <= self.max_length:
            raise WrongConfiguration(
                f"a continuation has {len(continuation)} tokens, but must have 1 to {self.max_length}: "
                "this model's tokenizer joins it to its context, or it is too long for the model"
            )
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    def _without_context(self, continuation: str) -> Pair:
        ids = self.tok_encode(continuation, add_special_tokens=False)
        begins = bool(ids) and ids[0] == self.prefix_token_id
        return (ids[:1], ids[1:]) if begins else ([self.prefix_token_id], ids)

    def _encode(self, texts: Any, add_special_tokens: bool | None = None) -> dict[str, list[int]]:
        """Return the token ids of many texts; one that begins with the special token gets no second one."""
        prefix = self.tokenizer.decode(self.prefix_token_id)
        groups: dict[bool | None, list[str]] = defaultdict(list)
        for text in texts:
            has_it = add_special_tokens is None and text.startswith(prefix)
            groups[False if has_it else add_special_tokens].append(text)
        found: dict[str, list[int]] = {}
        for special, members in groups.items():
            told = {} if special is None else {"add_special_tokens": special}
            found |= zip(members, self.tokenizer(members, **told)["input_ids"], strict=True)
        return found

    @contextmanager
    def _told(self, total: int, quiet: bool, unit: str) -> Iterator[Callable[[int], object]]:
        """Give what is to be told of progress."""
        if self._done is not None:
            yield self._done
            return
        with Reporter(quiet=quiet) as reporter, reporter.track(unit, total, "requests") as tracker:
            yield tracker.advance


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Return both with the spaces at the context's end before the continuation, as lm-eval has them tokenised."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation
