"""Seeded rounds of the node's cache of weights, in a process of its own: several readers at once, on a small disk.

    python -m tests.sources.object_store.kept_rounds ENDPOINT DIRECTORY SEED ROUNDS

In each round readers are killed, objects change, files of the cache are cut short or deleted, and the disk (a tmpfs of
6 MiB, where this machine lets a process mount one) is often full. A reader that gets a wrong byte ends with status 3.
Prints what happened, as JSON.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

from engine_loader.errors import CheckpointError
from engine_loader.sources.kept import node_cache
from engine_loader.sources.object_store.client import ObjectStoreOptions
from engine_loader.sources.object_store.object_source import ObjectStoreSource
from tests.support.mounts import mount_tmpfs, own_mounts

MIB = 1 << 20
KEYS = ("a", "b", "c")
WRONG = 3


def content_of(key: str, version: int) -> bytes:
    """The bytes of an object; its size tells its version."""
    nbytes = 2 * MIB + 4096 * KEYS.index(key) + 7 * version
    return np.random.default_rng([KEYS.index(key), version]).bytes(nbytes)


def version_of(key: str, size: int) -> int:
    return (size - 2 * MIB - 4096 * KEYS.index(key)) // 7


def put(endpoint: str, key: str, version: int) -> None:
    urlopen(Request(f"{endpoint}/bucket/{key}", data=content_of(key, version), method="PUT")).read()


def read(endpoint: str, directory: Path, seed: int) -> int:
    """Read random parts of random objects, and compare them; the status to end with."""
    rng = random.Random(seed)
    cache = node_cache._cache_at(str(directory), rng.choice((None, 3 * MIB)))
    options = ObjectStoreOptions(range_bytes=rng.choice((64, 256, 1024)) << 10, endpoint_url=endpoint, anonymous=True)
    source = ObjectStoreSource(options, cache=cache)
    for key in rng.sample(KEYS, rng.randint(1, len(KEYS))):
        file = source.open(f"s3://bucket/{key}")
        expected = content_of(key, version_of(key, file.size))
        for _ in range(rng.randint(1, 6)):
            begin = rng.randrange(file.size)
            end = min(file.size, begin + rng.randint(1, MIB))
            target = bytearray(end - begin)
            cuts = sorted(rng.sample(range(len(target) + 1), min(3, len(target))))
            done = 0
            while done < len(target):
                edges = [done, *(cut for cut in cuts if cut > done), len(target)]
                view = memoryview(target)
                buffers = [view[left:right] for left, right in itertools.pairwise(edges) if left < right]
                try:
                    done += file.read_into(begin + done, buffers)
                except CheckpointError as error:
                    if "was replaced" not in str(error):
                        raise
                    break
            if target[:done] != expected[begin : begin + done]:
                return WRONG
        if rng.random() < 0.5:
            file.close()
    if cache is not None and rng.random() < 0.7:
        cache.flush(1)
    return 0


def damage(directory: Path, rng: random.Random) -> str:
    """Do something to the cache that a disk or a person could do."""
    ranges = sorted(directory.glob("engine_loader-weights-*/*/*/*-*"))
    if not ranges:
        return "nothing"
    victim = rng.choice(ranges)
    what = rng.choice(("cut", "delete", "delete version", "directory"))
    try:
        if what == "cut":
            os.truncate(victim, rng.randrange(victim.stat().st_size))
        elif what == "delete":
            victim.unlink()
        elif what == "delete version":
            shutil.rmtree(victim.parent)
        else:
            victim.unlink()
            victim.mkdir()
    except OSError:  # it has just gone
        return "nothing"
    return what


def run_round(endpoint: str, directory: Path, rng: random.Random, versions: dict[str, int], told: Counter[str]) -> None:
    readers = []
    for _ in range(rng.randint(1, 3)):
        seed = rng.randrange(1 << 32)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = read(endpoint, directory, seed)
            finally:
                sys.stderr.flush()
                os._exit(status)
        readers.append(pid)
    if rng.random() < 0.4:
        time.sleep(rng.random() * 0.05)
        key = rng.choice(KEYS)
        versions[key] += 1
        put(endpoint, key, versions[key])
        told["changed"] += 1
    if rng.random() < 0.4:
        told[damage(directory, rng)] += 1
    for pid in readers:
        if rng.random() < 0.4:
            time.sleep(rng.random() * 0.1)
            os.kill(pid, signal.SIGKILL)
    for pid in readers:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told["killed" if status == -signal.SIGKILL else f"status {status}"] += 1


def main() -> None:
    endpoint, directory, seed, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    told: Counter[str] = Counter()
    try:
        own_mounts()
        mount_tmpfs(directory, "size=6m,mode=755")
        told["small disk"] += 1
    except OSError:
        pass
    rng = random.Random(seed)
    versions = dict.fromkeys(KEYS, 0)
    for key in KEYS:
        put(endpoint, key, 0)
    for _ in range(rounds):
        run_round(endpoint, directory, rng, versions, told)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
