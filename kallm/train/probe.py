"""Memory and speed of one variant alone, measured in a process of its own at a fixed shape. Imports no torch.

A study's table takes both from here: a cell that shares its process, its trunk or its machine measures the others too.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kallm.errors import ExitCode, KallmError, OutOfMemory
from kallm.kan.spec import FFNSpec
from kallm.model.facts import ModelFacts
from kallm.store.sealed import seal, short_hash, unseal
from kallm.store.store import Store

__all__ = [
    "CountedBytes",
    "Measurement",
    "ProbeRecord",
    "ProbeRequest",
    "find_probe",
    "measure_alone",
    "probe_once",
    "probe_prefix",
]

_POLL_S = 0.5
_CODE = 1
"""Counts up when training takes another time or memory than before: older figures are then not this code's."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProbeRequest(_Frozen):
    """What to measure: optimiser steps of one tail on the trunk's output, the trunk itself left out.

    Where there is no trunk (a tied head, all blocks), the tail is the whole model, and all of it is measured.
    """

    model: ModelFacts
    num_tail_blocks: int = Field(gt=0, description="blocks of the tail")
    spec: FFNSpec = Field(description="the FFN in them")
    head: Literal["untied", "tied"] = "untied"
    trainable: Literal["ffn", "tail", "tail+head"] = "tail+head"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    rows: int = Field(8, gt=0, description="packed rows of a step, in one forward pass")
    length: int = Field(1024, gt=1, description="tokens of a row")
    rounds: int = Field(3, gt=0, lt=10, description="steps that are timed, after one that is not")
    num_threads: int = Field(1, gt=0, description="of torch, on the CPU; it belongs to the hardware, not to the hash")

    @property
    def hash(self) -> str:
        """Hash of all that can change the figures, but the hardware; where the model's files lie cannot."""
        settings = self.model_dump(mode="json", exclude={"num_threads"})
        return short_hash({**settings, "model": self.model.identity, "code": _CODE})


class CountedBytes(_Frozen):
    """Bytes that follow from sizes alone, to hold the measured ones against."""

    parameters: int
    """Of the tail, frozen ones too."""
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """The least that a backward pass needs: what every module with trainable weights reads, each tensor once."""
    logits: int
    """One chunk of them, in fp32."""

    @property
    def total(self) -> int:
        """Their sum."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


class Measurement(_Frozen):
    """What one variant takes alone."""

    device: str
    tokens: int
    """Of one step."""
    step_s: tuple[float, ...]
    """Every timed step, in order."""
    peak_bytes: int
    """CUDA: allocated at most; CPU: resident at most, above what was resident before the model was loaded."""
    reserved_bytes: int | None
    """CUDA: reserved at most."""
    saved_bytes: int
    """What autograd kept of one forward pass, each storage once, parameters and the loss's own gradients apart."""
    counted: CountedBytes

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the fastest step."""
        return self.tokens / min(self.step_s)


class ProbeRecord(_Frozen):
    """A measurement in the store, ``probes/<request>/<hardware>.json``."""

    format: Literal[1] = 1
    request: str
    shape: tuple[int, int]
    """Rows and tokens of a row."""
    measurement: Measurement
    receipt: dict[str, Any]


def measure_alone(request: ProbeRequest, stop: Callable[[], None] = lambda: None) -> Measurement:
    """Measure a variant in a process of its own.

    Args:
        request: what to measure.
        stop: polled twice a second; where it raises, the process is ended.

    Raises:
        OutOfMemory: the process was killed, or had no memory left.
        KallmError: it failed otherwise; the message carries its last line.
    """
    command = [sys.executable, "-m", "kallm.train.measurement"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        told: tuple[str, str] | None = None
        given: str | None = request.model_dump_json()
        try:
            while told is None:
                stop()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    told = process.communicate(given, timeout=_POLL_S)
                given = None  # communicate goes on with what it was given first
        finally:
            process.kill()
    if process.returncode != 0:
        raise _failure(request, process.returncode, told[1])
    return Measurement.model_validate_json(told[0].splitlines()[-1])


def probe_once(
    store: Store, request: ProbeRequest, receipt: dict[str, Any], stop: Callable[[], None] = lambda: None
) -> ProbeRecord:
    """Return the stored measurement of a variant on this hardware, made now where there is none.

    Args:
        store: where the records lie.
        request: what to measure.
        receipt: of this process; its hardware (the number of threads too) and its torch are part of the key.
        stop: polled while the measurement runs.

    Raises:
        OutOfMemory: as ``measure_alone``.
        DataMismatch: the stored record is damaged.
    """
    record = find_probe(store, request, receipt)
    if record is not None:
        return record
    key = _key(request, receipt)
    record = ProbeRecord(
        request=request.hash,
        shape=(request.rows, request.length),
        measurement=measure_alone(request, stop),
        receipt=receipt,
    )
    if store.create(key, seal(record.model_dump(mode="json"))):
        return record
    standing = find_probe(store, request, receipt)
    assert standing is not None
    return standing


def find_probe(store: Store, request: ProbeRequest, receipt: dict[str, Any]) -> ProbeRecord | None:
    """Return the stored measurement of a variant on this hardware; None where there is none.

    Raises:
        DataMismatch: it is damaged.
    """
    key = _key(request, receipt)
    data = store.get(key)
    return None if data is None else ProbeRecord.model_validate(unseal(data, key))


def probe_prefix(request: str) -> str:
    """Return what the keys of a request's measurements begin with; what follows names the hardware."""
    return f"probes/{request}/"


def _key(request: ProbeRequest, receipt: dict[str, Any]) -> str:
    hardware = short_hash([receipt["hardware"], receipt["packages"]["torch"]])
    return f"{probe_prefix(request.hash)}{hardware}.json"


def _failure(request: ProbeRequest, code: int, told: str) -> KallmError:
    what = f"the probe of ffn '{request.spec.ffn}' at {request.rows} rows of {request.length} tokens"
    last = (told.strip().splitlines() or ["nothing was told"])[-1]
    if code in (-9, ExitCode.OUT_OF_MEMORY):
        return OutOfMemory(f"{what} ran out of memory: lower train.micro_batch ({last})")
    return KallmError(f"{what} failed with code {code}: {last}")
