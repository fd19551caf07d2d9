"""A moto server: S3's semantics in a process of its own, over HTTP."""

import subprocess
import sys

from .s3_server import S3Server


class MotoServer(S3Server):
    """Buckets in memory, gone with the server. Takes any credentials.

    with MotoServer() as server:
        server.put("bucket", {"key": b"content"})
    """

    PROGRAM = "moto's server"

    def launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
