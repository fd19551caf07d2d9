"""The C++ code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; see driver.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sanitizers import run_sanitized

from .building import HERE, compile_driver, link, native_objects

pytestmark = [pytest.mark.sanitizers, pytest.mark.timeout(900)]  # compiling is most of it


@pytest.mark.parametrize(("sanitizers", "rounds"), [("address,undefined", 200), ("thread", 60)])
def test_random_plans_are_clean(sanitizers: str, rounds: int, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("native")
    driver = tmp_path / "driver"
    link([compile_driver(kept, sanitizers), *native_objects(kept, sanitizers).values()], driver, sanitizers)
    done = run_sanitized([str(driver), str(tmp_path), str(rounds), "1"], sanitizers)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize(("sanitizers", "rounds"), [("address,undefined", 60), ("thread", 25)])
def test_a_window_of_several_members_is_clean(
    sanitizers: str, rounds: int, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("native")
    driver = tmp_path / "driver"
    compiled = compile_driver(kept, sanitizers, HERE / "window_driver.cpp")
    link([compiled, *native_objects(kept, sanitizers).values()], driver, sanitizers)
    done = run_sanitized([str(driver), str(tmp_path), str(rounds), "1"], sanitizers)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["lock"]
