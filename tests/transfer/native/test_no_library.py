"""Where the package was installed without a compiler: what the first load says, and that pip's cache is named."""

import logging
from pathlib import Path

import pytest

from engine_loader import open_checkpoint
from engine_loader.transfer import constructor
from engine_loader.transfer.native import library
from tests.support.checkpoints import checkpoint, entry

LINE = "ENGINE_LOADER_NATIVE_BUILD=require pip install --no-cache-dir --force-reinstall --no-deps engine-loader"


def test_the_first_load_says_with_which_line_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / "libengine_loader_native.so"
    monkeypatch.setattr(library, "library_path", lambda: missing)
    library.load_library.cache_clear()
    constructor._native_is_there.cache_clear()
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [16])}))
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                with open_checkpoint(tmp_path) as opened:
                    assert opened.get_tensor("a").numel() == 16
    finally:
        library.load_library.cache_clear()
        constructor._native_is_there.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"reading with the slower pure-Python reader threads: {missing}: the native library was not built when this "
        f"package was installed (install a C++17 compiler (apt-get install g++), then: {LINE})"
    ]
