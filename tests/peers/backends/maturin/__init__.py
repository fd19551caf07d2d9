"""Stands in for maturin where pip only downloads a source distribution: pip asks for its metadata, which the
distribution has in PKG-INFO, and maturin would need Rust and its registry to make the same."""

import shutil
from pathlib import Path
from typing import Any


def prepare_metadata_for_build_wheel(directory: str, settings: Any = None) -> str:
    fields = dict(line.split(": ", 1) for line in Path("PKG-INFO").read_text().splitlines()[:4] if ": " in line)
    name, version = fields["Name"], fields["Version"]
    made = Path(directory) / f"{name}-{version}.dist-info"
    made.mkdir()
    shutil.copy("PKG-INFO", made / "METADATA")
    return made.name
