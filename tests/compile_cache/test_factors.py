"""What is stored of an engine's keys holds no secret."""

import json
from pathlib import Path

import pytest

from engine_loader.compile_cache.directories import VLLM
from engine_loader.compile_cache.packs.key_packs import read_packs
from engine_loader.compile_cache.packs.scan import scan
from engine_loader.compile_cache.process.save import factors_of, save
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.verdict.factors import without_secrets
from tests.compile_cache.support import KEY, SECRET

HIDDEN = "hunter2-swordfish"


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_API_KEY",
        "HF_TOKEN",
        "S3_SECRET",
        "DB_PASSWORD",
        "SMTP_PASSWD",
        "BASIC_AUTH",
        "X_CREDENTIALS",
        "SENTRY_DSN",
    ],
)
def test_what_is_named_as_a_secret_is_left_out(name: str) -> None:
    assert without_secrets({name: HIDDEN, "inner": {name.lower(): [HIDDEN]}}) == {"inner": {}}


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("sk-proj-abcdefghijklmnop1234", "***"),
        ("hf_abcdefghijklmnopqrstu", "***"),
        ("ghp_abcdefghijklmnopqrstu", "***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIx.c2ln", "***"),
        ("http://user:swordfish@proxy:3128/x", "http://***@proxy:3128/x"),
        ("--header 'Authorization: Bearer abc.def-123456'", "--header 'Authorization: ***'"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "***"),
    ],
)
def test_a_value_that_is_a_secret_is_replaced_whatever_its_name(value: str, left: str) -> None:
    assert without_secrets({"VLLM_EXTRA": value, "list": [value]}) == {"VLLM_EXTRA": left, "list": [left]}


def test_what_explains_a_miss_stays() -> None:
    factors = {
        "env": {"VLLM_PLUGINS": "b10_3fs", "VLLM_NIXL_SIDE_CHANNEL_PORT": 5600, "CUDA_HOME": "/usr/local/cuda"},
        "num_key_value_heads": 8,
        "max_num_batched_tokens": 8192,
        "config_hash": "0f" * 32,
        "url": "https://example.com/path",
    }
    assert without_secrets(factors) == factors


def test_an_older_engines_account_of_its_key_is_stored_without_its_secrets(tmp_path: Path) -> None:
    """Older engines write all variables into the file."""
    local = tmp_path / "vllm"
    model = local / "torch_compile_cache" / "0123456789" / "rank_0_0"
    model.mkdir(parents=True)
    (model / "code.py").write_text("compiled")
    account = {"env": {"VLLM_API_KEY": HIDDEN, "HTTPS_PROXY": f"http://me:{HIDDEN}@proxy", "VLLM_PLUGINS": "a"}}
    (model / "cache_key_factors.json").write_text(json.dumps(account))
    files = scan((VLLM,), {"vllm": local})
    store = FilesystemStore(tmp_path / "store", SECRET)
    for expected in ("saved", "complete"):
        outcome = save(
            store,
            KEY,
            {"vllm": local},
            files,
            SECRET,
            factors=factors_of(files),
            threads=1,
            level=1,
            most_bytes=1 << 30,
        )
        assert outcome.status == expected
    (pack,) = read_packs(store, KEY, SECRET, [])
    assert [Path(file.path).name for file in pack.manifest.files] == ["code.py"]
    (stored,) = pack.manifest.factors.values()
    assert stored == {"env": {"HTTPS_PROXY": "http://***@proxy", "VLLM_PLUGINS": "a"}}
    assert HIDDEN.encode() not in pack.manifest.to_json()
