"""Names from outside can neither write lines of a log nor control a terminal."""

import logging

import pytest

from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.session import log_restore, log_save
from engine_loader.engines.common.cache_hooks import quietly
from engine_loader.escaping import printable, redacted

FORGED = "evil\nWARNING all is well\x1b[2J\x07"
ESCAPED = "evil\\nWARNING all is well\\x1b[2J\\x07"
LOG = logging.getLogger("test")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (FORGED, ESCAPED),
        ("\r\x9b31m\u2028\u202e", "\\r\\x9b31m\\u2028\\u202e"),
        ("Gerät 型号 é", "Gerät 型号 é"),
        ("\udce9", "\\udce9"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(f"a\n{text}", lines=True).startswith("a\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "GET https://a.test/b?sig=SECRET%3D&X-Amz-Signature=SECRET2 failed",
            "GET https://a.test/b?***&*** failed",
        ),
        ("http://user:p@ss:w0rd@proxy.test:3128/ refused", "http://***@proxy.test:3128/ refused"),
        ("s3://bucket/a@b?x=1", "s3://bucket/a@b?x=1"),
    ],
)
def test_passwords_and_signatures_of_urls_are_left_out(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_what_a_restore_says_is_escaped(caplog: pytest.LogCaptureFixture) -> None:
    job = Job("restore", "vllm", CacheKey((), "all"), {})
    with caplog.at_level(logging.DEBUG):
        log_restore(LOG, job, "/store", Outcome("refused", messages=[FORGED], notes=[FORGED]))
        log_save(LOG, job, "/store", Outcome("saved", verdict="miss", reasons=[FORGED], notes=[FORGED]))
    assert caplog.text.count(ESCAPED) == 4
    assert all("\n" not in record.getMessage() and "\x1b" not in record.getMessage() for record in caplog.records)


def test_what_an_error_in_a_hook_says_is_escaped(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ValueError(f"no file {FORGED}")

    assert quietly(LOG, broken) is None
    (record,) = caplog.records
    assert "\n" not in record.getMessage() and "\x1b" not in record.getMessage()
