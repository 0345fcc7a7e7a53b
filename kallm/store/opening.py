"""How an address opens a store, and what is refused before anything is computed."""

import errno
import re
import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kallm.errors import StorageUnavailable, WrongConfiguration, did_you_mean
from kallm.store.local import FolderStore, naming_disk_errors
from kallm.store.probe import probe
from kallm.store.s3 import S3Store
from kallm.store.store import Store, is_key

__all__ = ["open_store"]

_SCHEMES = ("file", "s3")
_EXAMPLES = "expected a folder, file:///folder, or s3://bucket/prefix"
_TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


def open_store(address: str | Path, *, writable: bool = False, inside_cell: bool = False) -> Store:
    """Open the store at an address: a folder, ``file:///folder`` or ``s3://bucket[/prefix]``.

    A folder is made where it is opened for writing. A bucket must exist, and is probed when opened for writing.

    Raises:
        WrongConfiguration: the address is none, or what is there can be no store.
        StorageUnavailable: the server does not answer, or refuses access inside a cell.
    """
    text = str(address).strip()
    if not text or not text.isprintable():
        raise WrongConfiguration(f"{text!r} is no address of a store: {_EXAMPLES}")
    if re.match(r"[^/]*:/+[^/]*@", text):
        raise WrongConfiguration(
            "the store's address holds credentials: take them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if scheme is None:
        return _open_folder(_expand(text), writable=writable)
    if scheme[1] == "file":
        return _open_folder(_parse_file(text), writable=writable)
    if scheme[1] == "s3":
        return _open_bucket(*_parse_s3(text), writable=writable, inside_cell=inside_cell)
    known = did_you_mean(scheme[1], _SCHEMES)
    raise WrongConfiguration(f"unknown scheme '{scheme[1]}' in store address {text!r}: {known}")


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise WrongConfiguration(f"store address {text!r} names the home of nobody: {_EXAMPLES}") from error


def _parse_file(text: str) -> Path:
    url = urlsplit(text)
    if url.netloc not in ("", "localhost") or url.path in ("", "/") or not text.startswith("file://"):
        raise WrongConfiguration(f"store address {text!r} names no folder of this machine: expected file:///folder")
    return Path(unquote(url.path))


def _parse_s3(text: str) -> tuple[str, str]:
    if not text.startswith("s3://"):
        raise WrongConfiguration(f"store address {text!r} lacks a slash: expected s3://bucket/prefix")
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise WrongConfiguration(
            f"{bucket!r} in store address {text!r} is no name of a bucket: expected 3 to 63 of a-z, 0-9, '.' and '-', "
            "with a letter or digit first and last"
        )
    if prefix and not is_key(prefix):
        raise WrongConfiguration(
            f"{prefix!r} in store address {text!r} is no prefix: expected parts joined by '/', none empty or '..'"
        )
    return bucket, prefix


def _open_bucket(bucket: str, prefix: str, *, writable: bool, inside_cell: bool) -> S3Store:
    store = S3Store(bucket, prefix, inside_cell=inside_cell)
    with store.naming_refusals():
        store.client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    if writable:
        probe(store)
    return store


def _open_folder(root: Path, *, writable: bool) -> FolderStore:
    store = FolderStore(root)
    try:
        with naming_disk_errors(store.root):
            found, is_folder = root.exists(), root.is_dir()
        if found and not is_folder:
            raise WrongConfiguration(f"the store {root} is a file: {_EXAMPLES}")
        if not found and not writable:
            raise WrongConfiguration(f"there is no store in {root}: name the folder that a study was run into")
        if writable:
            key = f".probe-{uuid.uuid4().hex}"
            store.create(key, b"")
            store.delete(key)
    except StorageUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT:
            raise
        raise WrongConfiguration(f"no store can be opened in {root}: {error}") from cause
    return store
