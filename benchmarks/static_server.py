"""Files over HTTP on loopback, as fast as the kernel sends them: nginx where it is installed, else a small server here.

    python -m benchmarks.static_server DIRECTORY PORT [BYTES_PER_SECOND]

serves by the latter, over one link of that bandwidth: GET, HEAD and single ranges, which is what a client needs of S3
to read a public bucket, whose name is then that of a directory, and a listing of the files right below that. Nothing is
signed or written.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

START_TIMEOUT_S = 20.0
NGINX = """
daemon off; master_process on; worker_processes 2; pid {place}/pid; error_log {place}/error.log; {user}
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; sendfile_max_chunk 2m; tcp_nopush on; keepalive_requests 1000000;
    client_body_temp_path {place}/a; proxy_temp_path {place}/b; fastcgi_temp_path {place}/c;
    uwsgi_temp_path {place}/d; scgi_temp_path {place}/e;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class Link:
    """A link that all connections share; 0: without a limit.

    Attributes:
        sent_bytes: bodies, of all.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self.sent_bytes = 0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def pass_through(self, nbytes: int) -> None:
        """Wait until so many bytes have gone over the link."""
        with self._lock:
            self.sent_bytes += nbytes
            if not self.bytes_per_s:
                return
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + nbytes / self.bytes_per_s
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))


LINK = Link()
LINK_PIECE_BYTES = 1 << 20


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if "list-type=2" in asked.query:
            self._list(unquote(asked.path).strip("/"))
            return
        try:
            file = os.open(unquote(asked.path).lstrip("/"), os.O_RDONLY)
        except OSError:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        try:
            self._send(file)
        finally:
            os.close(file)

    def _list(self, bucket: str) -> None:
        items = "".join(
            f"<Contents><Key>{entry.name}</Key><Size>{status.st_size}</Size><ETag>{_tag_of(status)}</ETag>"
            f"<LastModified>{datetime.fromtimestamp(status.st_mtime, UTC):%Y-%m-%dT%H:%M:%SZ}</LastModified></Contents>"
            for entry in os.scandir(bucket)
            if entry.is_file() and (status := entry.stat())
        )
        content = f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send(self, file: int) -> None:
        status = os.fstat(file)
        begin, end = 0, status.st_size
        span = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if span[0]:
            begin, end = int(span[0]), min(end, int(span[2]) + 1 if span[2] else end)
        self.send_response(206 if span[0] else 200)
        if span[0]:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{status.st_size}")
        self.send_header("ETag", _tag_of(status))
        self.send_header("Last-Modified", self.date_time_string(int(status.st_mtime)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        self.wfile.flush()
        while self.command == "GET" and begin < end:
            sent = os.sendfile(self.connection.fileno(), file, begin, min(end - begin, LINK_PIECE_BYTES))
            LINK.pass_through(sent)
            begin += sent

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def _tag_of(status: os.stat_result) -> str:
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'


class Server(ThreadingHTTPServer):
    request_queue_size = 1024  # else connections of many clients at once are made a second or more later


@contextmanager
def serving(root: Path, bytes_per_s: int = 0) -> Iterator[tuple[str, str]]:
    """(URL, name of the server) of what serves a directory until the block ends, over a link of that bandwidth."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") if not bytes_per_s else None
    with tempfile.TemporaryDirectory() as place:
        if nginx is not None:
            user = "user root;" if os.geteuid() == 0 else ""
            config = Path(place) / "nginx.conf"
            config.write_text(NGINX.format(place=place, port=port, root=root.resolve(), user=user))
            command, name = [nginx, "-p", place, "-c", str(config)], "nginx"
        else:
            command, name = (
                [sys.executable, "-m", "benchmarks.static_server", str(root), str(port), str(bytes_per_s)],
                "sendfile",
            )
        server = subprocess.Popen(command)
        try:
            _wait(server, port)
            yield f"http://127.0.0.1:{port}", name
        finally:
            server.terminate()
            server.wait(START_TIMEOUT_S)


def _wait(server: "subprocess.Popen[bytes]", port: int) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server did not start") from None
            time.sleep(0.05)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    LINK.bytes_per_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    Server(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
