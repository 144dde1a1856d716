"""Which make for shared tensors pays in the end, and whether experts that start apart do: trainings on equal data, for docs/paper.md.

    python benchmarks/paper/methods.py [--config FILE] [--work DIR] [--results FILE] [--workers N] [--only SETTING ...] [--report]
    python benchmarks/paper/methods.py --smoke

The settings are methods.yaml's; stages are kept as run.py keeps them, in the same --work, so that what both need is made once and a run
that was stopped goes on. --report makes results and page of what is finished. --smoke runs every setting at the size of smoke.yaml in a
scratch folder, with assertions. --only trains some settings, and leaves the page as it is.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import run
import yaml
from results import collect
from settings import chosen, load_config, overlaid
from stages import make_all


def methods_config(base: Path) -> dict[str, Any]:
    """methods.yaml's settings in the sizes of another configuration."""
    own: dict[str, Any] = yaml.safe_load((run.HERE / "methods.yaml").read_text())
    return overlaid(load_config(base), own)


def measure(config: dict[str, Any], work: Path, results: Path, workers: int | None, only: Sequence[str], train: bool) -> dict[str, Any]:
    """Make what is not made yet, and write what is finished to `results`."""
    config["workers"] = workers or config["workers"]
    if train:
        make_all(run.all_stages(config, only), work, config["workers"], config["threads"])
    found = collect(config, work, {**run.machine(), "gpu": run.gpu()})
    found["recipes"] = {name: recipe for name, recipe in found["recipes"].items() if name in chosen(config)}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    return found


def check(config: dict[str, Any], found: dict[str, Any]) -> str:
    """Assert what a smoke run must have shown; returns it in words."""
    assert found["settings"].keys() == chosen(config).keys(), found["settings"].keys()
    merges = [one for runs in found["merges"].values() for one in runs.values()]
    assert len(merges) == len(chosen(config)) and all(one["verified"] for one in merges), merges
    for name, runs in found["settings"].items():
        (one,) = runs.values()
        assert set(one["end"]) == set(config["domains"]) and all(map(math.isfinite, one["end"].values())), (name, one)
    starts = {name: tuple(run["start"].values()) for name, runs in found["merges"].items() for run in runs.values()}
    groups = {name.split()[0] for name in starts}
    for group in groups:  # no two settings of a group are the same model
        values = [start for name, start in starts.items() if name.split()[0] == group]
        assert len(set(values)) == len(values), {name: start for name, start in starts.items() if name.split()[0] == group}
    table = report.table_methods(found)
    assert all(name in table for name in starts), table
    return f"{len(merges)} merges verified and trained, in {len(groups)} groups"


def smoke(only: Sequence[str]) -> None:
    started, config = time.monotonic(), methods_config(run.HERE / "smoke.yaml")
    if only:
        config["only"] = list(only)
    with tempfile.TemporaryDirectory(prefix="bam-merge-methods-") as scratch:
        folder = Path(scratch)
        found = measure(config, folder / "work", folder / "methods.json", None, (), train=True)
        shown = check(config, found)
    print(report.table_methods(found))
    print(f"paper-methods smoke: {shown}. {time.monotonic() - started:.0f} s", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: gpu.yaml where torch has a GPU, else config.yaml")
    parser.add_argument("--work", type=Path, default=run.HERE / "work", metavar="DIR", help="where stages are kept (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=report.METHODS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=run.HERE.parents[1] / "docs", metavar="DIR", help="where paper.md goes")
    parser.add_argument("--workers", type=int, metavar="N", help="stages at a time (default: the configuration's)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING", help="these settings alone; the page is left as it is")
    parser.add_argument("--report", action="store_true", help="results and page of what is finished; train nothing")
    parser.add_argument("--smoke", action="store_true", help="every setting at a tiny size, with assertions; leaves nothing behind")
    options = parser.parse_args(arguments)
    config = methods_config(options.config or run.default_config())
    if unknown := set(options.only) - set(chosen(config)):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not among {'; '.join(chosen(config))}")
    if options.smoke:
        smoke(options.only)
        return
    found = measure(config, options.work.resolve(), options.results, options.workers, options.only, not options.report)
    print(report.table_methods(found))
    if not options.only:
        page = report.page(json.loads((run.HERE / "results.json").read_text()), report.read_forward(), found)
        (options.docs / "paper.md").write_text(page, encoding="utf-8")
        print(f"{options.results}, {options.docs / 'paper.md'}")


if __name__ == "__main__":
    main()
