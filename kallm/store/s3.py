"""A store in an S3 bucket, over boto3; correctness rests on ``If-None-Match: *`` alone."""

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.parsers import ResponseParserError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from s3transfer.exceptions import RetriesExceededError
from s3transfer.subscribers import BaseSubscriber

from kallm.errors import StorageUnavailable, WrongConfiguration
from kallm.store.local import naming_disk_errors, replacing
from kallm.store.refusals import explain_answer, explain_silence
from kallm.store.store import Entry, is_key

__all__ = ["S3Settings", "S3Store"]


class S3Settings(BaseModel):
    """How to reach S3; credentials, region, proxies and certificates come by boto3's own chain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str | None = Field(
        None, description="AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL: the server; AWS where unset"
    )
    addressing: Literal["path", "virtual", "auto"] | None = Field(
        None, description="KALLM_S3_ADDRESSING: where the bucket stands in the address; path where an endpoint is set"
    )
    connect_timeout_s: float = Field(10, gt=0, description="longest wait for a connection")
    read_timeout_s: float = Field(60, gt=0, description="longest wait for the next bytes of an answer")
    attempts: int = Field(6, ge=1, description="most tries of one request, the pauses between them growing and random")
    part_bytes: int = Field(16 << 20, ge=5 << 20, description="size of a part; larger files go up and down in parts")
    parts_at_once: int = Field(4, ge=1, description="parts of one file on their way at once")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        url = urlsplit(endpoint or "http://aws")
        if url.username or url.password:
            raise ValueError("holds credentials; take them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        host = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?", url.netloc)
        if url.scheme not in ("http", "https") or host is None:
            raise ValueError(f"is no address of a server: expected http://host:port or https://host, not {endpoint!r}")
        return endpoint

    @classmethod
    def from_environment(cls) -> "S3Settings":
        """Read the settings from the environment.

        Raises:
            WrongConfiguration: a variable holds something else than its description says.
        """
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        addressing = os.environ.get("KALLM_S3_ADDRESSING") or None
        try:
            return cls.model_validate({"endpoint": endpoint, "addressing": addressing})
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = {"endpoint": "AWS_ENDPOINT_URL_S3", "addressing": "KALLM_S3_ADDRESSING"}[str(first["loc"][0])]
        # outside the handler: pydantic's error repeats the value, and the value may hold a password
        raise WrongConfiguration(f"{name} {first['msg'].removeprefix('Value error, ')}")


class _Moved(BaseSubscriber):
    """Adds up the bytes of one upload; parts report from threads of their own."""

    def __init__(self, key: str, total: int, tell: Callable[[str, int, int], None]) -> None:
        self._key, self._done, self._total, self._tell, self._lock = key, 0, total, tell, threading.Lock()

    def on_progress(self, future: Any, bytes_transferred: int, **rest: Any) -> None:
        """Count more bytes as sent; a part that is sent again first counts back."""
        with self._lock:
            self._done += bytes_transferred
            self._tell(self._key, self._done, self._total)


class S3Store:
    """A store under a prefix of a bucket; any number of processes and hosts may write to it at once.

    ``inside_cell`` says that refused access is to be tried again later (76), not a mistake to be corrected now (2).
    """

    def __init__(
        self, bucket: str, prefix: str = "", settings: S3Settings | None = None, *, inside_cell: bool = False
    ) -> None:
        """Prepare a client; nothing is asked of the server yet.

        Raises:
            WrongConfiguration: the credentials are missing or cannot be right.
        """
        settings = settings or S3Settings.from_environment()
        assert not prefix or is_key(prefix), f"no prefix: {prefix!r}"
        self.bucket = bucket
        self.address = f"s3://{bucket}/{prefix}".rstrip("/")
        self.endpoint = settings.endpoint or "AWS"
        self.on_transfer: Callable[[str, int, int], None] = lambda key, done, total: None
        """Called from other threads with a key, the bytes that are sent, and all: a checkpoint may take minutes."""
        self._inside_cell = inside_cell
        self._attempts = settings.attempts
        self._begin = f"{prefix}/" if prefix else ""
        with self.naming_refusals():
            session = boto3.Session()
            self._check_credentials(session)
            self.client = session.client("s3", endpoint_url=settings.endpoint, config=_client_config(settings))
        self.endpoint = str(self.client.meta.endpoint_url)
        self._transfer = TransferConfig(
            multipart_threshold=settings.part_bytes,
            multipart_chunksize=settings.part_bytes,
            max_concurrency=settings.parts_at_once,
            num_download_attempts=settings.attempts,
            preferred_transfer_client="classic",
        )

    def get(self, key: str) -> bytes | None:
        """Return an object's bytes, or None where there is none."""
        with self.naming_refusals(key):
            for attempt in range(self._attempts):
                try:
                    return bytes(self.client.get_object(Bucket=self.bucket, Key=self.full_key(key))["Body"].read())
                except ClientError as error:
                    if _code(error) == "NoSuchKey":
                        return None
                    raise
                except BotoCoreError:
                    # boto3 tries again until the answer begins, but not when it breaks off
                    if attempt + 1 == self._attempts:
                        raise
                    _pause(attempt)
        raise AssertionError

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whole or not at all, replacing what was there."""
        with self.naming_refusals(key):
            self.client.put_object(Bucket=self.bucket, Key=self.full_key(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none; return whether this call's bytes are the ones that stand.

        Equal bytes that stand already count as this call's own: boto3 repeats a request whose reply was lost, and the
        second one is refused because the first one won.
        """
        with self.naming_refusals(key):
            for attempt in range(self._attempts):
                try:
                    self.client.put_object(Bucket=self.bucket, Key=self.full_key(key), Body=data, IfNoneMatch="*")
                except ClientError as error:
                    if _status(error) == 412:
                        return self._stands(key, data)
                    # 409: another conditional write of the key is under way, and either may win
                    if _status(error) != 409 or attempt + 1 == self._attempts:
                        raise
                    _pause(attempt)
                else:
                    return True
        raise AssertionError

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects whose key starts with ``prefix``, sorted by key."""
        with self.naming_refusals(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._begin + prefix
            )
            found = [item for page in pages for item in page.get("Contents", ())]
        # servers over a file system sort by a key's parts; a last slash is a console's mark for a folder
        for item in sorted(found, key=lambda item: item["Key"].encode()):
            if not item["Key"].endswith("/"):
                key = item["Key"].removeprefix(self._begin)
                yield Entry(key, int(item["Size"]), item["LastModified"].timestamp())

    def upload(self, path: Path, key: str) -> None:
        """Write a file's bytes as an object, whole or not at all."""
        with naming_disk_errors(path):
            moved = _Moved(key, path.stat().st_size, self.on_transfer)
        with self.naming_refusals(key), create_transfer_manager(self.client, self._transfer) as manager:
            manager.upload(str(path), self.bucket, self.full_key(key), subscribers=[moved]).result()

    def download(self, key: str, path: Path) -> bool:
        """Write an object's bytes to a file, whole or not at all; return False where there is no such object."""
        with naming_disk_errors(path), self.naming_refusals(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with replacing(path) as file, create_transfer_manager(self.client, self._transfer) as manager:
                    manager.download(self.bucket, self.full_key(key), file).result()
            except ClientError as error:
                if _status(error) != 404:
                    raise
                self.client.head_bucket(Bucket=self.bucket)
                return False
        return True

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with self.naming_refusals(key):
            try:
                self.client.delete_object(Bucket=self.bucket, Key=self.full_key(key))
            except ClientError as error:
                if _code(error) != "NoSuchKey":
                    raise

    def full_key(self, key: str) -> str:
        """Return the key in the bucket."""
        assert is_key(key), f"no key: {key!r}"
        return self._begin + key

    @contextmanager
    def naming_refusals(self, key: str = "") -> Iterator[None]:
        """Turn what boto3 raises in the block into one sentence with endpoint, bucket, key and the setting to change.

        Raises:
            StorageUnavailable: no answer, a server's fault, or refused access inside a cell.
            WrongConfiguration: wrong bucket, region or address, or refused access outside a cell.
        """
        try:
            yield
        except ClientError as error:
            # without the cause: the server's own words may repeat the access key
            raise explain_answer(error.response, self._place(key), inside_cell=self._inside_cell) from None
        except BotoCoreError as error:
            raise explain_silence(error, self._place(key), inside_cell=self._inside_cell) from error
        except RetriesExceededError as error:
            raise StorageUnavailable(
                f"{self._place(key)}: the download broke off again and again; try later"
            ) from error
        except ResponseParserError as error:
            remedy = "set AWS_ENDPOINT_URL_S3 to the S3 address of the server, not to its console"
            raise WrongConfiguration(f"{self._place(key)}: the answer is not S3's; {remedy}") from error

    def _place(self, key: str) -> str:
        return f"{self.address}/{key}".rstrip("/") + f" at {self.endpoint}"

    def _stands(self, key: str, data: bytes) -> bool:
        standing = self.get(key)
        if standing is None:
            raise StorageUnavailable(
                f"{self._place(key)}: the server says that the object exists (412), but there is nothing to read; "
                "see whether another program deletes it, and whether the server keeps its listing and its data in step"
            )
        return standing == data

    def _check_credentials(self, session: Any) -> None:
        credentials = session.get_credentials()
        frozen = credentials.get_frozen_credentials() if credentials else None
        if frozen is None or not frozen.access_key or not frozen.secret_key:
            raise explain_silence(NoCredentialsError(), self._place(""), inside_cell=self._inside_cell)
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        for name, value in zip(names, (frozen.access_key, frozen.secret_key, frozen.token), strict=True):
            if value and not (value.isascii() and value.isprintable() and " " not in value):
                raise WrongConfiguration(
                    f"{self._place('')}: {name} holds white space or a line break; write it without (printf, not echo)"
                )


def _client_config(settings: S3Settings) -> Any:
    addressing = settings.addressing or ("path" if settings.endpoint else None)
    return Config(
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": settings.attempts},
        # trailers with checksums, boto3's default, are unknown to older servers; a signed body is checked all the same
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,
        tcp_keepalive=True,
        **({"s3": {"addressing_style": addressing}} if addressing else {}),
    )


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0, min(0.1 * 2**attempt, 5)))
