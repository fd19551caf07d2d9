"""SGLang with real ranks: tensor parallelism on one node and on two."""

import json
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import VERSION, model_for_sglang
from tests.support.sglang_server import SglangServer, patched

from .checks import cold_and_restored
from .layouts import SGLANG, Layout
from .machines import PROMPT, TOKENS, SglangMachines

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_for_sglang("llama", tmp_path_factory.mktemp("llama"), shards=2)


@pytest.fixture(scope="module")
def one_rank(model: Path) -> str:
    """What one rank answers, with SGLang's own loader."""
    with (
        patched(VERSION),
        SglangServer(VERSION, model, "--load-format", "auto", "--dtype", "float32") as server,
    ):
        return server.complete(PROMPT, max_tokens=TOKENS)


@pytest.mark.parametrize("layout", SGLANG, ids=str)
def test_a_layout_answers_as_one_rank_and_its_cache_is_restored_on_each_node(
    layout: Layout, model: Path, one_rank: str, tmp_path: Path
) -> None:
    machines = SglangMachines(VERSION, tmp_path, model)
    with patched(VERSION):
        cold_and_restored(machines, layout, one_rank)
    for start, found in ((1, {"hit": 0, "miss": 1}), (2, {"hit": 1, "miss": 0})):
        for machine in (tmp_path / f"start-{start}").iterdir():
            for graphs in machine.glob("probe/compiled*.json"):
                assert json.loads(graphs.read_text()) == found
