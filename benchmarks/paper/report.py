"""docs/paper.md and its plots, from results.json, forward.json and page.md. No number of ours is written anywhere else.

python benchmarks/paper/report.py [--results FILE] [--out DIR]
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from results import Results, arithmetic, compute_of, differences, ends, geometric, spread
from settings import COMPUTE

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import machine_line, markdown_table  # noqa: E402

METHODS = HERE / "methods.json"
ON_A_GPU = HERE / "results_gpu.json"

EXPERT_KV, SHARED_KV, BTX1, BTX2 = "BAM Expert-KV", "BAM Shared-KV", "BTX top-1", "BTX top-2"
ROUTERS_OF_TEXT = ", ridge"
"""Ends the names of settings of head_start.yaml whose routers are made of text."""
PAPER_AVERAGE = {
    "seed": 13.91, BTX1: 10.72, EXPERT_KV: 9.70, SHARED_KV: 10.32, f"{EXPERT_KV}{COMPUTE}": 10.00, f"{SHARED_KV}{COMPUTE}": 10.46,
}  # fmt: skip
"""arXiv 2408.08274, Table 1, 590M: the average of the four perplexities."""
PAPER_ROUTING = {EXPERT_KV: 10.47, "BAM attention top-2": 10.72, "BAM attention top-1": 10.81, BTX1: 10.72}
"""Table 6, equal compute."""
PAPER_LATENCY = {"BTX": 4.81, EXPERT_KV: 6.17, SHARED_KV: 5.96}
"""Section 7.3: seconds for 16 new tokens after 256, 590M."""

CLAIMS = (
    ("BAM Expert-KV ends below BTX, equal data", "Table 1", EXPERT_KV, BTX1),
    ("... and below BTX with two renormalised experts", "-", EXPERT_KV, BTX2),
    ("BAM Shared-KV ends below BTX, equal data", "Table 1", SHARED_KV, BTX1),
    ("... and below BTX with two renormalised experts", "-", SHARED_KV, BTX2),
    ("Expert-KV ends below Shared-KV", "Table 1", EXPERT_KV, SHARED_KV),
    ("Expert-KV ends below BTX, equal compute", "Table 1", f"{EXPERT_KV}{COMPUTE}", BTX1),
    ("Shared-KV ends below BTX, equal compute", "Table 1", f"{SHARED_KV}{COMPUTE}", BTX1),
    ("BTX ends below the seed", "Table 1", BTX1, "seed"),
    ("BTX ends below the average trained as long", "-", BTX1, "average"),
    (
        "Expert-KV ends below BTX of equal total and active parameters (6 experts, top-3)",
        "Tables 4, 5",
        EXPERT_KV,
        "BTX 6 experts top-3",
    ),
    ("Expert-KV ends below BTX of equal total parameters (6 experts, top-1)", "Tables 4, 5", EXPERT_KV, "BTX 6 experts top-1"),
    ("Soft attention routing ends below top-2", "Table 6", EXPERT_KV, "BAM attention top-2"),
    ("Attention top-2 ends below top-1", "Table 6", "BAM attention top-2", "BAM attention top-1"),
    ("Attention top-2 ends below BTX", "Table 6: equal", "BAM attention top-2", BTX1),
    ("BTX ends below attention top-1", "Table 6", BTX1, "BAM attention top-1"),
    ("gate_scale 4 starts below the paper's gates", "-", "BAM gate_scale 4@0", f"{EXPERT_KV}@0"),
    ("... and ends below them", "-", "BAM gate_scale 4", EXPERT_KV),
    ("One renormalised gate (the constant 1) starts below the paper's gates", "-", "BAM renormalised top-1@0", f"{EXPERT_KV}@0"),
    ("... and ends below them", "-", "BAM renormalised top-1", EXPERT_KV),
    ("Two renormalised gates end below the paper's", "-", "BAM renormalised top-2", EXPERT_KV),
    ("... and below BTX's with two renormalised gates", "-", "BAM renormalised top-2", BTX2),
    ("BTX of branched experts ends below Sparse Upcycling of the seed", "-", BTX2, "Sparse Upcycling"),
)
"""What is claimed, where the paper says it, and the two settings of which the first should have the lower perplexity."""


def verdict(values: list[float]) -> str:
    below = sum(value > 0 for value in values)
    if not values:
        return "not measured"
    if below == len(values):
        return f"yes, {below} of {len(values)}"
    return f"no, {below} of {len(values)}" if below == 0 else f"undecided, {below} of {len(values)}"


# ---- the page's parts ------------------------------------------------------------------------------------------------------


def domains(results: Results) -> list[str]:
    return list(results["config"]["domains"])


def title(results: Results, name: str, shown: str = "") -> str:
    """The name in a table's first column, with the number of random seeds where some are missing."""
    found, wanted = len(ends(results, name)), len(results["config"]["random_seeds"])
    return f"{shown or name} (random seeds: {found})" if 0 < found < wanted else shown or name


def perplexity_cells(results: Results, name: str) -> list[str]:
    """Each domain's perplexity, their arithmetic and their geometric mean."""
    found = list(ends(results, name).values())
    return [
        *(spread([run[domain] for run in found], 1) for domain in domains(results)),
        spread([arithmetic(run) for run in found]),
        spread([geometric(run) for run in found]),
    ]


def cost_cells(results: Results, name: str) -> list[str]:
    merges = list(results["merges"].get(name.removesuffix("@0").removesuffix(COMPUTE), {}).values())
    if not merges:
        return ["", "", ""]
    one = merges[0]
    return [f"{one['parameters']:,}", f"{one['active']:,}", f"{one['flops_per_token'] / 1e6:.2f} M"]


def steps_cell(results: Results, name: str) -> str:
    runs = list(results["settings"].get(name, {}).values())
    return f"{runs[0]['steps']}" if runs else "0"


def table_1(results: Results) -> str:
    names = [
        *results["dense"], "average@0", "average", "Sparse Upcycling", BTX1, BTX2, EXPERT_KV, SHARED_KV,
        f"{EXPERT_KV}{COMPUTE}", f"{SHARED_KV}{COMPUTE}",
    ]  # fmt: skip
    shown = {"seed": "seed", "average@0": "average of the four, as merged", "average": "average, trained as long"}
    rows = []
    for name in names:
        row = title(results, name, shown.get(name, f"expert {name}" if name in results["dense"] else name))
        paper = f"{PAPER_AVERAGE[name]:.2f}" if name in PAPER_AVERAGE else ""
        rows.append([row, steps_cell(results, name), *perplexity_cells(results, name), paper])
    return markdown_table(["", "steps", *domains(results), "mean", "geometric mean", "the paper's mean"], rows)


def table_4(results: Results) -> str:
    names = [EXPERT_KV, SHARED_KV, "BTX 6 experts top-3", "BTX 6 experts top-1", BTX1, BTX2]
    rows = [[title(results, name), *cost_cells(results, name), *perplexity_cells(results, name)[-2:]] for name in names]
    return markdown_table(["", "parameters", "active", "FLOPs per token", "mean", "geometric mean"], rows)


def table_6(results: Results) -> str:
    shown = {EXPERT_KV: "soft", "BAM attention top-2": "top-2", "BAM attention top-1": "top-1", BTX1: "no attention experts (BTX top-1)"}
    rows = [
        [title(results, name, routing), cost_cells(results, name)[2], *perplexity_cells(results, name)[-2:], f"{PAPER_ROUTING[name]:.2f}"]
        for name, routing in shown.items()
    ]
    return markdown_table(["attention", "FLOPs per token", "mean", "geometric mean", "the paper's mean, equal compute"], rows)


def table_start(results: Results) -> str:
    rows = []
    for name in results["merges"]:
        recipe = results["recipes"][name]
        ffn = ", ".join(f"{key}: {value}" for key, value in recipe.get("ffn", {}).items()) or "default"
        start, end = ([geometric(run) for run in ends(results, which).values()] for which in (f"{name}@0", name))
        rows.append([title(results, name), f"{recipe['method']}; {ffn}", spread(start, 1), spread(end)])
    return markdown_table(["", "method; ffn", "as merged", "after phase 3"], rows, left=(0, 1))


def table_claims(results: Results) -> str:
    rows = []
    for claim, source, better, worse in CLAIMS:
        values = differences(results, better, worse)
        rows.append([claim, source, spread(values, 1) + " %" if values else "", verdict(values)])
    return markdown_table(["claim", "in the paper", "below by", "random seeds"], rows, left=(0, 1, 3))


def table_data(results: Results) -> str:
    parts = [(name, part, size) for name, both in results["data"]["domains"].items() for part, size in both.items()]
    titles = {"text": "trained on", "heldout": "held out"}
    rows = [[name, titles[part], f"{size['bytes']:,}", f"{size['tokens']:,}", size["sha256"][:16]] for name, part, size in parts]
    return markdown_table(["domain", "", "bytes", "tokens", "SHA-256"], rows, left=(0, 1, 4))


def table_verified(results: Results) -> str:
    rows = []
    for name, runs in results["merges"].items():
        passed = sum(run["verified"] for run in runs.values())
        rows.append(
            [name, *cost_cells(results, name), f"{passed} of {len(runs)}", f"{min((run['checks'] for run in runs.values()), default=0)}"]
        )
    return markdown_table(["merge", "parameters", "active", "FLOPs per token", "verified", "checks of each"], rows)


def table_experts(results: Results) -> str:
    """How a trained mixture's routers divide each domain, averaged over layers and random seeds."""
    rows = []
    for name in (EXPERT_KV, SHARED_KV, BTX1, BTX2):
        runs = [run["routing"] for run in results["settings"].get(name, {}).values()]
        for router in ("ffn", "attention"):
            for domain in domains(results):
                layers = [layer for run in runs for layer in run[domain].get(router, [])]
                if layers:
                    shares = [100 * mean(layer["shares"][i] for layer in layers) for i in range(len(layers[0]["shares"]))]
                    entropy = mean(layer["entropy"] for layer in layers) / math.log(len(shares))
                    rows.append([name, router, domain, *(f"{share:.0f} %" for share in shares), f"{entropy:.2f}"])
    experts = ["seed", *domains(results)[1:]]
    return markdown_table(["", "router", "text", *(f"expert {name}" for name in experts), "entropy / log N"], rows, left=(0, 1, 2))


def table_routers(results: Results | None, compared: bool = True) -> str:
    """Phase 3 from routers drawn at random and made of text, side by side: as merged, halfway, at the end, by how much; BAM against BTX."""
    if results is None:
        return "Not measured yet: run that command."
    rows = []
    for name in [name for name in results["settings"] if ROUTERS_OF_TEXT in name]:
        random = from_random(name)
        starts, halves, finals = ([along(results, which, share) for which in (random, name)] for share in (0.0, 0.5, 1.0))
        if not all(finals):
            continue
        cells = [f"{spread(a)} -> {spread(b)}" for a, b in (starts, halves, finals)]
        gains = differences(results, name, random)
        rows.append(
            [title(results, name, name.replace(ROUTERS_OF_TEXT, "")), *cells, spread(gains, 1) + " %" if gains else "", verdict(gains)]
        )
    header = ["geometric means, random -> ridge", "as merged", "halfway", "at the end", "below by, at the end", "random seeds"]
    parts = [machine_line(results["machine"]) + ".", markdown_table(header, rows, left=(0, 5))]
    return "\n\n".join([*parts, bam_or_btx(results)] if compared else parts)


def scaled(results: Results) -> str:
    """As table_routers, of the settings with a scale, which were trained where `results` were."""
    found = read_scaled()
    if found is None:
        return table_routers(None)
    measured = {name: runs for name, runs in found["settings"].items() if runs}
    return table_routers({**found, "settings": {**results["settings"], **measured}}, compared=False)


def from_random(name: str) -> str:
    """The setting that differs from this one, of routers made of text, in its routers alone."""
    return name.partition(ROUTERS_OF_TEXT)[0] + (COMPUTE if name.endswith(COMPUTE) else "")


def along(results: Results, name: str, share: float) -> list[float]:
    """Of every random seed the geometric mean at a share of phase 3: the plot's point that is nearest; at the end as the tables have it."""
    if share == 1.0:
        return [geometric(run) for run in ends(results, name).values()]
    found = []
    for run in results["settings"].get(name, {}).values():
        point = min(run["curve"], key=lambda point: abs(point["step"] - share * run["steps"]))
        found.append(geometric({key: value for key, value in point.items() if key != "step"}))
    return found


def bam_or_btx(results: Results) -> str:
    """Whether BAM ends below BTX, by the routers that both start from."""
    rows = []
    for bam, btx in ((EXPERT_KV, BTX1), (SHARED_KV, BTX1), ("BAM renormalised top-2", BTX2), ("BAM Shared-KV renormalised top-2", BTX2)):
        for compute, words in (("", "equal data"), (COMPUTE, "equal compute")):
            cells = []
            for routers in ("", ROUTERS_OF_TEXT):
                values = differences(results, f"{bam}{routers}{compute}", f"{btx}{routers}")
                cells += [spread(values, 1) + " %" if values else "", verdict(values)]
            rows.append([f"{bam} ends below {btx}, {words}", *cells])
    return markdown_table(["", "from random by", "random seeds", "from ridge by", "random seeds"], rows, left=(0, 2, 4))


def table_forward(forward: dict[str, Any] | None) -> str:
    if forward is None:
        return "Not measured yet: run that command, then `python benchmarks/paper/report.py`."
    about = f"scale {forward['scale']}, medians of {forward['pairs']} rounds, smallest and largest in brackets."
    parts = [f"{machine_line(forward['machine'])}; {about}"]
    for dtype, rows in forward["dtypes"].items():
        names = ("dense", "BTX", EXPERT_KV, SHARED_KV)
        parts.append(_latencies(dtype, {name: rows[f"{name}, exported"] for name in names}))
        if "BTX, vllm" in rows:
            parts.append(_latencies(f"{dtype}, in vLLM", {name: rows[f"{name}, vllm"] for name in names}))
    return "\n\n".join(parts)


def _latencies(title: str, found: dict[str, dict[str, Any]]) -> str:
    """A table of one implementation; what a file does not have, of an older measurement or of vLLM, has no column."""
    lines = []
    apart, passes, cached = (all(row.get(what) for row in found.values()) for what in ("prompt", "forward", "cache_bytes"))
    for name, row in found.items():
        paper = PAPER_LATENCY.get(name)
        theirs = [f"{paper:.2f}", f"{paper / PAPER_LATENCY['BTX']:.2f}"] if paper else ["", ""]
        to_btx = {what: ranged(ratios(row, found["BTX"], what)) for what in ("generate", "prompt", "forward") if row.get(what)}
        cells = [name, ranged(row["generate"]), to_btx["generate"], *theirs]
        cells += [to_btx["prompt"], ranged(_further(row, found["BTX"])), ranged(ratios(row, found["dense"], "generate"))] if apart else []
        cells += [to_btx["forward"]] if passes else []
        lines.append([*cells, f"{median(row['peak_bytes']) / 1e6:,.0f}", *([f"{row['cache_bytes'] / 1e6:.1f}"] if cached else [])])
    header = [title, "generate, s", "to BTX", "the paper's, s", "to BTX"]
    header += ["first token, to BTX", "each further one, to BTX", "generate, to dense"] if apart else []
    header += ["prompt alone, to BTX"] if passes else []
    return markdown_table([*header, "peak memory, MB", *(["KV cache, MB"] if cached else [])], lines)


def _further(row: dict[str, Any], anchor: dict[str, Any]) -> list[float]:
    """The ratios of what tokens after the first take."""
    ours, theirs = ([whole - first for whole, first in zip(of["generate"], of["prompt"], strict=True)] for of in (row, anchor))
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def table_methods(results: Results | None) -> str:
    """Every setting of methods.yaml, as merged and trained, against the first of its group: those that begin with the same word."""
    if results is None or not any(results["settings"].values()):
        return "Not measured yet: run `make paper-methods`."
    rows: list[list[str]] = []
    first: dict[str, str] = {}
    for name, recipe in results["recipes"].items():
        plain = first.setdefault(name.split()[0], name)
        start, end = ([geometric(run) for run in ends(results, which).values()] for which in (f"{name}@0", name))
        values = [] if name == plain else differences(results, name, plain)
        at_start = [] if name == plain else differences(results, f"{name}@0", f"{plain}@0")
        made = recipe.get("shared") or next(iter(recipe.get("rules", ())), {"make": "copy" if "Upcycling" in name else "mean"})
        numbers = ", ".join(f"{key} {value}" for key, value in made.items() if key not in ("make", "base", "from", "roles"))
        below = [spread(found, 1) + " %" if found else "" for found in (at_start, values)]
        shown = "" if name == plain else verdict(values)
        cells = [title(results, name), f"{made['make']}{f' ({numbers})' if numbers else ''}", spread(start, 1), below[0], spread(end)]
        rows.append([*cells, below[1], shown])
    header = ["", "make", "as merged", "below the first by", "after phase 3", "below the first by", "random seeds"]
    return f"{machine_line(results['machine'])}.\n\n" + markdown_table(header, rows, left=(0, 1, 6))


def table_gpu(results: Results | None) -> str:
    """What was finished of gpu.yaml: the machine, the perplexities of Table 1, the claims that these decide."""
    if results is None:
        return "Not measured yet: run that command."
    lines = table_1(results).splitlines()
    measured = [line for line in lines if not any(line.startswith(f"| {name} ") for name in _unfinished(results))]
    claims = [row for row in table_claims(results).splitlines() if "not measured" not in row]
    return "\n\n".join([summary(results).partition("Not finished")[0].rstrip(), "\n".join(measured), "\n".join(claims)])


def _unfinished(results: Results) -> list[str]:
    return [name for name, runs in results["settings"].items() if not runs]


def ratios(row: dict[str, Any], anchor: dict[str, Any], what: str) -> list[float]:
    """The ratios within each round."""
    return [one / other for one, other in zip(row[what], anchor[what], strict=True)]


def ranged(values: list[float]) -> str:
    """Median, and from smallest to largest."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def summary(results: Results) -> str:
    """Which machine, how many random seeds, how much training."""
    config, window = results["config"], results["config"]["data"]["window"]
    counts = {name: len(runs) for name, runs in results["settings"].items()}
    finished = min(counts.values(), default=0)
    tokens = {phase: config[phase]["steps"] * config["training"]["batch"] * window for phase in ("phase1", "phase2", "phase3")}
    missing = [name for name, count in counts.items() if count < len(config["random_seeds"])]
    model = config["model"]
    lines = [
        f"{machine_line(results['machine'])}. Random seeds finished with every setting: {finished} of {len(config['random_seeds'])}.",
        f"Model: {model['num_hidden_layers']} parallel blocks, width {model['hidden_size']}, FFN {model['intermediate_size']}, "
        f"{model['num_attention_heads']} heads, vocabulary {results['data']['vocabulary']:,}. Tokens: phase 1 {tokens['phase1']:,}; "
        f"phase 2 {tokens['phase2']:,} for each expert; phase 3 {tokens['phase3']:,}; {config['training']['batch'] * window:,} a step.",
        f"All stages together took {results['hours']:.1f} hours, {config['workers']} going on at a time.",
    ]
    if missing:
        partly = ", ".join(f"{name} ({counts[name]})" for name in missing)
        lines.append(f"Not finished for all random seeds, and so shown with fewer (in brackets how many): {partly}.")
    return "\n".join(lines)


def compute(results: Results) -> str:
    """What equal compute means in numbers."""
    lines = []
    for name in (EXPERT_KV, SHARED_KV):
        own, full, anchor = compute_of(results, f"{name}{COMPUTE}"), compute_of(results, name), compute_of(results, BTX1)
        if own and full and anchor:
            lines.append(
                f"{name} with equal data spends {full / anchor:.2f} times BTX's FLOPs, with equal compute {own / anchor:.3f} times"
            )
    return "; ".join(lines) + "." if lines else "Not measured yet."


PARTS: dict[str, Callable[[Results], str]] = {
    "summary": summary, "data": table_data, "verified": table_verified, "table 1": table_1, "compute": compute, "table 4": table_4,
    "table 6": table_6, "start": table_start, "claims": table_claims, "experts": table_experts,
    "scaled": scaled,
}  # fmt: skip


def page(results: Results, forward: dict[str, Any] | None, methods: Results | None = None) -> str:
    """page.md with every {{part}} filled in; `methods` are those of methods.json, where none are given."""
    text = (HERE / "page.md").read_text(encoding="utf-8")
    others = {
        "forward": lambda: table_forward(forward),
        "routers": lambda: table_routers(read_routers()),
        "gpu": lambda: table_gpu(read_gpu()),
        "methods": lambda: table_methods(methods or read_methods()),
    }
    return re.sub(r"\{\{(.+?)\}\}", lambda found: others[found[1]]() if found[1] in others else PARTS[found[1]](results), text)


def write(results: Results, forward: dict[str, Any] | None, out: Path) -> None:
    """paper.md and, where matplotlib is installed, its plots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "paper.md").write_text(page(results, forward), encoding="utf-8")
    try:
        import plots
    except ImportError:
        print("no plots: pip install 'bam-merge[plot]'", file=sys.stderr)
    else:
        plots.draw(results, out)


def read_forward() -> dict[str, Any] | None:
    file = HERE / "forward.json"
    return json.loads(file.read_text()) if file.exists() else None


def read_routers() -> Results | None:
    file = HERE / "head_start.json"
    return json.loads(file.read_text()) if file.exists() else None


def read_scaled() -> Results | None:
    file = HERE / "head_start_scale.json"
    return json.loads(file.read_text()) if file.exists() else None


def read_gpu() -> Results | None:
    found: Results | None = json.loads(ON_A_GPU.read_text()) if ON_A_GPU.exists() else None
    return found


def read_methods() -> Results | None:
    found: Results | None = json.loads(METHODS.read_text()) if METHODS.exists() else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The page of the paper's tables in miniature, from what was measured.")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", metavar="FILE")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs", metavar="DIR")
    options = parser.parse_args()
    write(json.loads(options.results.read_text()), read_forward(), options.out)


if __name__ == "__main__":
    main()
