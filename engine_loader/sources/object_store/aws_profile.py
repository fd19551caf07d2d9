"""Keys and region of an AWS profile, from the files that AWS's own tools share; obstore reads no profiles."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping

from ...errors import CheckpointError

_OTHER_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables that say where credentials come from: they go before the default profile."""
_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def profile_keys(environ: Mapping[str, str] | None = None, *, profile: str | None = None) -> dict[str, str]:
    """Keys and region of ``profile``, else of the one that AWS_PROFILE names, else of "default", as the files name them
    (``aws_access_key_id`` …, or ``credential_process``, and ``region``).

    Keys in the environment go before a profile that is not named by ``profile``, as in AWS's tools. Empty where
    there is none.

    Raises:
        CheckpointError: a profile that is named is not there, or has no keys (SSO, a role); a secret is missing; or a
            file cannot be read.
    """
    environ = os.environ if environ is None else environ
    named = profile or environ.get("AWS_PROFILE")
    keys_go_first = environ.get("AWS_ACCESS_KEY_ID") or (not named and any(map(environ.get, _OTHER_CREDENTIALS)))
    if profile is None and keys_go_first:
        return {}
    name = named or "default"
    credentials = environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    config = environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    found = _section(config, name if name == "default" else f"profile {name}") | _section(credentials, name)
    keys = _static_keys(_section(credentials, name)) or _static_keys(found)
    if not keys and found.get("credential_process"):
        keys = {"credential_process": found["credential_process"]}
    if named and not keys:
        raise CheckpointError(
            f"the AWS profile {name!r} has no keys in {credentials} or {config}",
            hint="for SSO and roles, let AWS's tool fetch them: "
            'eval "$(aws configure export-credentials --format env)"',
        )
    if keys and "credential_process" not in keys and "aws_secret_access_key" not in keys:
        raise CheckpointError(f"the AWS profile {name!r} has no aws_secret_access_key", file=credentials)
    return {**keys, "region": found["region"]} if keys and found.get("region") else keys


def _static_keys(section: Mapping[str, str]) -> dict[str, str]:
    """Keys that belong together: those of one section of one file."""
    return {key: section[key] for key in _KEYS if section.get(key)} if section.get("aws_access_key_id") else {}


def _section(path: str, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            parser.read_file(file)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise CheckpointError(f"could not read the AWS profiles: {error}", file=path) from None
    return dict(parser[name]) if parser.has_section(name) else {}
