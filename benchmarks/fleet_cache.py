"""A fleet of pods that share a compile cache in an object store, simulated: the code of restore, save, compaction and
pruning is the real one, the object store lies in memory, and requests take turns in an order that a seed decides.

python -m benchmarks.fleet_cache [--pods 500] [--kernels 40] [--seed 1]

All pods start at once on an empty key, again on a full one, and again after an upgrade (another key). Printed are packs
left, and bytes and requests per pod. Waiting takes no time: the clock of the simulation moves on when all pods wait.
"""

import argparse
import base64
import contextlib
import hashlib
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
from obstore.store import MemoryStore

from engine_loader.compile_cache.directories import INDUCTOR, TRITON
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.key_packs import living, read_key
from engine_loader.compile_cache.packs.scan import scan
from engine_loader.compile_cache.process import save as saving
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.restore import Restore
from engine_loader.compile_cache.process.save import Save, SaveOptions
from engine_loader.compile_cache.process.tidy import policy_of, tidy
from engine_loader.compile_cache.retention import GRACE_S, prune
from engine_loader.compile_cache.stores.objects import ObjectCacheStore
from engine_loader.compile_cache.stores.uses import note_used
from engine_loader.compile_cache.trust import Trust
from engine_loader.settings import CompileCacheSettings

TRUST = Trust(b"a key of a benchmark, not secret")
OLD = CacheKey((("engine", "1"), ("torch", "2.13.0")), "model_tp1")
NEW = CacheKey((("engine", "2"), ("torch", "2.13.0")), "model_tp1")
WAIT_S = 300.0
VARIANTS = 20


@dataclass
class Use:
    """What a pod asked of the store."""

    requests: int = 0
    read: int = 0
    written: int = 0


class Schedule:
    """Threads that take turns: one runs, until it asks for something or waits; the seed says which is next."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._turns: list[threading.Semaphore] = []
        self._ready: list[int] = []
        self._sleeping: dict[int, float] = {}
        self._running: int | None = None
        self.now = 0.0
        self.uses: dict[int, Use] = {}
        self._ids = threading.local()
        self._alive = 0

    def run(self, work: list[Callable[[], None]]) -> None:
        """Carry out all pieces of work, each in a thread."""
        failures: list[BaseException] = []
        self._alive = len(work)
        self._ready = list(range(len(work)))
        self.uses = {number: Use() for number in self._ready}
        self._turns = [threading.Semaphore(0) for _ in work]
        threads = [
            threading.Thread(target=self._carry_out, args=(number, piece, failures))
            for number, piece in enumerate(work)
        ]
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def current(self) -> Use:
        """The use of the pod whose turn it is. Threads of its own count for it."""
        return self.uses[self._running] if self._running is not None else Use()

    def pause(self) -> None:
        """Let another go on."""
        number = getattr(self._ids, "number", None)
        if number is not None:
            with self._lock:
                self._ready.append(number)
                self._next()
            self._turns[number].acquire()

    def sleep(self, seconds: float) -> None:
        """Let others go on for so long, in the time of the simulation."""
        number = getattr(self._ids, "number", None)
        if number is not None:
            with self._lock:
                self._sleeping[number] = self.now + seconds
                self._next()
            self._turns[number].acquire()

    def _carry_out(self, number: int, piece: Callable[[], None], failures: list[BaseException]) -> None:
        self._ids.number = number
        self._turns[number].acquire()
        try:
            piece()
        except BaseException as error:
            failures.append(error)
        with self._lock:
            self._next()

    def _next(self) -> None:
        if not self._ready and self._sleeping:
            first = min(self._sleeping, key=lambda one: (self._sleeping[one], one))
            self.now = max(self.now, self._sleeping[first])
        self._ready += [one for one, until in self._sleeping.items() if until <= self.now]
        self._sleeping = {one: until for one, until in self._sleeping.items() if until > self.now}
        self._running = self._ready.pop(self._chance.randrange(len(self._ready))) if self._ready else None
        if self._running is not None:
            self._turns[self._running].release()


@contextlib.contextmanager
def counted(schedule: Schedule) -> Iterator[None]:
    """Count every request to the object store, and have it end the turn of its pod."""
    plain = {name: getattr(obstore, name) for name in ("get", "put", "head", "delete", "list")}

    def get(store: Any, path: str, **options: Any) -> Any:
        answer = asked(plain["get"])(store, path, **options)
        begin, end = answer.range
        schedule.current().read += end - begin
        return answer

    def put(store: Any, path: str, content: Any, **options: Any) -> Any:
        schedule.current().written += len(content) if isinstance(content, bytes) else Path(content).stat().st_size
        return asked(plain["put"])(store, path, content, **options)

    def asked(call: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any, **options: Any) -> Any:
            schedule.pause()
            schedule.current().requests += 1
            return call(*arguments, **options)

        return ask

    clock = SimpleNamespace(monotonic=lambda: schedule.now, sleep=schedule.sleep)
    waiting = vars(saving)["time"]
    vars(saving)["time"] = clock
    obstore.get, obstore.put = get, put  # type: ignore[assignment]
    for name in ("head", "delete", "list"):
        setattr(obstore, name, asked(plain[name]))
    try:
        yield
    finally:
        vars(saving)["time"] = waiting
        for name, call in plain.items():
            setattr(obstore, name, call)


@dataclass
class Round:
    """What a start of the whole fleet cost.

    Attributes:
        restores, saves: of each pod.
        files_bytes: compressed bytes of the files that a pod restored.
        packs: of the key that are left, without those that a compaction replaces.
    """

    restores: list[Use] = field(default_factory=list)
    saves: list[Use] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    packs: int = 0
    stored: int = 0


class Fleet:
    """Pods that share a store.

    Args:
        directory: for their local caches.
        kernels: that every pod compiles, of a few KiB each; one pod in ten compiles one more.
    """

    def __init__(self, directory: Path, pods: int, kernels: int, seed: int) -> None:
        self._directory = directory
        self._pods = pods
        self._kernels = kernels
        self._seed = seed
        self._memory = MemoryStore()
        self._settings = CompileCacheSettings(directory="s3://caches/fleet")

    def store(self) -> ObjectCacheStore:
        store = ObjectCacheStore("s3://caches/fleet", TRUST, str(self._directory))
        store._store = self._memory
        return store

    def start(self, key: CacheKey, number: int) -> Round:
        """Start all pods at once, on nodes that have nothing."""
        self._directory.mkdir(exist_ok=True)
        schedule = Schedule(self._seed + number)
        random.seed(self._seed + number)
        result = Round()
        with counted(schedule):
            schedule.run([partial(self._pod, key, number, pod, schedule, result) for pod in range(self._pods)])
        found = read_key(self.store(), key.prefix, TRUST)
        result.packs = len(living(found.packs))
        for pod in range(self._pods):
            shutil.rmtree(self._directory / f"{number}-{pod}", ignore_errors=True)
        return result

    def settle(self, key: CacheKey) -> int:
        """Packs that are left of a key when the grace time of those that were replaced is over."""
        store = self.store()
        prune(store, policy_of(self._settings), TRUST, now=store.now() + GRACE_S + 1)
        return len(store.list(key.prefix))

    def _pod(self, key: CacheKey, number: int, pod: int, schedule: Schedule, result: Round) -> None:
        caches = {name: self._directory / f"{number}-{pod}" / name for name in ("inductor", "triton")}
        store = self.store()
        outcome = Restore(store, key, caches, TRUST, threads=1).run()
        if outcome.in_place:
            note_used(store, key.prefix)
        result.outcomes.append(outcome)
        result.restores.append(schedule.current())
        schedule.uses[schedule._ids.number] = use = Use()
        schedule.sleep(random.choice((1.0, 2.0, random.uniform(1, 5))))  # warm-up; many are ready at once
        self._compile(key, caches, pod)
        options = SaveOptions(threads=1, level=3, most_bytes=1 << 40, wait_s=WAIT_S)
        store = self.store()
        files = scan((INDUCTOR, TRITON), caches)
        saved = Save(store, key, caches, files, TRUST, options).run()
        tidy(store, key, self._settings, TRUST, saved)
        assert not saved.failed and not outcome.messages, (outcome, saved)
        result.saves.append(use)

    def _compile(self, key: CacheKey, caches: dict[str, Path], pod: int) -> None:
        """Make what is not there, as compilers do."""
        engine = key.parts[0][1]
        names = [f"kernel-{number}" for number in range(self._kernels)]
        if pod % 10 == 0:
            names.append(f"variant-{pod // 10 % VARIANTS}")
        for name in names:
            content = random.Random(f"{engine}-{name}").randbytes(4000)
            # As compilers name their directories: else a save passes them over.
            kernel = caches["triton"] / base64.b32encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=")
            for path in (caches["inductor"] / "ab" / f"{name}.so", kernel / "k.cubin"):
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    path.write_bytes(content)
            group = kernel / "__grp__k.json"
            if not group.exists():
                group.write_text(f'{{"child_paths": {{"k.cubin": "{kernel}/k.cubin"}}}}')


def simulate(directory: Path, pods: int, kernels: int, seed: int) -> dict[str, Round]:
    """Start a fleet three times; what each start cost, with the packs that are left at the end."""
    fleet = Fleet(directory, pods, kernels, seed)
    rounds = {
        "an empty key": fleet.start(OLD, 1),
        "a full key": fleet.start(OLD, 2),
        "after an upgrade": fleet.start(NEW, 3),
    }
    for name, key in zip(rounds, (OLD, OLD, NEW), strict=True):
        rounds[name].stored = fleet.settle(key)
    return rounds


def per_pod(uses: list[Use]) -> str:
    requests = sorted(use.requests for use in uses)
    read, written = sum(use.read for use in uses) / len(uses), sum(use.written for use in uses) / len(uses)
    return f"{requests[len(requests) // 2]:8d} {requests[-1]:8d} {read / 1024:12.1f} {written / 1024:12.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=100, help="a large fleet: 500, which takes some minutes")
    parser.add_argument("--kernels", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleet-cache-") as directory:
        rounds = simulate(Path(directory), arguments.pods, arguments.kernels, arguments.seed)
    print(f"{arguments.pods} pods, seed {arguments.seed}")
    print(f"{'':28}requests of a pod:   KiB read    KiB written")
    print(f"{'':28}  median     most    per pod        per pod   packs, at the end")
    for name, result in rounds.items():
        print(f"{name + ', restore':28}{per_pod(result.restores)}")
        print(f"{name + ', save':28}{per_pod(result.saves)}   {result.packs:5d} {result.stored:12d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
