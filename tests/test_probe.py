"""A probe of one variant alone: what it counts follows from sizes, what it measures is kept once per hardware."""

from pathlib import Path

import pytest
import studies
import torch
from torch import nn

from kallm.errors import DataMismatch, KallmError, Preempted
from kallm.model.sources import look_up_model
from kallm.progress import Reporter, Stop
from kallm.results.table import build_table
from kallm.run.probes import probe_variants
from kallm.store.opening import open_store
from kallm.study.plan import make_plan
from kallm.study.study import read_study
from kallm.train.measurement import count_saved
from kallm.train.probe import Measurement, ProbeRequest, find_probe, measure_alone, probe_once, probe_prefix

RECEIPT = {"hardware": {"device": "cpu", "processor": "a test"}, "packages": {"torch": torch.__version__}}


@pytest.fixture
def request_(model_folder: Path) -> ProbeRequest:
    return ProbeRequest(
        model=look_up_model(str(model_folder)),
        num_tail_blocks=2,
        spec={"ffn": "kan", "basis": "chebyshev2", "degree": 2},
        rows=2,
        length=64,
        rounds=2,
        num_threads=1,
    )


def test_a_measurement_counts_what_follows_from_sizes(request_: ProbeRequest) -> None:
    found = measure_alone(request_)
    width, vocabulary, kv = 48, 259, 24
    kan = 2 * (2 * width * width + width)
    block = 2 * width * width + 2 * width * kv + 2 * width + kan
    parameters = 4 * (2 * block + width + vocabulary * width)
    assert found.counted.parameters == found.counted.gradients == parameters
    assert found.counted.optimizer == 2 * parameters
    assert found.counted.logits == 128 * vocabulary * 4
    assert found.tokens == 128
    assert len(found.step_s) == 2
    assert found.tokens_per_s == 128 / min(found.step_s)
    assert 0 < found.counted.activations <= found.saved_bytes
    assert found.peak_bytes > 0
    assert found.reserved_bytes is None or torch.cuda.is_available()


def test_without_a_trunk_the_whole_model_is_measured(request_: ProbeRequest) -> None:
    request = request_.model_copy(update={"head": "tied"})
    assert request.hash != request_.hash
    found = measure_alone(request)
    width, vocabulary, kv, pretrained = 48, 259, 24, 3 * 48 * 96
    kan, rest = 2 * (2 * width * width + width), 2 * width * width + 2 * width * kv + 2 * width
    assert found.counted.parameters == 4 * (5 * rest + 3 * pretrained + 2 * kan + width + vocabulary * width)
    assert found.counted.gradients == 4 * (2 * rest + 2 * kan + width + vocabulary * width)


def test_a_variant_is_measured_once_per_hardware(request_: ProbeRequest, tmp_path: Path) -> None:
    store = open_store(tmp_path, writable=True)
    first = probe_once(store, request_, RECEIPT)
    assert probe_once(store, request_, RECEIPT) == first
    elsewhere = RECEIPT | {"hardware": {"device": "cpu", "processor": "another"}}
    assert find_probe(store, request_, elsewhere) is None
    probe_once(store, request_, elsewhere)
    keys = [entry.key for entry in store.list(probe_prefix(request_.hash))]
    assert len(keys) == 2
    for key in keys:
        store.put(key, store.get(key).replace(b"a test", b"a best"))
    with pytest.raises(DataMismatch, match="is damaged"):
        probe_once(store, request_, RECEIPT)


def test_where_the_models_files_lie_changes_no_key(request_: ProbeRequest) -> None:
    moved = request_.model.model_copy(update={"source": "/elsewhere"})
    assert request_.model_copy(update={"model": moved}).hash == request_.hash
    assert request_.model_copy(update={"rows": 3}).hash != request_.hash
    assert request_.model_copy(update={"num_threads": 7}).hash == request_.hash  # the hardware's name holds it


@pytest.fixture
def measured_alone(monkeypatch: pytest.MonkeyPatch) -> list[ProbeRequest]:
    """What was asked for; the measurement itself takes seconds and is not made."""
    asked: list[ProbeRequest] = []

    def measure(request: ProbeRequest, stop: object = None) -> Measurement:
        asked.append(request)
        return Measurement.model_validate(studies.MEASURED)

    monkeypatch.setattr("kallm.train.probe.measure_alone", measure)
    return asked


def test_a_plan_names_what_its_probes_are_stored_under(
    study_text: str, tmp_path: Path, measured_alone: list[ProbeRequest]
) -> None:
    plan, store = make_plan(read_study(study_text)), open_store(tmp_path, writable=True)
    receipt = {**RECEIPT, "hardware": {"device": "cpu", "num_threads": 5}}
    with Reporter(quiet=True) as reporter:
        assert [*probe_variants(plan, store, reporter, Stop(), receipt=receipt, variants=["baseline"])] == []
        first = probe_variants(plan, store, reporter, Stop(), receipt=receipt, variants=["baseline", "linear"])
        every = probe_variants(plan, store, reporter, Stop(), receipt=receipt)
    assert [*first] == ["linear"]
    assert [*every] == ["linear", "small-kan"]
    assert [request.num_threads for request in measured_alone] == [5, 5]
    named = {entry.variant: entry.probe for entry in plan.document.cells}
    assert named == {"baseline": None} | {name: record.request for name, record in every.items()}
    rows = {row.variant: row for row in build_table(store, plan.document).rows}
    assert [len(rows[name].probes) for name in ("baseline", "linear", "small-kan")] == [0, 1, 1]


def test_a_stop_ends_the_process_and_a_failure_tells_its_last_line(request_: ProbeRequest) -> None:
    def stop() -> None:
        raise Preempted("stopped")

    with pytest.raises(Preempted):
        measure_alone(request_, stop)
    gone = request_.model.model_copy(update={"source": "/no/such/folder"})
    with pytest.raises(KallmError, match="the probe of ffn 'kan' at 2 rows of 64 tokens failed with code"):
        measure_alone(request_.model_copy(update={"model": gone}))


def test_autograd_keeps_what_its_formulas_need() -> None:
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Sigmoid(), nn.Linear(16, 4, bias=False))
    x = torch.randn(10, 8)
    assert count_saved(module, lambda: module(x)) == 4 * (10 * 8 + 10 * 16)  # the input, and the sigmoid's own output
