"""``engine-loader compile-cache adopt | prune | verify | quarantine``: the upkeep of a store."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from .console.output import console, count, print_json, print_plain_table, print_warning, printable

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to those of ``compile-cache``."""
    for command in (adopt, prune, verify, quarantine):
        app.command()(command)


def adopt(
    name: Annotated[str | None, typer.Option(help="The store's name; default: the setting, or a new one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a directory or prefix that is not empty a store; nothing else in it is ever touched.

    An empty one becomes a store with the first save.
    """
    from ..compile_cache.stores.marker import adopt as adopt_store
    from ..compile_cache.stores.opening import open_store
    from ..settings import load_settings

    settings = load_settings().settings.compile_cache
    name = name or settings.store_name
    store = open_store(settings.model_copy(update={"store_name": name}))[0]
    if store.is_empty():
        store.found()
    given = adopt_store(store, name)
    if as_json:
        print_json({"store": store.description, "name": given})
    else:
        console().print(f"{printable(store.description)} is the store {given}")


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
    from ..settings import load_settings

    settings = load_settings().settings.compile_cache
    store, trust = open_store(settings)
    done = prune_store(store, policy_of(settings), trust, dry_run=dry_run, unverified=unverified)
    if as_json:
        deleted = [{"name": name, "bytes": size, "reason": reason} for name, size, reason in done.deleted]
        print_json({"deleted": deleted, "messages": done.messages, "dry_run": dry_run})
    else:
        if done.deleted:
            rows = [[reason, mib(size), name] for name, size, reason in done.deleted]
            print_plain_table(["reason", "size", "pack"], rows)
        console().print(f"{'would delete' if dry_run else 'deleted'} {len(done.deleted)} files, {mib(done.bytes)}")
    for message in done.messages:
        print_warning(message)
    if done.messages:
        raise typer.Exit(1)


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
    from ..settings import load_settings

    settings = load_settings().settings.compile_cache
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
        if rows:
            print_plain_table(["state", "files", "size", "pack"], rows)
            states = Counter(row[0] for row in rows)
            told = ", ".join(f"{number:,} {state}" for state, number in sorted(states.items(), reverse=True))
            nbytes = mib(sum(one.stored.size for one in found))
            console().print(f"{count(len(found), 'pack')}, {nbytes}: {told}")
        else:
            console().print(f"{store.description} is empty")
        for name, what in repaired.items():
            console().print(printable(f"{name}: {what}"))
        for one in bad:
            print_warning(one.problem or "")
    if bad:
        raise typer.Exit(1)


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
    from ..settings import load_settings

    store = open_store(load_settings().settings.compile_cache)[0]
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
