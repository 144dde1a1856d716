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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy
from common import Run, bam_merge, machine, machine_line, markdown_table, run, write_recipe

from bam_merge.synthetic import Values, write_checkpoint

SECTIONS = ("btx", "bam", "mergekit", "memory", "startup")
NAMES = ("seed", "code", "law", "math")
LAYERS, VOCABULARY = 22, 32_000

FULL_DISK = 26e9
"""Bytes of disk that scale 1 needs at once: the inputs, the output that cp copies from, and the output being written."""

FULL_MEMORY = 17e9
"""Bytes of page cache that scale 1 needs for a warm run: what a merge reads and what it writes."""

SCALES = (1.0, 0.5, 0.25, 0.1, 0.05)
"""What the default of --scale is chosen from."""


# ---- models ----------------------------------------------------------------------------------------------------------------


def llama(**sizes: int) -> dict[str, Any]:
    """A Llama config.json: the shape of the benchmark's models, with `sizes` in the place of its own."""
    return {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": LAYERS,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **sizes,
    }  # fmt: skip


def scaled(scale: float) -> dict[str, Any]:
    """The benchmark's model with `scale` times the layers and the vocabulary, so about `scale` times the bytes."""
    return llama(num_hidden_layers=max(1, round(LAYERS * scale)), vocab_size=max(256, round(VOCABULARY * scale)))


def wide(factor: float) -> dict[str, Any]:
    """A model of two layers whose matrices have about `factor` times the elements of the benchmark's."""
    side = factor**0.5
    return llama(
        hidden_size=64 * max(1, round(2048 * side / 64)),  # a multiple of 64, so that 32 heads have an even size
        intermediate_size=64 * max(1, round(5632 * side / 64)),
        vocab_size=64 * max(4, round(VOCABULARY * side / 64)),
        num_hidden_layers=2,
    )


def llama_70b() -> dict[str, Any]:
    """Llama 3 70B's shape."""
    return llama(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256
    )


def repeated_block(seed: int) -> Values:
    """Every tensor is the same block of random numbers, over and over: as incompressible for a merge, and quick to make."""
    block = numpy.random.default_rng(seed).standard_normal(2**20, dtype="f4") * numpy.float32(0.02)
    return lambda name, shape: numpy.resize(block, prod(shape))


def holes(name: str, shape: tuple[int, ...]) -> None:
    """Values of a sparse checkpoint: all zeros, and no disk space."""


def write_models(folder: Path, config: Mapping[str, Any], names: Sequence[str], sparse: bool, shards: int = 1) -> dict[str, str]:
    """Write models called `names` into `folder`, unless an earlier run with --keep left them. Returns a recipe's `sources`."""
    marker = folder / "made.json"
    made = json.dumps([dict(config), list(names), sparse, shards])
    if not marker.exists() or marker.read_text() != made:
        shutil.rmtree(folder, ignore_errors=True)
        for seed, name in enumerate(names):
            print(f"writing {folder.name}/{name}", file=sys.stderr)
            write_checkpoint(folder / name, config, holes if sparse else repeated_block(seed), "BF16", shards)
        marker.write_text(made)
    return {name: str(folder / name) for name in names}


# ---- recipes ---------------------------------------------------------------------------------------------------------------


def btx_recipe(sources: Mapping[str, str], layout: str = "mixtral") -> dict[str, Any]:
    """BTX, two experts per token."""
    ffn = {"top_k": 2, "gate": "topk_then_softmax"}
    return {"method": "btx", "sources": dict(sources), "ffn": ffn, "output": {"path": "unused", "layout": layout}}


def bam_recipe(sources: Mapping[str, str]) -> dict[str, Any]:
    """BAM Expert-KV: every model's whole attention and FFN become experts."""
    attention, ffn = {"kv": "expert", "routing": "soft"}, {"top_k": 1, "gate": "softmax_then_topk"}
    return {"method": "bam", "sources": dict(sources), "attention": attention, "ffn": ffn, "output": {"path": "unused"}}


def ties_recipe(sources: Mapping[str, str]) -> dict[str, Any]:
    """A dense TIES merge onto the seed, which reads every operand three times."""
    shared = {"make": "ties", "base": "seed", "density": 0.5}
    return {"method": "merge", "sources": dict(sources), "shared": shared, "output": {"path": "unused"}}


# ---- measuring -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What to run. `reads` are the folders it reads, `writes` the one it makes; `allowed` the exit statuses that are no failure."""

    label: str
    argv: Sequence[str | Path]
    reads: Sequence[Path] = ()
    writes: Path | None = None
    allowed: Sequence[int] = (0,)


@dataclass
class Row:
    """One line of a table: wall and processor times in seconds, peaks in bytes; per other command the ratios of the wall times."""

    label: str
    seconds: list[float]
    cpu_seconds: list[float]
    peak_bytes: list[int]
    ratios: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Table:
    """A section's result."""

    title: str
    rows: list[Row]


def warm(folder: Path) -> None:
    """Read every file in `folder` into the page cache."""
    view = memoryview(bytearray(2**23))
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(view):
                    pass


def clear(folder: Path | None) -> None:
    """Delete an output, and whatever else its making left beside it."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(f".{folder.name}.bam-merge"), ignore_errors=True)


def measure(command: Command, keep: bool = False) -> Run:
    """One run under the conditions of the module's docstring; its output is deleted afterwards unless `keep`."""
    clear(command.writes)
    os.sync()
    for folder in command.reads:
        warm(folder)
    result = run(command.argv, command.allowed)
    if not keep:
        clear(command.writes)
    return result


def alternate(commands: Sequence[Command], rounds: int, anchors: Sequence[str]) -> list[Row]:
    """Run the commands in turn, `rounds` times. Ratios are taken to the commands labelled in `anchors`."""
    runs: dict[str, list[Run]] = {command.label: [] for command in commands}
    for index in range(rounds):
        first = index % len(commands)
        for command in [*commands[first:], *commands[:first]]:
            result = measure(command)
            runs[command.label].append(result)
            print(f"  {command.label}: {result.seconds:.2f} s", file=sys.stderr)
    rows = []
    for label, results in runs.items():
        ratios = {
            anchor: [one.seconds / other.seconds for one, other in zip(results, runs[anchor], strict=True)]
            for anchor in anchors
            if anchor != label
        }
        seconds, cpu_seconds = [one.seconds for one in results], [one.cpu_seconds for one in results]
        rows.append(Row(label, seconds, cpu_seconds, [one.peak_bytes for one in results], ratios))
    return rows


def copies(source: Path, target: Path) -> list[Command]:
    """cp of a folder, and cp that is as durable as bam-merge's output when it ends: every file synced."""
    durable: list[str | Path] = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", source, target]
    return [Command("cp", ["cp", "-r", source, target], [source], target), Command("cp, fsync", durable, [source], target)]


def merge_command(label: str, recipe: Path, sources: Mapping[str, str], target: Path) -> Command:
    """A merge by bam-merge into `target`, without the verification that follows it: what is compared with cp is the merge alone."""
    argv: list[str | Path] = [bam_merge(), "merge", recipe, "--output", target, "--no-verify"]
    return Command(label, argv, [Path(folder) for folder in sources.values()], target)


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


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and from the smallest to the largest."""
    if not values:
        return ""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def table_text(table: Table) -> str:
    """A section's table in markdown."""
    anchors = list(dict.fromkeys(anchor for row in table.rows for anchor in row.ratios))
    rows = [
        [
            row.label,
            spread(row.seconds),
            *(spread(row.ratios.get(anchor, [])) for anchor in anchors),
            f"{median(row.cpu_seconds):.2f}",
            f"{max(row.peak_bytes) / 1e6:,.0f}",
        ]
        for row in table.rows
    ]
    header = [table.title, "wall time, s", *(f"ratio to {anchor}" for anchor in anchors), "processor time, s", "peak memory, MB"]
    return markdown_table(header, rows)


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


def default_scale(work: Path) -> float:
    """The largest scale for which disk and page cache suffice, with a fifth of each to spare."""
    disk, physical = shutil.disk_usage(work).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next((s for s in SCALES if s * FULL_DISK < 0.8 * disk and s * FULL_MEMORY < 0.8 * physical), SCALES[-1])


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
