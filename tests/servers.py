"""What the tests know of their S3 servers."""

import functools
import os
import uuid
from typing import Any

import boto3

ACCESS, SECRET = "AKIAKALLMTESTACCESS0", "kallm-test-secret-kallm-test-secret-0000"


@functools.cache
def _client(endpoint: str, access: str) -> Any:
    return boto3.Session().client("s3", endpoint_url=endpoint)


def make_bucket(endpoint: str) -> str:
    """Make a new bucket and return its name."""
    name = f"kallm-{uuid.uuid4().hex[:12]}"
    _client(endpoint, os.environ["AWS_ACCESS_KEY_ID"]).create_bucket(Bucket=name)
    return name
