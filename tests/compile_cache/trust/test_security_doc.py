"""The commands of docs/security.md, run as they stand there."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_loader.compile_cache.trust import load_trust
from tests.compile_cache.support import some_bytes

DOC = (Path(__file__).resolve().parents[3] / "docs" / "security.md").read_text()
VARIABLE = "ENGINE_LOADER_COMPILE_CACHE__"


def commands_of(heading: str) -> str:
    """The shell commands below a heading."""
    section = DOC.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    assert blocks, heading
    return "\n".join(blocks)


class Node:
    """A machine with caches of its own, that shares a store and what lies in the working directory."""

    def __init__(self, work: Path, name: str) -> None:
        self.home = work / name
        self.work = work
        self.home.mkdir()
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ENGINE_LOADER_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "VLLM_CACHE_ROOT": str(self.home / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.home / "inductor"),
            "TRITON_CACHE_DIR": str(self.home / "triton"),
            f"{VARIABLE}DIRECTORY": str(work / "store"),
            f"{VARIABLE}MIN_LOCAL_FREE_BYTES": "0",
            f"{VARIABLE}MIN_STORE_FREE_BYTES": "0",
        }

    def shell(self, script: str) -> str:
        """Run a script, and keep what it exports."""
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{script}\nprintf '\\0'; env -0"],
            cwd=self.work,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        said, _, after = ran.stdout.partition("\0")
        self.environ |= dict(line.split("=", 1) for line in after.split("\0") if line.startswith(VARIABLE))
        return said

    def cache(self, *arguments: str) -> Any:
        """A command of the compile cache; its JSON, whatever its status."""
        words = [sys.executable, "-m", "engine_loader", "compile-cache", *arguments, "--json"]
        ran = subprocess.run(words, cwd=self.work, env=self.environ, capture_output=True, text=True, check=False)
        return json.loads(ran.stdout)

    def write(self, name: str, seed: int) -> None:
        file = self.home / "inductor" / "ab" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(some_bytes(1000, seed))

    def save(self) -> Any:
        return self.cache("save", "--engine", "torch")

    def load(self) -> Any:
        return self.cache("load", "--engine", "torch")


@pytest.fixture
def node(tmp_path: Path) -> Callable[[str], Node]:
    return lambda name: Node(tmp_path, name)


SHORTEST = commands_of("The shortest thing that works: one secret on every machine")


def test_one_secret_on_every_machine(node: Callable[[str], Node], tmp_path: Path) -> None:
    first, second, stranger = node("first"), node("second"), node("stranger")
    first.shell(SHORTEST)
    first.write("kernel.so", 1)
    assert first.save()["status"] == "saved"
    assert stranger.load()["status"] == "refused"
    second.environ |= {f"{VARIABLE}KEY_FILE": str(tmp_path / "compile-cache.key")}
    outcome = second.load()
    assert (outcome["status"], outcome["messages"]) == ("restored", [])
    assert (tmp_path / "compile-cache.key").stat().st_mode & 0o777 == 0o600


def test_nodes_that_restore_cannot_sign(node: Callable[[str], Node]) -> None:
    saver, server = node("saver"), node("server")
    told = saver.shell(commands_of("Ed25519: nodes that restore cannot sign"))
    (public,) = set(re.findall(r"ed25519-public:\S+", told))
    saver.write("kernel.so", 1)
    assert saver.save()["status"] == "saved"
    server.environ |= {f"{VARIABLE}PUBLIC_KEYS": public}
    assert server.load()["status"] == "restored"
    server.write("other.so", 2)
    outcome = server.save()
    assert (outcome["status"], outcome["files"]) == ("nothing", 0)
    assert "this node has public keys only" in outcome["messages"][0]
    server.environ |= {f"{VARIABLE}READ_ONLY": "true"}
    assert server.save()["messages"] == []


def test_replacing_a_key_without_a_miss(node: Callable[[str], Node], tmp_path: Path) -> None:
    first = node("first")
    first.shell(SHORTEST)
    first.write("kernel.so", 1)
    first.save()
    file = tmp_path / "compile-cache.key"
    (old,) = load_trust(str(file)).keys
    steps = [line for line in commands_of("Replacing a key without a miss").splitlines() if line.strip()]
    assert len(steps) == 4
    kept = file.read_text()  # of the machine that takes each step last
    for number, step in enumerate(steps):
        first.shell(step)
        late = node(f"late{number}")
        (late.home / "key").write_text(kept)
        (late.home / "key").chmod(0o600)
        late.environ |= {f"{VARIABLE}KEY_FILE": str(late.home / "key")}
        early = node(f"early{number}")
        early.environ |= {f"{VARIABLE}KEY_FILE": str(file)}
        assert (early.load()["status"], early.load()["status"]) == ("restored", "complete"), step
        assert late.load()["status"] == "restored", step
        kept = file.read_text()
    (new,) = load_trust(str(file)).keys
    assert new != old


def test_stagings_packs_are_not_productions(node: Callable[[str], Node], tmp_path: Path) -> None:
    staging, production = node("staging"), node("production")
    staging.shell(SHORTEST)
    staging.environ |= {f"{VARIABLE}STORE_NAME": "staging"}
    staging.write("kernel.so", 1)
    staging.save()
    production.environ |= {f"{VARIABLE}KEY_FILE": str(tmp_path / "compile-cache.key")}
    production.shell(commands_of("Staging's packs are not production's"))
    outcome = production.load()
    assert (outcome["status"], outcome["files"]) == ("refused", 0)


def test_denying_a_pack(node: Callable[[str], Node], tmp_path: Path) -> None:
    first, second, third = node("first"), node("second"), node("third")
    first.shell(SHORTEST)
    first.write("kernel.so", 1)
    first.save()
    (pack,) = (tmp_path / "store").rglob("*.tar.zst")
    deny, show, remove = (line for line in commands_of("Packs that are bad, or old").splitlines() if line.strip())
    first.environ |= {"PACK": str(pack)}
    first.shell(deny)
    assert "SIGILL on the older nodes" in first.shell(show)
    second.environ |= {f"{VARIABLE}KEY_FILE": str(tmp_path / "compile-cache.key")}
    outcome = second.load()
    assert outcome["status"] == "refused"
    assert "SIGILL on the older nodes" in outcome["messages"][0]
    (tmp_path / "store" / "denied.json").unlink()
    assert second.load()["messages"] == outcome["messages"]  # the store's marker has a copy
    marker = tmp_path / "store" / "engine-loader-store.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "denied": None}))
    outcome = second.load()
    assert outcome["status"] == "refused"
    assert "denied.json is missing" in outcome["messages"][-1]
    second.cache("deny", "--renew")
    assert second.load()["messages"] == outcome["messages"][:-1]
    first.shell(remove)
    third.environ |= {f"{VARIABLE}KEY_FILE": str(tmp_path / "compile-cache.key")}
    assert third.load()["status"] == "restored"


def test_a_secret_that_others_may_read_warns_at_each_restore(node: Callable[[str], Node], tmp_path: Path) -> None:
    first, second = node("first"), node("second")
    first.shell(SHORTEST)
    first.write("kernel.so", 1)
    first.save()
    # Not below pytest's own directory, which each run of pytest closes to others.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        key = Path(shutil.copy(tmp_path / "compile-cache.key", place))
        key.chmod(0o644)
        second.environ |= {f"{VARIABLE}KEY_FILE": str(key)}
        for status in ("restored", "complete"):
            outcome = second.load()
            assert outcome["status"] == status
            assert ["others may read it (mode 644)" in message for message in outcome["messages"]] == [True]
