"""Does the head start of routers made of text last? Phase 3 from ridge routers against random ones, on the models of run.py.

    python benchmarks/paper/head_start.py [--config FILE] [--work DIR] [--smoke] [--results FILE] [--workers N] [--only SETTING ...]

BTX, Expert-KV and Shared-KV, each with the paper's gates and with two renormalised ones, for every random seed with equal data, and the BAM
settings with equal compute to BTX as well. What run.py has made in the same --work is not made again. Writes results (head_start.json) and
the page's table from them. With --smoke everything at a tiny size, in a few minutes, with assertions; the page is left as it is then.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import yaml
from results import collect, geometric
from run import all_stages, default_config
from settings import COMPUTE, chosen, load_config, overlaid
from stages import make_all

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import gpu, machine  # noqa: E402

RIDGE = report.ROUTERS_OF_TEXT


def head_start_config(base: Path) -> dict[str, Any]:
    """A configuration with the settings of head_start.yaml in place of its own."""
    own: dict[str, Any] = yaml.safe_load((HERE / "head_start.yaml").read_text())
    return overlaid(load_config(base), own)


def make(config: dict[str, Any], work: Path, workers: int | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Make what is not made yet, of `only` these settings where any are given; the results."""
    config["workers"] = workers or config["workers"]
    make_all(all_stages(config, only), work, config["workers"], config["threads"])
    return results_of(config, work)


def results_of(config: dict[str, Any], work: Path) -> dict[str, Any]:
    """What is finished, without the settings that other configurations have."""
    found = collect(config, work, {**machine(), "gpu": gpu()})
    return {**found, "recipes": {name: setting["recipe"] for name, setting in chosen(config).items()}}


def pairs(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(from random routers, from ridge routers) of every setting, those with equal compute too."""
    found = []
    for name in results["settings"]:
        if RIDGE in name:
            found.append((report.from_random(name), name))
    return found


def write(results: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, separators=(",", ":")).replace('},"', '},\n"').replace("}},", "}},\n") + "\n")


def smoke() -> str:
    """The whole chain at a tiny size, with assertions; what it showed, in words."""
    config = head_start_config(HERE / "smoke.yaml")
    with tempfile.TemporaryDirectory(prefix="bam-merge-head-start-") as scratch:
        work = Path(scratch, "work")
        results = make(config, work)
        write(results, Path(scratch, "head_start.json"))
        again = json.loads(Path(scratch, "head_start.json").read_text())
    assert again == results
    merges = [one for runs in results["merges"].values() for one in runs.values()]
    assert len(merges) == len(config["only"]) and all(one["verified"] for one in merges), merges
    both = pairs(results)
    assert len(both) == 9 + 4, both
    starts = []
    for random, ridge in both:
        one, other = (results["merges"][name.removesuffix(COMPUTE)]["0"]["start"] for name in (random, ridge))
        starts.append(geometric(other) / geometric(one))
        ends = [geometric(results["settings"][name]["0"]["end"]) for name in (random, ridge)]
        assert all(map(math.isfinite, ends)), (random, ends)
    table = report.table_routers(results)
    assert all(f"| {random} " in table for random, _ in both), table
    print(table)
    share = f"{min(starts):.3f} to {max(starts):.3f} times the perplexity of random ones"
    return f"{len(merges)} merges verified; as merged, ridge routers have {share}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: gpu.yaml where torch has a GPU, else config.yaml")
    parser.add_argument("--work", type=Path, default=HERE / "work", metavar="DIR", help="where stages are kept (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "head_start.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs", metavar="DIR", help="where paper.md and its plots go")
    parser.add_argument("--workers", type=int, metavar="N", help="stages at a time (default: the configuration's)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING", help="these settings alone")
    parser.add_argument("--report", action="store_true", help="results and page of what is finished; train nothing")
    parser.add_argument("--smoke", action="store_true", help="everything at a tiny size, in a scratch folder, with assertions")
    options = parser.parse_args(arguments)
    if options.smoke:
        print(f"head_start --smoke: {smoke()}", file=sys.stderr)
        return
    config = head_start_config(options.config or default_config())
    if unknown := set(options.only) - set(chosen(config)):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not among {'; '.join(chosen(config))}")
    work = options.work.resolve()
    results = results_of(config, work) if options.report else make(config, work, options.workers, options.only)
    write(results, options.results)
    print(report.table_routers(results))
    measured = HERE / "results.json"
    if options.results.resolve() == HERE / "head_start.json" and measured.exists():
        report.write(json.loads(measured.read_text()), report.read_forward(), options.docs)


if __name__ == "__main__":
    main()
