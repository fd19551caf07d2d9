"""The doctor's findings, for tests of what it looks at."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_loader.cli.diagnosis.finding import Finding
from tests.cli.running import invoke


def diagnose(*arguments: str | Path, env: dict[str, str | None] | None = None) -> dict[str, dict[str, Any]]:
    """The findings of ``doctor --quick --json`` by name."""
    result = invoke("doctor", "--quick", "--json", *arguments, env=env)
    found = json.loads(result.stdout)
    failed = any(finding["status"] == "fail" for finding in found["findings"])
    assert result.exit_code == int(failed)
    return {finding["name"]: finding for finding in found["findings"]}


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding
