"""What a command that runs vLLM's code says of its errors: a refusal is called one, and anything else by its cause."""

import re

import pytest

from engine_loader.cli.console.engine_output import quiet_engine
from engine_loader.errors import CheckpointError, EngineLoaderError


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def told(error: Exception) -> str:
    """What is said of an error, its line numbers as N."""
    with pytest.raises(EngineLoaderError) as caught, quiet_engine("resharding"):
        raise error
    assert caught.value.__cause__ is error
    return re.sub(r"line \d+", "line N", str(caught.value))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("1 validation error\n  Value error, Model architectures ['Odd'] are not supported for now."),
        ValueError("Transformers does not recognize this architecture"),
        ValueError("Total number of attention heads (4) must be divisible by tensor parallel size (3)."),
        ValueError("Unknown quantization method: odd"),
        NotImplementedError("OddModel does not support pipeline parallelism"),
    ],
)
def test_what_vllm_refuses_is_told_in_its_own_words(error: Exception) -> None:
    assert told(error) == f"vLLM does not take this model: {error}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("shape mismatch"), "RuntimeError: shape mismatch"),
        (KeyError("model.layers.0"), "KeyError: 'model.layers.0'"),
        (AssertionError(), "AssertionError"),
        (NotImplementedError(), "NotImplementedError"),
        (OSError(95, "Operation not supported", "/x"), "OSError: [Errno 95] Operation not supported: '/x'"),
        (ValueError("too many values\n  to unpack"), "ValueError: too many values; to unpack"),
        (MemoryError("no 8 GiB"), "MemoryError: no 8 GiB"),
    ],
)
def test_anything_else_is_told_with_its_class_and_its_place(error: Exception, said: str) -> None:
    assert (
        told(error)
        == f"resharding failed: {said} ({__file__}, line N, in told); VLLM_LOGGING_LEVEL=DEBUG shows all of it"
    )


def failing() -> None:
    try:
        {}["weight"]
    except KeyError as error:
        raise RuntimeError("could not load layer 3") from error


def test_the_causes_are_told_with_it() -> None:
    with pytest.raises(EngineLoaderError) as caught, quiet_engine("explaining the load"):
        failing()
    assert re.sub(r"line \d+", "line N", str(caught.value)) == (
        f"explaining the load failed: RuntimeError: could not load layer 3 ({__file__}, line N, in failing), caused by "
        f"KeyError: 'weight' ({__file__}, line N, in failing); VLLM_LOGGING_LEVEL=DEBUG shows all of it"
    )


def test_the_traceback_is_shown_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(RuntimeError("once"))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    told(RuntimeError("twice"))
    assert capsys.readouterr().err.splitlines()[-1] == "RuntimeError: twice"


def test_errors_of_this_package_are_told_as_they_are() -> None:
    error = CheckpointError("there is no config.json", file="/x")
    with pytest.raises(CheckpointError) as caught, quiet_engine("resharding"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("name", "said"),
    [("vllm.config", "vLLM cannot be imported here"), ("numba", "vLLM needs what cannot be imported here")],
)
def test_what_cannot_be_imported_is_named(name: str, said: str) -> None:
    assert told(ImportError("no module", name=name)) == f"{said}: no module"
