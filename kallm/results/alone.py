"""What the table says of each variant alone: memory and speed from its probes, and the learning rate that it took."""

from collections.abc import Iterator, Sequence

from kallm.results.evidence import Evidence
from kallm.results.record import CellEntry, choice_key
from kallm.results.schema import Choice, Counted, Hardware, Probe, Row
from kallm.train.probe import ProbeRecord

__all__ = [
    "describe_alone",
    "describe_choices",
    "find_rate",
    "make_choice",
    "make_hardware",
    "make_probes",
    "tell_edge",
]


def make_hardware(evidence: Evidence) -> list[Hardware]:
    """Return what the study's variants were measured alone on, in the order of the hashes; letters follow it."""
    records = {_hash(key): record for found in evidence.probes.values() for key, record in found.items()}
    labels = _label(evidence)
    found = []
    for name in sorted(records):
        told = records[name].receipt.get("hardware", {})
        found.append(
            Hardware(
                label=labels[name],
                hash=name,
                device=records[name].measurement.device,
                processor=told.get("processor"),
                num_threads=told.get("num_threads"),
                torch=records[name].receipt.get("packages", {}).get("torch"),
            )
        )
    return found


def make_probes(evidence: Evidence, request: str | None) -> list[Probe]:
    """Return what was measured of a variant alone, by the hardware's letter; [] where nothing was."""
    labels = _label(evidence)
    records = evidence.probes.get(request or "", {})
    return [_make_probe(evidence, labels[_hash(key)], key, record) for key, record in records.items()]


def make_choice(evidence: Evidence, choice: str | None) -> Choice | None:
    """Return which learning rate was chosen; None where there is nothing to choose, or nothing was chosen yet."""
    record = evidence.choices.get(choice or "")
    if record is None or choice is None:
        return None
    code = record.receipt.get("code") or {}
    return Choice(
        lr=record.lr,
        trials=[(trial.lr, trial.nats) for trial in record.trials],
        tokens=record.validation.get("tokens", 0),
        record=choice_key(choice),
        sha256=evidence.digests[choice_key(choice)],
        commit=code.get("commit"),
        dirty=code.get("dirty"),
    )


def find_rate(evidence: Evidence, cell: CellEntry) -> float | None:
    """Return the peak learning rate that a cell trains with, chosen or named by the recipe."""
    if not cell.trained:
        return None
    if cell.choice is not None:
        record = evidence.choices.get(cell.choice)
        return None if record is None else record.lr
    named = evidence.document.study.get("train", {}).get("lr")
    return named if isinstance(named, float) else None


def describe_alone(study: str, hardware: list[Hardware], rows: list[Row]) -> Iterator[str]:
    """Yield what is to be known of the figures: where they come from, and what is not measured."""
    shapes = sorted({(probe.rows, probe.length) for row in rows for probe in row.probes})
    if hardware:
        steps = " and ".join(f"{num_rows} × {length:,}" for num_rows, length in shapes)
        yield (
            "Memory and speed are of each variant alone: optimiser steps of its tail on the trunk's output, "
            f"{steps} tokens each, in a process of its own; the trunk itself is left out."
        )
    yield from (f"{machine.label} is {machine.name}." for machine in hardware)
    missing = [row.variant for row in rows if row.trained and not row.probes]
    if missing:
        yield f"Memory and speed of {', '.join(missing)} are not measured: 'kallm probe {study}' does."


def describe_choices(rows: list[Row]) -> Iterator[str]:
    """Yield how learning rates were chosen, then which one each variant took, and what the others gave."""
    choices = [(row.variant, row.choice) for row in rows if row.choice is not None]
    if choices:
        tokens = " and ".join(f"{count:,}" for count in sorted({choice.tokens for _, choice in choices}))
        yield (
            "All seeds of a variant take one learning rate, the best in short trials: in nats per token on "
            f"{tokens} tokens that were split off from the training conversations."
        )
    for variant, choice in choices:
        told = [f"{lr:g} gave {'none, it diverged' if nats is None else f'{nats:.4f}'}" for lr, nats in choice.trials]
        took = "no learning rate" if choice.lr is None else f"learning rate {choice.lr:g}"
        yield f"{variant} took {took}: {', '.join(told)}{tell_edge(choice.lr, [lr for lr, _ in choice.trials])}."


def tell_edge(lr: float | None, rates: Sequence[float]) -> str:
    """Return what is to be said of a learning rate at an end of what was tried; "" of one in between, or of none."""
    if lr is None or min(rates) < lr < max(rates):
        return ""
    end, beyond = ("highest", "higher") if lr == max(rates) else ("lowest", "lower")
    return f"; {lr:g} is the {end} that was tried, so a {beyond} one may do better"


def _label(evidence: Evidence) -> dict[str, str]:
    names = sorted({_hash(key) for found in evidence.probes.values() for key in found})
    return {name: chr(ord("A") + index % 26) + str(index // 26 or "") for index, name in enumerate(names)}


def _hash(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def _make_probe(evidence: Evidence, label: str, key: str, record: ProbeRecord) -> Probe:
    measured, code = record.measurement, record.receipt.get("code") or {}
    num_rows, length = record.shape
    return Probe(
        hardware=label,
        rows=num_rows,
        length=length,
        tokens_per_s=measured.tokens_per_s,
        step_s=list(measured.step_s),
        peak_bytes=measured.peak_bytes,
        reserved_bytes=measured.reserved_bytes,
        saved_bytes=measured.saved_bytes,
        counted=Counted.model_validate(measured.counted.model_dump()),
        record=key,
        sha256=evidence.digests[key],
        commit=code.get("commit"),
        dirty=code.get("dirty"),
        image=record.receipt.get("image"),
    )
