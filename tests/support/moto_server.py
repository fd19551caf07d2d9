"""A moto server: S3's semantics in a process of its own, over HTTP."""

import http.client
import subprocess
import sys
from collections.abc import Mapping
from urllib.parse import quote

from .loopback_server import LoopbackServer


class MotoServer(LoopbackServer):
    """Buckets in memory, gone with the server. Takes any credentials.

    with MotoServer() as server:
        server.put("bucket", {"key": b"content"})
    """

    PROGRAM = "moto's server"

    def launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def make_bucket(self, bucket: str) -> None:
        self.request("PUT", f"/{bucket}")

    def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        """Make the bucket, and objects in it by their keys."""
        self.make_bucket(bucket)
        for key, content in objects.items():
            self.request("PUT", f"/{bucket}/{quote(key)}", content)

    def delete(self, bucket: str, key: str) -> None:
        self.request("DELETE", f"/{bucket}/{quote(key)}")

    def request(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """Send a request; its answer's body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, content, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            body = answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"moto answered {answer.status} to {method} {path}: {body!r}")
            return body
        finally:
            connection.close()
