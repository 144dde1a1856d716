"""The paper's tables in miniature: three phases of training, merges by bam-merge between them, measurements, docs/paper.md.

    python benchmarks/paper/run.py [--config FILE] [--work DIR] [--results FILE] [--docs DIR] [--workers N] [--only SETTING ...] [--report]

Every stage is kept in --work (its folder is named by all it was made from), so a run that was stopped goes on. A GPU is used where
torch has one, by gpu.yaml; else config.yaml. --report makes results and page of what is finished, and trains nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from results import collect
from settings import chosen, graphs, load_config
from stages import Stage, make_all

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import gpu, machine  # noqa: E402


def default_config() -> Path:
    """gpu.yaml where torch has a GPU, else config.yaml."""
    return HERE / ("gpu.yaml" if gpu() else "config.yaml")


def with_inputs(stages: Sequence[Stage]) -> list[Stage]:
    """`stages`, each once, and before it what it is made from."""
    found: dict[str, Stage] = {}
    for stage in stages:
        for one in (*with_inputs(list(stage.inputs.values())), stage):
            found.setdefault(one.digest, one)
    return list(found.values())


def all_stages(config: dict[str, Any], only: Sequence[str]) -> list[Stage]:
    """What is to be made, in order: all of `only`; or for every random seed the settings that come first, then the others."""
    made, settings = graphs(config), chosen(config)
    passes = [only] if only else [[name for name in config["first"] if name in settings], list(settings)]
    return with_inputs([stage for names in passes for graph in made for stage in graph.measurements(names)])


def write_report(config: dict[str, Any], options: argparse.Namespace) -> None:
    results = collect(config, options.work, {**machine(), "gpu": gpu()})
    text = json.dumps(results, separators=(",", ":"))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(text.replace('},"', '},\n"').replace("}},", "}},\n") + "\n")
    report.write(results, report.read_forward(), options.docs)
    print(f"{options.results}, {options.docs / 'paper.md'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: gpu.yaml where torch has a GPU, else config.yaml")
    parser.add_argument("--work", type=Path, default=HERE / "work", metavar="DIR", help="where stages are kept (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs", metavar="DIR", help="where paper.md and its plots go")
    parser.add_argument("--workers", type=int, metavar="N", help="stages at a time (default: the configuration's)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING", help="these settings alone; the page is left as it is")
    parser.add_argument("--report", action="store_true", help="results and page of what is finished; train nothing")
    options = parser.parse_args(arguments)
    options.work = options.work.resolve()
    config = load_config(options.config or default_config())
    known = list(chosen(config))
    if unknown := set(options.only) - set(known):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not among {'; '.join(known)}")
    config["workers"] = options.workers or config["workers"]
    if not options.report:
        make_all(all_stages(config, options.only), options.work, config["workers"], config["threads"])
    if options.only:
        for stage in (graph.measured[name] for graph in graphs(config) for name in options.only):
            print(f"{stage.name}: {stage.read(options.work, 'measured.json')['perplexity']}")
    else:
        write_report(config, options)


if __name__ == "__main__":
    main()
