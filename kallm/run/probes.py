"""The probes of a study: every trained variant once on this machine, before the study takes its memory and cores."""

from collections.abc import Callable, Iterable
from typing import Any

from kallm.progress import Reporter
from kallm.store.store import Store
from kallm.study.plan import Plan, request_probe
from kallm.train.probe import ProbeRecord, ProbeRequest, find_probe, probe_once

__all__ = ["make_request", "probe_variants"]


def make_request(plan: Plan, variant: str, *, num_threads: int) -> ProbeRequest:
    """Return what to measure of a variant on this machine."""
    request = request_probe(plan.study, plan.model, plan.num_tail_blocks, variant)
    return request.model_copy(update={"num_threads": num_threads})


def probe_variants(
    plan: Plan,
    store: Store,
    reporter: Reporter,
    stop: Callable[[], None],
    *,
    receipt: dict[str, Any],
    variants: Iterable[str] | None = None,
) -> dict[str, ProbeRecord]:
    """Measure trained variants of a study alone, where the store has no measurement on this hardware yet.

    Args:
        plan: the study's.
        store: where the records lie.
        reporter: where progress is told; silent where nothing is left to measure.
        stop: polled while a measurement runs.
        receipt: of this process: what it says of hardware and torch is part of a record's key.
        variants: which; None is all of the study. Those that are not trained have nothing to measure.

    Returns:
        The records by variant, in the study's order.

    Raises:
        OutOfMemory: a variant alone does not fit this machine at the study's micro-batch.
    """
    chosen = set(plan.study.variants if variants is None else variants)
    names = [name for name, variant in plan.study.variants.items() if variant.trained and name in chosen]
    requests = {name: make_request(plan, name, num_threads=int(receipt["hardware"]["num_threads"])) for name in names}
    found = {name: find_probe(store, request, receipt) for name, request in requests.items()}
    missing = [name for name in names if found[name] is None]
    if not missing:
        return {name: record for name, record in found.items() if record is not None}
    with reporter.track("probe", len(missing), "variants") as tracker:
        for name in missing:
            found[name] = record = probe_once(store, requests[name], receipt, stop)
            measured = record.measurement
            reporter.say(
                f"{name} alone: {measured.tokens_per_s:,.0f} tok/s, {measured.peak_bytes / 2**30:.2f} GiB at most"
            )
            tracker.advance()
    return {name: record for name, record in found.items() if record is not None}
