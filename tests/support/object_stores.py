"""Fixtures: servers for the tests of object stores, and an environment that leads to no other.

A conftest imports them all (``from tests.support.object_stores import *``). S3 is moto, or with ``S3_SERVER=radosgw``
(``make test-radosgw``) Ceph's.
"""

import os
from collections.abc import Iterator

import pytest

from tests.support.fault_server import FaultServer
from tests.support.moto_server import MotoServer
from tests.support.radosgw import RadosGateway, missing_programs
from tests.support.s3_server import S3Server

__all__ = ["on_s3", "on_server", "only_these_servers", "s3", "server"]

ON_RADOSGW = os.environ.get("S3_SERVER") == "radosgw"

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
NOWHERE = "http://127.0.0.1:9"
"""What listens there answers nothing: a test that forgets its endpoint fails at once."""


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if not ON_RADOSGW:
        with MotoServer() as server:
            yield server
        return
    missing = missing_programs()
    assert not missing, (
        f"not installed: {', '.join(missing)} (Debian: apt install radosgw ceph-mon ceph-osd ceph-common)"
    )
    with RadosGateway(tmp_path_factory.mktemp("ceph")) as gateway:
        yield gateway


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture(autouse=True)
def only_these_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "ENGINE_LOADER_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{tmp_path}/no-credentials")
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{tmp_path}/no-config")
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)


@pytest.fixture
def on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    return s3


@pytest.fixture
def on_server(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> FaultServer:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return server
