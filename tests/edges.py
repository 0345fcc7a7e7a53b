"""The edges of the system that drills make fail: a disk, the way to a server, races, a process that gets a signal."""

import contextlib
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from drills import in_child

from kallm.store.local import FolderStore
from kallm.store.store import Store

__all__ = ["BadWay", "race_processes", "race_threads", "remount", "small_disk", "wait_for_handler"]

_CREATORS, _KEYS = 32, 4
_REFUSAL = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>slow down</Message></Error>"


class BadWay:
    """A way to an S3 server that can be turned bad from any forked process: it refuses, breaks off or stalls."""

    KINDS: ClassVar[tuple[str, ...]] = ("good", "refuse", "reset", "stall")

    def __init__(self, endpoint: str, *, stall_s: float) -> None:
        self.endpoint, self._stall_s = endpoint, stall_s
        place = urlsplit(endpoint)
        self._server = (place.hostname, place.port)
        self._state = RawArray("i", 2)  # the kind of fault, and how many are left
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "BadWay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def turn(self, kind: str, faults: int) -> None:
        """Let the next requests fail in one way."""
        self._state[0], self._state[1] = self.KINDS.index(kind), faults

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, contextlib.suppress(OSError):
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                if self._state[1] > 0 and data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"DELETE", b"HEAD"):
                    self._state[1] -= 1
                    self._fail(client)
                    return
                server.sendall(data)

    def _fail(self, client: socket.socket) -> None:
        kind = self.KINDS[self._state[0]]
        if kind == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if kind == "stall":
            time.sleep(self._stall_s)
            return
        client.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while client.recv(1 << 16):
                pass  # the body, whose end a proxy that reads no headers knows by the silence after it
        client.sendall(b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Type: application/xml\r\n")
        client.sendall(b"Content-Length: %d\r\n\r\n" % len(_REFUSAL) + _REFUSAL)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a disk in memory on a folder for the block."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "kallm-drill", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted disk, from any process; what is open for writing there stays writable until it is closed."""
    for _ in range(50):
        done = subprocess.run(["mount", "-o", f"remount,{options}", folder], check=False, capture_output=True)
        if done.returncode == 0:
            return
        time.sleep(0.02)  # busy: a file is open for writing
    raise AssertionError(done.stderr.decode())


def race_threads(store: Store, prefix: str) -> Counter[str]:
    """Let 32 threads create 4 keys at once; return the number of winners by key."""
    start = threading.Barrier(_CREATORS)

    def write(writer: int) -> tuple[str, bool]:
        key = f"{prefix}/{writer % _KEYS}"
        start.wait()
        return key, store.create(key, b"%d" % writer)

    with ThreadPoolExecutor(_CREATORS) as pool:
        return Counter(key for key, won in pool.map(write, range(_CREATORS)) if won)


def race_processes(folder: Path, prefix: str) -> Counter[str]:
    """Do the same between 32 processes on a folder, which start at one moment by the clock."""
    won, begin = RawArray("i", _CREATORS), time.time() + 0.5
    store = FolderStore(folder)

    def write(writer: int) -> None:
        time.sleep(max(0.0, begin - time.time()))
        won[writer] = store.create(f"{prefix}/{writer % _KEYS}", b"%d" % writer)

    with ThreadPoolExecutor(_CREATORS) as pool:
        codes = [*pool.map(lambda writer: in_child(lambda: write(writer)), range(_CREATORS))]
    assert not any(codes)
    return Counter(f"{prefix}/{writer % _KEYS}" for writer in range(_CREATORS) if won[writer])


def wait_for_handler(process: "subprocess.Popen[bytes]") -> None:
    """Wait until a process handles SIGTERM, or has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if int(status.partition("SigCgt:")[2].split()[0], 16) >> 14 & 1:
                return
        time.sleep(0.005)
    assert process.returncode == 0, f"the process ended with {process.returncode} before it handled signals"
