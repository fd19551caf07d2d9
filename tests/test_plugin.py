"""What engines call at their start: cheap, harmless, repeatable."""

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from engine_loader.compile_cache.directories import directories_of


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_engines_find_it_by_its_entry_point(group: str) -> None:
    (entry,) = entry_points(group=group, name="b10_3fs")
    assert entry.value == "engine_loader.plugin:register"


def test_registering_imports_no_engine_and_no_torch() -> None:
    heavy = run("""
        import sys
        from engine_loader.plugin import register
        register()
        print({name.partition(".")[0] for name in sys.modules} & {"torch", "vllm", "sglang", "numpy", "pydantic",
        "transformers"})
    """)
    assert heavy == "set()"


def test_registering_imports_little() -> None:
    """Some two dozen small modules, which is a matter of milliseconds."""
    more = run("""
        import sys
        before = set(sys.modules)
        from engine_loader.plugin import register
        register()
        print(len(set(sys.modules) - before))
    """)
    assert int(more) < 40


def test_registering_twice_leaves_one_hook() -> None:
    hooks = run("""
        import sys
        from engine_loader.plugin import register
        register()
        first = len(sys.meta_path)
        register()
        print(len(sys.meta_path) - first)
    """)
    assert hooks == "0"


def test_a_broken_adapter_is_told_and_nothing_is_raised() -> None:
    said = run("""
        import json, logging, sys
        logging.basicConfig(stream=sys.stdout)
        from engine_loader import plugin
        plugin.ADAPTERS = {"colorsys": "engine_loader.no_such_adapter", "json": "engine_loader.no_such_adapter"}
        plugin.register()
        import colorsys
        print(colorsys.rgb_to_hsv(0, 0, 0))
    """)
    assert said.count("could not register the load format b10_3fs") == 2
    assert said.endswith("(0.0, 0.0, 0)")


@pytest.mark.engine
def test_the_format_is_there_once_vllm_imports_its_loaders() -> None:
    classes = run("""
        from engine_loader.plugin import register
        register()
        register()
        import vllm.model_executor.model_loader as loaders
        register()
        kind = loaders._LOAD_FORMAT_TO_MODEL_LOADER["b10_3fs"]
        print("CLASS", kind.__module__, kind.__name__)
    """)
    assert "CLASS engine_loader.engines.vllm.loader B10ModelLoader" in classes
    assert "will be overwritten" not in classes


def named_cute_directory(**environ: str) -> str:
    """CUTE_DSL_CACHE_DIR once the plugin is registered."""
    code = (
        "import os; from engine_loader.plugin import register; register(); print(os.environ.get('CUTE_DSL_CACHE_DIR'))"
    )
    own = {name: value for name, value in os.environ.items() if name not in ("CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**own, **environ}
    )
    return done.stdout.strip()


def test_cute_dsl_caches_where_a_restart_finds_it(tmp_path: Path) -> None:
    directory = directories_of("vllm", {"XDG_CACHE_HOME": str(tmp_path)})["cute_dsl"]
    assert named_cute_directory(XDG_CACHE_HOME=str(tmp_path)) == str(directory) == str(tmp_path / "cute_dsl")
    assert named_cute_directory(HOME=str(tmp_path)) == str(tmp_path / ".cache" / "cute_dsl")


def test_a_named_directory_of_cute_dsl_stays(tmp_path: Path) -> None:
    assert named_cute_directory(CUTE_DSL_CACHE_DIR="/mine", HOME=str(tmp_path)) == "/mine"


def test_cute_dsl_keeps_its_default_where_there_is_no_home_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert named_cute_directory(HOME=str(tmp_path / "file")) == "None"
