"""Explains what one tensor-parallel rank of vLLM would read of a checkpoint, and what of that it keeps.

    python examples/explain_rank.py MODEL --tensor-parallel-size 4 --rank 1

Needs vLLM, but no GPU: vLLM's own model is built as that rank on tensors without data. Without --json,
`engine-loader explain-load` prints a table; with --tensors it tells of every tensor.
"""

import argparse
import json
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    arguments = parser.parse_args()
    layout = ["--tensor-parallel-size", str(arguments.tensor_parallel_size), "--rank", str(arguments.rank)]
    command = [sys.executable, "-m", "engine_loader", "explain-load", arguments.model, *layout, "--json"]
    explanation = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    for kind, row in explanation["totals"].items():
        print(f"{kind}: {row['file_bytes']:,} bytes in files, {row['kept_bytes']:,} kept, {row['read_bytes']:,} read")


if __name__ == "__main__":
    main()
