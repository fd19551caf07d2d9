"""``engine-loader settings``."""

import json
import shlex
from pathlib import Path

from engine_loader.settings import describe_settings, load_settings
from tests.cli.running import invoke, run


def test_every_setting_is_shown_with_value_origin_default_and_meaning(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("loader:\n  buffer_bytes: 1GiB\n")
    done = run("settings", env={"ENGINE_LOADER_CONFIG": str(config), "ENGINE_LOADER_LOADER__THREADS": "8"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"loader.buffer_bytes = 1 GiB  ← {config}:2 (default: 512 MiB)" in lines
    assert "loader.threads = 8  ← ENGINE_LOADER_LOADER__THREADS (default: auto)" in lines
    assert "loader.engine = auto" in lines
    for name, _, meaning in describe_settings():
        (position,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} = "))
        assert lines[position + 1].strip() == meaning


def test_as_json_every_setting_has_its_value_in_the_type_of_the_setting(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("loader:\n  buffer_bytes: 1GiB\n")
    env = {"ENGINE_LOADER_CONFIG": str(config), "FASTSAFETENSORS_DEBUG": "1"}
    rows = {row["name"]: row for row in json.loads(invoke("settings", "--json", env=env).stdout)}
    assert set(rows) == {name for name, _, _ in describe_settings()}
    assert rows["loader.buffer_bytes"] == {
        "name": "loader.buffer_bytes",
        "value": 1 << 30,
        "shown": "1 GiB",
        "default": "512 MiB",
        "origin": f"{config}:2",
        "variable": "ENGINE_LOADER_LOADER__BUFFER_BYTES",
        "description": rows["loader.buffer_bytes"]["description"],
    }
    assert (rows["debug"]["value"], rows["debug"]["origin"]) == (True, "FASTSAFETENSORS_DEBUG")
    assert (rows["loader.threads"]["value"], rows["loader.threads"]["shown"]) == (None, "auto")


def test_an_unknown_setting_in_the_file_is_named_with_file_and_line(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("loader:\n  treads: 8\n")
    done = run("settings", env={"ENGINE_LOADER_CONFIG": str(config)})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {config}:2: there is no setting loader.treads; did you mean loader.threads?")


def test_an_unknown_variable_is_named() -> None:
    done = run("settings", "--json", env={"ENGINE_LOADER_THREADS": "8"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ENGINE_LOADER_THREADS: there is no such setting; did you mean ")


def test_several_problems_are_a_line_each(tmp_path: Path) -> None:
    env = {"ENGINE_LOADER_LOADER__THREADS": "0", "ENGINE_LOADER_DEBUG": "perhaps"}
    lines = run("settings", env=env).stderr.splitlines()
    assert len(lines) == 2
    assert any(line.removeprefix("error: ").startswith("ENGINE_LOADER_DEBUG: ") for line in lines)


def test_only_what_is_changed(tmp_path: Path) -> None:
    env = {"ENGINE_LOADER_LOADER__THREADS": "8", "ENGINE_LOADER_LOADER__MODE": "auto"}
    lines = invoke("settings", "--changed", env=env).stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "loader.threads = 8  ← ENGINE_LOADER_LOADER__THREADS (default: auto)"
    ]
    assert invoke("settings", "--changed").stdout == "all settings have their defaults\n"
    assert [row["name"] for row in json.loads(invoke("settings", "--changed", "--json", env=env).stdout)] == [
        "loader.threads"
    ]


def test_as_variables_settings_can_be_given_back(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(
        "loader:\n  buffer_bytes: 1GiB\n  threads: 8\n"
        "  key_mapping: {'^model[.]': '', '^it.s[.]': null}\ncompile_cache:\n  scope: it's mine\n"
    )
    env = {"ENGINE_LOADER_CONFIG": str(config)}
    output = invoke("settings", "--changed", "--env", env=env).stdout
    assert "ENGINE_LOADER_LOADER__THREADS=8" in output.splitlines()
    given = dict(line.partition("=")[::2] for line in shlex.split(output))
    expected = load_settings(environ=env).settings
    assert load_settings(environ=given).settings == expected
    # All of them, each with its meaning above it.
    output = invoke("settings", "--env", env=env).stdout
    given = dict(line.partition("=")[::2] for line in shlex.split(output, comments=True))
    assert len(given) == len(list(describe_settings()))
    assert load_settings(environ=given).settings == expected
    assert "# Reader threads; auto: as many as the CPUs and the source can use." in output.splitlines()
