"""How long `bam-merge diff` takes, and in how much memory, against reading the same bytes.

    python benchmarks/diff.py [--scale S] [--pairs N] [--only equal,different,--seed] [--work DIR]

The models and the conditions are those of benchmarks/merge.py: 1.1 billion parameters in bfloat16, 2.2 GB, page cache warm, commands
that take turns. Each comparison's time is divided by that of `cat` of the same files. "equal": a model and a copy of it; "different":
two models that differ in every tensor; "--seed": one and three others, all of whose Gram matrices are taken.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from common import bam_merge, machine, machine_line
from paired import Command, Table, alternate, table_text
from workload import NAMES, scaled, write_models

MODELS = {"equal": ("seed", "copy"), "different": ("seed", "code"), "--seed": NAMES}


def comparison(kind: str, folders: dict[str, Path], pairs: int) -> Table:
    """`diff` of the kind, and `cat` of what it reads, in turn."""
    models = [folders[name] for name in MODELS[kind]]
    argv = [bam_merge(), "diff", *(["--seed"] if kind == "--seed" else []), *models]
    files = [file for folder in models for file in sorted(folder.glob("*.safetensors"))]
    rows = alternate(
        [
            Command(f"bam-merge diff, {kind}", argv, models, allowed=(0,) if kind == "equal" else (1,)),
            Command("cat", ["sh", "-c", 'cat "$@" > /dev/null', "sh", *files], models),
        ],
        pairs, ["cat"],
    )  # fmt: skip
    return Table(f"{len(models)} models, {sum(file.stat().st_size for file in files) / 1e9:.2f} GB", rows)


def main() -> None:
    """Make the models that are needed, measure, remove them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size (default 1: 11 GB of disk)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which the commands take turns (default 5)")
    parser.add_argument("--only", default=",".join(MODELS), metavar="KINDS", help="which comparisons, with commas between (default: all)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch space in a folder of its own in DIR; default: here")
    options = parser.parse_args()
    kinds = options.only.split(",")
    if unknown := set(kinds) - MODELS.keys():
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(MODELS)}")
    needed = {name for kind in kinds for name in MODELS[kind]}
    work = Path(tempfile.mkdtemp(prefix="bam-merge-bench-", dir=options.work or ".")).resolve()
    print(f"{machine_line(machine())}, load {os.getloadavg()[0]:.1f}", flush=True)
    try:
        sources = write_models(work / "models", scaled(options.scale), [name for name in NAMES if name in needed], sparse=False)
        folders = {name: Path(path) for name, path in sources.items()}
        if "copy" in needed:
            folders["copy"] = work / "copy"
            shutil.copytree(folders["seed"], folders["copy"])
        for kind in kinds:
            print(f"\n{table_text(comparison(kind, folders, options.pairs))}", flush=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
