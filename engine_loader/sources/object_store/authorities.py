"""Certificates that are trusted: the system's (or SSL_CERT_FILE's), and besides those of AWS_CA_BUNDLE."""

from __future__ import annotations

import os
import ssl

from ...errors import CheckpointError


def ca_bundle() -> str | None:
    """The certificates in the file that AWS_CA_BUNDLE names, in PEM; None where it is not set.

    Raises:
        CheckpointError: the file cannot be read, or has no certificates in it.
    """
    path = os.environ.get("AWS_CA_BUNDLE")
    if not path:
        return None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        ssl.create_default_context().load_verify_locations(cadata=_certificates(text))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CheckpointError(
            f"the certificates of AWS_CA_BUNDLE cannot be read: {error}",
            file=path,
            hint="it must name a file with certificates in PEM",
        ) from None
    return text


def tls_context() -> ssl.SSLContext:
    """What connections of this package trust.

    Raises:
        CheckpointError: as ``ca_bundle``.
    """
    bundle = ca_bundle()
    context = ssl.create_default_context()
    if bundle is not None:
        context.load_verify_locations(cadata=_certificates(bundle))
    return context


def _certificates(text: str) -> str:
    """The text from the first certificate on: bundles have names of authorities in any encoding above each."""
    pem = "".join(character for character in text if character.isascii())
    if "-----BEGIN CERTIFICATE-----" not in pem:
        raise ValueError("there is no certificate in it")
    return pem
