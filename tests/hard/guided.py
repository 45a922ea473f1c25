"""Fuzz the targets of test_fuzz.py with atheris, which looks for inputs that reach new code.

    python tests/hard/guided.py
    python tests/hard/guided.py --runs 2000 plan manifest

Hypothesis makes the files from the fuzzer's bytes. Any error but an EdgepruneError ends the run, and hypothesis prints
the file. No corpus is kept: each run starts from nothing.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgeprune"], enable_loader_override=False):
    import test_fuzz


def one(name: str, runs: int, folder: Path) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    counts = collections.Counter[str](), collections.Counter[str]()
    attempt = test_fuzz.attempts(name, runs, counts, folder).hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    calls = 0

    def counted(content: bytes) -> None:
        nonlocal calls
        attempt(content)
        calls += 1
        if calls == runs:  # libFuzzer ends the process without returning to Python
            print(f"{counts[0][name]} files", flush=True)

    # Hypothesis needs many bytes for a file; libFuzzer would start with very few.
    atheris.Setup([name, f"-runs={runs}", "-len_control=0", "-max_len=8000", f"-artifact_prefix={folder}/"], counted)
    atheris.Fuzz()


def main() -> None:
    """Fuzz each target in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="targets; by default all")
    parser.add_argument("--runs", type=int, default=2000, help="inputs per target")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        one(args.names[0], args.runs, args.folder)
        return
    failed = []
    for name in args.names or test_fuzz.TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, name, "--runs", str(args.runs), "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True)
        print(f"{name}: {done.stdout.strip() or 'failed'}", flush=True)
        if done.returncode:
            failed.append(name)
            print("\n".join([*done.stdout.splitlines()[-40:], *done.stderr.splitlines()[-40:]]))
    sys.exit(f"crashed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
