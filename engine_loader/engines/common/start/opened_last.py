"""What the last start of an engine opened of .so and .pyc files: kept beside the starts' reports, a list for each
interpreter and version of an engine, and asked for by `engine-loader warm`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ....compile_cache.host.versions import NONE, module_version
from ....home import home_expanded
from ....report.load_report import human_bytes
from ....settings import load_settings
from ....start.opened_files import list_name, noted, opened_here, read_list, write_list
from ....start.page_reading import WarmingEach

_ENGINES = ("vllm", "sglang")
_LISTS = "opened-*.json"
_MOST_LISTS = 8  # interpreters and versions


def keep_opened(directory: Path, engine: str) -> None:
    """Keep what the processes of a start have opened, to be called in its first process when it is ready.

    Args:
        directory: of the start; what the other processes have left there is taken up.
        engine: a module's name.

    Raises:
        OSError: the list cannot be written.
    """
    root = directory.parent
    write_list(root / list_name(engine, module_version(engine)), dict.fromkeys([*opened_here(), *noted(directory)]))
    for path in directory.glob(_LISTS):
        path.unlink(missing_ok=True)
    for path in sorted(root.glob(_LISTS), key=lambda path: path.stat().st_mtime)[:-_MOST_LISTS]:
        path.unlink(missing_ok=True)


def opened_last() -> list[str]:
    """The files that the last starts of the installed engines opened with this interpreter; none where no list is
    there, or is believed.
    """
    found: dict[str, None] = {}
    with suppress(OSError):  # there is no home
        root = home_expanded(load_settings().settings.report.directory)
        for engine in _ENGINES:
            version = module_version(engine)
            if version != NONE:
                found |= dict.fromkeys(read_list(root / list_name(engine, version)))
    return list(found)


def opened_in_words(done: WarmingEach) -> str:
    """What became of these files."""
    text = f"{done.files:,} .so and .pyc files of the last start: {human_bytes(done.read)} into the page cache in "
    text += f"{done.seconds:.1f} s"
    if done.resident:
        text += f", {human_bytes(done.resident)} were there already"
    return f"{text}; the rest was left: {done.reason}" if done.reason else text
