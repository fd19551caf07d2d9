"""The house as docs/architecture.md describes it: imports go down only and in no circle, and every room is small enough
that its files' names say where a thing is."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "engine_loader"

BASE = {"errors", "escaping", "failures", "garbage", "home", "replacing", "settings", "machine", "residency"}
STEPS: dict[str, set[str]] = {
    "errors": {"escaping"},
    "escaping": set(),
    "failures": {"errors"},
    "garbage": set(),
    "home": {"escaping"},
    "replacing": set(),
    "settings": {"errors", "formats"},
    "machine": {"errors"},
    "residency": set(),
    "formats": {"errors", "failures", "garbage"},
    "sources": BASE | {"formats"},
    "transfer": BASE | {"formats", "sources"},
    "report": BASE | {"formats"},
    "loading": BASE | {"formats", "sources", "transfer", "report"},
    "start": {"errors", "machine", "residency"},
    "ahead": BASE | {"formats", "sources", "transfer", "start"},
    "compile_cache": BASE | {"sources", "report"},
    "dcp": BASE | {"formats", "sources", "transfer", "report", "loading"},
    "conversion": BASE | {"formats", "sources", "transfer", "report", "loading", "dcp"},
    "plugin": {"errors", "report"},
}
"""What each room may import beside itself. Every other room is a door, or stands on top: it may import all of these."""

ENGINES = {"vllm", "sglang"}

MOST_LINES = 400
MOST_METHODS = 20
MOST_FILES = 12
SOURCE_SUFFIXES = {".py", ".c", ".cpp", ".h"}

INSIDE_FUNCTIONS = {
    ("ahead/handing_over.py", "sources.object_store.client"): "of an object store, and only a URL needs it",
    ("ahead/handing_over.py", "sources.object_store.endpoints"): "of an object store, and only a URL needs it",
    ("ahead/handing_over.py", "sources.object_store.url"): "of an object store, and only a URL needs it",
    ("compat/callable_package.py", "compat.b10_transfer"): "importing this package must not import the compile cache",
    ("compile_cache/stores/opening.py", "compile_cache.stores.objects"): "obstore is an extra: only a URL needs it",
    (
        "engines/common/start/phase_wrappers.py",
        "report.watchdog",
    ): "only processes of a start that is recorded have one",
    (
        "engines/sglang/start_phases.py",
        "engines.common.start.start_account",
    ): "only the first process of a start needs it",
    (
        "engines/vllm/start_phases.py",
        "engines.common.start.start_account",
    ): "only the first process of a start needs it",
    (
        "engines/vllm/start_phases.py",
        "engines.common.start.start_hints",
    ): "only the first process of a start needs it",
    ("report/watchdog.py", "report.load_report"): "every process of an engine imports it, and few have a stall",
    ("report/watchdog.py", "report.reading.timeline"): "every process of an engine imports it, and few wait for ranks",
    ("report/watchdog.py", "report.slow_ranks"): "every process of an engine imports it, and few wait for ranks",
    ("engines/sglang/format.py", "engines.common.cache_hooks"): "arguments are read before torch is imported",
    ("engines/sglang/format.py", "engines.common.model_files"): "arguments are read before torch is imported",
    (
        "engines/sglang/format.py",
        "engines.common.start.warm_weights",
    ): "every process imports it, and only the first one warms",
    ("engines/sglang/format.py", "engines.common.weights_uri"): "arguments are read before torch is imported",
    ("engines/sglang/format.py", "engines.sglang.loader"): "SGLang's loader, which it extends, is imported later",
    ("engines/vllm/sharded.py", "conversion.destination"): "the room of conversions imports what engines start without",
    ("loading/open_store.py", "loading.mapping.mapped_store"): "few checkpoints go through rules",
    ("loading/open_store.py", "loading.mapping.named_layouts"): "few checkpoints go through rules",
    ("loading/open_store.py", "loading.training.key_mapping"): "only a training checkpoint needs it",
    ("loading/open_store.py", "loading.training.parts"): "only a training checkpoint needs it",
    ("loading/open_store.py", "loading.training.store"): "only a training checkpoint needs it",
    ("loading/safetensors_store.py", "loading.sharing"): "only ranks that share need it, and the window",
    ("settings/__init__.py", "settings.layers"): "pydantic and the building of the tree cost more than other imports",
    ("sources/registry.py", "settings"): "who gives settings has imported their classes",
    ("sources/registry.py", "sources.memory"): "a source is imported when it is first used",
    ("sources/registry.py", "sources.threefs.threefs_source"): "a source is imported when it is first used",
    ("transfer/constructor.py", "transfer.python.python_readers"): "native reader threads serve nearly everybody",
}
"""(module, what a function of it imports of this package) -> the reason. Commands (cli/) import what they run: what one
of them needs costs no other."""

MIRRORS = ({"engines/common", "engines/sglang", "engines/vllm"},)
"""Folders that hold the same roles, for another engine, by the same file names."""

NAMED_ALIKE = {
    "store.py": "loading's store of tensors, and its implementation for training checkpoints",
    "interface.py": "of the compile cache's stores; and a module of the package that compat/ stands for",
}
"""File names that may exist more than once, and why. A command (cli/) may be named as the room that it shows."""


@cache
def modules() -> Sequence[tuple[str, ast.Module]]:
    """(path within the package, syntax tree) of every module."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths]


def room_of(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")


def imported(path: str, nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import among the nodes of a module."""
    package = ["engine_loader", *path.split("/")[:-1]]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*above, *([node.module] if node.module else []), alias.name])


def walk_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: none of a function, and nothing for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from walk_at_import(other)
            continue
        yield node
        yield from walk_at_import(node)


def module_named(name: str, known: Mapping[str, str]) -> str | None:
    """The module of this package that an import of ``name`` leads to: itself, or what holds the attribute."""
    return known.get(name) or known.get(name.rpartition(".")[0])


@cache
def import_graph() -> dict[str, set[str]]:
    """Path of a module -> paths of those that it imports when it is imported."""
    known = {name_of(path): path for path, _ in modules()}
    graph: dict[str, set[str]] = {path: set() for path, _ in modules()}
    for path, tree in modules():
        for _, name in imported(path, walk_at_import(tree)):
            target = module_named(name, known)
            if target is not None and target != path:
                graph[path].add(target)
    return graph


def name_of(path: str) -> str:
    """The dotted name of the module at ``path``."""
    return ".".join(["engine_loader", *path.removesuffix(".py").split("/")]).removesuffix(".__init__")


def at_level(path: str, room: str) -> str:
    """What stands for a module in the picture of a room: the folder or the file right below it."""
    below = path.removeprefix(f"{room}/") if room else path
    return below.partition("/")[0]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reached = {node: reachable(graph, node) for node in graph}
    groups = {tuple(sorted(other for other in reached[node] if node in reached[other])) for node in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for node in graph.get(ahead.pop(), ()):
            if node not in found:
                found.add(node)
                ahead.append(node)
    return found


def folders() -> list[str]:
    """Those with modules, within the package; "" is the package itself."""
    return sorted({path.rpartition("/")[0] for path, _ in modules()})


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_imports_go_down_only():
    wrong = []
    for path, tree in modules():
        room = room_of(path)
        for line, name in imported(path, ast.walk(tree)) if room in STEPS else ():
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
        for line, name in imported(path, ast.walk(tree))
        if name.partition(".")[0] in ENGINES
    ]
    assert wrong == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["b", "c"], ["e", "f"]]


def test_modules_import_each_other_in_no_circle():
    assert circles(import_graph()) == []


@pytest.mark.parametrize("room", folders())
def test_files_and_folders_of_a_room_import_each_other_in_no_circle(room):
    picture: dict[str, set[str]] = defaultdict(set)
    inside = {path: at_level(path, room) for path, _ in modules() if path.startswith(f"{room}/" if room else "")}
    for path, targets in import_graph().items():
        if path in inside:
            picture[inside[path]] |= {inside[target] for target in targets if target in inside} - {inside[path]}
    assert circles(picture) == []


def test_imports_inside_functions_are_counted():
    known = {name_of(path): path for path, _ in modules()}
    found = set()
    for path, tree in modules():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for _, name in imported(path, (node for function in functions for node in ast.walk(function))):
            target = module_named(name, known)
            if target is not None and room_of(path) != "cli":
                found.add((path, name_of(target).removeprefix("engine_loader.")))
    assert sorted(found - set(INSIDE_FUNCTIONS)) == []


def test_files_are_of_one_subject():
    paths = [path for path in PACKAGE.rglob("*") if path.suffix in SOURCE_SUFFIXES]
    sizes = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in paths}
    assert {path: lines for path, lines in sizes.items() if lines > MOST_LINES} == {}


def test_classes_are_small():
    large = {}
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
                if len(methods) > MOST_METHODS:
                    large[f"{path}: {node.name}"] = len(methods)
    assert large == {}


def test_folders_are_small():
    files: dict[str, int] = defaultdict(int)
    for path, _ in modules():
        folder, _, name = path.rpartition("/")
        files[folder] += name != "__init__.py"
    assert {folder: count for folder, count in files.items() if count > MOST_FILES} == {}


def test_a_file_name_says_which_file_it_is():
    holders: dict[str, set[str]] = defaultdict(set)
    for path, _ in modules():
        folder, _, name = path.rpartition("/")
        if name != "__init__.py" and room_of(path) != "cli":
            holders[name].add(folder)
    twice = {name: sorted(found) for name, found in holders.items() if len(found) > 1 and name not in NAMED_ALIKE}
    assert {name: found for name, found in twice.items() if not any(set(found) <= group for group in MIRRORS)} == {}


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


def test_open_checkpoint_is_imported_without_what_only_some_checkpoints_or_settings_need():
    """Beyond torch, the name costs the store of safetensors files: no settings are built, no training is known."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, torch\nfrom engine_loader import open_checkpoint\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = set(done.stdout.split())
    assert "engine_loader.loading.safetensors_store" in names
    late = ("pydantic", "yaml", "engine_loader.settings.", "engine_loader.formats.dcp_metadata", "typer")
    late += ("engine_loader.loading.training.", "engine_loader.loading.mapping.", "engine_loader.conversion")
    late += ("engine_loader.loading.sharing", "engine_loader.transfer.window", "engine_loader.transfer.python")
    late += ("statistics",)
    assert sorted(name for name in names if f"{name}.".startswith(tuple(f"{one.rstrip('.')}." for one in late))) == [
        "engine_loader.settings"
    ]


def test_formats_can_be_read_without_torch():
    code = "import engine_loader.formats.safetensors, engine_loader.formats.hf_index, engine_loader.sources.posix"
    assert "torch" not in loaded_after(code)


def test_transfer_needs_no_torch():
    assert "torch" not in loaded_after("import engine_loader.transfer.constructor")
