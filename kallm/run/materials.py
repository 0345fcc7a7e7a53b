"""What all cells of a study share in one process: model, tokenizer, packed corpus, trunk, prepared suites."""

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kallm.data.dialogues import Conversation, Dialogues, load_dialogues
from kallm.data.packing import IGNORED, Row, encode, pack
from kallm.errors import WrongConfiguration
from kallm.evaluate.lookup import find_suite
from kallm.evaluate.suites import Context, Prepared
from kallm.model.fit import CalibrationRow
from kallm.model.sources import cache_folder, load_model, load_tokenizer
from kallm.model.start import record_ffn_inputs
from kallm.model.trunk import HiddenCache, Tail, Trunk, split
from kallm.progress import Reporter
from kallm.study.plan import CALIBRATION_TOKENS, Plan

__all__ = ["Materials"]

_CALIBRATION_ROWS = 4


class Materials:
    """Everything expensive, made when first asked for and then kept."""

    def __init__(self, plan: Plan, reporter: Reporter, stop: Callable[[], None]) -> None:
        self.plan, self.reporter, self.stop = plan, reporter, stop
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._prepared: dict[str, Prepared] = {}

    def autocast(self) -> torch.autocast:
        """Return the context that every forward pass of the study runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.study.train.precision == "bf16")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The whole pretrained model, frozen."""
        self.reporter.say(f"loading {self.plan.model.source}")
        model = load_model(self.plan.model, torch.float32).to(self.device)
        self.stop()
        return model.requires_grad_(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            WrongConfiguration: it has no chat template.
        """
        tokenizer = load_tokenizer(self.plan.model)
        if tokenizer.chat_template is None:
            raise WrongConfiguration(
                f"the tokenizer of {self.plan.model.source} has no chat template, and dialogues need one"
            )
        return tokenizer

    @cached_property
    def _halves(self) -> tuple[Trunk, Tail]:
        return split(self.model, self.plan.num_tail_blocks)

    def new_tail(self) -> Tail:
        """Return a fresh copy of the pretrained tail."""
        return copy.deepcopy(self._halves[1])

    @cached_property
    def dialogues(self) -> Dialogues:
        """The conversations, split."""
        found = load_dialogues(self.plan.dialogues)
        left_out = "".join(f", {count} {why}" for why, count in found.left_out.items() if count)
        self.reporter.say(f"dialogues: {len(found.train)} to train on, {len(found.heldout)} held out{left_out}")
        return found

    @property
    def heldout(self) -> list[Conversation]:
        """The held-out conversations that are scored."""
        return self.dialogues.heldout[: self.plan.study.dialogues.heldout]

    @cached_property
    def rows(self) -> list[Row]:
        """The packed corpus, equal for all seeds."""
        recipe = self.plan.study.train
        padding = self.tokenizer.pad_token_id
        rows = pack(
            self.dialogues.train,
            lambda conversation: encode(self.tokenizer, conversation),
            length=recipe.length,
            num_tokens=recipe.tokens,
            padding_id=self.tokenizer.eos_token_id if padding is None else padding,
            long_documents=recipe.long_documents,
            tell=self.reporter.say,
        )
        supervised = sum(row.num_supervised for row in rows)
        self.reporter.say(f"corpus: {len(rows)} rows of {recipe.length} tokens, {supervised:,} supervised")
        return rows

    @cached_property
    def train_hidden(self) -> HiddenCache:
        """The trunk's output for every row: run once, then shared by all cells."""
        return self._filled(
            "trunk on the corpus",
            HiddenCache(self._halves[0], [row.passage for row in self.rows], self._folder, self._model_name),
        )

    @cached_property
    def ffn_inputs(self) -> list[Float[Tensor, "N D"]]:
        """What the pretrained tail's FFNs read on the first rows of the corpus: fresh FFNs are calibrated on it."""
        first = range(min(_CALIBRATION_ROWS, len(self.rows)))
        batch = [(self.train_hidden[index], self.rows[index].passage.position_ids) for index in first]
        return record_ffn_inputs(self._halves[1], batch)

    @cached_property
    def calibration_rows(self) -> list[CalibrationRow]:
        """Rows for ``start: fitted``, evenly spread over the corpus: its first ones hold the longest conversations."""
        count = min(-(-CALIBRATION_TOKENS // self.plan.study.train.length), len(self.rows))
        chosen = [index * len(self.rows) // count for index in range(count)]
        return [
            CalibrationRow(self.train_hidden[i], self.rows[i].passage.position_ids, self.rows[i].targets != IGNORED)
            for i in chosen
        ]

    def prepared(self, suite_id: str) -> Prepared:
        """Return a suite's prepared items, with the trunk's output where the suite uses it."""
        if suite_id not in self._prepared:
            settings = self.plan.suites[suite_id]
            suite = find_suite(suite_id.rpartition(".")[0])
            context = Context(
                trunk=self._halves[0],
                tokenizer=self.tokenizer,
                model_name=self._model_name,
                folder=self._folder,
                heldout=self.heldout,
            )
            self._prepared[suite_id] = suite.prepare(settings, context)
        return self._prepared[suite_id]

    @property
    def _folder(self) -> Path:
        return cache_folder() / "trunk"

    @property
    def _model_name(self) -> str:
        """Name the trunk's numbers: the weights, and all that their bits depend on."""
        precision = self.plan.study.train.precision
        return f"{self.plan.model.identity} {precision} {self.device.type} {torch.get_num_threads()}"

    def _filled(self, name: str, cache: HiddenCache) -> HiddenCache:
        if cache.num_missing():
            sizes = [len(passage.input_ids) for passage in cache.passages]
            with self.reporter.track(name, sum(sizes), "tok") as tracker, self.autocast():
                for index, size in enumerate(sizes):
                    self.stop()
                    cache[index]
                    tracker.advance(size)
        return cache
