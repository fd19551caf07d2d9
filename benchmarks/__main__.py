"""Runs the benchmarks of loading one after the other: python -m benchmarks (make bench)."""

import subprocess
import sys

MODULES = (
    "read",
    "fresh_pages",
    "gil",
    "small_tensors",
    "direct",
    "cuda",
    "usrbio",
    "open_files",
    "compile_cache",
    "fleet_cache",
    "dcp",
    "dcp_huggingface",
    "object_store",
)

if __name__ == "__main__":
    for module in sys.argv[1:] or MODULES:
        print(f"\n## {module}\n", flush=True)
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=False).returncode
        if status:
            sys.exit(status)
