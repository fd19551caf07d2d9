"""Ceph's S3 server with a cluster of its own, in memory: conditional writes, ETags and signatures as large sites have
them.

Written for Ceph 16 (Debian's ceph-mon, ceph-osd, ceph-common and radosgw). A monitor, one OSD and the gateway are
enough; what a manager would do, no test needs.
"""

import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

from .loopback_server import START_TIMEOUT_S, STOP_TIMEOUT_S, free_port
from .s3_server import S3Server

ACCESS_KEY, SECRET_KEY = "test", "test"
PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_MEMORY_BYTES = 4 << 30


def missing_programs() -> list[str]:
    """Of those it consists of, the ones that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class RadosGateway(S3Server):
    """Buckets in memory, gone with the server. Refuses requests whose signature is wrong (SigV4).

    with RadosGateway(path) as server:
        server.put("bucket", {"key": b"content"})
    """

    PROGRAM = "radosgw"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._cluster: list[subprocess.Popen[bytes]] = []

    def launch(self) -> subprocess.Popen[bytes]:
        self._configure(free_port())
        try:
            self._start_cluster()
            gateway = self._daemon("radosgw", "-n", "client.rgw")
            user = ["user", "create", "--uid=tests", "--display-name=tests"]
            keys = [f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
            self._run("radosgw-admin", "-n", "client.rgw", *user, *keys)
        except BaseException:
            self._stop_cluster()
            raise
        return gateway

    def stop(self) -> None:
        super().stop()
        self._stop_cluster()

    def said(self) -> str:
        logs = sorted(self._directory.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-500:]}" for log in logs)

    def headers(self, method: str, path: str, content: bytes | None) -> dict[str, str]:
        """A signature."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest(method, self.url + path, data=content or b"")
        S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
        return dict(request.headers)

    def _configure(self, monitor_port: int) -> None:
        place, fsid = self._directory, uuid.uuid4()
        (place / "mon").mkdir(parents=True)
        (place / "osd").mkdir()
        (place / "ceph.conf").write_text(f"""[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor_port}
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = true
keyring = {place}/keyring
run dir = {place}
log file = {place}/$name.log
admin socket = {place}/$name.$pid.asok
pid file =
ms bind msgr2 = false
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {place}/mon
mon data avail crit = 1
mon data avail warn = 2
osd data = {place}/osd
osd objectstore = memstore
memstore device bytes = {_MEMORY_BYTES}
rgw frontends = beast endpoint=127.0.0.1:{self.port}
""")
        for entity in ("mon.", "client.admin", "client.rgw", "osd.0"):
            create = [] if entity != "mon." else ["--create-keyring"]
            rights = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, "allow *")]
            subprocess.run(
                ["ceph-authtool", *create, f"{place}/keyring", "--gen-key", "-n", entity, *rights],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        address = f"v1:127.0.0.1:{monitor_port}"
        subprocess.run(
            ["monmaptool", "--create", "--addv", "a", address, "--fsid", str(fsid), f"{place}/monmap"],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def _start_cluster(self) -> None:
        place = self._directory
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", f"{place}/monmap", "--keyring", f"{place}/keyring")
        self._cluster.append(self._daemon("ceph-mon", "-i", "a"))
        identity = str(uuid.uuid4())
        self._run("ceph", "osd", "new", identity)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        self._cluster.append(self._daemon("ceph-osd", "-i", "0"))
        end = time.monotonic() + START_TIMEOUT_S
        while "1 up" not in self._run("ceph", "osd", "stat"):
            if time.monotonic() > end:
                raise RuntimeError(f"the OSD did not come up: {self.said()}")
            time.sleep(0.2)

    def _stop_cluster(self) -> None:
        for process in reversed(self._cluster):
            process.terminate()
        for process in reversed(self._cluster):
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._cluster.clear()

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [program, "-c", f"{self._directory}/ceph.conf", *arguments, "-f"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [program, "-c", f"{self._directory}/ceph.conf", *arguments],
            capture_output=True,
            text=True,
            timeout=2 * START_TIMEOUT_S,
            check=False,
            env=_environment(),
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr[-1000:]} {self.said()}")
        return done.stdout


def _environment() -> dict[str, str]:
    """What the ceph command, a Python program of the system's, is not to take from a virtual environment."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "LD_"))}
