"""Tables that ranks compare with one another are restored for all ranks, or for none."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from engine_loader.compile_cache.directories import ENGINES
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.scan import scan
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.restore import Restore
from engine_loader.compile_cache.process.save import save
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.unpacking.rank_sets import Layout, part_of
from tests.compile_cache.support import KEY, SECRET

SET = f"flashinfer_autotune_cache/0.4.0/90a/{'ab' * 32}"
SGLANG_SET = "flashinfer/autotune/0.4.0/sm90/0123456789abcdef"
OTHER = f"torch_compile_cache/torch_aot_compile/{'cd' * 32}/rank_0_0/model"


def table(rank: int, dp: int = 0) -> str:
    return f"{SET}/autotune_configs_dp{dp}_rank{rank}.json"


class Node:
    """A node that runs one engine."""

    def __init__(self, directory: Path, store: Path, engine: str = "vllm") -> None:
        self.engine = engine
        self.directory = directory
        self.store = FilesystemStore(store, SECRET)

    def write(self, paths: Iterable[str], content: str = "tuned") -> None:
        for path in paths:
            file = self.directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}: {path}")

    def save(self) -> Outcome:
        directories = {self.engine: self.directory}
        files = scan(ENGINES[self.engine][:1], directories)
        return save(self.store, KEY, directories, files, SECRET, threads=1, level=1, most_bytes=1 << 40)

    def restore(self, layout: Layout | None) -> Outcome:
        return Restore(self.store, KEY, {self.engine: self.directory}, SECRET, layout=layout, threads=1).run()

    def has(self) -> set[str]:
        found = (path for path in self.directory.rglob("*") if path.is_file())
        return {str(path.relative_to(self.directory)) for path in found}


@pytest.fixture
def saved(tmp_path: Path, store: Path) -> Node:
    node = Node(tmp_path / "saved", store)
    node.write([OTHER])
    return node


@pytest.fixture
def fresh(tmp_path: Path, store: Path) -> Node:
    return Node(tmp_path / "fresh", store)


def test_a_set_of_all_ranks_is_restored(saved: Node, fresh: Node) -> None:
    saved.write(map(table, range(4)))
    saved.save()
    outcome = fresh.restore(Layout(tp=2, pp=2))
    assert fresh.has() == {OTHER, *map(table, range(4))}
    assert outcome.messages == []


def test_without_a_ranks_part_none_is_restored_and_the_message_names_the_rank(saved: Node, fresh: Node) -> None:
    saved.write(map(table, (0, 1, 3)))
    saved.save()
    outcome = fresh.restore(Layout(tp=4))
    assert fresh.has() == {OTHER}, "what ranks do not compare is restored all the same"
    (message,) = outcome.messages
    assert f"vllm/{SET}" in message
    assert "of 4 ranks, the store lacks the part of rank 2 (data parallel 0)" in message


def test_nodes_save_the_parts_of_their_ranks_and_restore_them_once_all_are_there(
    saved: Node, fresh: Node, tmp_path: Path, store: Path
) -> None:
    saved.write(map(table, (0, 1)))
    saved.save()
    assert fresh.restore(Layout(tp=4)).messages != []
    other = Node(tmp_path / "other", store)
    other.write(map(table, (2, 3)))
    other.save()
    assert fresh.restore(Layout(tp=4)).messages == []
    assert fresh.has() == {OTHER, *map(table, range(4))}


def test_replicas_of_one_world_count_their_ranks_through(saved: Node, fresh: Node) -> None:
    saved.write([table(0), table(1), table(2, dp=1)])
    saved.save()
    (message,) = fresh.restore(Layout(tp=2, dp=2)).messages
    assert "rank 3 (data parallel 1)" in message
    saved.write([table(3, dp=1)])
    saved.save()
    assert fresh.restore(Layout(tp=2, dp=2)).messages == []
    assert table(3, dp=1) in fresh.has()


def test_replicas_of_their_own_each_have_their_ranks(saved: Node, fresh: Node) -> None:
    saved.write([table(0), table(1), table(0, dp=1)])
    saved.save()
    (message,) = fresh.restore(Layout(tp=2, dp=2)).messages
    assert "rank 1 (data parallel 1)" in message


def test_a_set_of_another_number_of_ranks_is_left_out(saved: Node, fresh: Node) -> None:
    saved.write(map(table, range(4)))
    saved.save()
    (message,) = fresh.restore(Layout(tp=2)).messages
    assert "they are of 4 ranks, here are 2" in message
    assert fresh.has() == {OTHER}


def test_without_a_layout_no_set_is_restored(saved: Node, fresh: Node) -> None:
    saved.write(map(table, range(2)))
    saved.save()
    (message,) = fresh.restore(None).messages
    assert "how many ranks there are is not known here" in message
    assert fresh.has() == {OTHER}


def test_a_node_with_a_part_of_another_measurement_keeps_it_and_gets_no_other(saved: Node, fresh: Node) -> None:
    saved.write(map(table, range(2)))
    saved.save()
    fresh.write([table(0)], "tuned otherwise")
    (message,) = fresh.restore(Layout(tp=2)).messages
    assert "the part of rank 0 (data parallel 0) on this node is another than the store's" in message
    assert fresh.has() == {OTHER, table(0)}


def test_a_node_with_a_part_of_the_same_measurement_gets_the_rest(saved: Node, fresh: Node) -> None:
    saved.write(map(table, range(2)))
    saved.save()
    fresh.write([table(0)])
    assert fresh.restore(Layout(tp=2)).messages == []
    assert table(1) in fresh.has()


def test_a_damaged_part_takes_the_others_with_it(saved: Node, fresh: Node, tmp_path: Path, store: Path) -> None:
    saved.write([table(0)])
    saved.save()
    other = Node(tmp_path / "other", store)
    other.write([table(1)])
    before = {stored.name for stored in saved.store.list(KEY.prefix)}
    other.save()
    (name,) = {stored.name for stored in saved.store.list(KEY.prefix)} - before
    pack = store / name
    content = bytearray(pack.read_bytes())
    content[20] ^= 1
    pack.write_bytes(content)
    (store / KEY.prefix / "index").unlink()  # it holds small packs as a whole
    outcome = fresh.restore(Layout(tp=2))
    assert fresh.has() == {OTHER}
    assert any(name in message for message in outcome.messages)


def test_an_older_copy_takes_no_damaged_parts_place(saved: Node, fresh: Node, store: Path) -> None:
    """It would stand beside parts of another measurement."""
    saved.write(map(table, (0, 1)))
    saved.save()
    before = set((store / KEY.prefix).glob("*.tar.zst"))
    saved.write([table(0)], "tuned anew")
    saved.save()
    (pack,) = set((store / KEY.prefix).glob("*.tar.zst")) - before
    content = bytearray(pack.read_bytes())
    content[20] ^= 1
    pack.write_bytes(content)
    (store / KEY.prefix / "index").unlink()  # it holds small packs as a whole
    fresh.restore(Layout(tp=2))
    assert fresh.has() == {OTHER}


@pytest.mark.parametrize(
    ("layout", "ranks", "lacking"),
    [
        (Layout(tp=2, pp=2), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], None),
        (Layout(tp=2, pp=2), [(0, 0, 0), (1, 0, 0), (0, 1, 0)], "rank tp1 pp1 dp0"),
        (Layout(tp=2, dp=2), [(0, 0, 0), (1, 0, 1)], "rank tp0 pp0 dp1, rank tp1 pp0 dp0"),
        (Layout(tp=2, dp=2, dp_attention=True), [(0, 0, 0), (1, 0, 1)], None),
        (Layout(tp=2, dp=2, dp_attention=True), [(1, 0, 1)], "rank tp0 pp0 dp0"),
    ],
)
def test_sglangs_ranks(
    layout: Layout, ranks: list[tuple[int, int, int]], lacking: str | None, tmp_path: Path, store: Path
) -> None:
    saving, fresh = (Node(tmp_path / name, store, "sglang") for name in ("saving", "fresh"))
    tables = {f"{SGLANG_SET}/rank_tp{tp}_pp{pp}_dp{dp}.json" for tp, pp, dp in ranks}
    saving.write(tables)
    saving.save()
    messages = fresh.restore(layout).messages
    assert fresh.has() == (set() if lacking else tables)
    assert [f"the store lacks the part of {lacking};" in message for message in messages] == ([True] if lacking else [])


@pytest.mark.parametrize(
    "path",
    [
        f"vllm/{SET}/autotune_configs.json",  # of the first rank, which sends it to the others
        f"vllm/{SET}/pcie_ipc_allreduce_tp_0-1.json",
        "triton/KEY/autotune_configs_dp0_rank0.json",
        f"sglang/{SGLANG_SET}/other.json",
    ],
)
def test_other_tables_are_no_parts(path: str) -> None:
    assert part_of(path) is None


def test_a_directory_that_a_variable_names_holds_such_sets_too() -> None:
    part = part_of(f"flashinfer_autotune/{'ab' * 32}/autotune_configs_dp1_rank3.json")
    assert part == (f"flashinfer_autotune/{'ab' * 32}", (1, 3))


@pytest.mark.parametrize(
    ("scope", "sizes", "layout"),
    [
        ("llama_2c04aacf_tp8_pp2_dp1", {}, Layout(tp=8, pp=2)),
        ("all", {}, None),
        ("all", {"tp": 4, "pp": 1, "dp": 2, "dp_attention": True}, Layout(tp=4, dp=2, dp_attention=True)),
    ],
)
def test_a_job_knows_the_layout_from_the_engine_or_from_a_default_scope(
    scope: str, sizes: dict[str, int], layout: Layout | None
) -> None:
    job = Job("restore", "vllm", CacheKey((), scope), {}, layout=sizes)
    assert Job.from_json(job.to_json()).ranks() == layout
