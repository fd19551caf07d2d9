"""``engine-loader compile-cache``: look at compile caches, move them, clean up."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import compile_cache_trust, compile_cache_upkeep
from .console.output import console, count, print_json, print_plain_table, print_warning, printable

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


compile_cache_upkeep.register(app)
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
    print_plain_table(["cache", "directory", "variable", "files", "size"], rows)


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
    columns = ["scope", "packs", "size", "used", "environment"]
    if not rows:
        console().print(f"{settings.directory} is empty")
        return
    print_plain_table(columns, shown)
    packs, nbytes = (sum(row[what] for row in rows) for what in ("packs", "bytes"))
    console().print(f"{count(len(rows), 'key')}, {count(packs, 'pack')}, {mib(nbytes)}")


@app.command()
def clear(
    engine: EngineOption = "vllm",
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
    total = mib(sum(file.size for file in files))
    if files and not yes and not as_json:
        typer.confirm(
            f"Delete {len(files)} files, {total}, below {', '.join(map(str, directories.values()))}?", abort=True
        )
    failed, deleted_bytes = [], 0
    for file in files:
        try:
            os.unlink(file.local)
        except OSError as error:
            failed.append(str(error))
        else:
            deleted_bytes += file.size
    if as_json:
        print_json({"files": len(files) - len(failed), "failed": failed})
    else:
        console().print(f"deleted {len(files) - len(failed)} files, {mib(deleted_bytes)}")
    for message in failed:
        print_warning(message)
    if failed:
        raise typer.Exit(1)


@app.command()
def explain(engine: EngineOption = "vllm", as_json: JsonOption = False) -> None:
    """Say what the cache was good for when an engine last started here, and why it was no hit."""
    from ..compile_cache.verdict.explain import account

    key = _key(engine, "")
    if (engine, "none") in key.parts:
        raise typer.BadParameter(f"{engine} is not installed here: there is nothing to compare", param_hint="--engine")
    value = account(engine, _settings(), key)
    if as_json:
        print_json(value)
        return
    out = console()
    last = value["last"]
    if last is None:
        out.print("no engine has left a verdict on this node yet")
    else:
        verdict = last["verdict"] or "there was no cache, and none was needed"
        out.print(f"{printable(last['scope'])}: {verdict}, {_age(last['when'])} ago")
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
        shown = {name: value for name, value in outcome.to_json().items() if name != "reads"}  # for the next start
        print_json({"key": job.key.prefix} | shown)
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
