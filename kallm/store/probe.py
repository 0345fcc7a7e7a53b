"""Whether a bucket keeps the promises that records and checkpoints rest on, found out by a race."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from kallm.errors import WrongConfiguration
from kallm.store.s3 import S3Store

__all__ = ["probe"]

_WRITERS = 8
_KNOWN_GOOD = "use AWS S3, Ceph RGW, SeaweedFS 4.18 or later, or the Versity gateway"

_probed: set[tuple[str, str]] = set()
_lock = threading.Lock()


def probe(store: S3Store) -> None:
    """Try a bucket's promises under ``.probe/`` and clean up; each bucket is tried once per process.

    Raises:
        WrongConfiguration: the server ignores ``If-None-Match: *``, or does not return what was just written; or
            the bucket keeps versions.
    """
    with _lock:
        if (store.endpoint, store.bucket) not in _probed:
            folder = f".probe/{uuid.uuid4().hex}"
            server = _check_versions(store, f"{folder}/versions")
            _check_race(store, f"{folder}/race", server)
            _probed.add((store.endpoint, store.bucket))


def _check_versions(store: S3Store, key: str) -> str:
    """Refuse a bucket that keeps versions; return the server's name for itself."""
    place = {"Bucket": store.bucket, "Key": store.full_key(key)}
    with store.naming_refusals(key):
        answer = store.client.put_object(Body=b"", **place)
        version = answer.get("VersionId", "null")
        store.client.delete_object(**place, **({} if version == "null" else {"VersionId": version}))
    if version != "null":
        raise WrongConfiguration(
            f"bucket {store.bucket} at {store.endpoint} keeps versions, so deleted checkpoints would go on filling it; "
            "suspend its versioning, or use another bucket"
        )
    name = answer["ResponseMetadata"]["HTTPHeaders"].get("server", "which gives no name")
    return f"the S3 server at {store.endpoint} ({name})"


def _check_race(store: S3Store, key: str, server: str) -> None:
    start = threading.Barrier(_WRITERS)

    def write(writer: int) -> bool:
        start.wait()
        return store.create(key, b"%d" % writer)

    try:
        with ThreadPoolExecutor(_WRITERS) as pool:
            won = [*pool.map(write, range(_WRITERS))]
        if sum(won) != 1:
            raise WrongConfiguration(
                f"{server} let {sum(won)} of {_WRITERS} writers create one object: it does not honour If-None-Match, "
                f"and two pods could both own a cell; {_KNOWN_GOOD}"
            )
        if store.get(key) != b"%d" % won.index(True):
            raise WrongConfiguration(f"{server} does not return what was just written; {_KNOWN_GOOD}")
        if [entry.key for entry in store.list(key)] != [key]:
            raise WrongConfiguration(f"{server} does not list what was just written; {_KNOWN_GOOD}")
    finally:
        store.delete(key)
