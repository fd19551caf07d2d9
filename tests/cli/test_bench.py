"""``engine-loader bench read``: what is printed, and that it is true."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine_loader.bench import contenders
from engine_loader.bench.contenders import Contender
from tests.cli.running import invoke, run
from tests.support.checkpoints import checkpoint, entry, index
from tests.support.html_page import Page

MODEL_BYTES = 2 * (1 << 20) + 2 * 64 * 32 + 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    one = {"a": entry("U8", [1 << 20]), "b": entry("BF16", [64, 32])}
    two = {"c": entry("U8", [1 << 20], seed=1), "scale": entry("F32", []), "empty": entry("F32", [0, 4])}
    (tmp_path / "1.safetensors").write_bytes(checkpoint(one))
    (tmp_path / "2.safetensors").write_bytes(checkpoint(two, padding=3))
    names = dict.fromkeys(one, "1.safetensors") | dict.fromkeys(two, "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(index(names))
    return tmp_path


def measured(*arguments: str | Path) -> Any:
    result = invoke("bench", "read", "--json", "--rounds", "2", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--fresh"], ["--cold"], ["--cold", "--fresh"]])
def test_every_contender_is_verified_and_measured_in_every_round(flags: list[str], model: Path) -> None:
    found = measured(*flags, "--threads", "1,2", model)
    assert found["scenario"]["cold"] is ("--cold" in flags)
    assert found["scenario"]["fresh"] is ("--fresh" in flags)
    names = [result["name"] for result in found["results"]]
    assert names[:2] == ["preadv, 1 thread", "preadv, 2 threads"]
    assert {"engine_loader load_into", "engine_loader tensors() + copy_", "safetensors"} <= set(names)
    for result in found["results"]:
        assert result["error"] is None, result
        assert result["verified"] is True, result
        assert len(result["gb_per_s"]) == 2
        assert min(result["gb_per_s"]) <= result["median_gb_per_s"] <= max(result["gb_per_s"])


@pytest.mark.slow
def test_the_limit_is_the_fastest_plain_read_and_the_rest_is_given_as_its_share(model: Path) -> None:
    found = measured("--threads", "1,2", model)
    by_name = {result["name"]: result for result in found["results"]}
    plain = [result for result in found["results"] if result["kind"] == "plain"]
    limit = by_name[found["limit"]]
    assert limit["median_gb_per_s"] == max(result["median_gb_per_s"] for result in plain)
    assert limit["of_limit"] == 1.0
    ours = by_name["engine_loader load_into"]
    assert ours["of_limit"] == pytest.approx(ours["median_gb_per_s"] / limit["median_gb_per_s"], abs=1e-3)
    assert "engine" in ours["how"]


def test_the_checkpoint_and_the_machine_are_described(model: Path) -> None:
    found = measured("--no-peers", model)
    assert found["checkpoint"]["bytes"] == MODEL_BYTES
    assert found["checkpoint"]["tensors"] == 5
    assert [Path(file).name for file in found["checkpoint"]["files"]] == ["1.safetensors", "2.safetensors"]
    assert {"cpu", "cpus", "kernel", "memory_bytes", "file_system", "torch", "engine_loader"} <= set(found["machine"])
    assert {result["kind"] for result in found["results"]} == {"plain", "ours"}


def test_only_the_first_files_are_taken_when_asked(model: Path) -> None:
    found = measured("--no-peers", "--files", "1", model)
    assert found["checkpoint"]["bytes"] == (1 << 20) + 2 * 64 * 32
    assert [Path(file).name for file in found["checkpoint"]["files"]] == ["1.safetensors"]


def test_a_person_sees_a_table_with_the_conditions_or_a_page(model: Path) -> None:
    options = ("--rounds", "1", "--threads", "1", "--no-peers", "--html", model / "page.html")
    done = run("bench", "read", *options, model)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == ("2.00 MiB in 5 tensors, 2 files; warm page cache, into touched parameters; medians of 1 rounds")
    (limit,) = (line for line in lines if line.startswith("preadv, 1 thread"))
    assert "100% (the limit)" in limit
    bars = [line.rstrip().rpartition("  ")[2] for line in lines[2:5]]
    assert "█" * 10 in bars  # that of the fastest
    assert all(set(bar) <= set("█▏▎▍▌▋▊▉") and len(bar) <= 10 for bar in bars)
    assert any(line.startswith("engine_loader load_into") and "%" in line for line in lines)
    assert (
        "warning: 2.00 MiB are too few to measure: opening the files and starting threads takes about as long as "
        "reading; measure a checkpoint of 256.0 MiB or more"
    ) in done.stderr.splitlines()
    page = Page((model / "page.html").read_text())
    assert (page.open, page.wrong, page.loads) == ([], [], [])
    for words in ("Warm page cache", lines[0].partition(";")[0], "preadv, 1 thread", limit.split()[3] + " GB/s"):
        assert words in page.text
    assert "Traceback" not in done.stderr


def test_cold_reads_are_not_claimed_where_files_cannot_be_dropped(tmp_path: Path) -> None:
    memory = os.memfd_create("not-to-be-dropped")  # it goes with this process, however that ends
    with os.fdopen(memory, "wb") as content:
        content.write(checkpoint({"a": entry("U8", [1 << 20])}))
        content.flush()
        file = tmp_path / "model.safetensors"
        file.symlink_to(f"/proc/{os.getpid()}/fd/{memory}")
        found = measured("--no-peers", "--cold", file)
    warning = found["warnings"][0]
    assert warning.startswith("100% of the files stayed in the page cache, so these are not cold reads")


def test_a_peer_that_fails_or_loads_wrong_bytes_is_reported_and_the_rest_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(workload: Any, targets: Any) -> None:
        raise RuntimeError("invalid device: cuda:cpu\nand more")

    def wrong(workload: Any, targets: Any) -> None:
        for target in targets.values():
            target.zero_()

    peers = [Contender("failing", "peer", fails), Contender("lying", "peer", wrong)]
    monkeypatch.setattr(contenders, "installed_peers", lambda: peers)
    by_name = {result["name"]: result for result in measured(model)["results"]}
    assert by_name["failing"]["error"] == "RuntimeError: invalid device: cuda:cpu"
    assert by_name["lying"]["error"].startswith("wrong bytes in 4 of 5 tensors, e.g. ")
    assert by_name["lying"]["verified"] is False
    assert by_name["lying"]["gb_per_s"] == []
    assert by_name["engine_loader load_into"]["median_gb_per_s"] > 0


def test_wrong_bytes_of_ours_are_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(workload: Any, targets: Any) -> None:
        return

    monkeypatch.setattr(contenders, "ours", lambda: [Contender("engine_loader load_into", "ours", nothing)])
    result = invoke("bench", "read", "--rounds", "1", "--no-peers", model)
    assert result.exit_code == 1
    assert "engine_loader load_into loaded wrong bytes" in result.stderr


def test_a_model_that_does_not_fit_into_memory_is_refused_before_anything_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_loader import machine

    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(1 << 20, 1 << 20, None))
    result = invoke("bench", "read", model)
    assert result.exit_code == 1
    assert "1.00 MiB are available: measure fewer files with --files" in result.stderr


@pytest.mark.parametrize("threads", ["0", "two", "1,,2", "1000"])
def test_threads_that_are_no_numbers(threads: str, model: Path) -> None:
    result = invoke("bench", "read", "--threads", threads, model)
    assert result.exit_code == 2
    assert "is not a list of numbers from 1 to 256" in result.stderr


def test_a_checkpoint_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"empty": entry("F32", [0])}))
    result = invoke("bench", "read", tmp_path)
    assert result.exit_code == 1
    assert "there are no bytes to read" in result.stderr
