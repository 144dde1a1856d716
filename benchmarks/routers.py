"""Routers made of text on SmolLM2 and its branches: what a mixture is worth before any training. First `make example`.

    python benchmarks/routers.py [--checkpoints DIR] [--work DIR] [--draws 3] [--tokens LIST] [--only CASES] [--further] [--quick]

For Expert-KV and BTX: held-out perplexity of 2,048 tokens a domain, means and spread over draws of text, beside each domain's own model,
the average, random routers, and the mixture with its gates forced. Then harder cases: two programming languages, two kinds of law, eight
experts, an expert twice, a useless expert, texts of 200 bytes; for each what the report says. More branches are trained where a case
needs them, and kept in --work with their texts; so are results, so that a run that was stopped goes on.

The bars, at 8,192 tokens: code and general at most 3 % above the average's perplexity; law and math within 10 % of their expert's, and of
BTX, whose attention is averaged, which no router brings back, within 5 % of what it has with its gates forced. Exits 1 where one is broken.
About two hours on two cores; --quick takes 512 held-out tokens, one draw and the bars' tokens alone.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import machine, machine_line, markdown_table, write_recipe
from router_texts import Domains

from bam_merge import MergeOptions, load_recipe, make_plan, merge
from bam_merge.architectures.opening import open_folder
from bam_merge.checkpoints.provenance import read_manifest
from bam_merge.model.loading import stored_model
from bam_merge.model.streaming import computing_on
from bam_merge.verifying import heldout
from bam_merge.verifying.devices import open_device, torch_workers
from bam_merge.verifying.perplexity import FORCED, perplexities
from bam_merge.verifying.router_words import readings

BASE = ("seed", "code", "law", "math")
METHODS: dict[str, dict[str, Any]] = {
    "Expert-KV": {"method": "bam", "ffn": {"top_k": 2, "gate": "topk_then_softmax"}},
    "BTX": {"method": "btx"},
}
ON_SEED = {"rules": [{"roles": ["embed", "norm.*"], "make": "task_arithmetic", "base": "seed"}]}
FURTHER: dict[str, dict[str, Any]] = {
    "Expert-KV, the paper's gates": {"method": "bam", "ffn": {"top_k": 1, "gate": "softmax_then_topk"}},
    "Expert-KV, norms and embeddings on the seed": {**METHODS["Expert-KV"], **ON_SEED},
}
"""By --further, with the bars' tokens alone."""
BAR_TOKENS = 8192
CHARACTERS = 12
"""For each token of a draw: more than any of these texts has."""
CASES: dict[str, dict[str, Any]] = {
    "two programming languages": {"experts": ("seed", "code", "cpp", "math")},
    "two kinds of law": {"experts": ("seed", "code", "gnu", "free")},
    "eight experts": {"experts": ("seed", "code", "cpp", "gnu", "free", "math", "docstrings", "tables")},
    "an expert twice": {"experts": (*BASE, "code")},
    "a useless expert": {"experts": (*BASE, "noise")},
    "texts of 200 bytes": {"experts": BASE, "characters": 200},
}
OWN, AVERAGE, MERGED = "own model", "average", "merged"
NEAR_AVERAGE = (("code", AVERAGE, 1.03), ("seed", AVERAGE, 1.03))
BARS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "Expert-KV": (("law", OWN, 1.10), ("math", OWN, 1.10), *NEAR_AVERAGE),
    "BTX": (("law", FORCED, 1.05), ("math", FORCED, 1.05), *NEAR_AVERAGE),
}
"""By method: domain, what its perplexity is compared with, and at most how many times that it is."""


class Trial:
    """Merges in `work`, measured; what was measured before, of the same recipe and texts, is not measured again."""

    def __init__(self, domains: Domains, options: argparse.Namespace) -> None:
        self.domains, self.options = domains, options
        self.work: Path = options.work
        heldout.TOKENS = options.heldout

    def recipe(self, setting: Mapping[str, Any], experts: Sequence[str], router: Mapping[str, Any]) -> dict[str, Any]:
        sources = {name: str(self.domains.model(name).resolve()) for name in dict.fromkeys(experts)}
        return {**setting, "sources": sources, "experts": list(experts), "router": dict(router), "output": {"path": "out"}}

    def ridge(self, experts: Sequence[str], tokens: int, draw: int, characters: int | None = None) -> dict[str, Any]:
        """The router section: `tokens` of each domain's own draw of text."""
        names = dict.fromkeys(experts)
        texts = {
            name: str(self.domains.draw(name, draw, self.options.draws, characters or CHARACTERS * tokens).resolve()) for name in names
        }
        return {"init": "ridge", "texts": texts, "tokens": tokens}

    def measured(self, recipe: Mapping[str, Any], dense: bool = False) -> dict[str, Any]:
        """Perplexities by domain, {domain: {model: value}}; accuracies; seconds of merge and calibration; and what the report says.

        With `dense` of the sources and their average too.
        """
        held = {name: str(self.domains.text(name, "heldout").resolve()) for name in dict.fromkeys(recipe["experts"])}
        key = json.dumps([recipe, held, dense, self.options.heldout], sort_keys=True)
        kept = self.work / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if kept.is_file():
            found: dict[str, Any] = json.loads(kept.read_text())
            return found
        plan = make_plan(load_recipe(write_recipe(self.work / "recipe.yaml", recipe)))
        started = time.monotonic()
        folder = merge(plan.recipe, options=MergeOptions(force=True, verify=False, device=self.options.device))
        seconds = time.monotonic() - started
        texts = heldout.read_domains(folder, held, recipe["experts"])
        checkpoint = open_folder(folder)
        with computing_on(open_device(self.options.device), torch_workers()) as computing:
            rows, choices = perplexities(checkpoint, plan if dense else None, texts, computing)
        routed = heldout.Routed(tuple(recipe["experts"]), texts, choices)
        figures = routed.document()
        said = readings(routed, figures, rows, stored_model(checkpoint), heldout.tokens_made_of(read_manifest(folder)))
        found = {
            "perplexity": {row["domain"]: row["perplexity"] for row in rows},
            "accuracy": {row["router"]: {"tokens": row["accuracy"], "windows": row["windows"]} for row in figures["overall"]},
            "seconds": seconds,
            "says": [[reading.question, reading.text] for reading in said],
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=1) + "\n")
        return found


# ---- the table of routers.md ---------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several."""
    shown = f"{mean(values):,.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def main_table(trial: Trial) -> tuple[list[list[str]], bool]:
    """The rows of the table, and whether every bar was kept."""
    options, rows, kept = trial.options, [], True

    def row(name: str, values: Sequence[Mapping[str, Any]], model: str = MERGED) -> None:
        cells = [spread([one["perplexity"][domain][model] for one in values]) for domain in BASE]
        routers = [values[0]["accuracy"].get(router) for router in ("attention", "ffn")] if model == MERGED else [None, None]
        for router, there in zip(("attention", "ffn"), routers, strict=True):
            cells.append(spread([100 * one["accuracy"][router]["tokens"] for one in values], 0) + " %" if there else "")
        rows.append([name, *cells])
        print(f"  {name}: {', '.join(cells)}", flush=True)

    dense: dict[str, dict[str, float]] = {}
    for method, setting in METHODS.items():
        random = trial.measured(trial.recipe(setting, BASE, {"init": "normal"}), dense=not dense)
        if not dense:
            dense = {domain: {**found, OWN: found[domain]} for domain, found in random["perplexity"].items()}
            for name in (OWN, AVERAGE):
                row(name, [{"perplexity": dense, "accuracy": {}}], name)
        row(f"{method}, random routers", [random])
        row(f"{method}, gates forced", [random], FORCED)
        for tokens in options.tokens:
            draws = [trial.measured(trial.recipe(setting, BASE, trial.ridge(BASE, tokens, draw))) for draw in range(options.draws)]
            row(f"{method}, ridge, {tokens:,} tokens", draws)
            if tokens == BAR_TOKENS:
                beside = {domain: {**dense[domain], FORCED: random["perplexity"][domain][FORCED]} for domain in BASE}
                kept &= bars(method, draws, beside)
    if options.further and BAR_TOKENS in options.tokens:
        for name, setting in FURTHER.items():
            draws = [trial.measured(trial.recipe(setting, BASE, trial.ridge(BASE, BAR_TOKENS, draw))) for draw in range(options.draws)]
            row(f"{name}, ridge, {BAR_TOKENS:,} tokens", draws)
    return rows, kept


def bars(method: str, draws: Sequence[Mapping[str, Any]], others: Mapping[str, Mapping[str, float]]) -> bool:
    """Say of each bar whether the mean over the draws keeps it."""
    kept = True
    for domain, beside, most in BARS[method]:
        ratio = mean(one["perplexity"][domain][MERGED] for one in draws) / others[domain][beside]
        print(f"bar: {method}, {domain}: {ratio:.3f} x {beside}, at most {most}: {'kept' if ratio <= most else 'BROKEN'}", flush=True)
        kept &= ratio <= most
    return kept


# ---- harder cases ----------------------------------------------------------------------------------------------------------------


def hard_case(trial: Trial, name: str) -> str:
    """A case as Markdown: perplexities by domain, and what the report says."""
    case = CASES[name]
    experts: tuple[str, ...] = case["experts"]
    router = trial.ridge(experts, BAR_TOKENS, 0, case.get("characters"))
    found = trial.measured(trial.recipe(METHODS["Expert-KV"], experts, router), dense=True)
    rows = []
    for domain, values in found["perplexity"].items():
        rows.append([domain, *(f"{values[model]:,.2f}" for model in (domain, AVERAGE, MERGED, FORCED))])
    right = [
        f"{router} {100 * one['tokens']:.0f} % of tokens, {100 * one['windows']:.0f} % of windows"
        for router, one in found["accuracy"].items()
    ]
    says = "\n".join(f"* *{question}* {text}" for question, text in found["says"])
    table = markdown_table(["", "own model", "average", "ridge", "forced"], rows)
    return f"### {name}\n\n{table}\n\nRight: {'; '.join(right)}. The report:\n\n{says}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR", help="of make example (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, default=Path("work/routers"), metavar="DIR", help="where all is kept (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=3, help="of text for the routers (default: %(default)s)")
    parser.add_argument("--tokens", default="255,1530,8192,20000", metavar="LIST", help="of each domain (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=2048, metavar="N", help="held-out tokens a domain (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="training steps of further branches (default: %(default)s)")
    parser.add_argument("--only", default=",".join(["table", *CASES]), metavar="CASES", help="of: table, " + ", ".join(CASES))
    parser.add_argument("--device", default="cpu", metavar="NAME", help="what is computed on (default: %(default)s)")
    parser.add_argument("--further", action="store_true", help="the table also has: " + "; ".join(FURTHER))
    parser.add_argument("--quick", action="store_true", help="512 held-out tokens, one draw, 8,192 tokens; the table alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there too")
    options = parser.parse_args()
    if options.quick:
        options.heldout, options.draws, options.tokens, options.only = 512, 1, str(BAR_TOKENS), "table"
    options.tokens = [int(number) for number in options.tokens.split(",")]
    wanted = [name.strip() for name in options.only.split(",")]
    if unknown := set(wanted) - {"table", *CASES}:
        parser.error(f"--only: {', '.join(sorted(unknown))}: not among table, {', '.join(CASES)}")
    if missing := [name for name in BASE if not (options.checkpoints / name / "config.json").is_file()]:
        parser.error(f"{options.checkpoints}: no {', '.join(missing)}. Run make example first, or give --checkpoints.")
    options.work.mkdir(parents=True, exist_ok=True)
    trial = Trial(Domains(options.checkpoints, options.work, options.steps), options)
    print(f"{machine_line(machine())}, load {os.getloadavg()[0]:.1f}", flush=True)
    rows: list[list[str]] = []
    parts, kept = [], True
    if "table" in wanted:
        rows, kept = main_table(trial)
        parts.append(markdown_table(["", "general", "code", "law", "math", "attention right", "FFN right"], rows))
    parts += [hard_case(trial, name) for name in CASES if name in wanted]
    print("\n" + "\n\n".join(parts), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(), "heldout": options.heldout, "table": rows, "page": parts}, indent=1) + "\n"
        )
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
