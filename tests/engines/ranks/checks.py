"""What holds of every layout: the first start compiles and saves, the next one on fresh machines restores."""

from .layouts import Layout
from .machines import Machines, Start


def cold_and_restored(machines: Machines, layout: Layout, expected: str) -> tuple[Start, Start]:
    """Start a layout twice, each time on fresh machines, and check what holds for every engine."""
    cold, restored = machines.start(layout), machines.start(layout)
    assert cold.text == restored.text == expected
    for node, engines in zip(cold.nodes, layout.engines, strict=True):
        assert len(node.verdicts) == engines
        assert node.restored == 0
        assert "compile cache: saved" in node.log
        assert node.left == []
    assert layout.scope in cold.nodes[0].log
    for node, engines in zip(restored.nodes, layout.engines, strict=True):
        assert node.verdicts == ["hit"] * engines
        assert node.restored > 0
        assert node.log.count("compile cache: nothing new to save") == engines
        assert node.left == []
    only_restored(cold, restored, whole=1 if machines.followers_save_early else None)
    return cold, restored


def only_restored(cold: Start, restored: Start, whole: int | None = None) -> None:
    """Each node (or the first ``whole`` ones) has what it had compiled itself, and every node has nothing that no node
    had, or that was written again.
    """
    for node, before in zip(restored.nodes[:whole], cold.nodes[:whole], strict=True):
        assert sorted(set(before.files) - set(node.files)) == []
    for node in restored.nodes:
        for file, mtime_ns in node.files.items():
            assert mtime_ns in [each.files.get(file) for each in cold.nodes], file
