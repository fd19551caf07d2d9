"""`engine-loader compile-cache keygen` and `keys`: files of keys, and which of them signs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_loader.cli import app
from engine_loader.compile_cache.trust import load_trust


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["compile-cache", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "key")


def test_a_new_file_is_for_its_owner_only_and_its_secret_is_not_printed(file: str) -> None:
    told = run("keygen", file)
    secret = Path(file).read_text().strip()
    assert Path(file).stat().st_mode & 0o777 == 0o600
    assert len(secret) == 44
    assert secret not in told
    assert load_trust(file).keys[0].id.hex() in told


def test_an_existing_file_is_not_written_over(file: str) -> None:
    run("keygen", file)
    before = Path(file).read_bytes()
    assert "--add" in run("keygen", file, status=2)
    assert Path(file).read_bytes() == before


def test_a_key_that_is_added_verifies_and_does_not_sign(file: str) -> None:
    first = run_json("keygen", file)["id"]
    added = run_json("keygen", file, "--add", "--kind", "ed25519")
    rows = run_json("keys", file)
    assert [(row["id"], row["signs"]) for row in rows] == [(first, True), (added["id"], False)]
    assert rows[1]["public_key"] == added["public_key"]
    assert added["public_key"].startswith("ed25519-public:")


def test_another_key_signs_and_one_is_dropped(file: str) -> None:
    ids = [run_json("keygen", file)["id"], *(run_json("keygen", file, "--add")["id"] for _ in range(2))]
    Path(file).write_text(f"# of this fleet\n{Path(file).read_text()}")
    rows = run_json("keys", file, "--sign-with", ids[1])
    assert [(row["id"], row["signs"]) for row in rows] == [(ids[1], True), (ids[0], False), (ids[2], False)]
    assert [row["id"] for row in run_json("keys", file, "--drop", ids[0])] == [ids[1], ids[2]]
    assert "# of this fleet" in Path(file).read_text()
    assert Path(file).stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_done_changes_nothing(file: str) -> None:
    only = run_json("keygen", file)["id"]
    before = Path(file).read_bytes()
    for key_id, told in (("00", "has no key 00"), (only, "is the only key")):
        boxed = run("keys", file, "--drop", key_id, status=2)
        assert told in " ".join(boxed.replace("│", " ").split())
    assert Path(file).read_bytes() == before
