"""The command that measures variants alone: probe."""

import typer
from rich.filesize import decimal
from rich.table import Table

from kallm.options import DEFAULT_STORE, SetOption, StoreOption, StudyArgument, make_console
from kallm.progress import Reporter, Stop
from kallm.store.opening import open_store
from kallm.study.plan import make_plan
from kallm.study.study import read_study
from kallm.train.probe import ProbeRecord

__all__ = ["attach_probe"]


def attach_probe(app: typer.Typer) -> None:
    """Add this command to the program."""
    app.command()(probe)


def probe(study: StudyArgument, store: StoreOption = DEFAULT_STORE, set_: SetOption = None) -> None:
    """Measure memory and speed of every trained variant alone, in a process of its own, at the study's micro-batch.

    Nothing is shared with other cells, and the trunk is left out. The figures go to the store; on the same hardware
    they are not measured again. "counted" follows from sizes alone: parameters, gradients, AdamW, activations, logits.

        kallm probe demo

        kallm probe demo --set train.micro_batch=8 --set train.length=1024
    """
    stop = Stop()
    stop.install()
    plan = make_plan(read_study(study, set_))
    opened = open_store(store, writable=True)
    from kallm.run.probes import probe_variants
    from kallm.run.training import receipt_of

    with Reporter() as reporter:
        found = probe_variants(plan, opened, reporter, stop, receipt=receipt_of(plan))
    make_console().print(_render(found))


def _render(found: dict[str, ProbeRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("variant", no_wrap=True)
    for name in ("tok/s", "peak", "counted", "saved for backward"):
        table.add_column(name, justify="right", no_wrap=True)
    for variant, record in found.items():
        measured = record.measurement
        sizes = (measured.peak_bytes, measured.counted.total, measured.saved_bytes)
        table.add_row(variant, f"{measured.tokens_per_s:,.0f}", *(decimal(size) for size in sizes))
    return table
