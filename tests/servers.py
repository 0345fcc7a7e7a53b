"""What the tests know of their S3 servers."""

import uuid

import boto3

ACCESS, SECRET = "AKIAKALLMTESTACCESS0", "kallm-test-secret-kallm-test-secret-0000"


def make_bucket(endpoint: str) -> str:
    """Make a new bucket and return its name."""
    name = f"kallm-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    return name
