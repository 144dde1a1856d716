"""How long a merge takes with its proof, against the merge alone; and how much memory.

    python benchmarks/verify.py [--scale S] [--pairs N] [--only btx,bam,ties] [--levels quick,full] [--work DIR] [--busy N]

The work and the conditions are those of benchmarks/merge.py. For each method the merge alone, the merge with the quick proof (the default)
and the merge with the full one take turns; the ratios are to the merge alone, of wall and of processor time. The quick one is to take at
most 3 times the wall time and 6 times the processor time. Its memory is to stay below one block of all models, in the float32 that it is
computed in, and 0.6 GB: no model is ever held whole. Exits 1 where a bound is broken.

With --busy N, N processes that compute all the time run beside it; the quick proof of a finished folder then takes turns with itself
alone. On P processors its time is to grow at most by (N + P) / P, its fair share, and half of that again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from statistics import median

from common import bam_merge, machine, machine_line, write_recipe
from paired import Command, Table, alternate, clear, measure, table_text
from workload import NAMES, bam_recipe, btx_recipe, default_scale, merge_command, scaled, ties_recipe, write_models

from bam_merge.checkpoints.folder import open_checkpoint

RECIPES = {"btx": btx_recipe, "bam": bam_recipe, "ties": ties_recipe}

ROOM = 0.6e9
"""Bytes allowed beside the blocks: interpreter, torch, activations, buffers."""


WALL, PROCESSOR = 3.0, 6.0
"""The most that merge and quick proof together may take, as multiples of the merge alone."""


def block_bytes(folder: Path) -> int:
    """Bytes of the first block's parameters in float32, from the headers."""
    return sum(4 * prod(entry.shape) for name, entry in open_checkpoint(folder).tensors.items() if ".layers.0." in name)


def verification(method: str, work: Path, scale: float, pairs: int, levels: list[str]) -> bool:
    """Print the table of one method, with a proof of each level, quick the first. Whether every bound was kept."""
    sources = write_models(work / "models", scaled(scale), NAMES, sparse=False)
    target, recipe = work / "out", write_recipe(work / "recipe.yaml", RECIPES[method](sources))
    folders = list(map(Path, sources.values()))
    alone = merge_command("merge alone", recipe, sources, target)
    proved = [
        Command(f"merge, {level} proof", [bam_merge(), "merge", recipe, "--output", target, "--verify", level], folders, target)
        for level in levels
    ]
    rows = alternate([alone, *proved], pairs, ["merge alone"])
    measure(alone, keep=True)
    limit = sum(map(block_bytes, [*folders, target])) + int(ROOM)
    clear(target)
    print(f"\n{table_text(Table(f'verify {method}', rows))}\n", flush=True)
    bare, quick = rows[:2]
    processor = median(mine / theirs for mine, theirs in zip(quick.cpu_seconds, bare.cpu_seconds, strict=True))
    kept = [
        _said("wall time of merge and quick proof", median(quick.ratios["merge alone"]), WALL, "x merge alone"),
        _said("processor time of merge and quick proof", processor, PROCESSOR, "x merge alone"),
        _said("peak memory", max(map(max, (row.peak_bytes for row in rows))) / 1e6, limit / 1e6, "MB"),
    ]
    return all(kept)


def _said(what: str, value: float, most: float, unit: str) -> bool:
    print(f"{what}: {value:,.2f} {unit}, at most {most:,.2f}: {'kept' if value <= most else 'BROKEN'}", flush=True)
    return value <= most


def crowded(method: str, work: Path, scale: float, pairs: int, busy: int) -> bool:
    """Print how the quick proof of a finished folder fares beside `busy` computing processes. Whether its bound was kept."""
    sources = write_models(work / "models", scaled(scale), NAMES, sparse=False)
    target = work / "out"
    measure(merge_command(method, write_recipe(work / "recipe.yaml", RECIPES[method](sources)), sources, target), keep=True)
    proof = Command("quick proof", [bam_merge(), "verify", target], [*map(Path, sources.values()), target])
    quiet: list[float] = []
    loud: list[float] = []
    for _ in range(pairs):
        quiet.append(measure(proof).seconds)
        with computing(busy):
            loud.append(measure(proof).seconds)
    clear(target)
    processors = len(os.sched_getaffinity(0))
    ratio = median(one / other for one, other in zip(loud, quiet, strict=True))
    print(f"\nverify {method}: alone {median(quiet):.2f} s, beside {busy} computing processes {median(loud):.2f} s")
    return _said("growth", ratio, 1.5 * (busy + processors) / processors, f"x on {processors} processors")


@contextmanager
def computing(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"]) for _ in range(count)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def main() -> None:
    """Measure every method asked for; exits 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, help="share of the full size; default: what free disk and memory allow, at most 1")
    parser.add_argument("--pairs", type=int, default=3, help="rounds in which the commands take turns (default 3)")
    parser.add_argument("--only", default=",".join(RECIPES), metavar="METHODS", help=f"of {','.join(RECIPES)}")
    parser.add_argument("--levels", default="quick,full", choices=("quick", "quick,full"), help="full takes minutes (default both)")
    parser.add_argument("--busy", type=int, metavar="N", help="instead: the quick proof beside N computing processes")
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
            if options.busy:
                within &= crowded(method, work.resolve(), scale, options.pairs, options.busy)
            else:
                within &= verification(method, work.resolve(), scale, options.pairs, options.levels.split(","))
    finally:
        if not options.keep:
            shutil.rmtree(work)
    raise SystemExit(0 if within else 1)


if __name__ == "__main__":
    main()
