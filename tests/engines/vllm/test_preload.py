"""`vllm preload`: the daemon's process, which loads no plugins, loads by this package's reader."""

import multiprocessing
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.vllm_inprocess import differences, load_state, state_of

pytestmark = pytest.mark.timeout(300)


def _run_daemon(vllm_config: Any, init_method: str, target: str, answers: "Queue[str]") -> None:
    """As vLLM's `_run_daemon`, up to serving, on a machine without accelerator."""
    from vllm.model_executor.model_loader.weight_cache import daemon as vllm_daemon

    for name in ("set_device_index", "empty_cache", "memory_allocated", "memory_reserved"):
        setattr(torch.accelerator, name, lambda *_: 0)
    vllm_daemon.process_weights_after_loading = lambda *_: None  # else they are packed, and cannot be compared
    daemon = vllm_daemon.WeightCacheDaemon(vllm_config, 0, 0, init_method)
    try:
        daemon.load_model()
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")
        raise
    assert daemon.model is not None
    torch.save(state_of(daemon.model), target)
    answers.put("loaded")


def test_the_daemons_process_knows_the_format(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm.model_executor.model_loader.weight_cache.daemon")
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(llama), load_format="b10_3fs", dtype="bfloat16", max_model_len=256, enforce_eager=True
    ).create_engine_config()
    spawn = multiprocessing.get_context("spawn")
    answers: Queue[str] = spawn.Queue()
    target = tmp_path / "state.pt"
    process = spawn.Process(
        target=_run_daemon, args=(config, f"file://{tmp_path}/store", str(target), answers), daemon=True
    )
    process.start()
    try:
        assert answers.get(timeout=240) == "loaded"
        process.join(60)
    finally:
        process.kill()
    expected, found = ({**loaded} for loaded in (load_state(llama, "auto")[0], torch.load(target)))
    assert expected.keys() == found.keys()
    for name in [name for name in expected if name.endswith("cos_sin_cache")]:
        # Computed, not loaded: the last bits of sines depend on the number of threads of a process.
        torch.testing.assert_close(found.pop(name), expected.pop(name))
    assert not differences(expected, found)
