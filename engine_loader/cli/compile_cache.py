"""``engine-loader compile-cache``: look at compile caches, move them, clean up."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import compile_cache_trust
from .console.output import console, print_json, print_warning, printable

if TYPE_CHECKING:
    from ..compile_cache.key import CacheKey
    from ..compile_cache.process.job import Job
    from ..compile_cache.process.outcome import Outcome
    from ..settings import CompileCacheSettings

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

EngineOption = Annotated[str, typer.Option(help="Whose caches: vllm, sglang, or torch (plain torch.compile).")]
ScopeOption = Annotated[
    str | None,
    typer.Option(help="Which scope; `list` shows them. Default: the setting, or what the engine used last here."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def main() -> None:
    """Compile caches that a fleet shares: restored before an engine's warm-up, saved after it.

    Engines do both by themselves; these commands are for looking, for cleaning, and for doing it by hand.
    """


compile_cache_trust.register(app)


@app.command()
def load(engine: EngineOption = "vllm", scope: ScopeOption = None, as_json: JsonOption = False) -> None:
    """Restore the caches of this environment from the store, now."""
    _report(_job("restore", engine, scope), as_json)


@app.command()
def save(engine: EngineOption = "vllm", scope: ScopeOption = None, as_json: JsonOption = False) -> None:
    """Save all that the local caches hold and the store does not, now."""
    _report(_job("save", engine, scope), as_json)


@app.command()
def info(engine: EngineOption = "vllm", as_json: JsonOption = False) -> None:
    """Show this environment's key, the local caches and what the store has for it."""
    from ..compile_cache.directories import ENGINES, directories_of
    from ..compile_cache.packs.scan import scan
    from ..compile_cache.stores.opening import open_store

    settings = _settings()
    key = _key(engine, "")
    _check_engine(engine)
    directories = directories_of(engine)
    local: list[dict[str, Any]] = []
    for root in ENGINES[engine]:
        if root.name in directories:
            files = scan((root,), directories)
            local.append(
                {
                    "cache": root.name,
                    "directory": str(directories[root.name]),
                    "variable": root.variable,
                    "files": len(files),
                    "bytes": sum(file.size for file in files),
                }
            )
    environment = key.prefix.partition("/")[0]
    store, trust = open_store(settings)
    packs = [stored for stored in store.list() if stored.key_prefix.partition("/")[0] == environment]
    stored_bytes = sum(stored.size for stored in packs)
    signed = trust.signed
    if as_json:
        value = {
            "enabled": settings.enabled,
            "store": settings.directory,
            "signed": signed,
            "environment": key.environment,
            "hash": key.hash,
            "stored_packs": len(packs),
            "stored_bytes": stored_bytes,
            "local": local,
        }
        print_json(value)
        return
    from ..compile_cache.space import mib

    out = console()
    out.print(f"environment  {printable(key.environment)}  ({key.hash})")
    size = f"{len(packs)} packs, {mib(stored_bytes)} for this environment"
    out.print(f"store        {printable(settings.directory)}: {size}")
    out.print(f"state        {'on' if settings.enabled else 'off'}, packs {trust.describe()}")
    rows = [
        [item["cache"], item["directory"], item["variable"], str(item["files"]), mib(item["bytes"])] for item in local
    ]
    out.print(_table(["cache", "directory", "variable", "files", "size"], rows))


@app.command("list")
def list_caches(as_json: JsonOption = False) -> None:
    """List what the store has: a line for each key, the last used first."""
    from ..compile_cache.space import mib
    from ..compile_cache.stores.opening import open_store
    from ..compile_cache.stores.uses import last_used

    settings = _settings()
    store = open_store(settings)[0]
    keys: dict[str, list[Any]] = defaultdict(list)
    for stored in store.entries() if store.name else ():
        keys[stored.key_prefix].append(stored)
    rows: list[dict[str, Any]] = [
        {
            "scope": prefix.rpartition("/")[2],
            "environment": prefix.partition("/")[0],
            "packs": len(packs),
            "bytes": sum(pack.size for pack in packs),
            "last_used": max([last_used(entries), *(pack.modified for pack in packs)]),
        }
        for prefix, entries in keys.items()
        if (packs := [entry for entry in entries if entry.kind == "pack"])
    ]
    for what in store.unreadable:
        print_warning(f"{what}: cannot be looked into")
    rows.sort(key=lambda row: -row["last_used"])
    if as_json:
        print_json(rows)
        return
    shown = [
        [row["scope"], str(row["packs"]), mib(row["bytes"]), _age(row["last_used"]), row["environment"]] for row in rows
    ]
    console().print(
        _table(["scope", "packs", "size", "used", "environment"], shown) if rows else f"{settings.directory} is empty"
    )


@app.command()
def clear(
    engine: EngineOption = "torch",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the local caches of an engine (never the store)."""
    import os

    from ..compile_cache.directories import ENGINES, directories_of
    from ..compile_cache.packs.scan import scan
    from ..compile_cache.space import mib

    _check_engine(engine)
    directories = directories_of(engine)
    files = scan(ENGINES[engine], directories)
    size = mib(sum(file.size for file in files))
    if files and not yes and not as_json:
        typer.confirm(
            f"Delete {len(files)} files, {size}, below {', '.join(map(str, directories.values()))}?", abort=True
        )
    failed = []
    for file in files:
        try:
            os.unlink(file.local)
        except OSError as error:
            failed.append(str(error))
    if as_json:
        print_json({"files": len(files) - len(failed), "failed": failed})
    else:
        console().print(f"deleted {len(files) - len(failed)} files, {size}")
    for message in failed:
        print_warning(message)
    if failed:
        raise typer.Exit(1)


@app.command()
def adopt(
    name: Annotated[str | None, typer.Option(help="The store's name; default: the setting, or a new one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a directory or prefix that is not empty a store; nothing else in it is ever touched.

    An empty one becomes a store with the first save.
    """
    from ..compile_cache.stores.marker import adopt as adopt_store
    from ..compile_cache.stores.opening import open_store

    settings = _settings()
    name = name or settings.store_name
    store = open_store(settings.model_copy(update={"store_name": name}))[0]
    if store.is_empty():
        store.found()
    given = adopt_store(store, name)
    if as_json:
        print_json({"store": store.description, "name": given})
    else:
        console().print(f"{printable(store.description)} is the store {given}")


@app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Delete packs that are not trusted or damaged at their ends, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete from the store what the settings do not keep (keep_days, keep_keys, keep_bytes), and leftovers."""
    from ..compile_cache.process.tidy import policy_of
    from ..compile_cache.retention import prune as prune_store
    from ..compile_cache.space import mib
    from ..compile_cache.stores.opening import open_store

    settings = _settings()
    store, trust = open_store(settings)
    done = prune_store(store, policy_of(settings), trust, dry_run=dry_run, unverified=unverified)
    if as_json:
        deleted = [{"name": name, "bytes": size, "reason": reason} for name, size, reason in done.deleted]
        print_json({"deleted": deleted, "messages": done.messages, "dry_run": dry_run})
    else:
        if done.deleted:
            rows = [[reason, mib(size), name] for name, size, reason in done.deleted]
            console().print(_table(["reason", "size", "pack"], rows))
        console().print(f"{'would delete' if dry_run else 'deleted'} {len(done.deleted)} files, {mib(done.bytes)}")
    for message in done.messages:
        print_warning(message)
    if done.messages:
        raise typer.Exit(1)


@app.command()
def verify(
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Save what is sound of packs with damaged frames, and take those packs out of use."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of every pack; ends with status 1 when one in use is damaged, forged or not to be trusted."""
    from ..compile_cache.packs.verify import verify as verify_packs
    from ..compile_cache.space import mib
    from ..compile_cache.stores.opening import open_store
    from ..compile_cache.upkeep.quarantine import repair as repair_packs

    settings = _settings()
    store, trust = open_store(settings)
    found = list(verify_packs(store, trust))
    repaired = {}
    if repair:
        done = repair_packs(store, trust, found, level=settings.compression_level)
        repaired = {stored.name: what for stored, what in done}
    bad = [one for one in found if one.problem and not one.quarantined and one.stored.name not in repaired]
    if as_json:
        print_json(
            [
                {
                    "name": one.stored.name,
                    "bytes": one.stored.size,
                    "files": one.files,
                    "problem": one.problem,
                    "quarantined": one.quarantined or one.stored.name in repaired,
                    "repaired": repaired.get(one.stored.name),
                }
                for one in found
            ]
        )
    else:
        rows = [
            [
                "out of use" if one.quarantined else "ok" if one.problem is None else "BAD",
                str(one.files),
                mib(one.stored.size),
                one.stored.name,
            ]
            for one in found
        ]
        console().print(_table(["state", "files", "size", "pack"], rows) if rows else f"{store.description} is empty")
        for name, what in repaired.items():
            console().print(printable(f"{name}: {what}"))
        for one in bad:
            print_warning(one.problem or "")
    if bad:
        raise typer.Exit(1)


@app.command()
def quarantine(
    pack: Annotated[str, typer.Argument(help="Its name, or the beginning of its content hash; `verify` shows them.")],
    undo: Annotated[bool, typer.Option("--undo", help="Take it into use again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a pack out of use for the whole fleet: no engine restores it, and its files are saved anew."""
    from ..compile_cache.cache_errors import CacheError
    from ..compile_cache.stores.opening import open_store
    from ..compile_cache.upkeep.quarantine import find_pack, release
    from ..compile_cache.upkeep.quarantine import quarantine as take_out

    store = open_store(_settings())[0]
    try:
        found = find_pack(store, pack)
    except CacheError as error:
        raise typer.BadParameter(str(error), param_hint="PACK") from None
    if undo:
        release(store, found)
    else:
        take_out(store, found, "by hand")
    if as_json:
        print_json({"name": found.name, "quarantined": not undo})
    else:
        console().print(printable(f"{found.name}: {'in use again' if undo else 'out of use'}"))


@app.command()
def explain(engine: EngineOption = "vllm", as_json: JsonOption = False) -> None:
    """Say what the cache was good for when an engine last started here, and why it was no hit."""
    from ..compile_cache.verdict.explain import account

    value = account(engine, _settings(), _key(engine, ""))
    if as_json:
        print_json(value)
        return
    out = console()
    last = value["last"]
    if last is None:
        out.print("no engine has left a verdict on this node yet")
    else:
        out.print(f"{printable(last['scope'])}: {last['verdict'] or 'not judged'}, {_age(last['when'])} ago")
        for reason in last["reasons"]:
            out.print(f"  {printable(reason)}")
    if value["environment"]:
        out.print("the nearest environment in the store differs from this one:")
        for line in value["environment"]:
            out.print(f"  {printable(line)}")


def _settings() -> CompileCacheSettings:
    from ..settings import load_settings

    return load_settings().settings.compile_cache


def _check_engine(engine: str) -> None:
    from ..compile_cache.directories import ENGINES

    if engine not in ENGINES:
        raise typer.BadParameter(
            f"there is no engine {engine!r} (there are: {', '.join(ENGINES)})", param_hint="--engine"
        )


def _key(engine: str, scope: str) -> CacheKey:
    from ..compile_cache.host.versions import module_version
    from ..compile_cache.key import environment_key

    _check_engine(engine)
    return environment_key({} if engine == "torch" else {engine: module_version(engine)}, scope)


def _job(action: Any, engine: str, scope: str | None) -> Job:
    from ..compile_cache.directories import directories_of
    from ..compile_cache.process.job import Job
    from ..compile_cache.verdict.explain import last_key

    settings = _settings()
    _check_engine(engine)
    directories = directories_of(engine)
    scope = scope or settings.scope
    last = last_key(next(iter(directories.values())))
    if scope is None and engine == "torch":
        scope = "all"
    if scope is None and last is None:
        raise typer.BadParameter(
            "no engine has used a scope here yet: name one (`engine-loader compile-cache list`)", param_hint="--scope"
        )
    key = last if last is not None and scope in (None, last.scope) else _key(engine, scope or "")
    return Job(
        action,
        engine,
        key,
        {name: str(path) for name, path in directories.items()},
        settings=settings.model_dump(mode="json"),
    )


def _report(job: Job, as_json: bool) -> None:
    from ..compile_cache.process.session import run_job
    from ..compile_cache.space import mib

    settings = _settings()
    outcome: Outcome = run_job(job, settings.restore_timeout_s if job.action == "restore" else settings.save_timeout_s)
    if as_json:
        print_json({"key": job.key.prefix} | outcome.to_json())
    else:
        size = (
            f"{outcome.files} files, {mib(outcome.bytes)} ({mib(outcome.pack_bytes)} packed), {outcome.seconds:.1f} s"
        )
        console().print(
            f"{outcome.status}: {size}, {printable(job.key.prefix)}"
            if outcome.files
            else f"{outcome.status}: {job.key.prefix}"
        )
        for line in (*outcome.reasons, *outcome.notes):
            console().print(f"  {printable(line)}")
    for message in outcome.messages:
        print_warning(message)
    if outcome.failed or outcome.status == "off":
        raise typer.Exit(1)


def _age(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _table(columns: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table
