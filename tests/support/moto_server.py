"""A moto server: S3's semantics in a process of its own, over HTTP."""

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from urllib.parse import quote

START_TIMEOUT_S = 60.0


class MotoServer:
    """Buckets in memory, gone with the server. Takes any credentials.

    with MotoServer() as server:
        server.put("bucket", {"key": b"content"})
    """

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def make_bucket(self, bucket: str) -> None:
        self._send("PUT", bucket)

    def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        """Make the bucket, and objects in it by their keys."""
        self.make_bucket(bucket)
        for key, content in objects.items():
            self._send("PUT", f"{bucket}/{quote(key)}", content)

    def delete(self, bucket: str, key: str) -> None:
        self._send("DELETE", f"{bucket}/{quote(key)}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("moto's server did not start") from None
                time.sleep(0.05)

    def _send(self, method: str, path: str, content: bytes | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, f"/{path}", content, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            if answer.status >= 300:
                raise RuntimeError(f"moto answered {answer.status} to {method} {path}: {answer.read()!r}")
        finally:
            connection.close()
