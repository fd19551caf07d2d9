"""The services of AWS that give out credentials: STS, a container's and an instance's, in one server on loopback."""

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

from .http_service import HttpHandler, HttpService


@dataclass
class Asked:
    """A request that came in."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]


@dataclass
class Refusal:
    """What goes out instead of credentials: a status, or (None) nothing until the server stops."""

    status: int | None = None
    body: str = "refused"


class CredentialServices(HttpService):
    """Gives KEY1, KEY2, … with TOKEN1, TOKEN2, …, one for each time that it is asked.

    ``/sts`` is STS, ``/container`` a container's service, and the rest an instance's (IMDSv2: a token is required).

    Attributes:
        lifetime: of the credentials.
        refuse: asked for every request; what it returns goes out.
        asked: all requests.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: it speaks https with this context's certificate; obstore asks no STS that speaks http."""
        self.lifetime = timedelta(hours=1)
        self.refuse: Callable[[Asked], Refusal | None] = lambda asked: None
        self.asked: list[Asked] = []
        self.given = 0
        self._lock = threading.Lock()
        super().__init__(_handler(self), tls)

    def paths(self) -> list[str]:
        """Method and path of every request, in order."""
        return [f"{asked.method} {asked.path}" for asked in self.asked]

    def fresh(self) -> tuple[str, str, str]:
        """A new key, its token, and when both expire."""
        with self._lock:
            self.given += 1
            expires = (datetime.now(UTC) + self.lifetime).strftime("%Y-%m-%dT%H:%M:%SZ")
            return f"KEY{self.given}", f"TOKEN{self.given}", expires


def _handler(services: CredentialServices) -> type[HttpHandler]:
    class Handler(HttpHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query) | parse_qs(self.body().decode())
            asked = Asked(self.command, parts.path, query, self.lower_headers())
            services.asked.append(asked)
            refusal = services.refuse(asked)
            if refusal is None:
                self._send(*_right(services, asked))
            elif refusal.status is None:
                services.stopped.wait(60)
                self.close_connection = True
            else:
                self._send(refusal.status, refusal.body)

        def _send(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    return Handler


def _right(services: CredentialServices, asked: Asked) -> tuple[int, str]:
    if asked.path.rstrip("/") == "/sts":
        return 200, _of_sts(services)
    if asked.path == "/container":
        return 200, _of_json(services)
    if asked.path == "/latest/api/token":
        has_lifetime = "x-aws-ec2-metadata-token-ttl-seconds" in asked.headers
        return (200, "SESSION") if asked.method == "PUT" and has_lifetime else (400, "")
    if asked.headers.get("x-aws-ec2-metadata-token") != "SESSION":
        return 401, ""
    role = asked.path.removeprefix("/latest/meta-data/iam/security-credentials/")
    return (200, "the-role") if not role else (200, _of_json(services)) if role == "the-role" else (404, "")


def _of_json(services: CredentialServices) -> str:
    key, token, expires = services.fresh()
    return json.dumps(
        {"Code": "Success", "AccessKeyId": key, "SecretAccessKey": "s", "Token": token, "Expiration": expires}
    )


def _of_sts(services: CredentialServices) -> str:
    key, token, expires = services.fresh()
    return (
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
        f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>{token}</SessionToken>"
        f"<Expiration>{expires}</Expiration>"
        "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
    )
