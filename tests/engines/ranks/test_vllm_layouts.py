"""vLLM with real ranks: tensor, pipeline, data and expert parallelism, on one node and on two."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .checks import cold_and_restored
from .layouts import VLLM, Layout
from .machines import VllmMachines

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(3600)]

COMPILATION = ("saved AOT compiled function to", "Compiling model again")
LOADED = re.compile(r"b10_3fs: (?:rank \d+ of \d+: )?loaded")
NO_COMPILATION = "Directly load AOT compilation from path"


@pytest.mark.parametrize("layout", VLLM, ids=str)
def test_a_layout_answers_as_one_rank_and_its_cache_is_restored_on_each_node(
    layout: Layout, model: Callable[[str], Path], one_rank: Callable[[str], str], tmp_path: Path
) -> None:
    machines = VllmMachines(tmp_path, model(layout.model))
    cold, restored = cold_and_restored(machines, layout, one_rank(layout.model))
    loads = sum(len(LOADED.findall(node.log)) for node in cold.nodes)
    assert loads >= 1
    for before, node in zip(cold.nodes, restored.nodes, strict=True):
        assert COMPILATION[0] in before.log
        assert NO_COMPILATION in node.log
        assert not any(words in node.log for words in COMPILATION)
