"""Fixtures: a folder, a bucket on moto's server, and one on a real server when KALLM_TEST_S3_ENDPOINT names it."""

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from servers import ACCESS, SECRET, make_bucket

from kallm.store.local import FolderStore
from kallm.store.s3 import S3Settings, S3Store
from kallm.store.store import Store

REAL = "KALLM_TEST_S3_ENDPOINT"


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """Moto's S3 on a free port of the loopback; it takes any credentials."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="session")
def nanio_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that ignores If-None-Match."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"],
        env={**os.environ, "NANIO_ACCESS_KEY": ACCESS, "NANIO_SECRET_KEY": SECRET, "NANIO_LOG_LEVEL": "error"},
        cwd=tmp_path_factory.mktemp("nanio"),
    )
    try:
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for the servers of the tests, and none of the user's own settings."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "KALLM_S3_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def bucket(moto_endpoint: str, credentials: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket on moto, whose endpoint the environment names."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_endpoint)
    return make_bucket(moto_endpoint)


def _real_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    endpoint = os.environ.get(REAL)
    if not endpoint:
        pytest.skip(f"{REAL} names no S3 server")
    request.getfixturevalue("credentials")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, os.environ.get(f"KALLM_TEST_{name}", "kallm-secret" if "SECRET" in name else "kallm"))
    return S3Store(make_bucket(endpoint), "some/prefix", S3Settings(endpoint=endpoint))


@pytest.fixture(params=["folder", "moto", pytest.param("real", marks=pytest.mark.e2e)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Each kind of store in turn, empty."""
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    if request.param == "real":
        return _real_bucket(request, monkeypatch)
    return S3Store(request.getfixturevalue("bucket"), "some/prefix")


def assert_one_line_without_credentials(error: BaseException) -> None:
    shown = "".join(traceback.format_exception(error))
    assert SECRET not in shown
    assert ACCESS not in shown
    assert "\n" not in str(error)


def keys_of(store: Store, prefix: str = "") -> list[str]:
    """Return the keys of a listing."""
    return [entry.key for entry in store.list(prefix)]
