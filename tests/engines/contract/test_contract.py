"""The contract with the engines: nothing moved in those that are installed, and what moves is said in one line."""

import sys
from pathlib import Path

import pytest

from tests.engines.contract import __main__ as command
from tests.engines.contract.check import FIXUPS, check
from tests.engines.contract.source_tree import SourceTree

ROOT = Path(__file__).parents[3]
LOADER = "vllm.model_executor.model_loader.default_loader"
CORE = "vllm.v1.engine.core"


class Edited(SourceTree):
    """The installed source with some text exchanged, as the next version might have it."""

    def __init__(self, site: Path, module: str, before: str, after: str) -> None:
        super().__init__(site)
        self._edit = module, before, after

    def text(self, module: str) -> str | None:
        text = super().text(module)
        edited, before, after = self._edit
        if module != edited or text is None:
            return text
        assert before in text, f"{module} has no {before!r} any more"
        return text.replace(before, after)


def site_of(engine: str) -> Path:
    found = [site for site in command.installed_sites() if (site / engine).is_dir()]
    if not found:
        pytest.skip(f"{engine} is not installed here")
    return found[0]


@pytest.mark.parametrize("engine", ["vllm", "torch"])
def test_nothing_moved_in_what_is_installed(engine: str) -> None:
    report = check(engine, SourceTree(site_of(engine)))
    assert report.moved == ()


# Complete ones: make test installs one while its tests are collected.
@pytest.mark.parametrize(
    "stamp", sorted(ROOT.glob(".venv-sglang-*/.package-installed")), ids=lambda path: path.parent.name
)
def test_nothing_moved_in_a_version_of_sglang(stamp: Path) -> None:
    (site,) = stamp.parent.glob("lib/python*/site-packages")
    assert check("sglang", SourceTree(site)).moved == ()


@pytest.mark.parametrize(
    ("module", "before", "after", "line"),
    [
        (CORE, "_initialize_kv_caches", "_set_up_kv_caches", "EngineCore._initialize_kv_caches is gone"),
        (
            LOADER,
            "def get_all_weights(\n        self,",
            "def get_all_weights(\n        self, rank, ",
            "get_all_weights takes",
        ),
        (
            LOADER,
            "weights_iterator = safetensors_weights_iterator(",
            "weights_iterator = self.read(",
            "_get_weights_iterator does not call safetensors_weights_iterator",
        ),
        (CORE, "load_general_plugins()", "pass", "EngineCore.__init__ does not call load_general_plugins"),
        (
            LOADER,
            "def download_model(self, model_config",
            "def download_model(self, model_config, where",
            "needs where too",
        ),
    ],
)
def test_what_moves_is_said_in_one_line(module: str, before: str, after: str, line: str) -> None:
    moved = check("vllm", Edited(site_of("vllm"), module, before, after)).moved
    about = [found for found in moved if line in found]
    assert len(about) == 1, moved
    assert "\n" not in about[0]
    assert about[0].startswith(module)


def test_the_lines_of_the_fixups_decide_and_not_the_version() -> None:
    (fixup,) = [fixup for fixup in FIXUPS if fixup.distribution == "vllm"]
    site = site_of("vllm")
    assert f"fix-up {fixup.name}: its lines are there" in check("vllm", SourceTree(site)).remarks
    mended = Edited(site, fixup.module, fixup.upstream, "                pass\n")
    assert f"fix-up {fixup.name}: its lines are not there: not needed" in check("vllm", mended).remarks


def test_the_command_says_what_moved_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["contract", "--site", str(tmp_path), "--quiet"])
    assert command.main() == 1
    *moved, total = capsys.readouterr().out.splitlines()
    assert moved
    assert all(line.startswith("vllm ?: moved: vllm") and " is gone: " in line for line in moved), moved
    assert total.endswith(f"{len(moved)} moved")

    monkeypatch.setattr(sys, "argv", ["contract", "--site", str(site_of("torch")), "--quiet"])
    assert command.main() == 0
