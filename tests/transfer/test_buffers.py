"""The pool of buffers: counted, reused when the last view is gone, and never before."""

import gc
import random
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.errors import CheckpointError
from engine_loader.transfer.memory.buffers import BufferPool

KIB, MIB = 1 << 10, 1 << 20


def view(lease, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(lease.memory, dtype=torch.uint8, count=nbytes)


def test_a_buffer_is_as_large_as_asked_and_starts_at_a_page():
    pool = BufferPool(8 * MIB)
    for nbytes in (0, 1, 4096, 4097, MIB, 2 * MIB + 1):
        lease = pool.lease(nbytes)
        assert lease.capacity >= nbytes
        assert lease.address % 4096 == 0
        view(lease, lease.capacity).fill_(1)
        del lease


def test_a_buffer_whose_last_view_is_gone_is_used_again():
    pool = BufferPool(8 * MIB)
    lease = pool.lease(MIB)
    address = lease.address
    one, other = view(lease, 100), view(lease, MIB)[5:10]
    del lease
    assert pool.lease(MIB).address != address
    del one
    assert pool.lease(MIB).address != address
    del other
    assert pool.lease(MIB).address == address


def test_views_of_views_keep_a_buffer():
    pool = BufferPool(8 * MIB)
    lease = pool.lease(MIB)
    address = lease.address
    kept = view(lease, MIB).view(torch.int32)[::2].reshape(2, -1)[1].detach()
    storage = view(lease, MIB).untyped_storage()
    del lease
    gc.collect()
    assert pool.lease(MIB).address != address
    del kept
    assert pool.lease(MIB).address != address
    del storage
    assert pool.lease(MIB).address == address


def test_the_budget_holds():
    pool = BufferPool(4 * MIB)
    leases = [pool.lease(MIB) for _ in range(4)]
    assert None not in leases
    assert pool.lease(1) is None
    assert pool.allocated_bytes == 4 * MIB
    leases.pop()
    assert pool.lease(MIB) is not None
    assert pool.peak_bytes == 4 * MIB


def test_more_than_the_budget_must_be_forced():
    pool = BufferPool(MIB)
    assert pool.lease(3 * MIB) is None
    lease = pool.lease(3 * MIB, force=True)
    assert lease.capacity >= 3 * MIB
    assert pool.peak_bytes == lease.capacity
    del lease
    assert pool.lease(MIB) is not None
    assert pool.allocated_bytes <= MIB


def test_free_buffers_make_room_for_one_of_another_size():
    pool = BufferPool(4 * MIB)
    leases = [pool.lease(MIB) for _ in range(4)]
    leases.clear()
    large = pool.lease(4 * MIB)
    assert large is not None
    assert pool.allocated_bytes == 4 * MIB


def test_a_small_need_does_not_take_a_large_buffer():
    pool = BufferPool(64 * MIB)
    large = pool.lease(32 * MIB)
    del large
    assert pool.lease(MIB).capacity < 32 * MIB


def test_a_disowned_buffer_is_its_holder_s_and_no_longer_counted():
    pool = BufferPool(2 * MIB)
    lease = pool.lease(2 * MIB)
    kept, number = view(lease, 2 * MIB), lease.number
    kept.fill_(5)
    del lease
    assert pool.lease(MIB) is None
    pool.disown(number)
    assert pool.allocated_bytes == 0
    others = [pool.lease(MIB) for _ in range(2)]
    for other in others:
        view(other, MIB).fill_(9)
    assert (kept == 5).all()
    del kept, other
    others.clear()
    assert pool.lease(2 * MIB) is not None
    assert pool.allocated_bytes == 2 * MIB


def test_disowning_what_has_come_back_changes_nothing():
    pool = BufferPool(4 * MIB)
    lease = pool.lease(MIB)
    number, address = lease.number, lease.address
    del lease
    pool.disown(number)
    pool.disown(number)
    pool.disown(12345)
    assert pool.allocated_bytes == MIB
    assert pool.lease(MIB).address == address


def test_views_outlive_the_pool():
    pool = BufferPool(MIB)
    kept = view(pool.lease(MIB), MIB).fill_(3)
    del pool
    gc.collect()
    BufferPool(MIB).lease(MIB)
    assert (kept == 3).all()


def test_memory_that_cannot_be_had_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="no memory for a buffer of"):
        BufferPool(MIB).lease(1 << 50, force=True)


def test_leases_may_end_on_any_thread():
    pool = BufferPool(64 * MIB)
    handed: list[torch.Tensor] = []
    stop = threading.Event()

    def let_go() -> None:
        while not stop.is_set() or handed:
            try:
                tensor = handed.pop()
            except IndexError:
                time.sleep(0)
                continue
            assert int(tensor[0]) == int(tensor[-1])
            del tensor

    threads = [threading.Thread(target=let_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(2000):
        lease = pool.lease(random.Random(number).choice([4096, 70_000, 200_000]), force=True)
        handed.append(view(lease, 4096).fill_(number % 251))
        if number % 7 == 0:
            pool.disown(lease.number)
        del lease
        if len(handed) > 50:
            time.sleep(0)
    stop.set()
    for thread in threads:
        thread.join()
    assert pool.lease(64 * MIB) is not None
    assert pool.allocated_bytes == 64 * MIB


@given(st.lists(st.tuples(st.sampled_from(["lease", "drop", "disown"]), st.integers(0, 7)), max_size=40))
def test_no_two_holders_ever_share_memory_and_the_count_is_right(steps):
    pool = BufferPool(64 * KIB)
    held: list[tuple[int, int, torch.Tensor]] = []
    disowned: set[int] = set()
    for step, choice in steps:
        if step == "lease":
            lease = pool.lease([1, 4096, 4097, 10_000, 20_000, 40_000, 50_000, 100_000][choice], force=choice == 7)
            if lease is not None:
                held.append((lease.number, lease.number % 251, view(lease, lease.capacity).fill_(lease.number % 251)))
            del lease
        elif held and step == "drop":
            held.pop(choice % len(held))
        elif held:
            number = held[choice % len(held)][0]
            pool.disown(number)
            disowned.add(number)
        assert all(bool((tensor == value).all()) for _, value, tensor in held)
        counted = sum(tensor.numel() for number, _, tensor in held if number not in disowned)
        assert counted <= pool.allocated_bytes <= max(pool.peak_bytes, 64 * KIB)
