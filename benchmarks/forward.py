"""How fast the exported model runs: BAM against BTX and a dense model, and each against a loop over the experts.

    python benchmarks/forward.py [--scale S] [--pairs N] [--dtypes bfloat16,float32] [--vllm PYTHON] [--device cuda] [--json FILE]

Work: the paper's 590M architecture (arXiv 2408.08274, Table 9: d 1024, 6 parallel blocks, 8 heads, FFN 2048, vocabulary 256,000,
untied, 4 experts; random weights) at --scale 1; a smaller scale takes that share of the layers and of the vocabulary. Batch 1, a
prompt of 256 tokens. BTX has one expert per token, as in the paper's tables of FLOPs. Three times are taken:

    generate  16 new tokens after the prompt, greedily, with a cache: what section 7.3 of the paper measures
    prompt    the first of these, for which the prompt is read; the others take what is left of generate
    forward   one pass over the prompt, with the logits of every position

"loop" is bam-merge's reference model; its generate computes the logits of the whole prompt, transformers' those of the last
position only, so `forward` is the fairer comparison of the two. The exported dense model is transformers' own Cohere. With
--vllm, the Python of an environment that has vLLM, the same folders are run there too; the dense model is then vLLM's own Cohere.

At --scale 1 the parameters of every model that runs are counted, and must be those of the paper's Table 9.

Every measurement is a process of its own, which loads the model, runs each call once untimed and twice timed; the smaller
time counts, and the processes take turns as in merge.py. Ratios are taken within a round; shown are medians, smallest and
largest. Peak memory includes loading; of a GPU it is the most that was taken of its own.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from common import bam_merge, gpu, machine, machine_line, markdown_table, run, write_recipe
from paired import spread
from workload import write_models

LAYERS, VOCABULARY = 6, 256_000
PROMPT, NEW, REPEATS = 256, 16, 2
KINDS = ("exported", "loop", "vllm")
PAPER = {"BAM Expert-KV": 6.17 / 4.81, "BAM Shared-KV": 5.96 / 4.81}
"""Ratios to BTX of the latencies in section 7.3."""

TOTALS = {"dense": 587_209_728, "BTX": 700_480_512, "BAM Expert-KV": 776_002_560, "BAM Shared-KV": 738_253_824}
"""Parameters by the paper's Table 9, at scale 1."""

METHODS: dict[str, dict[str, Any]] = {
    "BTX": {"method": "btx", "ffn": {"top_k": 1, "gate": "topk_then_softmax"}},
    "BAM Expert-KV": {"method": "bam", "attention": {"kv": "expert", "routing": "soft"}, "ffn": {"top_k": 1}},
    "BAM Shared-KV": {"method": "bam", "attention": {"kv": "shared", "routing": "soft"}, "ffn": {"top_k": 1}},
}


def cohere(scale: float) -> dict[str, Any]:
    """config.json of the paper's dense 590M model, with `scale` times the layers and the vocabulary."""
    return {
        "model_type": "cohere", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": max(1, round(LAYERS * scale)),
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": max(256, round(VOCABULARY * scale)), "layer_norm_eps": 1e-5,
        "logit_scale": 1.0, "tie_word_embeddings": False, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip


def models(work: Path, scale: float) -> dict[str, Path]:
    """The dense model and what each method makes of it; four experts of one model cost what four models' would."""
    seed = Path(write_models(work / "models", cohere(scale), ["seed"], sparse=False)["seed"])
    made = {"dense": seed}
    for name, method in METHODS.items():
        made[name] = work / name.replace(" ", "-")
        recipe = {**method, "sources": {"seed": str(seed)}, "experts": ["seed"] * 4, "output": {"path": str(made[name])}}
        print(f"merging {name}", file=sys.stderr)
        run([bam_merge(), write_recipe(work / "recipe.yaml", recipe), "--force", "--no-verify"])
    return made


@dataclass
class Row:
    """One model's measurements by one implementation, a value a round: seconds, and the largest resident set in bytes."""

    generate: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    parameters: int = 0


Rows = dict[tuple[str, str], Row]
"""By model and implementation."""


def measure(folders: Mapping[str, Path], dtype: str, rounds: int, vllm: Path | None = None, device: str = "cpu") -> Rows:
    """Every model by every implementation, in turn, `rounds` times, each round starting with another. `vllm`: the Python that has it."""
    rows: Rows = {(name, kind): Row() for kind in KINDS if kind != "vllm" or vllm for name in folders}
    keys = list(rows)
    script = Path(__file__).with_name("one_forward.py")
    for index in range(rounds):
        first = index % len(keys)
        for name, kind in [*keys[first:], *keys[:first]]:
            python = vllm if kind == "vllm" and vllm else sys.executable
            done = run([python, script, folders[name], kind, dtype, str(PROMPT), str(NEW), str(REPEATS), device])
            (line,) = [text for text in done.output.splitlines() if text.startswith('{"')][-1:]
            result, row = json.loads(line), rows[name, kind]
            for what in ("generate", "prompt", "forward"):
                getattr(row, what).extend([min(result[what])] if what in result else [])
            row.peak_bytes.append(result.get("device_bytes", done.peak_bytes))
            row.cache_bytes, row.parameters = result.get("cache_bytes", 0), result.get("parameters", 0)
            print(f"  {dtype} {name}, {kind}: generate {row.generate[-1]:.3f} s, prompt {row.prompt[-1]:.3f} s", file=sys.stderr)
    return rows


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of each round: median, smallest and largest."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def further(row: Row) -> list[float]:
    """Seconds of each new token after the first."""
    return [(whole - first) / (NEW - 1) for whole, first in zip(row.generate, row.prompt, strict=True)]


def table(title: str, rows: Rows) -> str:
    """The exported models; the last columns compare them with the loop."""
    lines = []
    anchor, dense = rows["BTX", "exported"], rows["dense", "exported"]
    for name in dict.fromkeys(name for name, _ in rows):
        row, loop = rows[name, "exported"], rows[name, "loop"]
        lines.append([
            name, f"{row.parameters:,}", spread(row.generate, 3), ratios(row.generate, dense.generate),
            ratios(row.generate, anchor.generate),
            f"{PAPER[name]:.2f}" if name in PAPER else "", ratios(row.prompt, anchor.prompt), ratios(further(row), further(anchor)),
            ratios(row.forward, anchor.forward),
            f"{row.cache_bytes / 1e6:.1f}", f"{median(row.peak_bytes) / 1e6:,.0f}",
            ratios(row.generate, loop.generate), ratios(row.forward, loop.forward),
        ])  # fmt: skip
    header = [
        title, "parameters", "generate, s", "ratio to dense", "ratio to BTX", "the paper's", "prompt, ratio to BTX",
        "further token, ratio to BTX", "forward, ratio to BTX", "KV cache, MB", "peak memory, MB", "generate, ratio to the loop",
        "forward, ratio to the loop",
    ]  # fmt: skip
    return markdown_table(header, lines)


def table_vllm(title: str, rows: Rows) -> str:
    """The same models in vLLM."""
    lines = []
    anchor, dense = rows["BTX", "vllm"], rows["dense", "vllm"]
    for name in dict.fromkeys(name for name, _ in rows):
        row, exported = rows[name, "vllm"], rows[name, "exported"]
        lines.append([
            name, spread(row.generate, 3), ratios(row.generate, dense.generate), ratios(row.generate, anchor.generate),
            f"{PAPER[name]:.2f}" if name in PAPER else "", ratios(row.prompt, anchor.prompt), ratios(further(row), further(anchor)),
            f"{median(row.peak_bytes) / 1e6:,.0f}", ratios(row.generate, exported.generate),
        ])  # fmt: skip
    header = [
        f"{title} in vLLM", "generate, s", "ratio to dense", "ratio to BTX", "the paper's", "prompt, ratio to BTX",
        "further token, ratio to BTX", "peak memory, MB", "generate, ratio to transformers",
    ]  # fmt: skip
    return markdown_table(header, lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers and the vocabulary (default 1; 0.17 is quick)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which the models take turns (default 5)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="which to compute in (default %(default)s)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="scratch space (6 GB at scale 1) in a folder of its own in DIR; default: here"
    )
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the Python of an environment that has vLLM, to measure there as well")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="what transformers and the loop compute on (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as well")
    options = parser.parse_args()
    options.dtypes = options.dtypes.split(",")
    if unknown := set(options.dtypes) - {"bfloat16", "float32"}:
        parser.error(f"--dtypes: {', '.join(sorted(unknown))}: bfloat16 or float32, or both with a comma.")
    if options.pairs < 1 or options.scale <= 0:
        parser.error("--pairs is at least 1, and --scale above 0.")
    return options


def measure_all(options: argparse.Namespace, work: Path) -> None:
    """One table per dtype; written to --json as they are done."""
    facts, config = machine(), cohere(options.scale)
    if options.device != "cpu":
        facts["gpu"] = gpu()
    print(f"{machine_line(facts)}, load {os.getloadavg()[0]:.1f}")
    print(f"{config['num_hidden_layers']} layers, vocabulary {config['vocab_size']:,}. {options.pairs} rounds.", flush=True)
    folders = models(work, options.scale)
    results: dict[str, Any] = {"machine": facts, "scale": options.scale, "pairs": options.pairs, "dtypes": {}}
    for dtype in options.dtypes:
        rows = measure(folders, dtype, options.pairs, options.vllm, options.device)
        counted = {name: row.parameters for (name, kind), row in rows.items() if kind != "vllm"}
        if options.scale == 1 and (wrong := {name: count for name, count in counted.items() if count != TOTALS[name]}):
            raise SystemExit(f"parameters not as in the paper's Table 9: {wrong}")
        print(f"\n{table(dtype, rows)}", flush=True)
        if options.vllm:
            print(f"\n{table_vllm(dtype, rows)}", flush=True)
        results["dtypes"][dtype] = {f"{name}, {kind}": asdict(row) for (name, kind), row in rows.items()}
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    """Make the scratch folder, measure, remove it."""
    options = arguments()
    base = options.work or Path()
    base.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bam-merge-bench-", dir=base))
    try:
        measure_all(options, work.resolve())
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
