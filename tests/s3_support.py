"""A real S3 service on loopback, by moto, for the tests of `hub.weight_folder`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_service(environment: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a new bucket. This process and those that it starts reach it by their environment."""
    import fsspec

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        environment.setenv(name, value)
    try:
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they know the addresses of earlier services
        bucket = f"s3://{uuid.uuid4().hex}"  # moto keeps the buckets of earlier ones
        fsspec.filesystem("s3").mkdir(bucket)
        yield bucket
    finally:
        server.stop()
