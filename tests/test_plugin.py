"""What engines call at their start: cheap, harmless, repeatable."""

import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest


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
        plugin._ADAPTERS = {"colorsys": "engine_loader.no_such_adapter", "json": "engine_loader.no_such_adapter"}
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
