"""The real `vllm serve` on the emulator's mount: the same completion, read by USRBIO."""

from pathlib import Path

import pytest

from tests.support.threefs import emulator
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

pytestmark = pytest.mark.engine

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def llama() -> Path:
    return make_model("llama", emulator().mount / "llama", shards=3)


def completion(model: Path, *args: str, env: dict[str, str]) -> tuple[str, str]:
    with VllmServer(model, *args, env=env) as server:
        text = server.complete(PROMPT, max_tokens=24)
    return text, server.log


def test_a_model_on_3fs_is_served_the_same_and_read_by_usrbio(llama: Path) -> None:
    environment = emulator().environment("jitter_us=500,short_every=5,error_every=11")
    text, log = completion(llama, "--load-format", "b10_3fs", env=environment)
    expected, _ = completion(llama, "--load-format", "auto", env={})
    assert expected.strip()
    assert text == expected
    (line,) = [line for line in log.splitlines() if "b10_3fs: loaded" in line]
    assert "from usrbio (cpp engine" in line
    assert "usrbio" in line.partition("threads")[2]
    assert f"files on the 3FS mount {emulator().mount} are read by USRBIO" in log
    assert not list((emulator().mount / "3fs-virt" / "iovs").iterdir())


def test_usrbio_that_was_asked_for_and_cannot_be_had_ends_the_engine(llama: Path) -> None:
    server = VllmServer(
        llama,
        "--load-format",
        "b10_3fs",
        "--model-loader-extra-config",
        '{"backend": "usrbio"}',
    )
    with pytest.raises(RuntimeError, match=r"ended with status [1-9]"), server:
        pass
    assert "backend usrbio is not available" in server.log
    assert "HF3FS_LIB_DIR is not set" in server.log
