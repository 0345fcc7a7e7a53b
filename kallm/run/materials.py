"""What all cells of a study share in one process: model, tokenizer, packed corpus, trunk, prepared suites."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kallm.data.dialogues import Conversation, Dialogues, load_dialogues
from kallm.data.packing import IGNORED, Row, encode, pack
from kallm.errors import WrongConfiguration
from kallm.evaluate.lookup import find_suite
from kallm.evaluate.suites import Context, Prepared
from kallm.model.cache import HiddenCache, TrunkPass, available_bytes, kept_bytes
from kallm.model.cachefolder import cache_folder
from kallm.model.fit import CalibrationRow
from kallm.model.sources import load_model, load_tokenizer
from kallm.model.start import record_ffn_inputs
from kallm.model.trunk import Tail, Trunk, split
from kallm.progress import Reporter
from kallm.run.sharing import Room, Sharing, choose_sharing, work_of
from kallm.study.plan import CALIBRATION_TOKENS, Cell, Plan
from kallm.train.workers import Workers

__all__ = ["Materials"]

_CALIBRATION_ROWS = 4
_CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container what memory it may take."""


class Materials:
    """Everything expensive, made when first asked for and then kept."""

    def __init__(self, plan: Plan, reporter: Reporter, stop: Callable[[], None]) -> None:
        self.plan, self.reporter, self.stop = plan, reporter, stop
        self.workers = Workers()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sharing: Sharing | None = None
        """How the cells share the trunk, once ``share`` has decided."""
        self._prepared: dict[str, Prepared] = {}

    def autocast(self) -> torch.autocast:
        """Return the context that every forward pass of the study runs in.

        It holds no narrow copies of the weights: those would outlive the optimiser's steps, for it is left at the end.
        """
        low = self.plan.study.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False)

    def share(self, cells: Sequence[Cell], *, disk: bool = True) -> Sharing:
        """Decide how cells that are to be trained share the trunk, and say why.

        Args:
            cells: those that are not trained yet.
            disk: whether a cache is an option.
        """
        passages, (trunk, _) = [row.passage for row in self.rows], self._halves
        bound_gb = self.plan.study.train.cache_gb
        self._sharers = cells
        self.sharing = choose_sharing(
            work_of(self.plan, cells, num_rows=len(passages), trunk_blocks=trunk.cut),
            Room(
                disk_bytes=available_bytes(trunk, passages, self._folder, self._model_name) if disk else 0,
                kept_bytes=kept_bytes(trunk, passages, self._folder, self._model_name) if disk else 0,
                bound_bytes=None if bound_gb is None else int(bound_gb * 1e9),
                memory_bytes=_free_memory_bytes(self.device),
                folder=str(self._folder),
            ),
        )
        self.reporter.say(self.sharing.why)
        return self.sharing

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
        trunk, tail = split(self.model, self.plan.num_tail_blocks, head=self.plan.study.head)
        if trunk.note:
            self.reporter.say(trunk.note)
        return trunk, tail

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
        rows = self.pack(self.dialogues.train, recipe.tokens, tell=self.reporter.say)
        supervised = sum(row.num_supervised for row in rows)
        self.reporter.say(f"corpus: {len(rows)} rows of {recipe.length} tokens, {supervised:,} supervised")
        return rows

    def pack(
        self, conversations: Sequence[Conversation], num_tokens: int, *, tell: Callable[[str], None] = lambda text: None
    ) -> list[Row]:
        """Return conversations packed as the recipe says, up to so many tokens."""
        recipe, padding = self.plan.study.train, self.tokenizer.pad_token_id
        return pack(
            conversations,
            lambda conversation: encode(self.tokenizer, conversation),
            length=recipe.length,
            num_tokens=num_tokens,
            padding_id=self.tokenizer.eos_token_id if padding is None else padding,
            long_documents=recipe.long_documents,
            tell=tell,
        )

    @property
    def hidden(self) -> HiddenCache | TrunkPass:
        """The trunk's output for every row: kept for all cells and epochs, or computed when it is read."""
        if self.sharing is None or not self.sharing.cached:
            return self.trunk_pass
        if self._fill():
            return self._cache
        self.share(self._sharers, disk=False)
        return self.trunk_pass

    @cached_property
    def trunk_pass(self) -> TrunkPass:
        """The trunk's output for every row, computed when it is read."""
        return TrunkPass(self._halves[0], [row.passage for row in self.rows])

    @cached_property
    def _cache(self) -> HiddenCache:
        passages = [row.passage for row in self.rows]
        return HiddenCache(self._halves[0], passages, self._folder, self._model_name, say=self.reporter.say)

    @cached_property
    def ffn_inputs(self) -> list[Float[Tensor, "N D"]]:
        """What the pretrained tail's FFNs read on the first rows of the corpus: fresh FFNs are calibrated on it."""
        first = range(min(_CALIBRATION_ROWS, len(self.rows)))
        hidden = self.hidden
        batch = [(hidden[index], self.rows[index].passage.position_ids) for index in first]
        return record_ffn_inputs(self._halves[1], batch)

    @cached_property
    def calibration_rows(self) -> list[CalibrationRow]:
        """Rows for ``start: fitted``, evenly spread over the corpus: its first ones hold the longest conversations."""
        count = min(-(-CALIBRATION_TOKENS // self.plan.study.train.length), len(self.rows))
        chosen = [index * len(self.rows) // count for index in range(count)]
        hidden = self.hidden
        return [
            CalibrationRow(hidden[i], self.rows[i].passage.position_ids, self.rows[i].targets != IGNORED)
            for i in chosen
        ]

    def prepare_suites(self) -> None:
        """Prepare every suite, so that what cannot be asked is named before anything is trained."""
        for suite_id in self.plan.suites:
            self.prepared(suite_id)

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

    def _fill(self) -> bool:
        """Run the trunk over what the corpus's cache misses; return whether the disk had room for all of it."""
        if self._cache.num_missing() and self._cache.is_kept:
            sizes = [len(passage.input_ids) for passage in self._cache.passages]
            with self.reporter.track("trunk on the corpus", sum(sizes), "tok") as tracker, self.autocast():
                for index, size in enumerate(sizes):
                    self.stop()
                    self._cache[index]
                    if not self._cache.is_kept:
                        break
                    tracker.advance(size)
        return self._cache.is_kept


def _free_memory_bytes(device: torch.device) -> int:
    """Return what is free on the GPU, or of this machine's memory and of what its container may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    limit = _CGROUP / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        told = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(told.get("inactive_file", 0))
        free = min(free, int(limit.read_text()) - used)
    return max(0, free)
