"""Weights that a process reads into the page cache: what it reads, what it leaves, and that it ends with everybody."""

import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine_loader.machine import Memory, memory
from engine_loader.start.page_reading import Budget, Warming, WarmingEach
from engine_loader.start.page_warmer import listen, name_of, warm, warm_each, warm_once
from engine_loader.start.warming import WarmingAccount, tell_loader_begins, warm_files
from engine_loader.transfer.modes import resident_share
from tests.support.children import in_child
from tests.support.page_cache import made_cold, share_of

MIB = 1 << 20
ROOM = Memory(total=1 << 40, available=1 << 40, limit=None)


@pytest.fixture
def cold(tmp_path: Path) -> list[Path]:
    """Two files that do not lie in the page cache."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom(MIB) * (9 + number))
    made_cold(*paths)
    return paths


def told(paths: list[Path]) -> WarmingAccount:
    return warm_files(list(map(str, paths)))


def test_cold_files_are_read_into_the_page_cache(cold: list[Path]) -> None:
    assert is_about(told(cold), read=19, resident=0)
    assert min(map(share_of, cold)) > 0.9


def test_what_lies_in_the_page_cache_is_not_read_again(cold: list[Path]) -> None:
    cold[0].read_bytes()
    assert is_about(told(cold), read=10, resident=9)
    assert is_about(told(cold), read=0, resident=19)


def is_about(account: WarmingAccount, *, read: int, resident: int) -> bool:
    """Whether all was done, with so many MiB: other programs of the machine may have the kernel drop a few pages."""
    assert account.reason == ""
    assert account.read + account.resident == account.size == (read + resident) * MIB
    return abs(account.read - read * MIB) <= MIB


def test_a_file_that_is_missing_forbidden_or_a_pipe_is_left_to_the_loader(cold: list[Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert is_about(told([tmp_path / "missing", tmp_path / "pipe", *cold]), read=19, resident=0)


def test_a_directory_that_is_missing_is_a_reason(tmp_path: Path) -> None:
    assert told([tmp_path / "missing" / "a"]).reason == "their directory cannot be read (No such file or directory)"


def test_files_in_memory_are_left_alone() -> None:
    path = Path("/dev/shm") / f"engine-loader-test-{os.getpid()}"
    path.write_bytes(b"x" * MIB)
    try:
        assert told([path]) == WarmingAccount(reason="they lie in memory")
    finally:
        path.unlink()


def test_a_file_that_is_cut_short_meanwhile_is_no_error(cold: list[Path]) -> None:
    warming = Warming([str(cold[0])], Budget(lambda: ROOM))
    os.truncate(cold[0], 5 * MIB)
    warming.run()
    assert (warming.read, warming.reason) == (5 * MIB, "")


def test_a_read_that_fails_is_a_reason(cold: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    warming = Warming([str(cold[0])], Budget(lambda: ROOM))
    monkeypatch.setattr(os, "preadv", fail)
    warming.run()
    assert (warming.read, warming.reason) == (0, "it could not be read (Input/output error)")


@pytest.mark.parametrize(
    ("found", "room"),
    [
        (Memory(total=16 << 30, available=10 << 30, limit=None), 6 << 30),  # a quarter is the engine's
        (Memory(total=64 << 30, available=6 << 30, limit=8 << 30), 4 << 30),
        (Memory(total=64 << 30, available=300 * MIB, limit=512 * MIB), 44 * MIB),
        (Memory(total=64 << 30, available=100 * MIB, limit=512 * MIB), 0),
    ],
)
def test_the_room_is_what_is_available_but_for_a_reserve(found: Memory, room: int) -> None:
    assert Budget(lambda: found).bytes() == room


def test_it_ends_where_there_is_no_room_for_more(cold: list[Path]) -> None:
    found = Memory(total=1 << 30, available=(256 + 8) * MIB, limit=None)
    warming = Warming(list(map(str, cold)), Budget(lambda: found))
    warming.run()
    assert (warming.read, warming.reason) == (8 * MIB, "there is no room for more")


def test_a_limit_of_the_cgroup_is_not_passed(tmp_path: Path) -> None:
    limit, file = 512 * MIB, tmp_path / "large.safetensors"
    with file.open("wb") as made:  # without blocks on the disk, but with pages in memory
        made.truncate(900 * MIB)
    group = memory_group(limit)
    try:

        def run() -> tuple[WarmingAccount, Memory]:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return told([file]), memory()

        account, found = in_child(run)
        most = next(path for name in ("memory.max_usage_in_bytes", "memory.peak") if (path := group / name).exists())
        assert found.limit == limit
        assert account.reason == "there is no room for more"
        assert 0 < account.read <= limit // 2  # the other half is the reserve
        assert int(most.read_text()) < limit
    finally:
        remove_group(group)


def memory_group(limit: int) -> Path:
    """A new cgroup for memory."""
    for root, name in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"engine-loader-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit))
        except OSError:
            remove_group(group)
            continue
        return group
    pytest.skip("this machine lets nobody make a cgroup with a limit")


def remove_group(group: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # its last process may not be gone yet
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


class Slow(Warming):
    """Reads nothing, and is done when it is told."""

    def __init__(self) -> None:
        super().__init__([], Budget(lambda: ROOM))
        self.ended: list[str] = []

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        while not stopped():
            time.sleep(0.01)
        self.ended.append("told")


def test_it_ends_when_a_loader_begins_to_read(tmp_path: Path) -> None:
    listening = listen(str(tmp_path / "a.safetensors"))
    assert listening is not None
    warming = Slow()
    with listening:
        thread = threading.Thread(target=warm, args=(warming, listening))
        thread.start()
        (tmp_path / "link").symlink_to(tmp_path)
        assert tell_loader_begins(str(tmp_path / "link" / "another.safetensors"))
        thread.join(10)
    assert not thread.is_alive()
    assert warming.reason == "the loader began"


def test_it_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    listening = listen(str(tmp_path / "a.safetensors"))
    assert listening is not None
    lifeline, others = os.pipe()
    with listening:
        thread = threading.Thread(target=warm, args=(Slow(), listening, lifeline))
        thread.start()
        os.close(others)
        thread.join(10)
    os.close(lifeline)
    assert not thread.is_alive()


def test_nobody_is_told_where_nobody_warms(tmp_path: Path) -> None:
    assert not tell_loader_begins(str(tmp_path / "a.safetensors"))
    assert not tell_loader_begins(str(tmp_path / "missing" / "a.safetensors"))


def test_of_two_at_once_one_reads(cold: list[Path]) -> None:
    listening = listen(str(cold[0]))
    assert listening is not None
    with listening:
        assert told(cold) == WarmingAccount(reason="another process does it already")
    assert is_about(told(cold), read=19, resident=0)


def test_another_user_has_a_name_of_its_own(tmp_path: Path) -> None:
    assert f"-{os.geteuid()}-" in name_of(str(tmp_path / "a"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_nobody_else_may_tell(cold: list[Path]) -> None:
    tmp_path = cold[0].parent
    listening = listen(str(cold[0]))
    assert listening is not None
    warming = Slow()
    with listening:
        thread = threading.Thread(target=warm, args=(warming, listening), daemon=True)
        thread.start()
        name = name_of(str(cold[0]))

        def tell() -> None:
            import socket

            with socket.socket(socket.AF_UNIX) as telling:
                telling.connect(name)

        in_child(tell, user=65534)
        time.sleep(0.2)
        assert thread.is_alive()
        assert tell_loader_begins(str(tmp_path / "x"))
        thread.join(10)
    assert warming.ended or not thread.is_alive()


@pytest.fixture(scope="module")
def throttle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes reads slow."""
    library = tmp_path_factory.mktemp("throttle") / "throttle.so"
    code = Path(__file__).parents[2] / "benchmarks" / "throttle.c"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, code, "-ldl"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler")
    return library


ASKING = """
import os, sys, threading
from engine_loader.start.warming import warm_files
thread = threading.Thread(target=lambda: print(warm_files(sys.argv[1:]), flush=True), daemon=True)
thread.start()
sys.stdin.readline()
"""


@pytest.fixture
def asking(cold: list[Path], throttle: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has asked for files which take minutes, and that ends with the next line of its input."""
    link = cold[0].parent / "link"
    link.write_bytes(bytes(16))
    env = {**os.environ, "LD_PRELOAD": str(throttle), "THROTTLE_FILE": str(link), "THROTTLE_BYTES_PER_S": "100000"}
    with subprocess.Popen(
        [sys.executable, "-c", ASKING, *map(str, cold)],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert wait_for(lambda: helper_of(process.pid) and listens(name_of(str(cold[0]))))
            yield process
        finally:
            process.kill()


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += list(map(int, (task / "children").read_text().split()))
    return found


def helper_of(pid: int) -> int:
    return next(iter(children_of(pid)), 0)


def listens(name: str) -> bool:
    return name.replace("\0", "@") in Path("/proc/net/unix").read_text()


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_its_process_has_the_lowest_priority(asking: subprocess.Popen[str]) -> None:
    assert os.getpriority(os.PRIO_PROCESS, helper_of(asking.pid)) == 19


def test_its_process_ends_when_the_loader_begins_and_no_zombie_is_left(
    asking: subprocess.Popen[str], cold: list[Path]
) -> None:
    helper = helper_of(asking.pid)
    assert tell_loader_begins(str(cold[0]))
    assert asking.stdout is not None
    assert "reason='the loader began'" in asking.stdout.readline()
    assert not is_there(helper)


@pytest.mark.parametrize("end", ["killed", "by itself"])
def test_its_process_ends_with_the_one_that_asked(asking: subprocess.Popen[str], end: str) -> None:
    helper = helper_of(asking.pid)
    if end == "killed":
        asking.kill()
    else:
        assert asking.stdin is not None
        asking.stdin.write("\n")
        asking.stdin.flush()
    assert asking.wait(30) == (-signal.SIGKILL if end == "killed" else 0)
    assert wait_for(lambda: not is_there(helper))


def test_that_its_process_was_killed_is_a_reason(asking: subprocess.Popen[str]) -> None:
    os.kill(helper_of(asking.pid), signal.SIGKILL)
    assert asking.stdout is not None
    assert "reason='the process for it failed (it ended with status -9)'" in asking.stdout.readline()


def test_that_no_process_can_be_started_is_a_reason(cold: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/missing/python")
    assert told(cold).reason.startswith("the process for it failed (")


def test_a_checkpoint_of_more_files_than_may_be_open_is_read_whole(tmp_path: Path) -> None:
    paths = [tmp_path / f"model-{number}.safetensors" for number in range(100)]
    for path in paths:
        path.write_bytes(bytes(8192))

    asking = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
    asking += "from engine_loader.start.warming import warm_files\n"
    asking += "account = warm_files(sys.argv[1:]); print(account.size, account.read + account.resident)"
    done = subprocess.run([sys.executable, "-c", asking, *map(str, paths)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(100 * 8192)] * 2


def test_of_a_file_only_what_is_asked_for_is_read(cold: list[Path]) -> None:
    ranges = {str(cold[0]): [(MIB + 5, 100), (3 * MIB, MIB), (8 * MIB, 64 * MIB), (99 * MIB, 1)]}
    account = warm_files([str(cold[0])], ranges)
    page = mmap.PAGESIZE
    assert account.size == account.read + account.resident == 105 + MIB + MIB
    assert account.reason == ""
    with cold[0].open("rb") as file:
        assert resident_share(file.fileno(), MIB) == 0.0
    assert page <= share_of(cold[0]) * 9 * MIB


def test_what_is_asked_for_by_wrong_numbers_is_left(cold: list[Path]) -> None:
    ranges = {str(cold[0]): [(-5, 100), (0, 0), (5, -5), (1 << 70, 1 << 70)]}
    assert warm_files([str(cold[0])], ranges) == WarmingAccount()


def test_names_that_are_no_text_are_told_to_its_process(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.safetensors"))
    path.write_bytes(bytes(MIB))
    assert told([path]).size == MIB


def test_many_small_files_are_read_each_and_what_is_none_is_passed_over(cold: list[Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    budget = Budget(lambda: ROOM)
    each = WarmingEach(map(str, [tmp_path / "missing", tmp_path / "pipe", tmp_path, *cold]), budget)
    warm_each(each)
    assert (each.files, each.read + each.resident, each.reason) == (2, 19 * MIB, "")
    assert min(map(share_of, cold)) > 0.9


def test_the_room_is_shared_by_what_is_read_first_and_the_weights(cold: list[Path]) -> None:
    found = Memory(total=1 << 30, available=(256 + 9) * MIB, limit=None)
    each = WarmingEach([str(cold[0])], Budget(lambda: found))
    warm_each(each)
    warming = Warming([str(cold[1])], each.budget)
    warming.run()
    assert (each.read + each.resident, each.reason) == (9 * MIB, "")
    assert (warming.read + warming.resident, warming.reason) == (0, "there is no room for more")


def test_a_loader_that_begins_ends_what_is_read_first_and_no_weights_are_read(cold: list[Path]) -> None:
    def told() -> Iterator[str]:
        assert tell_loader_begins(str(cold[0]))
        time.sleep(0.5)
        yield str(cold[1])

    each = WarmingEach(told(), Budget(lambda: ROOM))
    assert warm_once(list(map(str, cold)), before=[each]) == {"reason": "the loader began"}


def test_its_process_needs_nothing_but_the_standard_library() -> None:
    root = Path(__file__).parents[2]
    program = "import sys; sys.path.insert(0, sys.argv[1]); from engine_loader.start import page_warmer"
    program += "; print(*(name for name in sys.modules if name.startswith('engine_loader')))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(root)], capture_output=True, text=True, check=True
    )
    ours = {"engine_loader", "engine_loader.start", "engine_loader.start.page_warmer", "engine_loader.machine"}
    ours |= {"engine_loader.start.page_reading", "engine_loader.start.pace"}
    ours |= {"engine_loader.residency", "engine_loader.errors", "engine_loader.escaping", "engine_loader.compat"}
    ours |= {"engine_loader.compat.callable_package", "engine_loader.transfer"}
    assert set(done.stdout.split()) <= ours


def test_it_may_be_called_without_a_process(cold: list[Path]) -> None:
    assert is_about(WarmingAccount.of(warm_once(list(map(str, cold)))), read=19, resident=0)
