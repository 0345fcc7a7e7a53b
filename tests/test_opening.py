"""Addresses, settings and the opening probe."""

from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from servers import ACCESS, SECRET, make_bucket
from stores import assert_one_line_without_credentials, keys_of

from kallm.errors import StorageUnavailable, WrongConfiguration
from kallm.store.opening import open_store

pytest_plugins = ["stores"]


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
    assert_one_line_without_credentials(caught.value)


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
    assert_one_line_without_credentials(caught.value)


def test_a_bucket_opens_is_probed_once_and_is_left_clean(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"s3://{bucket}/some/prefix/", writable=True)
    assert store.address == f"s3://{bucket}/some/prefix"
    assert keys_of(open_store(f"s3://{bucket}")) == []
    assert store.create("a", b"one")
    assert keys_of(open_store(f"s3://{bucket}", writable=True)) == ["some/prefix/a"]
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
    assert_one_line_without_credentials(caught.value)
    assert keys_of(open_store(f"s3://{name}")) == []


@pytest.mark.usefixtures("credentials")
def test_a_wrong_secret_is_refused(nanio_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", nanio_endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(WrongConfiguration, match="set AWS_SECRET_ACCESS_KEY"):
        open_store("s3://some-bucket")
    with pytest.raises(StorageUnavailable, match="set AWS_SECRET_ACCESS_KEY"):
        open_store("s3://some-bucket", inside_cell=True)
