"""`engine-loader compile-cache …`: what a person types, and what a program reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_loader.cli import app
from engine_loader.compile_cache.directories import STATE
from engine_loader.compile_cache.key import environment_key
from engine_loader.compile_cache.space import mib
from engine_loader.compile_cache.verdict.explain import note_verdict
from engine_loader.compile_cache.verdict.judge import Verdict
from tests.cli.running import shown_at
from tests.compile_cache.support import some_bytes


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own, with something in inductor's cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", str(tmp_path / "store"))
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__MIN_LOCAL_FREE_BYTES", "0")
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__MIN_STORE_FREE_BYTES", "0")
    kernel = tmp_path / "inductor" / "ab" / "kernel.so"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(some_bytes(100_000))
    return tmp_path


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["compile-cache", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def run_json(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["compile-cache", *arguments, "--json"])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_save_clear_load(local: Path) -> None:
    assert "saved: 1 files, 97.7 KiB" in run("save", "--engine", "torch")
    assert "deleted 1 files" in run("clear", "--engine", "torch", "--yes")
    assert not (local / "inductor/ab/kernel.so").exists()
    assert "restored: 1 files" in run("load", "--engine", "torch")
    assert (local / "inductor/ab/kernel.so").read_bytes() == some_bytes(100_000)
    assert run_json("load", "--engine", "torch")["status"] == "complete"


def test_an_empty_store_is_told_plainly(local: Path) -> None:
    assert "is empty" in run("list")
    assert "is empty" in run("verify")
    assert run_json("list") == []
    assert run_json("load", "--engine", "torch")["status"] == "nothing"


def test_info_shows_the_key_and_every_cache(local: Path) -> None:
    info = run_json("info", "--engine", "torch")
    assert info["environment"].startswith("torch-")
    assert [(item["cache"], item["files"]) for item in info["local"]] == [("inductor", 1), ("triton", 0)]
    assert "TORCHINDUCTOR_CACHE_DIR" in run("info", "--engine", "torch")


def test_list_shows_a_line_for_each_key(local: Path) -> None:
    run("save", "--engine", "torch", "--scope", "one")
    run("save", "--engine", "torch", "--scope", "two")
    assert {row["scope"] for row in run_json("list")} == {"one", "two"}
    assert "one" in run("list")


@pytest.mark.parametrize("columns", [80, 120])
def test_hashes_are_whole_and_lines_are_added_up(columns: int, local: Path) -> None:
    run("save", "--engine", "torch", "--scope", "one")
    run("save", "--engine", "torch", "--scope", "two")
    (environment,) = {row["environment"] for row in run_json("list")}
    found = run_json("verify")
    packs = {one["name"] for one in found}
    total = mib(sum(one["bytes"] for one in found))

    # To a program: a tab between columns, no blanks at the end.
    listed = [line.split("\t") for line in run("list").splitlines()]
    assert listed[0] == ["scope", "packs", "size", "used", "environment"]
    assert {(row[0], row[1], row[2], row[4]) for row in listed[1:-1]} == {
        ("one", "1", "100.1 KiB", environment),
        ("two", "1", "100.1 KiB", environment),
    }
    assert listed[-1] == [f"2 keys, 2 packs, {total}"]
    verified = [line.split("\t") for line in run("verify").splitlines()]
    assert {row[-1] for row in verified[1:-1]} == packs
    assert verified[-1] == [f"2 packs, {total}: 2 ok"]

    # To a person: in columns, and whole in a narrow terminal, too.
    shown = shown_at(columns, "compile-cache", "verify")
    assert shown[0] == "state  files  size       pack"
    assert {line.removeprefix("ok     1      100.1 KiB  ") for line in shown[1:-1]} == packs
    assert shown[-1] == f"2 packs, {total}: 2 ok"


def test_clear_and_load_are_of_the_same_engine_where_none_is_named(local: Path) -> None:
    vllm = local / "vllm" / "torch_compile_cache" / "ab" / "artifact.bin"
    vllm.parent.mkdir(parents=True)
    vllm.write_bytes(some_bytes(1000))
    run("save", "--scope", "one")
    run("clear", "--yes")
    assert not vllm.exists()
    assert run_json("load", "--scope", "one")["status"] == "restored"
    assert vllm.read_bytes() == some_bytes(1000)


def test_verify_ends_with_1_when_a_pack_is_damaged(local: Path) -> None:
    run("save", "--engine", "torch")
    assert "ok" in run("verify")
    (pack,) = (local / "store").rglob("*.tar.zst")
    content = bytearray(pack.read_bytes())
    content[100] ^= 1
    pack.write_bytes(content)
    (found,) = run_json("verify", status=1)
    assert "refused" in found["problem"]
    assert run_json("load", "--engine", "torch", "--scope", "all", status=0)["status"] == "complete"


def test_verify_repairs_what_is_damaged(local: Path) -> None:
    sound = local / "inductor" / "zz" / "large.so"
    sound.parent.mkdir()
    sound.write_bytes(some_bytes(9 << 20))
    run("save", "--engine", "torch")
    (pack,) = (local / "store").rglob("*.tar.zst")
    content = bytearray(pack.read_bytes())
    content[100] ^= 1
    pack.write_bytes(content)
    (found,) = run_json("verify", "--repair")
    assert found["quarantined"]
    assert "what is sound of it is in" in found["repaired"]
    assert "out of use" in run("verify")
    run("clear", "--engine", "torch", "--yes")
    assert run_json("load", "--engine", "torch")["files"] == 1
    assert sound.read_bytes() == some_bytes(9 << 20)


def test_a_pack_is_put_into_quarantine_and_taken_out(local: Path) -> None:
    run("save", "--engine", "torch")
    (pack,) = (local / "store").rglob("*.tar.zst")
    digest = pack.name.removesuffix(".tar.zst")
    assert "out of use" in run("quarantine", digest[:10])
    run("clear", "--engine", "torch", "--yes")
    assert run_json("load", "--engine", "torch")["status"] == "nothing"
    assert run_json("quarantine", digest, "--undo")["quarantined"] is False
    assert run_json("load", "--engine", "torch")["status"] == "restored"
    assert "verify" in run("quarantine", "f" * 64, status=2)


def test_prune_keeps_what_is_new(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("save", "--engine", "torch", "--scope", "one")
    run("save", "--engine", "torch", "--scope", "two")
    assert "deleted 0 files" in run("prune")
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__KEEP_KEYS", "1")
    assert len(run_json("prune", "--dry-run")["deleted"]) == 1
    assert len(run_json("prune")["deleted"]) == 1
    assert len(run_json("list")) == 1


def test_explain_tells_what_an_engine_found(local: Path) -> None:
    assert "no engine has left a verdict on this node yet" in run("explain", "--engine", "torch")
    key = environment_key({}, "llama_tp1")
    note_verdict(local / "inductor", key, Verdict("miss", ["VLLM_X was 1 when this cache was made, is 2 now"]))
    assert (local / "inductor" / STATE / "last.json").is_file()
    text = run("explain", "--engine", "torch")
    assert "llama_tp1: miss" in text
    assert "VLLM_X was 1 when this cache was made, is 2 now" in text
    assert run_json("explain", "--engine", "torch")["last"]["verdict"] == "miss"
    note_verdict(local / "inductor", key, Verdict(""))
    assert "llama_tp1: there was no cache, and none was needed, " in run("explain", "--engine", "torch")


def test_the_key_that_an_engine_used_last_is_the_default(local: Path) -> None:
    note_verdict(local / "inductor", environment_key({}, "llama_tp1"), Verdict("hit"))
    assert run_json("save", "--engine", "torch", "--scope", "llama_tp1")["key"].endswith("/llama_tp1")


def test_an_engine_that_does_not_exist_and_a_scope_that_is_missing_are_errors_of_the_command_line(local: Path) -> None:
    assert "there is no engine" in run("info", "--engine", "nope", status=2)
    assert "name one" in run("save", "--engine", "vllm", status=2)


def test_a_store_that_is_open_to_others_ends_with_1_and_says_what_to_do(local: Path) -> None:
    run("save", "--engine", "torch")
    (local / "store").chmod(0o777)
    run("clear", "--engine", "torch", "--yes")
    result = CliRunner().invoke(app, ["compile-cache", "load", "--engine", "torch"])
    assert result.exit_code == 1
    assert "chmod go-w" in result.output + result.stderr
