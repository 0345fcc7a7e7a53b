"""One contract for every store, and what each kind must refuse."""

import os
import resource
import subprocess
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.httpsession import URLLib3Session
from servers import ACCESS, SECRET, make_bucket

from kallm.errors import StorageUnavailable, WrongConfiguration
from kallm.store.local import FolderStore
from kallm.store.opening import open_store
from kallm.store.s3 import S3Settings, S3Store
from kallm.store.store import Store, is_key

pytest_plugins = ["stores"]


def _keys(store: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix)]


# every store


def test_what_is_put_is_what_is_got(store: Store) -> None:
    store.put("a/b c/ü+%20.json", b"\x00one")
    store.put("a/empty", b"")
    assert store.get("a/b c/ü+%20.json") == b"\x00one"
    assert store.get("a/empty") == b""
    assert _keys(store) == ["a/b c/ü+%20.json", "a/empty"]


def test_put_replaces(store: Store) -> None:
    store.put("a/b", b"a longer one")
    store.put("a/b", b"two")
    assert store.get("a/b") == b"two"
    assert [(entry.key, entry.size) for entry in store.list()] == [("a/b", 3)]


def test_missing_objects_are_none_and_their_deletion_nothing(store: Store, tmp_path: Path) -> None:
    store.put("a/b", b"one")
    for key in ("c", "a", "a/c", "d/e/f"):
        assert store.get(key) is None
        assert store.download(key, tmp_path / "out") is False
        store.delete(key)
    assert not (tmp_path / "out").exists()
    assert _keys(store) == ["a/b"]


def test_create_wins_once_and_equal_bytes_have_won(store: Store) -> None:
    assert store.create("a/b", b"one") is True
    assert store.create("a/b", b"two") is False
    assert store.create("a/b", b"one") is True
    assert store.get("a/b") == b"one"


def test_create_after_a_deletion_wins_again(store: Store) -> None:
    assert store.create("a", b"one")
    store.delete("a")
    assert store.get("a") is None
    assert store.create("a", b"two")
    assert store.get("a") == b"two"


def test_32_creators_of_4_keys_give_4_winners(store: Store) -> None:
    def write(writer: int) -> tuple[str, bytes, bool]:
        key, data = f"race/{writer % 4}", b"%d" % writer
        return key, data, store.create(key, data)

    with ThreadPoolExecutor(32) as pool:
        results = [*pool.map(write, range(32))]
    winners = {key: data for key, data, won in results if won}
    assert sum(won for *_, won in results) == 4
    assert {key: store.get(key) for key in winners} == winners


def test_the_listing_is_sorted_by_bytes_and_true_to_the_prefix(store: Store) -> None:
    keys = ["a-b", "a.b", "a/b.c", "a/b/c/d", "a/b0", "a/b-c/d", "a0", "b/é", "b/z", "ab/c"]
    for number, key in enumerate(keys):
        store.put(key, b"x" * number)
    for prefix in ("", "a", "a/", "a/b", "a/b/", "b/", "zz", "zz/", "a-b/"):
        expected = sorted((key for key in keys if key.startswith(prefix)), key=str.encode)
        assert _keys(store, prefix) == expected, prefix
    assert {entry.key: entry.size for entry in store.list()} == {key: size for size, key in enumerate(keys)}


def test_the_listing_knows_when_an_object_was_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "clock").write_bytes(b"")
    store.put("a", b"one")
    assert abs(next(store.list()).modified - (tmp_path / "clock").stat().st_mtime) < 5


@pytest.mark.parametrize("size", [0, 1000, (16 << 20) + 12345])
def test_a_file_comes_back_as_it_went(store: Store, tmp_path: Path, size: int) -> None:
    data = (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]
    (tmp_path / "in").write_bytes(data)
    store.upload(tmp_path / "in", "big/file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_bytes(b"what was there")
    assert store.download("big/file", tmp_path / "out" / "file") is True
    assert (tmp_path / "out" / "file").read_bytes() == data
    assert store.get("big/file") == data
    assert os.listdir(tmp_path / "out") == ["file"]


def test_what_is_no_key_is_refused(store: Store) -> None:
    for key in ("", "/a", "a/", "a//b", "../a", "a/..", "./a", "a\\b", "a\0", ".tmp-1", "a/.tmp-1"):
        assert not is_key(key)
        with pytest.raises(AssertionError):
            store.put(key, b"")
    assert all(map(is_key, ("a", "a/b", "...", ".a/b..", "a b/ü")))


# folders


def test_half_written_files_are_not_listed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a/b", b"one")
    (tmp_path / "a" / ".tmp-0123").write_bytes(b"half")
    assert _keys(store) == _keys(store, "a/") == ["a/b"]


def _stopped_at(call: int, action: Callable[[], object]) -> bool:
    """Run an action in a child that ends without any clean-up before its n-th system call; say whether it did."""
    child = os.fork()
    if child == 0:
        left = iter(range(call))

        def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any, **options: Any) -> Any:
                if next(left, None) is None:
                    os._exit(9)
                return function(*arguments, **options)

            return called

        for name in ("fsync", "link", "replace", "unlink", "mkdir"):
            setattr(os, name, stopping(getattr(os, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("method", ["put", "create", "upload"])
def test_a_writer_stopped_anywhere_leaves_all_or_nothing(tmp_path: Path, method: str, before: bytes | None) -> None:
    (tmp_path / "in").write_bytes(b"after")
    seen = set()
    for call in range(100):
        store = FolderStore(tmp_path / f"{call}")
        if before is not None:
            store.put("a/b", before)
        actions = {
            "put": lambda store=store: store.put("a/b", b"after"),
            "create": lambda store=store: store.create("a/b", b"after"),
            "upload": lambda store=store: store.upload(tmp_path / "in", "a/b"),
        }
        stopped = _stopped_at(call, actions[method])
        seen.add(store.get("a/b"))
        assert _keys(store) == ([] if store.get("a/b") is None else ["a/b"])
        if not stopped:
            break
    assert not stopped
    assert call >= 4
    assert seen == ({before} if method == "create" and before else {before, b"after"})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_unavailable_and_what_stood_stays(small_disk: Path, tmp_path: Path) -> None:
    store = FolderStore(small_disk / "store")
    store.put("a", b"before")
    (tmp_path / "in").write_bytes(b"x" * (2 << 20))
    big = FolderStore(tmp_path / "big")
    big.upload(tmp_path / "in", "a")
    for action in (
        lambda: store.put("a", b"x" * (2 << 20)),
        lambda: store.create("b", b"x" * (2 << 20)),
        lambda: store.upload(tmp_path / "in", "a"),
        lambda: big.download("a", small_disk / "out"),
    ):
        with pytest.raises(StorageUnavailable, match=r"disk/.*: No space left on device; free some space"):
            action()
    assert store.get("a") == b"before"
    assert _keys(store) == ["a"]
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["a"]


def test_a_read_only_disk_is_unavailable_and_cannot_be_opened_for_writing(small_disk: Path) -> None:
    store = FolderStore(small_disk)
    store.put("a", b"before")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for action in (lambda: store.put("a", b""), lambda: store.create("b", b""), lambda: store.delete("a")):
        with pytest.raises(StorageUnavailable, match=r"Read-only file system; mount it writable"):
            action()
    with pytest.raises(WrongConfiguration, match=r"Read-only file system; mount it writable"):
        open_store(small_disk, writable=True)
    assert open_store(small_disk).get("a") == b"before"


def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(StorageUnavailable, match="File too large; raise the limit"):
            store.put("a", b"x" * (1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _keys(store) == []


def test_a_name_without_a_readable_file_is_an_error_not_a_lost_race(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(StorageUnavailable, match=r"/a: the file system says that it exists"):
        FolderStore(tmp_path).create("a", b"")


# servers


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
    assert _keys(store, "n/") == names


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
        _assert_one_line_without_credentials(caught.value)


def _assert_one_line_without_credentials(error: BaseException) -> None:
    shown = "".join(traceback.format_exception(error))
    assert SECRET not in shown
    assert ACCESS not in shown
    assert "\n" not in str(error)


@pytest.mark.usefixtures("credentials")
def test_a_server_that_does_not_answer_is_unavailable() -> None:
    store = S3Store("some-bucket", settings=S3Settings(endpoint="http://127.0.0.1:9", attempts=1))
    with pytest.raises(StorageUnavailable, match=r"some-bucket/a at http://127.0.0.1:9: no connection"):
        store.get("a")


def test_missing_or_broken_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}\n")
    with pytest.raises(WrongConfiguration, match="AWS_SECRET_ACCESS_KEY holds white space") as caught:
        S3Store(bucket)
    _assert_one_line_without_credentials(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(WrongConfiguration, match="no credentials, or only a part"):
        S3Store(bucket)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(WrongConfiguration, match="set AWS_ACCESS_KEY_ID"):
        S3Store(bucket)
    with pytest.raises(StorageUnavailable, match="set AWS_ACCESS_KEY_ID"):
        S3Store(bucket, inside_cell=True)


# addresses


@pytest.mark.parametrize("make", [str, Path, lambda path: f"file://{path}", lambda path: path.as_uri()])
def test_a_folder_opens_under_all_its_names(tmp_path: Path, make: Callable[[Path], str | Path]) -> None:
    folder = tmp_path / "new" / "one"
    assert open_store(make(folder), writable=True).create("a", b"one")
    assert open_store(make(folder)).get("a") == b"one"
    assert [path.name for path in folder.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "no address"),
        (" ", "no address"),
        ("a\nb", "no address"),
        ("s4://bucket", "Did you mean 's3'"),
        ("https://server/bucket", "unknown scheme 'https'"),
        ("s3:bucket", "lacks a slash"),
        (Path("s3://bucket/prefix"), "lacks a slash"),
        ("s3://", "3 to 63"),
        ("s3://ab", "3 to 63"),
        ("s3://Bucket_1", "3 to 63"),
        ("s3://bucket/a//b", "no prefix"),
        ("s3://bucket/../b", "no prefix"),
        (f"s3://{ACCESS}:{SECRET}@bucket/a", "holds credentials"),
        ("file://server/folder", "no folder of this machine"),
        ("file:folder", "no folder of this machine"),
        ("file:///", "no folder of this machine"),
        ("/proc/kallm", "no store can be opened"),
        ("/dev/null", "is a file"),
        ("/dev/null/store", "no store can be opened"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_wrong_address_is_refused_in_one_line(address: str | Path, reason: str) -> None:
    with pytest.raises(WrongConfiguration, match=reason) as caught:
        open_store(address, writable=True)
    _assert_one_line_without_credentials(caught.value)


def test_reading_where_nothing_was_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongConfiguration, match="there is no store"):
        open_store(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("AWS_ENDPOINT_URL_S3", "127.0.0.1:9000", "no address of a server"),
        ("AWS_ENDPOINT_URL_S3", f"http://{ACCESS}:{SECRET}@127.0.0.1", "holds credentials"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:port", "no address of a server"),
        ("KALLM_S3_ADDRESSING", "paths", "'path', 'virtual' or 'auto'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(WrongConfiguration, match=f"^{name} .*{reason}") as caught:
        open_store(f"s3://{bucket}")
    _assert_one_line_without_credentials(caught.value)


def test_a_bucket_opens_is_probed_once_and_is_left_clean(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"s3://{bucket}/some/prefix/", writable=True)
    assert store.address == f"s3://{bucket}/some/prefix"
    assert _keys(open_store(f"s3://{bucket}")) == []
    assert store.create("a", b"one")
    assert _keys(open_store(f"s3://{bucket}", writable=True)) == ["some/prefix/a"]
    with pytest.raises(WrongConfiguration, match="there is no such bucket"):
        open_store("s3://no-such-bucket")


def test_a_bucket_with_versions_is_refused_and_left_clean(bucket: str, moto_endpoint: str) -> None:
    client = boto3.Session().client("s3", endpoint_url=moto_endpoint)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    with pytest.raises(WrongConfiguration, match=f"bucket {bucket} .* keeps versions"):
        open_store(f"s3://{bucket}", writable=True)
    assert "Versions" not in client.list_object_versions(Bucket=bucket)
    open_store(f"s3://{bucket}")


@pytest.mark.usefixtures("credentials")
def test_a_server_that_ignores_conditions_is_refused_by_name(
    nanio_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", nanio_endpoint)
    name = make_bucket(nanio_endpoint)
    reason = rf"{nanio_endpoint} \(.*\) let 8 of 8 .* use AWS S3, Ceph RGW"
    with pytest.raises(WrongConfiguration, match=reason) as caught:
        open_store(f"s3://{name}", writable=True)
    _assert_one_line_without_credentials(caught.value)
    assert _keys(open_store(f"s3://{name}")) == []


@pytest.mark.usefixtures("credentials")
def test_a_wrong_secret_is_refused(nanio_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", nanio_endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(WrongConfiguration, match="set AWS_SECRET_ACCESS_KEY"):
        open_store("s3://some-bucket")
    with pytest.raises(StorageUnavailable, match="set AWS_SECRET_ACCESS_KEY"):
        open_store("s3://some-bucket", inside_cell=True)
