"""``engine-loader compile-cache keygen | keys | resign | deny``: whose packs are taken (docs/security.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .console.output import console, print_json, print_warning, printable

if TYPE_CHECKING:
    from ..compile_cache.trust.signatures import Key

FileArgument = Annotated[Path, typer.Argument(help="The key file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to those of ``compile-cache``."""
    for command in (keygen, keys, resign, deny):
        app.command()(command)


def keygen(
    file: FileArgument,
    kind: Annotated[
        Literal["hmac", "ed25519"],
        typer.Option(help="hmac: a secret that every node needs. ed25519: signs here, and public keys verify."),
    ] = "hmac",
    add: Annotated[
        bool, typer.Option("--add", help="Add the key to the file, behind those that it has: they go on signing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key for signing packs, in a file that only you can read."""
    from ..compile_cache.trust.keys import new_key, parse_keys, public_line, read_key_file

    line = new_key(kind)
    lines = [line]
    if add:
        read_key_file(str(file))
        lines = [*file.read_text().splitlines(), line]
    elif file.exists():
        raise typer.BadParameter(f"{file} exists: use --add to add a key to it", param_hint="FILE")
    _write_lines(file, lines)
    (key,) = parse_keys([line.encode()], str(file))
    public = public_line(key)
    if as_json:
        print_json({"id": key.id.hex(), "kind": kind, "public_key": public})
        return
    out = console()
    out.print(f"{'added to' if add else 'made'} {printable(str(file))}: the key {key.id.hex()}")
    if public:
        out.print("for compile_cache.public_keys of nodes that only restore:", public, sep="\n", soft_wrap=True)


def keys(
    file: FileArgument,
    sign_with: Annotated[
        str | None, typer.Option(metavar="ID", help="Let this key (or `last`) sign from now on.")
    ] = None,
    drop: Annotated[str | None, typer.Option(metavar="ID", help="Take this key (or `last`) out of the file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys of a key file, and change which of them signs."""
    from ..compile_cache.trust.keys import public_line, read_key_file, signing_key

    if sign_with is not None:
        _change(file, sign_with, keep=True)
    if drop is not None:
        _change(file, drop, keep=False)
    found = read_key_file(str(file))
    signer = signing_key(found.keys)
    rows = [
        {"id": key.id.hex(), "kind": _kind(key), "signs": key is signer, "public_key": public_line(key)}
        for key in found.keys
    ]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            does = "signs, verifies" if row["signs"] else "verifies"
            console().print(f"{row['id']}  {row['kind']}  {does}  {row['public_key'] or ''}", soft_wrap=True)
    for warning in found.warnings:
        print_warning(warning)


def resign(as_json: JsonOption = False) -> None:
    """Sign all packs of the store again with the key that signs now, so that older keys can be dropped."""
    from ..compile_cache.stores.opening import open_store
    from ..compile_cache.upkeep.resign import resign as resign_packs
    from ..settings import load_settings

    store, trust = open_store(load_settings().settings.compile_cache)
    if trust.denied.counter:
        trust.publish_denied(store, trust.denied.with_denied({}), None)
    done = list(resign_packs(store, trust))
    failed = [one for one in done if one.problem is not None]
    if as_json:
        print_json([{"name": one.name, "problem": one.problem} for one in done])
    else:
        console().print(f"signed {len(done) - len(failed)} packs again")
    for one in failed:
        print_warning(f"{one.name}: {one.problem}")
    if failed:
        raise typer.Exit(1)


def deny(
    packs: Annotated[list[str] | None, typer.Argument(help="Packs: their names, or the digests in them.")] = None,
    reason: Annotated[str, typer.Option(help="Why; every node that refuses the pack says it.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Take the packs off the list.")] = False,
    renew: Annotated[bool, typer.Option("--renew", help="Sign the list again, with the key that signs now.")] = False,
    engine: Annotated[str, typer.Option(help="Whose directory on this node notes the newest list.")] = "vllm",
    as_json: JsonOption = False,
) -> None:
    """Let no node restore these packs, though they are well signed; without any, show the store's deny-list."""
    from ..compile_cache.directories import STATE, directories_of
    from ..compile_cache.stores.opening import open_store
    from ..compile_cache.upkeep.denying import names_of
    from ..settings import load_settings

    state = next(iter(directories_of(engine).values())) / STATE
    store, trust = open_store(load_settings().settings.compile_cache, state)
    denied = trust.denied
    digests = {name.rpartition("/")[2].removesuffix(".tar.zst") for name in packs or ()}
    names = names_of(store, trust, digests) if digests else set()
    if remove:
        denied = denied.without(digests | (names & set(denied.packs)))
    elif digests or renew:
        denied = denied.with_denied(dict.fromkeys(sorted(names), reason or "no reason was given"))
    if denied is not trust.denied:
        trust.publish_denied(store, denied, state)
    _show(denied.counter, dict(denied.packs), as_json)
    for warning in trust.warnings:
        print_warning(warning)


def _show(number: int, packs: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json({"number": number, "packs": packs})
        return
    console().print(f"deny-list number {number}: {len(packs)} packs")
    for digest, reason in packs.items():
        console().print(f"{printable(digest)}  {printable(reason)}", soft_wrap=True)


def _kind(key: Key) -> str:
    from ..compile_cache.trust.signatures import KINDS

    return KINDS[key.kind]


def _change(file: Path, key_id: str, *, keep: bool) -> None:
    """Move the line of a key to the front, or take it out. Comments stay where they are."""
    from ..compile_cache.trust.keys import parse_keys, read_key_file

    found = read_key_file(str(file)).keys
    lines = file.read_text().splitlines()
    key_id = found[-1].id.hex() if key_id == "last" else key_id

    def is_meant(line: str) -> bool:
        return any(key.id.hex() == key_id for key in parse_keys([line.encode()], str(file)))

    meant = [line for line in lines if is_meant(line)]
    if not meant:
        raise typer.BadParameter(f"{file} has no key {key_id} (`engine-loader compile-cache keys {file}` lists them)")
    others = [line for line in lines if not is_meant(line)]
    if not keep and not parse_keys((line.encode() for line in others), str(file)):
        raise typer.BadParameter(f"{key_id} is the only key of {file}: delete the file instead")
    _write_lines(file, [*meant, *others] if keep else others)


def _write_lines(file: Path, lines: list[str]) -> None:
    """Write the file as a whole, readable by its owner only."""
    target = file.resolve()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write("".join(f"{line}\n" for line in lines))
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
