"""An S3 server as a store: lost replies, conflicts, refusals, and what their errors say."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.httpsession import URLLib3Session
from servers import ACCESS, SECRET
from stores import assert_one_line_without_credentials, keys_of

from kallm.errors import StorageUnavailable, WrongConfiguration
from kallm.store.s3 import S3Settings, S3Store

pytest_plugins = ["stores"]


def _answer(request: Any, status: int, code: str) -> AWSResponse:
    class Body(list[bytes]):
        def stream(self, **_: Any) -> Iterator[bytes]:
            yield f"<Error><Code>{code}</Code><Message>{ACCESS} {SECRET}</Message></Error>".encode()

    return AWSResponse(request.url, status, {}, Body())


def _interfere(store: S3Store, operation: str, *answers: Callable[[Any], AWSResponse | None]) -> None:
    """Answer the next requests of an operation on the wire; after them the server's own answers are taken."""
    left = iter(answers)

    def answer(request: Any, **_: Any) -> AWSResponse | None:
        return next(left, lambda _: None)(request)

    store.client.meta.events.unregister(f"before-send.s3.{operation}", unique_id="test")
    store.client.meta.events.register(f"before-send.s3.{operation}", answer, unique_id="test")


def test_more_than_a_page_is_listed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    store = S3Store(bucket)
    names = [f"n/{number}" for number in range(10)]
    for name in names:
        store.put(name, b"")
    assert len(store.client.list_objects_v2(Bucket=bucket)["Contents"]) == 3
    assert keys_of(store, "n/") == names


def test_a_lost_reply_is_no_lost_race(bucket: str) -> None:
    store = S3Store(bucket)

    def lose(request: Any) -> AWSResponse:
        assert URLLib3Session().send(request).status_code == 200
        return _answer(request, 500, "InternalError")

    _interfere(store, "PutObject", lose)
    assert store.create("a", b"one") is True
    _interfere(store, "PutObject", lambda request: _answer(request, 500, "InternalError"))
    assert store.create("a", b"two") is False


def test_an_object_said_to_exist_but_not_there_is_unavailable(bucket: str) -> None:
    store = S3Store(bucket)
    _interfere(store, "PutObject", lambda request: _answer(request, 412, "PreconditionFailed"))
    with pytest.raises(StorageUnavailable, match=rf"s3://{bucket}/a/b at http.*\(412\), but there is nothing to read"):
        store.create("a/b", b"one")


def test_a_conflict_is_tried_again_and_then_given_up(bucket: str, moto_endpoint: str) -> None:
    conflict = [lambda request: _answer(request, 409, "ConditionalRequestConflict")]
    store = S3Store(bucket, settings=S3Settings(endpoint=moto_endpoint, attempts=3))
    _interfere(store, "PutObject", *conflict * 2)
    assert store.create("a", b"one") is True
    _interfere(store, "PutObject", *conflict * 100)
    with pytest.raises(StorageUnavailable, match=r"s3://.*/b at .*: another write was under way every time"):
        store.create("b", b"one")


def test_a_body_that_breaks_off_is_read_again(bucket: str) -> None:
    store = S3Store(bucket)
    store.put("a", b"one")

    def cut(request: Any) -> AWSResponse:
        answer = URLLib3Session().send(request)
        answer.raw.read()
        return answer

    _interfere(store, "GetObject", cut)
    assert store.get("a") == b"one"


ANSWERS = [
    (403, "AccessDenied", WrongConfiguration, "give this key the rights"),
    (403, "InvalidAccessKeyId", WrongConfiguration, "set AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", WrongConfiguration, "set AWS_SECRET_ACCESS_KEY"),
    (403, "RequestTimeTooSkewed", WrongConfiguration, "set this machine's clock"),
    (403, "Unheard", WrongConfiguration, "access is denied"),
    (400, "ExpiredToken", WrongConfiguration, "fetch new credentials"),
    (404, "NoSuchBucket", WrongConfiguration, "make it, or name an existing one"),
    (400, "AuthorizationHeaderMalformed", WrongConfiguration, "set AWS_DEFAULT_REGION"),
    (301, "PermanentRedirect", WrongConfiguration, "set AWS_DEFAULT_REGION"),
    (503, "SlowDown", StorageUnavailable, "fewer cells at once"),
    (507, "InsufficientStorage", StorageUnavailable, "the server is full"),
    (500, "Unheard", StorageUnavailable, "see the server's log"),
]


@pytest.mark.parametrize("inside_cell", [False, True])
def test_a_refusal_names_place_and_remedy_and_no_credential(bucket: str, moto_endpoint: str, inside_cell: bool) -> None:
    store = S3Store(bucket, settings=S3Settings(endpoint=moto_endpoint, attempts=1), inside_cell=inside_cell)
    for status, code, kind, remedy in ANSWERS:
        _interfere(store, "PutObject", *[lambda request, row=(status, code): _answer(request, *row)] * 9)
        later = inside_cell and (status == 403 or code == "ExpiredToken")
        with pytest.raises(StorageUnavailable if later else kind) as caught:
            store.put("a/b", b"one")
        assert remedy in str(caught.value)
        assert str(caught.value).startswith(f"s3://{bucket}/a/b at {moto_endpoint}: ")
        assert str(caught.value).endswith(f"(the server answered {status} {code})")
        assert_one_line_without_credentials(caught.value)


@pytest.mark.usefixtures("credentials")
def test_a_server_that_does_not_answer_is_unavailable() -> None:
    store = S3Store("some-bucket", settings=S3Settings(endpoint="http://127.0.0.1:9", attempts=1))
    with pytest.raises(StorageUnavailable, match=r"some-bucket/a at http://127.0.0.1:9: no connection"):
        store.get("a")


def test_missing_or_broken_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}\n")
    with pytest.raises(WrongConfiguration, match="AWS_SECRET_ACCESS_KEY holds white space") as caught:
        S3Store(bucket)
    assert_one_line_without_credentials(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(WrongConfiguration, match="no credentials, or only a part"):
        S3Store(bucket)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(WrongConfiguration, match="set AWS_ACCESS_KEY_ID"):
        S3Store(bucket)
    with pytest.raises(StorageUnavailable, match="set AWS_ACCESS_KEY_ID"):
        S3Store(bucket, inside_cell=True)


def test_a_file_in_parts_tells_how_far_it_is(bucket: str, moto_endpoint: str, tmp_path: Path) -> None:
    store = S3Store(bucket, settings=S3Settings(endpoint=moto_endpoint, part_bytes=5 << 20))
    told: list[tuple[str, int, int]] = []
    store.on_transfer = lambda *figures: told.append(figures)
    size = 3 * (5 << 20) + 7
    (tmp_path / "in").write_bytes(bytes(size))
    store.upload(tmp_path / "in", "a/b")
    assert {(key, total) for key, _, total in told} == {("a/b", size)}
    assert max(done for _, done, _ in told) == told[-1][1] == size
