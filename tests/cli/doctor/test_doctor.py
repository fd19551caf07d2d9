"""``engine-loader doctor``: every finding was looked at, and what is wrong comes with how to repair it."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from engine_loader.cli.diagnosis import software
from tests.cli.running import invoke, run

STATUSES = ("ok", "absent", "warn", "fail")


@contextmanager
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_as_json_every_finding_has_all_its_fields_and_what_is_not_well_says_how_to_mend_it() -> None:
    found = json.loads(invoke("doctor", "--quick", "--json").stdout)
    for finding in found["findings"]:
        assert set(finding) == {"area", "name", "status", "value", "repair", "detail"}
        assert finding["status"] in STATUSES
        assert finding["value"]
        assert finding["status"] in ("ok", "absent") or finding["repair"]
    statuses = [finding["status"] for finding in found["findings"]]
    assert found["summary"] == {status: statuses.count(status) for status in STATUSES}
    areas = {finding["area"] for finding in found["findings"]}
    assert areas >= {"software", "engines", "sources", "caches", "machine"}


def test_a_person_sees_marks_and_how_to_mend() -> None:
    output = invoke("doctor", "--quick", env={"ENGINE_LOADER_LOADER__THREADS": "0"}).output
    assert "✓ python: " in output
    assert "✗ settings: ENGINE_LOADER_LOADER__THREADS: loader.threads = '0'" in output
    assert "    → engine-loader settings shows them all" in output
    assert " 1 to repair" in output.splitlines()[-1]


def test_what_is_absent_and_not_needed_has_no_tick_and_code_is_shown_when_asked_for() -> None:
    lines = invoke("doctor", "--quick").output.splitlines()
    assert "  - usrbio: no 3FS mount here" in lines
    assert "  - file systems: no path was given" in lines
    assert "  ✓ fix-up inductor-header-on-hit: applied when an engine starts" in lines
    assert not any("_precompile_header" in line for line in lines)
    detailed = invoke("doctor", "--quick", "--verbose").output
    assert "_precompile_header" in detailed
    assert "HF3FS_LIB_DIR is not set" in detailed


def test_the_status_is_1_when_anything_fails() -> None:
    assert run("doctor", "--quick", env={"VLLM_PLUGINS": ""}).returncode == 1


def test_strict_counts_warnings() -> None:
    with few_descriptors():
        assert invoke("doctor", "--quick").exit_code in (0, 1)
        assert invoke("doctor", "--quick", "--strict").exit_code == 1


def test_a_tensor_is_read_back_from_every_source() -> None:
    assert [(finding.name, finding.status) for finding in software.check_reading()] == [
        ("posix", "ok"),
        ("memory", "ok"),
    ]
