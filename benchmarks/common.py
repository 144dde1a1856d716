"""What the benchmarks share: whole processes measured from outside, recipes, tables."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bam_merge import __version__

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment in which no library looks anything up on the network, which would be timed with the rest."""


@dataclass(frozen=True)
class Run:
    """One finished process: wall time and processor time in seconds, largest resident set in bytes, and what it printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def run(command: Sequence[str | Path], allowed: Iterable[int] = (0,)) -> Run:
    """Run `command` to its end. An exit status not in `allowed` ends the benchmark with the command's last words."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        measure = [sys.executable, "-S", "-E", str(Path(__file__).with_name("one_run.py")), str(log), *map(str, command)]
        report = subprocess.run(measure, capture_output=True, text=True, env={**os.environ, **OFFLINE})
        output = log.read_text(errors="replace") if log.exists() else ""
    if report.returncode:
        raise SystemExit(f"{Path(command[0]).name} could not be started:\n{report.stderr}")
    result = json.loads(report.stdout)
    if result["status"] not in allowed:
        raise SystemExit(f"{Path(command[0]).name} ended with status {result['status']}:\n{output[-3000:]}")
    return Run(result["seconds"], result["cpu_seconds"], result["peak_bytes"], output)


def bam_merge() -> str:
    """The `bam-merge` command that belongs to the Python that runs this, or else the first on the path."""
    beside = Path(sys.executable).with_name("bam-merge")
    found = str(beside) if beside.exists() else shutil.which("bam-merge")
    if found is None:
        raise SystemExit("bam-merge is not installed for this Python: pip install -e . in the repository.")
    return found


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    """Write `recipe`, or a mergekit configuration, to `path` as JSON, which is YAML as well. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe, indent=2) + "\n")
    return path


def machine() -> dict[str, Any]:
    """What of this machine a reader needs in order to judge the numbers; nothing that identifies it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "bam_merge": __version__,
    }


def gpu() -> str | None:
    """What torch calls the GPU; None where it has none."""
    import torch  # most of the benchmarks leave it to the processes that they measure

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def machine_line(facts: Mapping[str, Any]) -> str:
    """`machine()` as a line of text."""
    return (
        f"{facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}, torch {facts['torch']}, bam-merge {facts['bam_merge']}"
        + (f", {facts['gpu']}" if facts.get("gpu") else "")
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A markdown table; the columns in `left` are aligned to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [text.ljust(widths[i]) if i in left else text.rjust(widths[i]) for i, text in enumerate(row)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i in left else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
