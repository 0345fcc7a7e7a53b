"""The probes of a study: every trained variant once on this machine, before the study takes its memory and cores."""

from collections.abc import Callable
from typing import Any

from kallm.progress import Reporter
from kallm.store.store import Store
from kallm.study.plan import Plan
from kallm.train.probe import ProbeRecord, ProbeRequest, probe_once

__all__ = ["make_request", "probe_variants"]


def make_request(plan: Plan, variant: str, *, num_threads: int) -> ProbeRequest:
    """Return what to measure of a variant: its tail under the study's recipe, one forward pass a step."""
    study, recipe = plan.study, plan.study.train
    return ProbeRequest(
        model=plan.model,
        num_tail_blocks=plan.num_tail_blocks,
        spec=study.variants[variant].spec,
        trainable=study.trainable,
        precision=recipe.precision,
        compile=recipe.compile,
        rows=recipe.micro_batch,
        length=recipe.length,
        num_threads=num_threads,
    )


def probe_variants(
    plan: Plan, store: Store, reporter: Reporter, stop: Callable[[], None], *, receipt: dict[str, Any]
) -> dict[str, ProbeRecord]:
    """Measure every trained variant of a study alone, where the store has no measurement on this hardware yet.

    Args:
        plan: the study's.
        store: where the records lie.
        reporter: where progress is told.
        stop: polled while a measurement runs.
        receipt: of this process: what it says of hardware and torch is part of a record's key.

    Returns:
        The records by variant.

    Raises:
        OutOfMemory: a variant alone does not fit this machine at the study's micro-batch.
    """
    names = [name for name, variant in plan.study.variants.items() if variant.trained]
    found: dict[str, ProbeRecord] = {}
    with reporter.track("probe", len(names), "variants") as tracker:
        for name in names:
            request = make_request(plan, name, num_threads=int(receipt["hardware"]["num_threads"]))
            found[name] = probe_once(store, request, receipt, stop)
            measured = found[name].measurement
            reporter.say(
                f"{name} alone: {measured.tokens_per_s:,.0f} tok/s, {measured.peak_bytes / 2**30:.2f} GiB at most"
            )
            tracker.advance()
    return found
