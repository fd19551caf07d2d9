"""An S3 server of the tests, whatever program it is: buckets and objects by plain HTTP requests."""

import http.client
from collections.abc import Mapping
from urllib.parse import quote

from .loopback_server import LoopbackServer

TIMEOUT_S = 60.0


class S3Server(LoopbackServer):
    """Answers for buckets by path, e.g. ``PUT /bucket/key``."""

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
        headers = self.headers(method, path, content)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{self.PROGRAM} answered {answer.status} to {method} {path}: {body!r}")
            return body
        finally:
            connection.close()

    def headers(self, method: str, path: str, content: bytes | None) -> dict[str, str]:
        """What a request needs to be taken."""
        return {"Content-Type": "application/octet-stream"}
