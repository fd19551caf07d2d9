"""What people do wrong at first, and the message: each begins with the cause, on real output.

``wrong_usages.txt`` holds what a terminal of 80 columns shows of all of them; it is there to be read. After a change of
messages: ``python -m tests.cli.test_first_contact`` writes it anew.
"""

import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from engine_loader import open_checkpoint
from engine_loader.cli import app
from engine_loader.errors import SettingsError
from engine_loader.sources.object_store.request_failures import object_failure
from tests.cli.running import invoke, on_terminal, without_codes
from tests.support.checkpoints import checkpoint, entry, index

SHOWN = Path(__file__).with_name("wrong_usages.txt")
COLUMNS = (80, 120)
DIRECTORY = "/tmp/models-of-the-first-contact"
"""As long as paths are that people have."""
_OF_A_PERSON = ("AWS_", "GOOGLE_", "AZURE_", "ENGINE_LOADER_")
"""What a person may have set for object stores and for this package."""


@dataclass(frozen=True)
class Usage:
    """A command that cannot succeed; ``DIR`` in arguments and message is the directory that ``make`` fills."""

    arguments: str
    message: str
    make: Callable[[Path], object] = lambda directory: None
    env: dict[str, str] = field(default_factory=dict)


def _file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def _in_a_folder(directory: Path) -> None:
    (directory / "fp16").mkdir()
    (directory / "fp16" / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [8])}))


def _cut_short(directory: Path) -> None:
    content = checkpoint({"a": entry("U8", [1000])})
    (directory / "model-00001-of-00002.safetensors").write_bytes(content[:-500])


def _without_a_shard(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_bytes(index({"a": "model-00001-of-00001.safetensors"}))


WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976698672\n"
WITHOUT_CUDA = " is built for CPUs only" if torch.version.cuda is None else ""
UNKNOWN = "there is no such setting; did you mean"
USAGES = {
    "a pointer of git-lfs": Usage(
        "inspect DIR",
        "DIR/model.safetensors: this is a git-lfs pointer, not the file itself (run `git lfs pull`)",
        _file(WEIGHTS, POINTER),
    ),
    "an HTML page": Usage(
        "inspect DIR",
        "DIR/model.safetensors: this is an HTML page, perhaps the error page of a download (download it again)",
        _file(WEIGHTS, b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>\n"),
    ),
    "config.json as weights": Usage(
        f"inspect DIR/{WEIGHTS}",
        "DIR/model.safetensors: this is JSON, as a config.json or a server's error is, not weights (give the "
        "model's directory, or download the file again)",
        _file(WEIGHTS, b'{\n  "architectures": ["LlamaForCausalLM"]\n}\n'),
    ),
    "GGUF as safetensors": Usage(
        "inspect DIR",
        "DIR/model.safetensors: this is a GGUF file, not a safetensors file (give the model's safetensors files)",
        _file(WEIGHTS, b"GGUF" + struct.pack("<IQQ", 3, 291, 29)),
    ),
    "a file of torch.save as safetensors": Usage(
        "inspect DIR",
        "DIR/model.safetensors: this is a zip file, perhaps a .pt checkpoint (convert it to safetensors)",
        _file(WEIGHTS, b"PK\x03\x04" + bytes(26) + b"archive/data.pkl"),
    ),
    "a shard that is cut short": Usage(
        "inspect DIR",
        "DIR/model-00001-of-00002.safetensors: the data is cut short: the header describes 1074 bytes, the file has "
        "574 (the file is damaged or was not written completely: copy or download it again)",
        _cut_short,
    ),
    "a shard that is missing": Usage(
        "inspect DIR",
        "DIR/model.safetensors.index.json: the index puts 1 tensor into 'model-00001-of-00001.safetensors', which is "
        "not there (the download is not complete: fetch the missing shard)",
        _without_a_shard,
    ),
    "weights in a directory below": Usage(
        "inspect DIR",
        "DIR: no .safetensors file in this directory (there are weights below it, in 'DIR/fp16': give that directory)",
        _in_a_folder,
    ),
    "an empty directory": Usage("inspect DIR", "DIR: no .safetensors file in this directory (it is empty)"),
    "only .bin files": Usage(
        "inspect DIR",
        "DIR: no .safetensors file in this directory (it has PyTorch files; write them as safetensors: engine-loader "
        "convert DIR OUTPUT)",
        _file("pytorch_model.bin", b"PK"),
    ),
    "a path that is not there": Usage(
        "inspect DIR/model",
        "DIR/model: could not open the file: No such file or directory [ENOENT] (check the path; was the file removed "
        "or renamed?)",
    ),
    "a size as pods have it, mistyped": Usage(
        "settings",
        "ENGINE_LOADER_LOADER__BUFFER_BYTES: loader.buffer_bytes = '512Mx': this is not a size like 536870912, 512MiB, "
        "512Mi or 1GB",
        env={"ENGINE_LOADER_LOADER__BUFFER_BYTES": "512Mx"},
    ),
    "one underscore where two are meant": Usage(
        "settings",
        f"ENGINE_LOADER_LOADER_THREADS: {UNKNOWN} ENGINE_LOADER_LOADER__THREADS? (engine-loader settings --env lists "
        "all)",
        env={"ENGINE_LOADER_LOADER_THREADS": "8"},
    ),
    "the same of the compile cache": Usage(
        "settings",
        f"ENGINE_LOADER_COMPILE_CACHE_ENABLED: {UNKNOWN} ENGINE_LOADER_COMPILE_CACHE__ENABLED? (engine-loader settings "
        "--env lists all)",
        env={"ENGINE_LOADER_COMPILE_CACHE_ENABLED": "1"},
    ),
    "a letter that is missing": Usage(
        "settings",
        f"ENGINE_LOADER_LOADER__THREDS: {UNKNOWN} ENGINE_LOADER_LOADER__THREADS? (engine-loader settings --env lists "
        "all)",
        env={"ENGINE_LOADER_LOADER__THREDS": "8"},
    ),
    "a value that is none": Usage(
        "bench read DIR",
        "ENGINE_LOADER_LOADER__MODE: loader.mode = 'fast': Input should be 'auto', 'direct' or 'stream'",
        env={"ENGINE_LOADER_LOADER__MODE": "fast"},
    ),
    "Google's storage that does not answer": Usage(
        "inspect gs://bucket/model",
        "gs://bucket/model: could not list the prefix: the server cannot be reached (check the network, and "
        "object_store_endpoint_url with its http or https, if it is set)",
        env={
            "ENGINE_LOADER_LOADER__OBJECT_STORE_ENDPOINT_URL": "http://127.0.0.1:9",
            "ENGINE_LOADER_LOADER__OBJECT_STORE_ANONYMOUS": "true",
            "ENGINE_LOADER_LOADER__MAX_TRIES": "1",
        },
    ),
    "Azure without an account": Usage(
        "inspect az://container/model",
        "az://container: the object store cannot be reached as configured: Generic MicrosoftAzure error: Account must "
        "be specified (for az://, AZURE_STORAGE_ACCOUNT_NAME must be set)",
    ),
    "a bucket that does not answer": Usage(
        "inspect s3://bucket/model",
        "s3://bucket/model: could not list the prefix: the server cannot be reached (check the network, "
        "AWS_ENDPOINT_URL or object_store_endpoint_url, and its http or https)",
        env={
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
            "ENGINE_LOADER_LOADER__MAX_TRIES": "1",
        },
    ),
    "a URL through pathlib": Usage(
        "inspect s3:/bucket/model",
        "s3:/bucket/model: this is not the URL of an object store (pathlib.Path makes one slash of two: give the URL "
        "as a string)",
    ),
    "to convert into the source": Usage(
        "convert DIR DIR", "DIR: source and destination are one, or one within the other"
    ),
    "a size of shards that is none": Usage(
        "convert DIR DIR/../out --max-shard-size many", "--max-shard-size: 'many' is not a size like 5GB or 512MiB"
    ),
}


def _clean() -> dict[str, str | None]:
    return {name: None for name in os.environ if name.startswith(_OF_A_PERSON)}


@pytest.mark.parametrize("usage", USAGES.values(), ids=list(USAGES))
def test_the_message_begins_with_the_cause(usage: Usage, tmp_path: Path) -> None:
    usage.make(tmp_path)
    arguments = usage.arguments.replace("DIR", str(tmp_path)).split()
    done = invoke(*arguments, env={**_clean(), **usage.env})
    assert done.exit_code in (1, 2), done.output
    assert done.stderr.replace(str(tmp_path), "DIR") == f"error: {usage.message}\n"


def show_all() -> None:
    """Run all usages in this process, each behind its name and its command line."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(_OF_A_PERSON)}
    for name, usage in USAGES.items():
        settings = "".join(f"{key}={value} " for key, value in usage.env.items())
        arguments = usage.arguments.replace("DIR", DIRECTORY).split()
        print(f"{name}\n$ {settings}engine-loader {' '.join(arguments)}", flush=True)
        os.environ.clear()
        os.environ |= {**environ, **usage.env}
        os.mkdir(DIRECTORY)
        try:
            usage.make(Path(DIRECTORY))
            with suppress(SystemExit):
                app(arguments)
        finally:
            shutil.rmtree(DIRECTORY)
        print(flush=True)


def shown(columns: int) -> str:
    """What a terminal of this width shows of all of them."""
    command = [sys.executable, "-m", "tests.cli.test_first_contact"]
    status, output = on_terminal(["--here"], columns=columns, command=command)
    assert status == 0, output
    lines = [line for line in without_codes(output).replace("\r", "").split("\n") if "━" not in line]  # no bars
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("columns", COLUMNS)
def test_lines_end_between_words(columns: int) -> None:
    text = shown(columns)
    for line in text.splitlines():
        if line.startswith("$ "):
            continue
        assert len(line) <= columns or " " not in line.strip(), line
    if columns == COLUMNS[0]:
        assert text == SHOWN.read_text()


@pytest.mark.parametrize(
    ("url", "named", "not_named"),
    [
        ("s3://bucket/key", "AWS_ACCESS_KEY_ID", "GOOGLE"),
        ("gs://bucket/key", "GOOGLE_APPLICATION_CREDENTIALS", "AWS"),
        ("az://bucket/key", "AZURE_STORAGE_ACCOUNT_NAME", "AWS"),
    ],
)
def test_who_denies_is_asked_about_with_its_own_variables(url: str, named: str, not_named: str) -> None:
    error = object_failure(PermissionError("status code: 403"), "read", url)
    assert error.message == "could not read: access was denied (403)"
    assert named in str(error.hint)
    assert not_named not in str(error.hint)


def test_bytes_as_a_pods_limits_have_them() -> None:
    env = {"ENGINE_LOADER_LOADER__BUFFER_BYTES": "1Gi", "ENGINE_LOADER_LOADER__BLOCK_BYTES": "1.5Mi"}
    output = invoke("settings", env=env).output
    assert "loader.buffer_bytes = 1 GiB  ← " in output
    assert "loader.block_bytes = 1536 KiB  ← " in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("device", "cause"),
    [
        ("cuda", f"device = 'cuda': torch {torch.__version__}{WITHOUT_CUDA}"),
        ("cuda:7", f"device = 'cuda:7': torch {torch.__version__}{WITHOUT_CUDA}"),
        ("gpu", "device = 'gpu': Expected"),
    ],
)
def test_a_device_that_is_not_there_is_told_before_anything_is_opened(device: str, cause: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(cause)):
        open_checkpoint("/nowhere", device=device)


def test_an_engine_that_is_not_installed_is_not_compared() -> None:
    done = invoke("compile-cache", "explain", "--engine", "sglang")
    assert done.exit_code == 2
    assert "sglang is not installed here: there is nothing to compare" in " ".join(done.stderr.split())


def main() -> None:
    if sys.argv[1:] == ["--here"]:
        show_all()
        return
    SHOWN.write_text(shown(COLUMNS[0]))
    sys.stdout.write(shown(COLUMNS[1]))


if __name__ == "__main__":
    main()
