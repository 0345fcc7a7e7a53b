"""The inside of a probe: build one tail, train it for some steps, and read memory and time. Run as a program.

It reads a request from standard input, and writes the measurement to standard output.
"""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from kallm.data.packing import IGNORED, Row
from kallm.errors import ExitCode, OutOfMemory
from kallm.model.retrofit import RetrofitConfig, retrofit_
from kallm.model.sources import load_model
from kallm.model.start import freeze
from kallm.model.trunk import Passage, Tail, WholeTail, split
from kallm.train.loop import Progress, Trainer, make_optimizer
from kallm.train.loss import CHUNK
from kallm.train.probe import CountedBytes, Measurement, ProbeRequest
from kallm.train.recipe import Recipe

__all__ = ["count_saved", "measure", "peak_resident", "reset_peak"]

_DOCUMENT_TOKENS = 256
_ADAM_MOMENTS = 2


def measure(request: ProbeRequest) -> Measurement:
    """Measure a variant in this process, which should have done nothing else.

    Raises:
        OutOfMemory: the device's memory does not suffice.
    """
    torch.set_num_threads(request.num_threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resident = psutil.Process().memory_info().rss
    tail = _make_tail(request).to(device)
    trainer = _make_trainer(tail, request)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=request.precision == "bf16", cache_enabled=False):
            saved, activations = _count_step(tail, trainer)
            reset = reset_peak(device)
            steps = tuple(_timed(trainer, device) for _ in range(request.rounds))
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error
    cuda = device.type == "cuda"
    return Measurement(
        device=torch.cuda.get_device_name() if cuda else "cpu",
        tokens=request.rows * request.length,
        step_s=steps,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else peak_resident(reset=reset) - resident,
        reserved_bytes=torch.cuda.max_memory_reserved() if cuda else None,
        saved_bytes=saved,
        counted=_count(tail, request, activations),
    )


def reset_peak(device: torch.device) -> bool:
    """Forget the peak of memory so far; return whether that was possible for resident memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no Linux, or a sandbox: the peak then covers the loading of the model too
        return False
    return True


def peak_resident(*, reset: bool) -> int:
    """Return the most bytes that were resident since ``reset_peak``, or in all where that was not possible."""
    if reset:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def count_saved(own: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of a forward pass, each storage once, without the module's own tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*own.parameters(), *own.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())


def _make_tail(request: ProbeRequest) -> Tail:
    """Return the tail alone: the rest of the model is loaded, and let go."""
    model = load_model(request.model, torch.float32)
    _, tail = split(model, request.num_tail_blocks, head=request.head)
    del model
    config = RetrofitConfig(ffn=request.spec, layers=tail.layers)
    retrofit_(tail, config, generator=torch.Generator().manual_seed(0))
    freeze(tail, request.trainable)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return tail


def _make_trainer(tail: Tail, request: ProbeRequest) -> Trainer:
    """Return a trainer whose every step sees all rows: random tokens in documents, and a random residual stream.

    A tail that is the whole model gets the tokens themselves.
    """
    recipe = Recipe(
        tokens=request.rows * request.length,
        epochs=request.rounds + 1,
        length=request.length,
        batch=request.rows,
        micro_batch=request.rows,
        precision=request.precision,
        compile=request.compile,
    )
    vocabulary, width = tail.head.weight.shape
    positions = torch.arange(request.length) % _DOCUMENT_TOKENS
    rows = []
    for _ in range(request.rows):
        ids = torch.randint(0, vocabulary, (request.length,))
        targets = ids.roll(-1)
        targets[positions.roll(-1) == 0] = IGNORED
        rows.append(Row(Passage(ids, positions), targets))
    if isinstance(tail, WholeTail):
        hidden = [row.passage.input_ids[:, None].float() for row in rows]
    else:
        hidden = [torch.randn(request.length, width) for _ in rows]
    return Trainer(tail, make_optimizer(tail, recipe), rows, hidden, recipe, seed=0, progress=Progress())


def _count_step(tail: Tail, trainer: Trainer) -> tuple[int, int]:
    """Take the step that is not timed; return the bytes that autograd kept, and the least that it could keep."""
    inputs: dict[int, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], *rest: object) -> None:
        inputs[id(arguments[0])] = arguments[0]

    hooks = [
        module.register_forward_pre_hook(keep)
        for module in tail.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    hooks.append(tail.body.register_forward_hook(lambda module, given, out: keep(module, (out.last_hidden_state,))))
    saved = count_saved(tail, lambda: trainer.forward(trainer.next_rows()))
    for hook in hooks:
        hook.remove()
    activations = sum(value.nbytes for value in inputs.values())
    inputs.clear()
    trainer.advance(lambda: None)
    return saved, activations


def _count(tail: Tail, request: ProbeRequest, activations: int) -> CountedBytes:
    parameters = list(tail.parameters())
    trainable = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return CountedBytes(
        parameters=sum(parameter.nbytes for parameter in parameters),
        gradients=trainable,
        optimizer=_ADAM_MOMENTS * trainable,
        activations=activations,
        logits=min(CHUNK, request.rows * request.length) * tail.head.weight.shape[0] * 4,
    )


def _timed(trainer: Trainer, device: torch.device) -> float:
    began = time.perf_counter()
    trainer.advance(lambda: None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main() -> None:
    """Answer the request on standard input."""
    try:
        found = measure(ProbeRequest.model_validate_json(sys.stdin.read()))
    except OutOfMemory as error:
        print(error, file=sys.stderr)
        sys.exit(ExitCode.OUT_OF_MEMORY)
    print(found.model_dump_json())


if __name__ == "__main__":
    main()
