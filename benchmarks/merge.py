"""How fast and how small a merge is, against what limits it: copying the same bytes.

    python benchmarks/merge.py [--scale S] [--pairs N] [--only btx,bam,...] [--mergekit BIN_DIR] [--json FILE]

Sections:

    btx       bam-merge BTX in layout mixtral, against cp of the same output, and cp made durable (fsync of every file)
    bam       bam-merge BAM Expert-KV, against the same
    mergekit  mergekit-moe with random gates, against cp of its output and bam-merge BTX (needs --mergekit)
    memory    peak memory of merges of tensors of one size and of ten times that size (sparse inputs that hold zeros)
    startup   --help, plans and inspect from headers alone, against `import torch`

Work: four Llama-shaped dense models (22 layers, d 2048, FFN 5632, 32 heads, 4 KV heads, vocabulary 32,000, untied, bfloat16,
random weights; 2.2 GB each) at --scale 1. A smaller scale takes that share of the layers and of the vocabulary; tensors of a
layer keep their size.

Every command is a whole process. The commands of a section take turns, each round starting with another one, so that what else
the machine does falls on all of them; a ratio is taken within its round, and its median, smallest and largest value are shown.
Before each run, outside the timing: earlier output is deleted, `sync` empties the write queue, and what the command will read
is read once, so that it comes from the page cache. bam-merge makes its output durable before it ends; plain cp does not.
What bam-merge verifies after a merge is switched off here; benchmarks/verify.py measures it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import bam_merge, machine, machine_line, write_recipe
from paired import Command, Row, Table, alternate, clear, measure, table_text
from workload import (
    NAMES,
    bam_recipe,
    btx_recipe,
    default_scale,
    llama,
    llama_70b,
    merge_command,
    scaled,
    ties_recipe,
    wide,
    write_models,
)  # fmt: skip

SECTIONS = ("btx", "bam", "mergekit", "memory", "startup")

# ---- measuring -------------------------------------------------------------------------------------------------------------


def copies(source: Path, target: Path) -> list[Command]:
    """cp of a folder, and cp that is as durable as bam-merge's output when it ends: every file synced."""
    durable: list[str | Path] = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", source, target]
    return [Command("cp", ["cp", "-r", source, target], [source], target), Command("cp, fsync", durable, [source], target)]


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def make_sample(command: Command, sample: Path) -> int:
    """Run `command` once, untimed, and put what it makes at `sample`, for cp to copy from. Returns its bytes."""
    assert command.writes is not None
    clear(sample)
    measure(command, keep=True)
    command.writes.rename(sample)
    return folder_bytes(sample)


# ---- the sections ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What the sections need: scratch folder, scale, number of rounds, the folder of mergekit's commands."""

    work: Path
    scale: float
    pairs: int
    mergekit: Path | None = None

    def sources(self) -> dict[str, str]:
        """The four models, written when first asked for."""
        return write_models(self.work / "models", scaled(self.scale), NAMES, sparse=False)


def against_cp(bench: Bench, title: str, recipe: Mapping[str, Any]) -> Table:
    """A merge against cp of its output."""
    sources, sample, target = bench.sources(), bench.work / "sample", bench.work / "out"
    file = write_recipe(bench.work / "recipe.yaml", recipe)
    command = merge_command("bam-merge", file, sources, target)
    size = make_sample(command, sample)
    rows = alternate([command, *copies(sample, target)], bench.pairs, ["cp", "cp, fsync"])
    clear(sample)
    return Table(f"{title}, {size / 1e9:.2f} GB written", rows)


def btx(bench: Bench) -> Table:
    """Section btx."""
    return against_cp(bench, "BTX in layout mixtral", btx_recipe(bench.sources()))


def bam(bench: Bench) -> Table:
    """Section bam."""
    return against_cp(bench, "BAM Expert-KV", bam_recipe(bench.sources()))


def mergekit(bench: Bench) -> Table:
    """Section mergekit. mergekit-moe copies the base model's attention, norms and embeddings where BTX averages four models'."""
    assert bench.mergekit is not None
    sources, sample, target = bench.sources(), bench.work / "sample", bench.work / "out"
    config = {
        "base_model": str(with_tokenizer(Path(sources["seed"]), bench.work / "base")),
        "architecture": "mixtral",
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "experts": [{"source_model": folder} for folder in sources.values()],
    }
    config_file = write_recipe(bench.work / "mergekit.yaml", config)
    argv: list[str | Path] = [bench.mergekit / "mergekit-moe", config_file, target, "--quiet"]
    theirs = Command("mergekit-moe", argv, [Path(folder) for folder in sources.values()], target)
    ours = merge_command("bam-merge", write_recipe(bench.work / "recipe.yaml", btx_recipe(sources)), sources, target)
    size = make_sample(theirs, sample)
    rows = alternate([theirs, ours, copies(sample, target)[0]], bench.pairs, ["cp", "bam-merge"])
    clear(sample)
    return Table(f"mergekit-moe, random gates, {size / 1e9:.2f} GB written", rows)


def with_tokenizer(model: Path, folder: Path) -> Path:
    """`model` again, by links, with the tokenizer that mergekit-moe insists on: the smallest there can be."""
    clear(folder)
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    special = [
        {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for index, token in enumerate(("<unk>", "<s>", "</s>"))
    ]
    words = {str(token["content"]): token["id"] for token in special}
    tokenizer = {"version": "1.0", "added_tokens": special, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


MEMORY_RECIPES: dict[str, Callable[[Mapping[str, str]], dict[str, Any]]] = {"BTX": btx_recipe, "BAM": bam_recipe, "TIES": ties_recipe}


def memory(bench: Bench) -> Table:
    """Section memory: the same recipes on two layers of matrices of one size, and of ten times that size."""
    rows: list[Row] = []
    for factor in (1, 10):
        config = wide(factor * bench.scale)
        sources = write_models(bench.work / f"wide{factor}", config, NAMES, sparse=True)
        largest = config["vocab_size"] * config["hidden_size"] * 2
        for method, recipe in MEMORY_RECIPES.items():
            file = write_recipe(bench.work / "recipe.yaml", recipe(sources))
            label = f"{method}, largest tensor {largest / 1e6:,.0f} MB"
            command = merge_command(label, file, sources, bench.work / "out")
            rows += alternate([command], bench.pairs if method != "TIES" else 1, [])  # TIES reads all three times: slow
        shutil.rmtree(bench.work / f"wide{factor}")
    return Table("peak memory (four sparse models of two layers)", rows)


def startup(bench: Bench) -> Table:
    """Section startup. All inputs are sparse: only their headers take space, and only they are read."""
    small = write_models(bench.work / "headers", llama(), NAMES, sparse=True)
    large = write_models(bench.work / "headers70b", llama_70b(), [f"model{i}" for i in range(8)], sparse=True, shards=30)
    plan_small = write_recipe(bench.work / "small.yaml", btx_recipe(small))
    plan_large = write_recipe(bench.work / "large.yaml", btx_recipe(large))
    commands = [
        Command("bam-merge --help", [bam_merge(), "--help"]),
        Command("bam-merge plan, 4 x 1B shape", [bam_merge(), "plan", plan_small]),
        # Status 2 follows the plan where the disk has no room for the 900 GB that the merge would write.
        Command("bam-merge plan, 8 x 70B shape", [bam_merge(), "plan", plan_large], allowed=(0, 2)),
        Command("bam-merge inspect, 1B shape", [bam_merge(), "inspect", small["seed"]]),
        Command("bam-merge inspect, 70B shape", [bam_merge(), "inspect", large["model0"]]),
        Command("python -c 'import torch'", [sys.executable, "-c", "import torch"]),
    ]
    for command in commands:  # once untimed, for the page cache
        printed = measure(command).output
        if command.label.startswith(("bam-merge plan", "bam-merge inspect")) and "parameters" not in printed:
            raise SystemExit(f"{command.label} printed no answer:\n{printed[-3000:]}")
    return Table("start-up", alternate(commands, bench.pairs, ["python -c 'import torch'"]))


# ---- results ---------------------------------------------------------------------------------------------------------------


def describe(bench: Bench, chosen: bool) -> str:
    """What was measured, in two lines."""
    config = scaled(bench.scale)
    why = "the largest that free disk and memory allow" if chosen else "as asked"
    return (
        f"Scale {bench.scale:g} ({why}): four models of {config['num_hidden_layers']} layers and vocabulary {config['vocab_size']:,}. "
        f"{bench.pairs} rounds.\n"
        "Times and ratios of wall times: median (smallest to largest). Processor time: all threads, median. "
        "Peak memory: largest resident set of any run; pages of mapped files count too."
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, help="share of the full size, about; default: what free disk and memory allow, at most 1")
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which the commands take turns (default 5)")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTIONS", help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--mergekit", type=Path, metavar="BIN_DIR", help="the folder in which mergekit-moe 0.1.5 is")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch space in DIR/bam-merge-bench; default: a temporary folder here")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder, so that a later run with --work finds its inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as well")
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}. Sections: {', '.join(SECTIONS)}.")
    if options.pairs < 1 or (options.scale is not None and options.scale <= 0):
        parser.error("--pairs is at least 1, and --scale above 0.")
    if options.mergekit and not (options.mergekit / "mergekit-moe").exists():
        parser.error(f"{options.mergekit} holds no mergekit-moe.")
    return options


def measure_all(options: argparse.Namespace, work: Path) -> None:
    """Run the sections; print each as it is done, and write what there is to --json."""
    sections: dict[str, Callable[[Bench], Table]] = {"btx": btx, "bam": bam, "mergekit": mergekit, "memory": memory, "startup": startup}
    bench = Bench(work, options.scale or default_scale(work), options.pairs, options.mergekit and options.mergekit.resolve())
    facts = machine()
    print(f"{machine_line(facts)}, load {os.getloadavg()[0]:.1f}\n{describe(bench, options.scale is None)}", flush=True)
    results: dict[str, Any] = {"machine": facts, "scale": bench.scale, "pairs": bench.pairs, "sections": {}}
    for name in SECTIONS:
        if name not in options.only or (name == "mergekit" and bench.mergekit is None):
            continue
        table = sections[name](bench)
        print(f"\n{table_text(table)}", flush=True)
        results["sections"][name] = asdict(table)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    """Make the scratch folder, measure, remove it."""
    options = arguments()
    if options.work:
        work = options.work / "bam-merge-bench"
        work.mkdir(parents=True, exist_ok=True)
    else:
        work = Path(tempfile.mkdtemp(prefix="bam-merge-bench-", dir="."))
    try:
        measure_all(options, work.resolve())
    finally:
        if not options.keep:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
