"""Credentials of AWS that obstore does not fetch, or fetches with more patience than a load has.

These are the credentials of a profile, of a web identity, of a container, and of the instance's role.
"""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPSHandler, build_opener

from ...escaping import printable
from .authorities import tls_context

NOT_FOUND = "no AWS credentials:"
"""Begins the message of every CredentialsError; obstore hands on the text alone."""
_CHARACTERS = 400
_ANSWER_BYTES = 64 << 10
_TIMEOUT_S = 2.0
_STS_TIMEOUT_S = 5.0
_TRIES = 2
_PROCESS_TIMEOUT_S = 60.0
_REMEMBERED_S = 30.0
"""A failure is not repeated within this time: a load may make several clients."""
_CONTAINER_HOST = "http://169.254.170.2"
_failures: dict[str, tuple[float, str]] = {}
_lock = threading.Lock()


class CredentialsError(RuntimeError):
    """Credentials were not found; the message says where they were looked for."""

    def __init__(self, text: str) -> None:
        # A process may have printed what a terminal obeys.
        super().__init__(f"{NOT_FOUND} {printable(text)[:_CHARACTERS]}")


Provider = Callable[[], dict[str, Any]]


def provider_of(keys: Mapping[str, str], sts: str) -> Provider | None:
    """obstore's ``credential_provider``; None: obstore takes those of the environment (``AWS_ACCESS_KEY_ID``).

    Args:
        keys: of the profile that is used, as ``aws_profile.profile_keys`` gives them; empty: the environment's
            credentials are used.
        sts: the address of the service that gives credentials for a web identity.
    """
    if "credential_process" in keys:
        return _kept(lambda: _from_process(keys["credential_process"]))
    if "aws_access_key_id" in keys:
        # What obstore finds in the environment (a session token) must not mix with the keys of a profile.
        return lambda: _credentials(keys, "aws_access_key_id", "aws_secret_access_key", "aws_session_token", None)
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    if os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE") and os.environ.get("AWS_ROLE_ARN"):
        return _kept(lambda: _from_identity(sts))
    return _kept(_from_container if _container_url() else _from_instance)


def _kept(fetch: Provider) -> Provider:
    """Credentials are fetched again minutes before they expire: until then, a service that fails ends no load."""
    last: dict[str, Any] = {}

    def provide() -> dict[str, Any]:
        try:
            last.update(fetch())
        except CredentialsError:
            expires = last.get("expires_at")
            if expires is None or expires <= datetime.now(UTC):
                raise
        return dict(last)

    return provide


def _container_url() -> str | None:
    relative = os.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    return f"{_CONTAINER_HOST}{relative}" if relative else os.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")


def _from_identity(sts: str) -> dict[str, Any]:
    """The credentials of a role for a web identity (IRSA)."""
    form = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": os.environ["AWS_ROLE_ARN"],
        "RoleSessionName": os.environ.get("AWS_ROLE_SESSION_NAME") or "engine-loader",
        "WebIdentityToken": _token_in(os.environ["AWS_WEB_IDENTITY_TOKEN_FILE"]),
    }
    body = urlencode(form).encode()
    text = _ask(f"STS ({urlsplit(sts).hostname})", "POST", sts, {}, body)
    names = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
    found = {name: re.search(rf"<{name}>\s*([^<]*?)\s*</{name}>", text) for name in names}
    return _parsed(json.dumps({name: html.unescape(match[1]) for name, match in found.items() if match}), names[2])


def _token_in(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialsError(f"the token in {file} cannot be read: {error}") from None


def _from_container() -> dict[str, Any]:
    """The credentials that ECS and EKS Pod Identity give to a container."""
    url = _container_url() or ""
    token = os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
    file = os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
    if file:
        token = _token_in(file)
    headers = {"Authorization": token} if token else {}
    return _parsed(_ask("the container's credentials service", "GET", url, headers), "Token")


def _from_instance() -> dict[str, Any]:
    """The credentials of the role of an EC2 instance (IMDSv2; v1 with ``AWS_IMDSV1_FALLBACK``)."""
    service = "the instance metadata service"
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise CredentialsError(f"none is set, and {service} is switched off (AWS_EC2_METADATA_DISABLED)")
    names = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_METADATA_ENDPOINT")
    base = next((os.environ[name] for name in names if os.environ.get(name)), "http://169.254.169.254").rstrip("/")
    headers: dict[str, str] = {}
    try:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "600"}
        headers["X-aws-ec2-metadata-token"] = _ask(service, "PUT", f"{base}/latest/api/token", lifetime)
    except CredentialsError:
        if os.environ.get("AWS_IMDSV1_FALLBACK", "").lower() not in ("true", "1"):
            raise
    roles = f"{base}/latest/meta-data/iam/security-credentials/"
    role = _ask(service, "GET", roles, headers).split("\n")[0].strip()
    return _parsed(_ask(service, "GET", roles + role, headers), "Token")


def _from_process(command: str) -> dict[str, Any]:
    """The credentials that a profile's ``credential_process`` prints."""
    try:
        ended = subprocess.run(
            shlex.split(command), stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROCESS_TIMEOUT_S, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CredentialsError(f"credential_process could not be run: {type(error).__name__}") from None
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise CredentialsError(f"credential_process ended with status {ended.returncode}: {said}")
    return _parsed(ended.stdout.decode(errors="replace"), "SessionToken")


def _parsed(text: str, token: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
        return _credentials(answer, "AccessKeyId", "SecretAccessKey", token, answer.get("Expiration"))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CredentialsError("the answer holds no credentials") from None


def _credentials(found: Mapping[str, str], key: str, secret: str, token: str, expires: str | None) -> dict[str, Any]:
    """What obstore wants of a provider; it asks again before the time in ``expires``, in ISO 8601."""
    at = datetime.fromisoformat(expires) if expires else None
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return {
        "access_key_id": found[key],
        "secret_access_key": found[secret],
        "token": found.get(token) or None,
        "expires_at": at,
    }


def _ask(service: str, method: str, url: str, headers: Mapping[str, str], content: bytes | None = None) -> str:
    """The body of a service's answer."""
    with _lock:
        when, text = _failures.get(url, (0.0, ""))
        if text and time.monotonic() - when < _REMEMBERED_S:
            raise CredentialsError(text)
        for _ in range(_TRIES):
            try:
                status, body = _request(method, url, headers) if content is None else _posted(url, content)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = "does not answer" if isinstance(error, TimeoutError) else f"cannot be reached ({error})"
            else:
                if status == 200:
                    return body
                said = [found[1] for found in re.finditer("<(?:Code|Message)>([^<]*)<", body)]
                reason = " ".join([f"answered {status}", *said])
                if status < 500:
                    break
        text = f"none is set, and {service} {reason}"
        _failures[url] = (time.monotonic(), text)
    raise CredentialsError(text)


def _request(method: str, url: str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Status and body of an answer of a service of this machine. No proxy is asked."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url} is not an address")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    try:
        path = parts.path or "/"
        connection.request(method, f"{path}?{parts.query}" if parts.query else path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(_ANSWER_BYTES).decode(errors="replace")
    finally:
        connection.close()


def _posted(url: str, content: bytes) -> tuple[int, str]:
    """Status and body of the answer to a form, from anywhere: by a proxy where one is set."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is not an address")
    opener = build_opener(HTTPSHandler(context=tls_context()))
    try:
        with opener.open(url, content, timeout=_STS_TIMEOUT_S) as answer:
            return answer.status, answer.read(_ANSWER_BYTES).decode(errors="replace")
    except HTTPError as error:
        return error.code, error.read(_ANSWER_BYTES).decode(errors="replace")
    except URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason)) from None
