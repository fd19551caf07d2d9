"""What was copied before processes meet is in memory when they do: the others may read it then."""

import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from safetensors.torch import load_file

from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from tests.loading.direct.model import Model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A store of the only rank of a group: of a group of its own, or of one that a model loaded here has left."""
    path = tmp_path_factory.mktemp("store") / "store"
    made = dist.FileStore(str(path), 1)
    there = dist.is_initialized()
    if not there:
        dist.init_process_group("gloo", store=made, rank=0, world_size=1, timeout=timedelta(seconds=60))
    made.set("there", "1")
    yield made
    if not there:
        dist.destroy_process_group()


def send(store: Any) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.send("copied")
    assert theirs.recv() == "copied"


def put(store: Any) -> None:
    multiprocessing.get_context("spawn").SimpleQueue().put("copied")


def collective(store: Any) -> None:
    group = dist.distributed_c10d._get_default_group()
    group._get_backend(torch.device("cpu")).barrier(dist.BarrierOptions()).wait()


MEETINGS: dict[str, Callable[[Any], object]] = {
    "barrier": lambda store: dist.barrier(),
    "monitored_barrier": lambda store: dist.monitored_barrier(),
    "all_reduce of something else": lambda store: dist.all_reduce(torch.ones(1)),
    "all_gather_object": lambda store: dist.all_gather_object([None], "copied"),
    "broadcast_object_list": lambda store: dist.broadcast_object_list(["copied"], 0),
    "functional": lambda store: functional.wait_tensor(functional.all_reduce(torch.ones(1), "sum", dist.group.WORLD)),
    "a backend without its group": collective,
    "store.set": lambda store: store.set("copied", "1"),
    "store.wait": lambda store: store.wait(["there"], timedelta(seconds=60)),
    "store.add": lambda store: store.add("count", 1),
    "store with a prefix": lambda store: dist.PrefixStore("a", store).set("copied", "1"),
    "pipe": send,
    "queue": put,
    "event": lambda store: multiprocessing.get_context("spawn").Event().set(),
    "barrier of processes": lambda store: multiprocessing.get_context("spawn").Barrier(1).wait(),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_copies_are_done_when_processes_meet(meeting: str, store: Any, checkpoint: Path) -> None:
    model = Model()
    address, nbytes = model.weight.data_ptr(), model.weight.nbytes  # before the load: not known as exposed
    expected = load_file(checkpoint)["a"].numpy().tobytes()
    settings = load_settings({}).settings.loader
    with DirectLoad(model) as load, torch.no_grad():
        for name, tensor in stream_weights([str(checkpoint)], settings, direct=load):
            if name == "a":
                model.weight.copy_(tensor)
                break
        assert load.pending()
        MEETINGS[meeting](store)
        assert not load.pending()
        assert ctypes.string_at(address, nbytes) == expected


def test_what_is_replaced_for_a_load_is_put_back(store: Any, checkpoint: Path) -> None:
    groups = (torch._C._distributed_c10d.ProcessGroup, torch._C._distributed_c10d.Backend)
    before = [kind.barrier for kind in groups], dist.Store.set, multiprocessing.connection.Connection.send
    own = "wait" in vars(multiprocessing.synchronize.Barrier)
    with DirectLoad(Model()):
        assert dist.Store.set is not before[1]
    assert ([kind.barrier for kind in groups], dist.Store.set, multiprocessing.connection.Connection.send) == before
    assert ("wait" in vars(multiprocessing.synchronize.Barrier)) is own


def test_a_tensor_of_the_checkpoint_can_be_sent(store: Any, checkpoint: Path) -> None:
    settings = load_settings({}).settings.loader
    with DirectLoad(Model()) as load, torch.no_grad():
        for name, tensor in stream_weights([str(checkpoint)], settings, direct=load):
            if name == "a":
                dist.all_reduce(tensor)
                result = [torch.empty_like(tensor, device="cpu")]
                dist.all_gather(result, tensor)
                got = [part.clone() for part in result]
    assert torch.equal(got[0], load_file(checkpoint)["a"])
