"""Command-line arguments that the benchmarks share."""

import argparse
import tempfile
from pathlib import Path


def parser_of(doc: str | None, folder: str = "engine-loader-benchmark") -> argparse.ArgumentParser:
    """A parser with --dir.

    Args:
        doc: the docstring of the benchmark's module, whose first line describes the benchmark.
        folder: the name of the default directory, in the directory for temporary files.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    default = Path(tempfile.gettempdir()) / folder
    parser.add_argument("--dir", type=Path, default=default, help="where checkpoints are kept (default: %(default)s)")
    return parser
