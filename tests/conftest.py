"""Settings of the whole suite."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A shell that runs tests in the background ignores Ctrl-C for them, and all their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that load a model in this process make vLLM quiet, for good: others read what its servers and hooks log.
os.environ["VLLM_LOGGING_LEVEL"] = "INFO"

# Engines that tests make in this process are no starts to look at; those of tests/support/vllm_server.py are.
os.environ["_ENGINE_LOADER_START"] = "off"

# Where these are set, pytest tells all differences of what an assert compares: minutes for some 100 KB of bytes, which
# end a test as its timeout, at a line or, between two, with an error of pytest itself.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)

# The same cases in every run, so that a failure is the change's; HYPOTHESIS_PROFILE=explore looks further.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.register_profile(
    "explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


SERVER_FIXTURES = {"gateway", "moto", "on_s3", "s3"}
"""What starts moto, JuiceFS or radosgw. A test that starts one by itself is marked by hand."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what requests a server, so that no test of one is forgotten in ``make check``."""
    for item in items:
        if isinstance(item, pytest.Function) and SERVER_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.servers)


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return type(value)(map(_printable, value)) if type(value) in (list, tuple) else value


# A report that quotes a name of bytes that are no UTF-8 cannot be sent to the process that prints it: without this, the
# failure of one test ends the run with an internal error that names no test.
@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    return _printable((yield))


_last_words: list[str] = []


def pytest_internalerror(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Remember an error of pytest itself, after which it prints no summary."""
    _last_words.append(_printable(f"pytest itself failed: {excinfo.exconly()[-800:]}"))


# Libraries print what they leak when the processes of the tests end, and a log may be kept by its last lines only.
@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Name what failed in the last lines, once more."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    for report in [*reporter.stats.get("failed", []), *reporter.stats.get("error", [])]:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = " ".join(str(crash.message if crash else report.longrepr).split())
        _last_words.append(_printable(f"{report.outcome} in {report.when}: {report.nodeid}: {text[:200]}"))
    session.config.add_cleanup(lambda: print("\n".join(_last_words[:20])) if _last_words else None)


@contextmanager
def _kept_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


# vLLM, loaded in this process, sets variables for the workers that it would start (LD_PRELOAD for one): they end with
# the test, or with the module where one of its fixtures loads a model.
@pytest.fixture(autouse=True, scope="module")
def _environment_of_the_module() -> Iterator[None]:
    with _kept_environment():
        yield


@pytest.fixture(autouse=True)
def _environment_of_the_test() -> Iterator[None]:
    with _kept_environment():
        yield
