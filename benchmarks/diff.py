"""How long `bam-merge diff` takes, and in how much memory, against the commands that answer a smaller question of the same bytes.

    python benchmarks/diff.py [--scale S] [--pairs N] [--only=equal,different,--seed] [--work DIR]

The models and the conditions are those of benchmarks/merge.py: 1.1 billion parameters in bfloat16, 2.2 GB, page cache warm, commands
that take turns. Exits 1 if the median of a kind's ratios is above its limit:

    equal      a model and a copy of it                     cmp A B                                     at most 1.1
    different  two models that differ in every tensor       sha256sum A & sha256sum B; wait             at most 0.5
    --seed     one and three others, all Gram matrices      sha256sum A C & sha256sum B D; wait         at most 0.5

The digests of four models are taken two at a time, as those of two are: on two cores four at once would take as long. cmp is on every
Unix; where there is no sha256sum, as on macOS, the same digests are taken by `shasum -a 256`. The limit of 0.5 is for a sha256sum in
plain C, as GNU coreutils has it in Debian: 0.35 to 0.5 GB/s a core. The table's title says what this machine's takes; one that uses
the processor's own instructions takes 1.5 GB/s or more, and there the limit says nothing. The limits are for scale 1: of smaller
models Python's start, a fifth to a third of a second, is most of the time; and the limit of 1.1 is for a cmp that takes a second, since
where memory is so fast that it takes less (10 GB/s: 0.4 s), the start alone is half of that.
"""

import argparse
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from common import bam_merge, machine, machine_line
from paired import Command, Table, alternate, table_text
from workload import NAMES, scaled, write_models


@dataclass(frozen=True)
class Kind:
    """A comparison: its models, the label of the command it is timed against, and how many times as long it may take."""

    models: tuple[str, ...]
    anchor: str
    limit: float


KINDS = {
    "equal": Kind(("seed", "copy"), "cmp", 1.1),
    "different": Kind(("seed", "code"), "sha256sum", 0.5),
    "--seed": Kind(NAMES, "sha256sum", 0.5),
}

DIGESTS = (("sha256sum",), ("shasum", "-a", "256"))
"""Commands that print the SHA-256 of files: the first that is there is taken."""


def digest_command() -> tuple[str, ...]:
    """The first of DIGESTS on the path."""
    found = next((command for command in DIGESTS if shutil.which(command[0])), None)
    if found is None:
        raise SystemExit("Neither sha256sum nor shasum is on the path: one of them is what diff is timed against.")
    return found


def digests(models: Sequence[Sequence[Path]], digest: Sequence[str]) -> list[str | Path]:
    """A command that takes the digests of all files, two at a time; `models` are the files of each. It fails where one of the two does."""
    halves = [[file for files in models[half::2] for file in files] for half in (0, 1)]
    first, second = (shlex.join([*digest, "--", *map(str, half)]) for half in halves)
    return ["sh", "-c", f"{first} & {second} && wait $!"]


def compared(models: Sequence[Sequence[Path]]) -> list[str | Path]:
    """A command that compares the files of two models byte by byte, and fails at the first that differ."""
    pairs = zip(*models, strict=True)
    return ["sh", "-c", " && ".join(shlex.join(["cmp", "--", *map(str, pair)]) for pair in pairs)]


def comparison(name: str, folders: dict[str, Path], pairs: int) -> tuple[Table, float]:
    """`diff` of the kind and what it is timed against, in turn; the median of its ratios."""
    kind = KINDS[name]
    models = [folders[model] for model in kind.models]
    argv = [bam_merge(), "diff", *(["--seed"] if name == "--seed" else []), *models]
    files = [sorted(folder.glob("*.safetensors")) for folder in models]
    against = compared(files) if kind.anchor == "cmp" else digests(files, digest_command())
    rows = alternate(
        [
            Command(f"bam-merge diff, {name}", argv, models, allowed=(0,) if name == "equal" else (1,)),
            Command(kind.anchor, against, models),
        ],
        pairs, [kind.anchor],
    )  # fmt: skip
    size = sum(file.stat().st_size for group in files for file in group)
    rate = size / median(rows[1].seconds) / 1e9
    return Table(f"{len(models)} models, {size / 1e9:.2f} GB; {kind.anchor} {rate:.2f} GB/s", rows), median(rows[0].ratios[kind.anchor])


def main() -> None:
    """Make the models that are needed, measure, remove them; exits 1 if a ratio is above its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size (default 1: 11 GB of disk)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which the commands take turns (default 5)")
    parser.add_argument("--only", default=",".join(KINDS), metavar="KINDS", help="which comparisons, with commas between (default: all)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch space in a folder of its own in DIR; default: here")
    options = parser.parse_args()
    kinds = options.only.split(",")
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(KINDS)}")
    needed = {model for kind in kinds for model in KINDS[kind].models}
    work = Path(tempfile.mkdtemp(prefix="bam-merge-bench-", dir=options.work or ".")).resolve()
    print(f"{machine_line(machine())}, load {os.getloadavg()[0]:.1f}", flush=True)
    within = True
    try:
        sources = write_models(work / "models", scaled(options.scale), [name for name in NAMES if name in needed], sparse=False)
        folders = {name: Path(path) for name, path in sources.items()}
        if "copy" in needed:
            folders["copy"] = work / "copy"
            shutil.copytree(folders["seed"], folders["copy"])
        for kind in kinds:
            table, ratio = comparison(kind, folders, options.pairs)
            limit = KINDS[kind].limit
            within &= ratio <= limit
            print(f"\n{table_text(table)}\n\nlimit {limit:g}: {'kept' if ratio <= limit else 'BROKEN'}", flush=True)
    finally:
        shutil.rmtree(work)
    raise SystemExit(0 if within else 1)


if __name__ == "__main__":
    main()
