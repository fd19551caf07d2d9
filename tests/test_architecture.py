"""Data flows down one staircase, and imports go down only (docs/architecture.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "engine_loader"

BASE = {"errors", "escaping", "failures", "garbage", "replacing", "settings", "machine"}
STEPS: dict[str, set[str]] = {
    "errors": set(),
    "escaping": set(),
    "failures": {"errors"},
    "garbage": set(),
    "replacing": set(),
    "settings": {"errors", "formats"},
    "machine": {"errors"},
    "formats": {"errors", "failures", "garbage"},
    "sources": BASE | {"formats"},
    "transfer": BASE | {"formats", "sources"},
    "report": BASE | {"formats"},
    "loading": BASE | {"formats", "sources", "transfer", "report"},
    "compile_cache": BASE | {"sources"},
    "plugin": {"errors"},
}
"""What each room may import beside itself. Every other room is a door, or stands on top: it may import all of these."""

ENGINES = {"vllm", "sglang"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(path within the package, syntax tree) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def room_of(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")


def imported(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import, wherever in the module it stands."""
    package = ["engine_loader", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*above, *([node.module] if node.module else []), alias.name])


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_imports_go_down_only():
    wrong = []
    for path, tree in modules():
        room = room_of(path)
        for line, name in imported(path, tree) if room in STEPS else ():
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == "engine_loader" and target != room and target not in STEPS[room]:
                wrong.append(f"engine_loader/{path}:{line} imports {name if is_room(target) else 'the package itself'}")
    assert wrong == []


def test_nothing_below_the_adapters_imports_an_engine():
    wrong = [
        f"engine_loader/{path}:{line} imports {name}"
        for path, tree in modules()
        if room_of(path) != "engines"
        for line, name in imported(path, tree)
        if name.partition(".")[0] in ENGINES
    ]
    assert wrong == []


def test_every_module_says_what_it_is_for():
    assert [path for path, tree in modules() if not ast.get_docstring(tree)] == []


def loaded_after(code: str) -> set[str]:
    """The modules of a fresh interpreter after ``code``."""
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import engine_loader",
        "import engine_loader.plugin",
        "from engine_loader.plugin import register; register(); register()",
    ],
)
def test_importing_and_registering_is_cheap(code):
    heavy = {"torch", "numpy", "pydantic", "vllm", "sglang", "safetensors", "transformers"}
    assert loaded_after(code) & heavy == set()


def test_formats_can_be_read_without_torch():
    code = "import engine_loader.formats.safetensors, engine_loader.formats.hf_index, engine_loader.sources.posix"
    assert "torch" not in loaded_after(code)


def test_transfer_needs_no_torch():
    assert "torch" not in loaded_after("import engine_loader.transfer.constructor")
