"""A small S3 on loopback that does wrong what a test wants done wrong."""

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from .http_service import HttpHandler, HttpService

MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT"


@dataclass
class Request:
    """What came in.

    Attributes:
        number: of the requests of this method for this key, counted from 0.
    """

    method: str
    key: str
    headers: dict[str, str]
    number: int
    query: dict[str, list[str]]


@dataclass
class Answer:
    """What goes out instead of the right answer. None: as it would be.

    Attributes:
        message: S3's explanation in the answer of an error.
        cut: bytes of the body that are sent before the connection breaks.
        stall: instead of breaking, it stays open in silence until the server stops.
    """

    status: int | None = None
    code: str = "Failure"
    message: str = "as the test wants it"
    cut: int | None = None
    stall: bool = False
    ignore_range: bool = False
    etag: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None


Fault = Callable[[Request], Answer | None]


class FaultServer(HttpService):
    """Serves ``objects`` ("bucket/key" -> content) by GET, HEAD and ListObjectsV2. Takes more by PUT, on no condition,
    in one request or in parts; copies and deletes.

    Attributes:
        objects: content by bucket and key. Its hash is its ETag.
        uploads: parts of uploads that were begun, and neither completed nor aborted, by their ids.
        fault: asked for every request of an object or a listing.
        etags: whether answers have an ETag, and If-Match is heeded.
        requests: all that came in.

    Args:
        tls: it speaks https with this context's certificate.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.fault: Fault = lambda request: None
        self.etags = True
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._open: set[object] = set()
        super().__init__(_handler(self), tls)

    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def opened(self, connection: object) -> None:
        with self._lock:
            self._open.add(connection)

    def closed(self, connection: object) -> None:
        with self._lock:
            self._open.discard(connection)

    def gets(self) -> list[Request]:
        """The requests for content."""
        return [request for request in self.requests if request.method == "GET" and "list-type" not in request.query]

    def arrived(self, method: str, target: str, headers: dict[str, str]) -> Request:
        parts = urlsplit(target)
        key, query = unquote(parts.path.lstrip("/")), parse_qs(parts.query, keep_blank_values=True)
        with self._lock:
            number = sum(request.method == method and request.key == key for request in self.requests)
            request = Request(method, key, headers, number, query)
            self.requests.append(request)
        return request


def tag_of(content: bytes) -> str:
    """The ETag of an object."""
    return f'"{hash(content) & 0xFFFFFFFF:08x}"'


def _handler(server: FaultServer) -> type[HttpHandler]:
    class Handler(HttpHandler):
        def setup(self) -> None:
            super().setup()
            server.opened(self)

        def finish(self) -> None:
            server.closed(self)
            super().finish()

        def do_CONNECT(self) -> None:
            """As a proxy that may not connect to where it should."""
            server.arrived("CONNECT", f"/{self.path}", {})
            self._fail(403, "Forbidden", {})

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            headers = self.lower_headers()
            content = self.body()
            request = server.arrived("PUT", self.path, headers)
            answer = server.fault(request) or Answer()
            if answer.status is not None:
                self._fail(answer.status, answer.code, answer.headers, answer.message)
                return
            if "uploadId" in request.query:
                server.uploads[request.query["uploadId"][0]][int(request.query["partNumber"][0])] = content
            elif "x-amz-copy-source" in headers:
                server.objects[request.key] = server.objects[unquote(headers["x-amz-copy-source"]).lstrip("/")]
                tag = tag_of(server.objects[request.key])
                text = f"<CopyObjectResult><LastModified>2024-01-01T00:00:00Z</LastModified><ETag>{tag}</ETag>"
                self._send(200, {}, f"{text}</CopyObjectResult>".encode(), answer)
                return
            else:
                server.objects[request.key] = content
            self._send(200, {"ETag": tag_of(content)}, b"", answer)

        def do_POST(self) -> None:
            headers = self.lower_headers()
            self.body()
            request = server.arrived("POST", self.path, headers)
            answer = server.fault(request) or Answer()
            if answer.status is not None:
                self._fail(answer.status, answer.code, answer.headers, answer.message)
            elif "uploads" in request.query:
                upload = f"upload-{request.number}"
                server.uploads[upload] = {}
                text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
                self._send(200, {}, text.encode(), answer)
            elif "uploadId" in request.query:
                parts = server.uploads.pop(request.query["uploadId"][0])
                content = server.objects[request.key] = b"".join(parts[number] for number in sorted(parts))
                tag = f"<ETag>{tag_of(content)}</ETag>"
                text = f"<CompleteMultipartUploadResult>{tag}</CompleteMultipartUploadResult>"
                self._send(200, {}, text.encode(), answer)
            else:
                self._fail(501, "NotImplemented", {})

        def do_DELETE(self) -> None:
            headers = self.lower_headers()
            request = server.arrived("DELETE", self.path, headers)
            answer = server.fault(request) or Answer()
            if answer.status is not None:
                self._fail(answer.status, answer.code, answer.headers, answer.message)
                return
            if "uploadId" in request.query:
                server.uploads.pop(request.query["uploadId"][0], None)
            else:
                server.objects.pop(request.key, None)
            self._send(204, {}, b"", answer)

        def _serve(self) -> None:
            headers = self.lower_headers()
            request = server.arrived(self.command, self.path, headers)
            answer = server.fault(request) or Answer()
            if answer.status is not None:
                self._fail(answer.status, answer.code, answer.headers, answer.message)
            elif "list-type" in request.query:
                self._list(request, answer)
            else:
                self._object(request, answer)

        def _object(self, request: Request, answer: Answer) -> None:
            content = server.objects.get(request.key) if answer.content is None else answer.content
            if content is None:
                self._fail(404, "NoSuchKey", {})
                return
            tag = answer.etag or tag_of(content)
            wanted = request.headers.get("if-match")
            if server.etags and wanted is not None and (wanted != tag or wanted.startswith("W/")):
                self._fail(412, "PreconditionFailed", {})
                return
            status, headers = 200, {"Last-Modified": MODIFIED, "Accept-Ranges": "bytes"}
            if server.etags:
                headers["ETag"] = tag
            span = request.headers.get("range")
            if span is not None and not answer.ignore_range and request.method == "GET":
                first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
                status, size = 206, len(content)
                content = content[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
            self._send(status, {**headers, **answer.headers}, content, answer)

        def _list(self, request: Request, answer: Answer) -> None:
            prefix = request.query.get("prefix", [""])[0]
            bucket = request.key.rstrip("/")
            keys = sorted(key.removeprefix(f"{bucket}/") for key in server.objects if key.startswith(f"{bucket}/"))
            below = [key for key in keys if key.startswith(prefix)]
            items = "".join(
                f"<Contents><Key>{key}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
                f"<Size>{len(server.objects[f'{bucket}/{key}'])}</Size>"
                f"<ETag>{tag_of(server.objects[f'{bucket}/{key}'])}</ETag></Contents>"
                for key in below
                if "delimiter" not in request.query or "/" not in key.removeprefix(prefix)
            )
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
            self._send(200, {"Content-Type": "application/xml"}, text.encode(), answer)

        def _fail(self, status: int, code: str, headers: dict[str, str], message: str = "") -> None:
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            self._send(status, headers, text.encode(), Answer())

        def _send(self, status: int, headers: dict[str, str], content: bytes, answer: Answer) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(content[: answer.cut])
            self.wfile.flush()
            if answer.stall:
                server.stopped.wait(30)
            if answer.stall or answer.cut is not None:
                self.close_connection = True

    return Handler
