"""How much memory and time `bam-merge verify` takes, against its limit and against reading the same bytes.

    python benchmarks/verify.py [--scale S] [--pairs N] [--only btx,bam,ties] [--work DIR] [--keep]

The work and the conditions are those of benchmarks/merge.py. For each method the four models are merged once; then `bam-merge
verify` of the result, with every check, takes turns with `cat` of all that it has to read, the sources and the result. The limit
of its memory is one block of all models, in the float32 that it computes with, and 0.6 GB: no model is ever held whole.
"""

import argparse
import json
import os
import shutil
import tempfile
from math import prod
from pathlib import Path

from common import bam_merge, machine, machine_line, write_recipe
from paired import Command, Table, alternate, clear, measure, table_text
from workload import NAMES, bam_recipe, btx_recipe, default_scale, merge_command, scaled, ties_recipe, write_models

from bam_merge.checkpoints.folder import open_checkpoint

RECIPES = {"btx": btx_recipe, "bam": bam_recipe, "ties": ties_recipe}

ROOM = 0.6e9
"""Bytes allowed beside the blocks: interpreter, torch, activations, buffers."""


def block_bytes(folder: Path) -> int:
    """Bytes of the first block's parameters in float32, from the headers."""
    return sum(4 * prod(entry.shape) for name, entry in open_checkpoint(folder).tensors.items() if ".layers.0." in name)


def verification(method: str, work: Path, scale: float, pairs: int) -> tuple[Table, int, int]:
    """The table of one method, its largest peak in bytes, and the limit."""
    sources = write_models(work / "models", scaled(scale), NAMES, sparse=False)
    target = work / "out"
    measure(merge_command(method, write_recipe(work / "recipe.yaml", RECIPES[method](sources)), sources, target), keep=True)
    folders = [*map(Path, sources.values()), target]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    rows = alternate(
        [
            Command("bam-merge verify", [bam_merge(), "verify", target], folders),
            Command("cat", ["sh", "-c", 'cat "$@" > /dev/null', "sh", *files], folders),
        ],
        pairs, ["cat"],
    )  # fmt: skip
    limit = sum(map(block_bytes, folders)) + int(ROOM)
    size = sum(file.stat().st_size for file in files)
    clear(target)
    return Table(f"verify {method}, {size / 1e9:.2f} GB read", rows), max(rows[0].peak_bytes), limit


def main() -> None:
    """Merge and verify by every method asked for; exits 1 if a peak is above its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, help="share of the full size; default: what free disk and memory allow, at most 1")
    parser.add_argument("--pairs", type=int, default=3, help="rounds in which the commands take turns (default 3)")
    parser.add_argument("--only", default=",".join(RECIPES), metavar="METHODS", help=f"of {','.join(RECIPES)}")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch space in DIR/bam-merge-bench; default: a temporary folder here")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder, so that a later run with --work finds its inputs")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(RECIPES):
        parser.error(f"no such method: {', '.join(sorted(unknown))}. Methods: {', '.join(RECIPES)}.")
    if options.work:
        work = options.work / "bam-merge-bench"
        work.mkdir(parents=True, exist_ok=True)
    else:
        work = Path(tempfile.mkdtemp(prefix="bam-merge-bench-", dir="."))
    scale = options.scale or default_scale(work)
    print(f"{machine_line(machine())}, load {os.getloadavg()[0]:.1f}\nScale {scale:g}: {json.dumps(scaled(scale))}", flush=True)
    within = True
    try:
        for method in options.only.split(","):
            table, peak, limit = verification(method, work.resolve(), scale, options.pairs)
            within &= peak <= limit
            print(f"\n{table_text(table)}\n\nlimit {limit / 1e6:,.0f} MB: {'kept' if peak <= limit else 'BROKEN'}", flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(work)
    raise SystemExit(0 if within else 1)


if __name__ == "__main__":
    main()
