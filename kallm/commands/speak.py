"""The commands that use a trained cell: generate, chat, export."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kallm.options import DEFAULT_STORE, StoreOption, find_plan_of
from kallm.results.card import write_card
from kallm.results.logs import find_cell
from kallm.store.opening import open_store
from kallm.store.store import Store

if TYPE_CHECKING:
    from kallm.run.trained import TrainedCell
    from kallm.study.plan import Cell, Plan

__all__ = ["attach_speak"]

CellArgument = Annotated[str, typer.Argument(metavar="CELL", help="a cell's id, or a beginning that no other cell has")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="most tokens of one reply")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token; 1: the model's own distribution")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="what is drawn with a temperature over 0")]


def attach_speak(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (generate, chat, export):
        app.command()(command)


def generate(
    cell: CellArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="the text to go on from; - for standard input")],
    store: StoreOption = DEFAULT_STORE,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Print how a trained cell goes on from a text, token by token; no chat template is put around it.

    kallm generate kan.seed-0 "The sea is"

    kallm generate baseline "The sea is" --temperature 0.8 --seed 1
    """
    with _opened(cell, store) as (_, _, _, trained):
        from kallm.run.speech import Speaker

        speaker = Speaker(trained, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        speaker.continue_text(sys.stdin.read() if prompt == "-" else prompt)


def chat(
    cell: CellArgument,
    store: StoreOption = DEFAULT_STORE,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Talk to a trained cell in its chat template; every line is a turn, and the reply appears as it is made.

    /new forgets the conversation; /exit, Ctrl-D or Ctrl-C ends it. What is piped in is answered line by line.

        kallm chat kan.seed-0

        echo "What is tea?" | kallm chat baseline
    """
    with _leaving_quietly(), _opened(cell, store) as (_, found, _, trained):
        from kallm.run.speech import Speaker

        speaker = Speaker(trained, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        speaker.begin()
        print(f"{found.id}; /new forgets, /exit leaves", file=sys.stderr)
        for line in _lines():
            if line == "/exit":
                return
            if line == "/new":
                speaker.begin()
            elif line:
                speaker.reply(line)


def export(
    cell: CellArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="is made; must be new or empty")],
    store: StoreOption = DEFAULT_STORE,
    licence: Annotated[
        str, typer.Option("--license", help="of the base model's weights, as the hub spells it: apache-2.0")
    ] = "unknown",
) -> None:
    """Write a trained cell as a folder that transformers opens without KALLM, with a model card from its records.

    kallm export kan.seed-0 my-model --license apache-2.0

    kallm export linear.seed-1 my-model --store s3://my-bucket/kallm
    """
    with _opened(cell, store) as (plan, found, opened, trained):
        from kallm.run.trained import read_evaluations, read_training
        from kallm.saving.exported import export as write_folder

        entry = next(entry for entry in plan.document.cells if entry.id == found.id)
        card = write_card(
            plan.document,
            entry,
            read_training(opened, found),
            read_evaluations(opened, plan, found),
            licence=licence,
        )
        written = write_folder(trained.model, folder, tokenizer=trained.tokenizer, card=card)
    print(f"{found.id} is in {written}")


@contextmanager
def _opened(named: str, store: str) -> "Iterator[tuple[Plan, Cell, Store, TrainedCell]]":
    """Find a cell and the study that names it, and build its model."""
    opened = open_store(store)
    cell = find_cell(opened, named)
    plan = find_plan_of(opened, cell)
    found = next(each for each in plan.cells if each.id == cell)
    from kallm.run.trained import open_trained, read_training

    read_training(opened, found)
    with open_trained(plan, found, opened) as trained:
        yield plan, found, opened, trained


def _lines() -> Iterator[str]:
    """Yield what the user says, line by line, after a prompt where it is typed."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


@contextmanager
def _leaving_quietly() -> Iterator[None]:
    """Take Ctrl-C as a wish to leave."""
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)
