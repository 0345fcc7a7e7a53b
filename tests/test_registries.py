"""What is asked of registries and of an Argo Server, over HTTP on the loopback."""

import http.server
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
from kube import ground

from kallm.cluster.images import find_digest, split_image
from kallm.cluster.server import ServerEngine, ServerSettings
from kallm.cluster.submission import Request, prepare
from kallm.errors import WrongConfiguration
from kallm.study.plan import make_plan
from kallm.study.study import read_study


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("busybox", ("registry-1.docker.io", "library/busybox", "latest")),
        ("me/kallm:0.1", ("registry-1.docker.io", "me/kallm", "0.1")),
        ("ghcr.io/me/kallm", ("ghcr.io", "me/kallm", "latest")),
        ("localhost/kallm:1", ("localhost", "kallm", "1")),
        ("r.example:5000/a/b:c", ("r.example:5000", "a/b", "c")),
        (f"r.example/a@sha256:{'0' * 64}", ("r.example", "a", "latest")),
    ],
)
def test_an_images_name_is_split_as_runtimes_do(image: str, parts: tuple[str, str, str]) -> None:
    assert split_image(image) == parts


@pytest.mark.parametrize("image", ["", "A/B", "a b", "a:", "https://r.example/a", "a@sha256:12"])
def test_what_is_no_image_is_refused(image: str) -> None:
    with pytest.raises(WrongConfiguration, match="is no name of an image"):
        split_image(image)


Answer = Callable[[str, str, Mapping[str, str], bytes], tuple[int, dict[str, str], bytes]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Start a server on the loopback that answers as the test says; return its host and port."""
    servers = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                status, headers, data = answer(self.command, self.path, self.headers, body)
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else data)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                """Keep the test's output clean."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_digest_is_asked_of_a_registry_that_wants_a_token(serve: Callable[[Answer], str]) -> None:
    digest = f"sha256:{'a' * 64}"

    def answer(method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/token"):
            assert "scope=repository" in path
            return 200, {}, b'{"token": "t"}'
        if headers.get("authorization") != "Bearer t":
            realm = f"http://{headers['host']}/token"
            return 401, {"www-authenticate": f'Bearer realm="{realm}",service="r",scope="repository:a/b:pull"'}, b""
        known = path == "/v2/a/b/manifests/1"
        return (200, {"docker-content-digest": digest}, b"") if known else (404, {}, b"")

    host = serve(answer)
    assert find_digest(f"{host}/a/b:1") == (digest, "")
    assert find_digest(f"{host}/a/b:2") == (None, f"{host} answers 404 without a login")


def test_a_registry_that_does_not_answer_leaves_the_tag() -> None:
    digest, why = find_digest("127.0.0.1:1/a:b")
    assert digest is None
    assert "127.0.0.1:1 does not answer from here" in why


def test_an_argo_server_is_asked_by_its_own_api(serve: Callable[[Answer], str]) -> None:
    pytest.importorskip("argo_workflows", reason="the extra argo is not installed")
    asked = []

    def answer(method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        asked.append((method, path, headers.get("authorization"), body))
        if "nowhere" in path:
            return 404, {}, b'{"message": "not found"}'
        if "mine/refused" in path:
            return 403, {}, b'{"message": "not allowed"}'
        status = {"phase": "Running", "nodes": {"a": {"type": "Pod", "phase": "Pending", "message": "ErrImagePull: x"}}}
        return 200, {}, json.dumps({"metadata": {"name": "kallm-x"}, "status": status, "new": {"in": 4.1}}).encode()

    settings = ServerSettings(server=serve(answer), token="Bearer t", secure=False, namespace="mine")  # type: ignore[arg-type]
    engine = ServerEngine(settings)
    manifest = prepare(make_plan(read_study("smoke")), Request("server"), ground(), None).manifest
    assert engine.create(manifest) == "kallm-x"
    assert asked[0][:3] == ("POST", "/api/v1/workflows/mine", "Bearer t")
    assert json.loads(asked[0][3])["workflow"] == manifest
    assert engine.progress("kallm-x").sentence == "Running"
    assert engine.look("kallm-x").trouble == "a pod cannot start: ErrImagePull: x"
    assert engine.stop("kallm-x") is True
    assert asked[-1][:2] == ("PUT", "/api/v1/workflows/mine/kallm-x/stop")
    assert engine.stop("nowhere") is False
    assert engine.progress("nowhere").finished
    with pytest.raises(WrongConfiguration, match="refuses this: not allowed"):
        engine.progress("refused")


def test_an_argo_server_that_is_not_named_or_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARGO_SERVER", raising=False)
    with pytest.raises(WrongConfiguration, match="set ARGO_SERVER to host:port"):
        ServerSettings.from_environment()
    monkeypatch.setenv("ARGO_SERVER", "127.0.0.1:1")
    monkeypatch.setenv("ARGO_SECURE", "perhaps")
    with pytest.raises(WrongConfiguration, match="ARGO_SECURE is wrong"):
        ServerSettings.from_environment()
    monkeypatch.setenv("ARGO_SECURE", "false")
    monkeypatch.setitem(sys.modules, "argo_workflows", None)
    with pytest.raises(WrongConfiguration, match=re.escape("pip install kallm[argo]")):
        ServerEngine(ServerSettings.from_environment())
