"""The command that shows single answers: items."""

from typing import Annotated

import typer

from kallm.options import DEFAULT_STORE, SetOption, StoreOption, StudyArgument, find_document
from kallm.results.disagreement import compare_answers, find_suites, render_pair
from kallm.store.opening import open_store

__all__ = ["attach_items"]


def attach_items(app: typer.Typer) -> None:
    """Add this command to the program."""
    app.command()(items)


def items(
    study: StudyArgument,
    disagree: Annotated[
        tuple[str, str],
        typer.Option("--disagree", metavar="A B", help="two variants"),
    ],
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    suite: Annotated[str | None, typer.Option("--suite", help="one suite only")] = None,
    task: Annotated[str | None, typer.Option("--task", help="one task only")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="most items shown of each pair of cells")] = 20,
) -> None:
    """Show questions that two variants answer differently, side by side: prompt, answers, likelihoods or raw replies.

    kallm items demo --disagree kan linear

    kallm items demo --disagree kan linear --suite bbh-choice --task snarks --limit 5
    """
    opened = open_store(store)
    document = find_document(opened, study, set_)
    for entry in find_suites(document, suite):
        for comparison in compare_answers(opened, document, *disagree, entry):
            if comparison.missing:
                print(f"{comparison.suite}: {' and '.join(comparison.missing)} not evaluated yet")
                continue
            found = [pair for pair in comparison.differing if task in (None, pair[0].get("task"))]
            for pair in found[:limit]:
                print(render_pair(comparison, pair), end="\n\n")
            more = f", {len(found) - limit} not shown: raise --limit" if len(found) > limit else ""
            where = "" if task is None else f" of {task}"
            print(
                f"{comparison.suite}, {comparison.left} and {comparison.right}: {len(found)} answers{where} differ "
                f"among {comparison.num_items} items{more}; right: only {comparison.left} {comparison.num_only_left}, "
                f"only {comparison.right} {comparison.num_only_right}"
            )
