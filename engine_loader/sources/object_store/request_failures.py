"""What obstore's exceptions mean: which are retryable, and the error for one that is not.

obstore gives the kind of most failures by a class, and the rest in its text only: status and error code of the server's
answer, the phase in which a connection broke. (Read in obstore 0.12.)
"""

from __future__ import annotations

import errno
import html
import re
from dataclasses import dataclass

from ...errors import TransferError, system_failure
from ...escaping import printable, redacted
from .aws_credentials import NOT_FOUND
from .url import scheme_of

_REGION = "does the bucket lie in this region? set AWS_REGION or object_store_region"
_PUBLIC = "a public bucket may need object_store_anonymous"
_DENIED = {
    "s3": "check the credentials (AWS_ACCESS_KEY_ID …, AWS_PROFILE), and that they allow s3:GetObject (to write, "
    f"s3:PutObject and s3:DeleteObject), and s3:ListBucket for a prefix; {_PUBLIC}",
    "gs": "check the credentials (GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, or the instance's account), "
    "and that they allow storage.objects.get and storage.objects.list (to write, storage.objects.create and "
    f"storage.objects.delete); {_PUBLIC}",
    "az": "check the credentials (AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, a SAS token, a client "
    "secret or a managed identity), and that they allow reading and listing blobs (Storage Blob Data Reader; to write, "
    f"Contributor); {_PUBLIC}",
}
_SLOW = "the server is overloaded or down: try again, or lower object_store_requests"
_ENDPOINTS = {
    "s3": "check the network, AWS_ENDPOINT_URL or object_store_endpoint_url, and its http or https",
    "gs": "check the network, and object_store_endpoint_url with its http or https, if it is set",
    "az": "check the network, the account's name, and object_store_endpoint_url with its http or https, if it is set",
}
_HINTS = {
    "ContainerNotFound": "check the container's name and the account",
    "ExpiredToken": "the credentials have expired: fetch new ones",
    "InvalidAccessKeyId": "this endpoint does not know the access key: check AWS_ACCESS_KEY_ID and the endpoint",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY; a proxy that changes requests has the same effect",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "InvalidObjectState": "the object lies in an archive (Glacier): restore it (aws s3api restore-object) or copy it "
    "to another storage class",
}
_TLS = (
    "for a private CA, name the file of its certificate (PEM) in AWS_CA_BUNDLE or SSL_CERT_FILE; also check the host's "
    "name in the endpoint, and the clock"
)
_MESSAGE_CHARACTERS = 400
_METADATA_SERVICES = ("169.254.", "metadata.google.internal", "metadata/identity")


@dataclass(frozen=True)
class Answer:
    """The answer of the server, as far as obstore's text gives it.

    Attributes:
        status: of HTTP.
        code: S3's name of the error.
        text: obstore's text in one line.
        tries: how often the request was sent.
        message: S3's explanation.
    """

    status: int | None
    code: str | None
    text: str
    tries: int
    message: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Answer:
        """Parse the text of an exception of obstore."""
        text, _, details = str(error).partition("\n\nDebug source")
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>\s*([\w.-]+)\s*</Code>", text)
        retries = re.search(r"\bretries: (\d+)", details)
        return cls(
            int(status[1]) if status else None,
            code[1] if code else None,
            " ".join(text.split()),
            int(retries[1]) + 1 if retries else 1,
            _message(text),
        )

    def __str__(self) -> str:
        named = " ".join(str(part) for part in (self.status, self.code) if part is not None)
        return named or self.text


def remove_secrets(error: BaseException) -> None:
    """Take the secrets out of an exception's own text, and of those that it came from: tracebacks print them all."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.args = tuple(redacted(part) if isinstance(part, str) else part for part in one.args)
            pending += [one.__cause__, one.__context__]


def _message(text: str) -> str | None:
    """What stands in S3's <Message>, without what a terminal would obey."""
    found = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if found is None:
        return None
    words = " ".join(html.unescape(found[1]).split())
    shown = printable(words)
    return shown if len(shown) <= _MESSAGE_CHARACTERS else shown[:_MESSAGE_CHARACTERS] + "…"


def is_request_failure(error: BaseException) -> bool:
    """Whether it is a failure of the client: its exceptions, and its panics, which are no Exceptions."""
    from obstore.exceptions import BaseError

    return isinstance(error, (BaseError, FileNotFoundError, ValueError)) or is_panic(error)


def is_failure(error: BaseException) -> bool:
    """Whether a call has failed; False for what ends a process (KeyboardInterrupt …)."""
    return isinstance(error, Exception) or is_panic(error)


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has panicked."""
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


def retryable_errno(error: BaseException) -> int | None:
    """The errno for a response body that broke off or stalled, which is retryable; None for other failures."""
    remove_secrets(error)
    text = str(error)
    if "response body error" not in text and "error decoding response body" not in text:
        return None
    return errno.ETIMEDOUT if "TimedOut" in text or "kind: Timeout" in text else errno.EREMOTEIO


def object_changed(path: str, offset: int | None = None) -> TransferError:
    """The error for an object that is no longer the one that was opened."""
    return TransferError(
        "the object was replaced while it was read",
        file=path,
        offset=offset,
        hint="load again when nothing writes to it",
    )


def object_failure(
    error: BaseException, doing: str, path: str, offset: int | None = None, *, elsewhere: str | None = None
) -> TransferError:
    """The error for a request that failed for good. ``error`` is left without secrets, to be its cause.

    Args:
        error: what the client raised.
        doing: what was tried, for the message.
        path: of the object.
        offset: of the bytes that were asked for, if any.
        elsewhere: the host to which the server sent the request, if it did.
    """
    from obstore import exceptions

    remove_secrets(error)
    answer = Answer.of(error)
    if isinstance(error, exceptions.PreconditionError) or answer.status == 416:
        return object_changed(path, offset)
    scheme = scheme_of(path)
    code, what, hint = _explain(error, answer, scheme)
    if elsewhere is not None:
        code, what, hint = errno.EREMOTEIO, f"the server sends elsewhere: to {elsewhere}", _REGION
    hint = hint if elsewhere else _HINTS.get(answer.code or "", hint)
    if answer.message and code != errno.ENOENT:
        hint = "; ".join(filter(None, (hint, f"the server says: {answer.message}")))
    after = f" after {answer.tries} tries" if answer.tries > 1 else ""
    return system_failure(code, f"could not {doing}: {what}{after}", file=path, offset=offset, hint=hint)


def _explain(error: BaseException, answer: Answer, scheme: str) -> tuple[int | None, str, str | None]:
    """errno, what happened, and what to do with a store of this kind."""
    denied, endpoint = _DENIED[scheme], _ENDPOINTS[scheme]
    if is_panic(error):
        return errno.EINVAL, f"the client failed ({answer.text})", endpoint
    if NOT_FOUND in answer.text:
        return errno.EACCES, "no credentials were found: " + answer.text.partition(NOT_FOUND)[2].strip(), denied
    if any(service in answer.text for service in _METADATA_SERVICES):
        return errno.EACCES, "no credentials were found", denied
    if answer.code in ("NoSuchBucket", "ContainerNotFound"):
        named = "check the bucket's name, and AWS_ENDPOINT_URL or object_store_endpoint_url"
        return errno.ENOENT, "there is no such bucket", named if scheme == "s3" else "check the bucket's name"
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT, "there is no such object", "check the URL; was the object deleted meanwhile?"
    if answer.code == "InvalidObjectState":
        return errno.EACCES, f"the object is archived ({answer})", None
    if answer.status in (401, 403):
        return errno.EACCES, f"access was denied ({answer})", denied
    if "non-partial response" in answer.text:
        return (
            errno.EOPNOTSUPP,
            "the server ignores ranges: it answers with the whole object",
            ("read it from a server that serves ranges, or copy it to a disk"),
        )
    if re.search(r"Requested \S+, got ", answer.text):
        return (
            errno.EREMOTEIO,
            "the server sent another range than was asked for",
            ("was the object replaced by a shorter one, or is there a proxy between that does not keep ranges?"),
        )
    if "invalid path" in answer.text or isinstance(error, ValueError):
        return errno.EINVAL, answer.text, "keys with empty parts cannot be read: copy the objects to a plain prefix"
    if "redirect" in answer.text:
        return errno.EREMOTEIO, "the server sends elsewhere", _REGION
    if answer.status is not None:
        overloaded = answer.status >= 500 or answer.status == 429
        return errno.EREMOTEIO, f"the server answered {answer}", _SLOW if overloaded else None
    if "kind: Timeout" in str(error) or "TimedOut" in str(error):
        return errno.ETIMEDOUT, "the server did not answer in time", endpoint
    untrusted = re.search(r"invalid peer certificate: ([^\n\"]*)|InvalidCertificate\(\s*(\w+)", str(error))
    if untrusted is not None:
        why = (untrusted[1] or untrusted[2]).strip()
        return errno.EPROTO, f"the server cannot be reached: its certificate is not trusted ({why})", _TLS
    if "error sending request" in answer.text:
        return errno.ECONNREFUSED, "the server cannot be reached", endpoint
    return errno.EREMOTEIO, answer.text, None
