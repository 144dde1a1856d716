"""The walk-through of docs/tutorial/smollm2.md: a pretrained dense seed, three experts branched from it, and every recipe in recipes/.

The dense checkpoints land in checkpoints/, where an earlier run's are kept, and the merged ones in out/, as the recipes say.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BAM_MERGE = Path(sys.executable).with_name("bam-merge")


def call(*command: str | Path, capture: bool = False) -> str:
    """Run `command` in the repository's root; returns its stdout if captured. Where it fails, it has said why, and this program ends."""
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(f"run.py: failed: {' '.join(map(str, command))}")
    return done.stdout


def merge(recipe: Path, *options: str) -> tuple[str, ...]:
    """Carry out `recipe` as a user would; returns its row of the closing table."""
    print(f"\n$ {' '.join(('bam-merge', str(recipe), '--force', *options))}", flush=True)
    plan = json.loads(call(BAM_MERGE, "plan", recipe, "--json", capture=True))
    started = time.monotonic()
    call(BAM_MERGE, recipe, "--force", *options)
    seconds = time.monotonic() - started
    total, active, size = plan["parameters"]["total"], plan["parameters"]["active"], plan["bytes"]["write"]
    return recipe.stem, f"{total:,}", f"{active:,}", f"{size:,}", f"{seconds:.1f}"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """The first column to the left, the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (header, *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a seed and three experts in checkpoints/, then merge them by every recipe.")
    parser.add_argument("--steps", default="20", metavar="N", help="training steps per expert (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="merge without proving each result, which takes about as long as merging")
    args = parser.parse_args()
    options = ["--no-verify"] if args.no_verify else []
    if not BAM_MERGE.exists():
        parser.error(f"{BAM_MERGE} is missing: install the project into this Python, or use `make example`")

    seed, checkpoints = Path("checkpoints/seed"), Path("checkpoints")
    call(sys.executable, HERE / "get_seed.py", seed)
    call(sys.executable, HERE / "branch.py", seed, checkpoints, "--steps", args.steps)
    call(sys.executable, HERE / "adapters.py", seed, checkpoints, "--steps", args.steps)
    rows = [merge(recipe.relative_to(ROOT), *options) for recipe in sorted(ROOT.glob("recipes/*.yaml"))]
    print()
    print(table(("recipe", "parameters", "active per token", "bytes", "seconds"), rows))


if __name__ == "__main__":
    main()
