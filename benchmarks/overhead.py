"""What it costs to make a merge in parts: eight one after the other, and as tasks on two Ray nodes, against one process.

    python benchmarks/overhead.py [--scale S] [--pairs N] [--only parts,long,ray] [--work DIR] [--keep]

Work: the four models of merge.py (1.1 billion parameters each at --scale 1), BTX in layout mixtral, in eight files. It is measured with
the proof that is the default, and without: `--part` proves its part, and `finish` what is left.

    parts   eight `--part`, one after the other, then `finish`; and with --no-verify the eight alone; against one run with as many threads.
            BTX takes seconds, so that this shows what one more process costs: in the times that a process takes which imports what a
            merge does and makes nothing, and which is measured in every round
    long    the same of a dense TIES merge, which takes minutes at --scale 1: what parts cost beside work. Its bar is for a minute and more
    ray     `--ray` on two nodes of one processor each on this machine, against two threads. What Ray takes to start for nothing, a task on
            each node that imports what a part does, is measured in every round and taken off (needs the extra `ray`)

Conditions are those of merge.py: whole processes that take turns, ratios taken within a round, inputs in the page cache. Processor time of
`--ray` is the driver's alone. A median over its bar ends the benchmark with status 1.
"""

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from common import machine, machine_line, run, write_recipe
from paired import Command, Row, Table, alternate, clear, spread, table_text
from workload import NAMES, btx_recipe, default_scale, scaled, ties_recipe, write_models

PARTS, THREADS = 8, 2

LONG_BAR, RAY_BAR = 1.2, 1.3
"""Ratios of wall times to one process's that are allowed."""

LONG_SECONDS = 60
"""What one process must take for LONG_BAR to hold of it: of less, eight starts are a fifth by themselves."""

PROCESS_BAR = 1.5
"""What one process more may cost, in the times that a process takes to start and to end."""

PROGRAM = [sys.executable, "-m", "bam_merge"]

NOTHING = """
import sys, ray
from bam_merge.publishing import ray_tasks
from bam_merge.merging import kernels
def nothing(order):
    import torch, time
    from bam_merge.publishing import ray_tasks
    from bam_merge.merging import kernels
    time.sleep(0.2)
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
task = ray.remote(nothing).options(num_cpus=1)
ray.get([task.remote(n) for n in range(2)])
ray.shutdown()
"""
"""Starts what a run on Ray starts, and makes nothing. The tasks sleep, so that one node does not run both."""


MODULES = (
    "torch, bam_merge.cli, bam_merge.merging.kernels, bam_merge.merging.execute, bam_merge.publishing.publish, bam_merge.publishing.parts"
)
IMPORTS = f"import {MODULES}"
"""A process that starts as a merge does, and makes nothing."""


def recipe_in_files(work: Path, name: str, recipe: dict[str, Any]) -> Path:
    """`recipe` in work/NAME.yaml, in as many files as there are parts, of about one size."""
    whole = write_recipe(work / "whole.yaml", recipe)
    text = run([*PROGRAM, "plan", whole, "--json"], allowed=(0, 2)).output
    document, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    nbytes = sum(shard["bytes"] for shard in document["shards"])
    for megabytes in range(math.ceil(nbytes / PARTS / 1e6), math.ceil(nbytes / 1e6)):
        recipe["output"]["max_shard_size"] = f"{megabytes}MB"
        found = write_recipe(work / f"{name}.yaml", recipe)
        text = run([*PROGRAM, "plan", found, "--json"], allowed=(0, 2)).output
        document, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        if len(document["shards"]) == PARTS:
            return found
    raise SystemExit("these models do not make as many files as parts")


def in_parts(recipe: Path, target: Path, proved: bool) -> list[str | Path]:
    """All parts, one after the other; then finish, unless only what is merged counts."""
    words = shlex.join([*PROGRAM, str(recipe), "--output", str(target), "--workers", str(THREADS), *([] if proved else ["--no-verify"])])
    lines = [f"for i in $(seq {PARTS}); do {words} --part $i/{PARTS} || exit 1; done"]
    if proved:
        lines.append(shlex.join([*PROGRAM, "finish", str(recipe), "--output", str(target), "--workers", str(THREADS)]))
    return ["sh", "-ec", "\n".join(lines)]


def whole(recipe: Path, target: Path, proved: bool) -> list[str | Path]:
    return [*PROGRAM, recipe, "--output", target, "--workers", str(THREADS), *([] if proved else ["--no-verify"])]


def parts(work: Path, sources: dict[str, str], rounds: int) -> bool:
    """Section parts. Whether the bar is kept."""
    recipe, kept = recipe_in_files(work, "btx", btx_recipe(sources)), True
    for proved in (True, False):
        rows = against_one_run(work, recipe, sources, proved, rounds, [Command("a start", [sys.executable, "-c", IMPORTS])])
        more = PARTS + proved - 1
        costs = [(many - one) / more / start for many, one, start in zip(*(row.seconds for row in rows), strict=True)]
        kept &= _told(Table(f"BTX, {_with(proved)}", rows), costs, PROCESS_BAR, "one process more, in starts")
    return kept


def long(work: Path, sources: dict[str, str], rounds: int) -> bool:
    """Section long. Whether the bar is kept."""
    recipe, kept = recipe_in_files(work, "ties", ties_recipe(sources)), True
    for proved in (True, False):
        rows = against_one_run(work, recipe, sources, proved, rounds)
        bar = LONG_BAR if median(rows[1].seconds) >= LONG_SECONDS else math.inf
        kept &= _told(Table(f"TIES, {_with(proved)}", rows), rows[0].ratios[rows[1].label], bar)
    return kept


def against_one_run(
    work: Path, recipe: Path, sources: dict[str, str], proved: bool, rounds: int, others: Sequence[Command] = ()
) -> list[Row]:
    """Rows of all parts, of one run, and of `others`."""
    one, many = f"one run, {THREADS} threads", f"{PARTS} parts{', finish' if proved else ''}"
    target, reads = work / "out", folders(sources)
    made = [Command(many, in_parts(recipe, target, proved), reads, target), Command(one, whole(recipe, target, proved), reads, target)]
    return alternate([*made, *others], rounds, [one])


def folders(sources: dict[str, str]) -> list[Path]:
    return [Path(folder) for folder in sources.values()]


def _with(proved: bool) -> str:
    return "with proof" if proved else "without"


def ray(work: Path, sources: dict[str, str], rounds: int) -> bool:
    """Section ray. Whether the bar is kept."""
    recipe, reads, kept = recipe_in_files(work, "btx", btx_recipe(sources)), folders(sources), True
    with two_nodes() as address:
        for proved in (True, False):
            target = work / "out"
            start, on_ray, one = "Ray's start", "--ray, two nodes of one processor", f"one run, {THREADS} threads"
            some = [] if proved else ["--no-verify"]
            argv = [*PROGRAM, recipe, "--output", target, "--ray", address, "--parts", str(PARTS), "--workers", "1", *some]
            rows = alternate(
                [
                    Command(start, [sys.executable, "-c", NOTHING, address]),
                    Command(on_ray, argv, reads, target),
                    Command(one, whole(recipe, target, proved), reads, target),
                ],
                rounds,
                [one],
            )
            apart = [(run - idle) / alone for idle, run, alone in zip(*(row.seconds for row in rows), strict=True)]
            kept &= _told(Table(f"BTX, {_with(proved)}", rows), apart, RAY_BAR, "ratio, Ray's start apart")
    return kept


def _told(table: Table, ratios: list[float], bar: float, how: str = "ratio") -> bool:
    """Print a table, and whether the median is within its bar. Where starting took longer than running did, nothing was measured."""
    verdict = "NOT MEASURED, on too busy a machine" if min(ratios) <= 0 else "kept" if median(ratios) <= bar else "BROKEN"
    print(f"\n{table_text(table)}\n{how}: {spread(ratios)}; bar {bar:g}: {verdict}", flush=True)
    return verdict == "kept"


CLUSTER = """
import logging, ray, sys
from ray.cluster_utils import Cluster
logging.disable(logging.CRITICAL)
small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, memory=2 * 10**9)
cluster.wait_for_nodes()
print("\\n" + cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with one processor each, on 127.0.0.1."""
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # drivers too, which else look elsewhere
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield next(line.strip() for line in process.stdout if line.startswith("127.0.0.1:"))
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, help="share of the full size, about; default: what free disk and memory allow, at most 1")
    parser.add_argument("--pairs", type=int, default=3, help="rounds in which the commands take turns (default 3)")
    parser.add_argument("--only", default="parts,long,ray", metavar="SECTIONS", help="of parts,long,ray")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch space in DIR/bam-merge-bench; default: a temporary folder here")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder, so that a later run with --work finds its inputs")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if set(options.only) - {"parts", "long", "ray"}:
        parser.error("sections are parts, long and ray.")
    if "ray" in options.only and importlib.util.find_spec("ray") is None:
        parser.error("section ray needs the extra ray: pip install -e '.[ray]', or --only parts,long.")
    return options


def main() -> None:
    """Make the scratch folder, measure, remove it."""
    options = arguments()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its modules compiled
    work = (options.work / "bam-merge-bench") if options.work else Path(tempfile.mkdtemp(prefix="bam-merge-bench-", dir="."))
    work.mkdir(parents=True, exist_ok=True)
    work = work.resolve()
    kept = True
    try:
        scale = options.scale or default_scale(work)
        sources = write_models(work / "models", scaled(scale), NAMES, sparse=False)
        print(f"{machine_line(machine())}, load {os.getloadavg()[0]:.1f}\nscale {scale:g}, {options.pairs} rounds", flush=True)
        run([sys.executable, "-c", IMPORTS])  # once untimed: modules are compiled
        for section in (parts, long, ray):
            if section.__name__ in options.only:
                kept &= section(work, sources, options.pairs)
    finally:
        clear(work / "out")
        if not options.keep:
            shutil.rmtree(work)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
