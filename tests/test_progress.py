"""What a run tells while it works, and how it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kallm.errors import Preempted
from kallm.progress import Heartbeat, Reporter, Stop, format_duration
from kallm.store.store import Store

pytest_plugins = ["stores"]

POLLING = """
import sys, time
from kallm.progress import Stop
from kallm.errors import Preempted
stop = Stop()
stop.install()
print("ready", flush=True)
while True:
    time.sleep(0.01)
    {poll}
"""


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.4, "59 s"), (60.0, "1 min 00 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 05 min")],
)
def test_durations_are_told_in_two_units(seconds: float, told: str) -> None:
    assert format_duration(seconds) == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_at_the_next_poll(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    stop = Stop()
    try:
        stop.install()
        stop()
        os.kill(os.getpid(), number)
        with pytest.raises(Preempted, match=f"stopped by {number.name}; the same command continues from here"):
            stop()
    finally:
        stop.disarm()  # or the grace ends this process
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_second_signal_leaves_at_once() -> None:
    code = POLLING.format(poll="pass")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert "once more leaves at once" in told


def test_without_a_terminal_the_lines_are_plain_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter, reporter.track("train", 10, "tok") as tracker:
        assert reporter.bars is None
        reporter.say("hello [world]")
        tracker.advance(4)
    told = capsys.readouterr()
    assert told.err == "hello [world]\n"
    assert told.out == ""
    assert [line.split(" ", 1)[1] for line in reporter.lines] == ["hello [world]"]
    assert (tracker.done, tracker.total) == (4, 10)
    assert tracker.eta_s == pytest.approx(6 / tracker.rate, rel=0.5)


def test_a_heartbeat_tells_the_phase_and_the_innermost_work(store: Store) -> None:
    with Reporter(quiet=True) as reporter, reporter.track("study", 7, "cells"):
        heartbeat = Heartbeat(store, "cells/x/heartbeat.json", {"nonce": "n", "pid": os.getpid()}, reporter)
        with reporter.track("train", 3, "tok"):
            heartbeat.start()
            heartbeat.stop()
    told = json.loads(store.get("cells/x/heartbeat.json") or b"")
    assert (told["nonce"], told["phase"], told["pid"]) == ("n", "start", os.getpid())
    assert (told["step"], told["total"], told["unit"]) == (0, 3, "tok")
    assert abs(told["at"] - time.time()) < 60
