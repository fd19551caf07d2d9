"""Fixtures: servers for the tests of object stores, and an environment that leads to no other.

A conftest imports them all (``from tests.support.object_stores import *``).
"""

import os
from collections.abc import Iterator

import pytest

from tests.support.fault_server import FaultServer
from tests.support.moto_server import MotoServer

__all__ = ["moto", "on_moto", "on_server", "only_these_servers", "server"]

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
NOWHERE = "http://127.0.0.1:9"
"""What listens there answers nothing: a test that forgets its endpoint fails at once."""


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as server:
        yield server


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
def on_moto(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> MotoServer:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    return moto


@pytest.fixture
def on_server(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> FaultServer:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return server
