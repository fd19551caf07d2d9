"""What a save takes from the local caches: what compilers make, and what nobody else could have written."""

import os
from pathlib import Path

import pytest

from engine_loader.compile_cache.directories import ENGINES, INDUCTOR, TRITON, CacheRoot
from engine_loader.compile_cache.packs.layouts import LAYOUTS, made_by_compiler
from engine_loader.compile_cache.packs.scan import LocalFile, open_unchanged, scan
from tests.compile_cache.support import Machine

KEY = "A" * 52
DIGEST = "cabk7d3zqk4x5v2w6y7t2i5p3o4n6m7l2k3j4h5g6f7d2s3a4z"
HEX = "0123456789abcdef" * 4


def paths(files: list[LocalFile]) -> list[str]:
    return [file.path for file in files]


class TestLayouts:
    def test_a_home_directory_in_the_place_of_a_cache_keeps_what_is_its_own(self, tmp_path: Path) -> None:
        """Every variable that names a cache names the home directory."""
        secrets = (
            ".git-credentials",
            ".netrc",
            ".ssh/id_rsa",
            ".ssh/config",
            ".aws/credentials",
            ".docker/config.json",
            ".cache/huggingface/token",
            "id_rsa",
            "secrets.json",
            "go/main.go",
            "go/token.json",
            "work/service-account.json",
            "work/settings.py",
            "work/.env",
            "KEYS/prod.json",
            "KEYS/id_ed25519",
            "notes.txt",
        )
        for path in (*secrets, f"{KEY}/kernel.cubin"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("a secret")
        for engine, roots in ENGINES.items():
            for root in roots:
                found = paths(scan([root], {root.name: tmp_path}))
                assert not {path.partition("/")[2] for path in found} & set(secrets), (engine, root.name, found)
        assert paths(scan([TRITON], {"triton": tmp_path})) == [f"triton/{KEY}/kernel.cubin"]

    @pytest.mark.parametrize(
        ("cache", "path"),
        [
            ("inductor", f"ab/{DIGEST}.py"),
            ("inductor", f"ab/{DIGEST}.main.so"),
            ("inductor", f"ab/{DIGEST}.best_config"),
            ("inductor", "fxgraph/mt/fmtb6nfz/ab12"),
            ("inductor", "aotautograd/a7x/entry"),
            ("inductor", f"triton/0/{KEY}/triton_poi_fused_0.json"),
            ("inductor", "precompiled_headers/c2wd32fromm623gtw33upituzpft4apbzxpfhqe5ktfbtp3yw4kr.h.gch"),
            ("triton", f"{KEY}/__grp__kernel.json"),
            ("triton", f"{KEY}/kernel.cubin"),
            ("triton", f"{HEX}/cuda_utils.so"),
            ("vllm", "torch_compile_cache/0a1b2c3d4e/rank_0_0/backbone/computation_graph.py"),
            ("vllm", f"torch_compile_cache/torch_aot_compile/{HEX}/rank_0_0/model"),
            ("vllm", "modelinfos/vllm-model_executor-models-llama-LlamaForCausalLM.json"),
            ("vllm", f"flashinfer_autotune_cache/0.6/90a/{HEX}/autotune_configs.json"),
            ("vllm", "startup_plan/startup_plan_0a1b2c.json"),
            ("flashinfer", "0.6.2/90a/cached_ops/batch_decode/build.ninja"),
            ("flashinfer", "0.6.2/90a/generated/batch_decode/batch_decode.cu"),
            ("deep_gemm", "cache/kernel.fp8_gemm.0123456789abcdef/kernel.cubin"),
            ("tvm_ffi", "add_one_0123456789abcdef/add_one.so"),
            ("tilelang", f"{HEX}/params.pkl"),
            ("cuda", "a/7/0123456789abcd"),
            ("cuda", "index"),
            ("sglang", f"triton/{KEY}/_fwd_kernel.json"),
            ("sglang", "torch_compile_cache/0a1b2c3d4e/rank_0_0/eagle/artifact"),
            ("sglang_jit", "cuda_90a/rope/build-01/deps-02/rope.so"),
            ("torch_extensions", "py312_cu130/ext/ext.so"),
            ("torch_extensions", "py312_cu130/ext/.ninja_log"),
            ("of another compiler", f"{HEX}/kernel.json"),
        ],
    )
    def test_what_compilers_make_is_taken(self, cache: str, path: str) -> None:
        assert made_by_compiler(cache, path)

    def test_every_cache_has_a_layout_by_its_name(self) -> None:
        names = {root.name for roots in ENGINES.values() for root in roots}
        assert names <= LAYOUTS.keys() | {"torch_extensions"}


class TestOwnership:
    """As a restore has it."""

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        place = tmp_path / "cache"
        for path in ("ab/one.so", "cd/two.so"):
            (place / path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            (place / path).write_bytes(b"code")
        return place

    def found(self, cache: Path) -> tuple[list[str], list[str]]:
        messages: list[str] = []
        return paths(scan([INDUCTOR], {"inductor": cache}, messages)), messages

    def test_a_private_cache_is_taken(self, cache: Path) -> None:
        assert self.found(cache) == (["inductor/ab/one.so", "inductor/cd/two.so"], [])

    @pytest.mark.parametrize(
        ("open_one", "left"),
        [("", []), ("ab", ["inductor/cd/two.so"]), ("ab/one.so", ["inductor/cd/two.so"])],
        ids=["root", "directory", "file"],
    )
    @pytest.mark.parametrize("mode", [0o777, 0o720])
    def test_what_others_may_write_is_left_and_told(
        self, cache: Path, open_one: str, left: list[str], mode: int
    ) -> None:
        (cache / open_one).chmod(mode)
        found, messages = self.found(cache)
        assert found == left
        (message,) = messages
        assert f"others may write it (mode {mode:o})" in message
        assert str(cache / open_one) in message
        assert "chmod" in message

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    @pytest.mark.parametrize(
        ("given", "left"), [("", []), ("ab", ["inductor/cd/two.so"]), ("ab/one.so", ["inductor/cd/two.so"])]
    )
    def test_what_another_user_owns_is_left_and_told(self, cache: Path, given: str, left: list[str]) -> None:
        os.chown(cache / given, 12345, 12345)
        found, messages = self.found(cache)
        assert found == left
        assert "it belongs to user 12345" in messages[0]

    def test_many_are_told_of_in_one_line(self, cache: Path) -> None:
        for path in ("ab/one.so", "cd/two.so"):
            (cache / path).chmod(0o666)
        found, (message,) = self.found(cache)
        assert found == []
        assert "(and 1 more)" in message

    def test_a_link_of_this_user_in_the_place_of_a_cache_is_followed(self, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("cache")
        assert len(self.found(tmp_path / "link")[0]) == 2

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
    def test_a_link_of_another_user_in_the_place_of_a_cache_is_refused(self, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("cache")
        os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
        found, (message,) = self.found(tmp_path / "link")
        assert found == []
        assert "it is a link of user 12345" in message

    def test_links_to_directories_of_the_cache_are_not_walked_and_those_that_lead_out_are(
        self, cache: Path, tmp_path: Path
    ) -> None:
        (cache / "ef").symlink_to("ab")
        assert self.found(cache) == (["inductor/ab/one.so", "inductor/cd/two.so"], [])
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/three.so").write_bytes(b"code")
        (cache / "gh").symlink_to(tmp_path / "elsewhere")
        assert self.found(cache) == (["inductor/ab/one.so", "inductor/cd/two.so", "inductor/gh/three.so"], [])
        (tmp_path / "elsewhere").chmod(0o777)
        found, (message,) = self.found(cache)
        assert found == ["inductor/ab/one.so", "inductor/cd/two.so"]
        assert f"{cache / 'gh'}: others may write it" in message

    def test_modes_below_a_directory_that_nobody_else_can_enter_do_not_count(self, cache: Path) -> None:
        (cache / "ab/one.so").chmod(0o777)
        cache.chmod(0o700)
        assert self.found(cache) == (["inductor/ab/one.so", "inductor/cd/two.so"], [])

    def test_a_file_that_was_replaced_since_is_not_read(self, cache: Path, tmp_path: Path) -> None:
        file = scan([INDUCTOR], {"inductor": cache})[0]
        (tmp_path / "new").write_bytes(b"else")
        (tmp_path / "new").replace(file.local)
        with pytest.raises(OSError, match="replaced"):
            os.close(open_unchanged(file))

    def test_a_pack_holds_what_was_scanned(self, tmp_path: Path) -> None:
        """Between the scan and the packing a file gives way to a link to a secret of the same size and time."""
        machine = Machine(tmp_path / "machine", tmp_path / "store")
        file = machine.write("inductor/ab/one.so", b"code", mtime_ns=10**18)
        machine.write("inductor/ab/two.so", b"code")
        files = scan((INDUCTOR,), machine.directories)
        file.unlink()
        (tmp_path / "secret").write_bytes(b"pass")
        os.utime(tmp_path / "secret", ns=(10**18, 10**18))
        os.link(tmp_path / "secret", file)
        assert machine.save_files(files).files == 1
        other = Machine(tmp_path / "other", tmp_path / "store")
        other.restore()
        assert other.content() == {"inductor/ab/two.so": b"code"}


def test_a_root_that_is_not_there_has_nothing(tmp_path: Path) -> None:
    messages: list[str] = []
    assert scan([CacheRoot("inductor", "X", "~")], {"inductor": tmp_path / "missing"}, messages) == []
    assert messages == []
