"""Where the exported model's time goes: operators counted and timed by group, for a prompt and for one token after it.

    python benchmarks/operators.py [--scale S] [--dtype bfloat16] [--repeats N]

The models of forward.py, in turn, by torch's profiler on the CPU. Counts depend on nothing but the code; times do on what else the machine
does, so that only those of one model beside each other say something on a busy one. Groups:

    products     of matrices: projections, experts, routers, head
    attention    scores, softmax, weighted values
    copies       casts, concatenation, gathering: cache, rotation, layout of heads
    elementwise  norms, rotation, gates, activations; views, which move nothing
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, machine_line, markdown_table
from forward import PROMPT, models
from one_forward import exported
from torch.profiler import ProfilerActivity, profile

GROUPS = ("products", "attention", "copies", "elementwise")
PRODUCTS = {"mm", "addmm", "bmm", "_grouped_mm", "linear", "mkldnn_linear"}
COPIES = {
    "copy_",
    "clone",
    "cat",
    "stack",
    "contiguous",
    "index",
    "index_select",
    "gather",
    "scatter",
    "scatter_",
    "index_add",
    "index_put_",
}


def group(name: str) -> str:
    """The group of an operator of torch's."""
    name = name.removeprefix("aten::")
    if name in PRODUCTS:
        return "products"
    if "attention" in name:
        return "attention"
    return "copies" if name in COPIES else "elementwise"


def profiled(call: Callable[[], Any], repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds and calls of each group in one `call`, of `repeats`, after one that is not counted."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(repeats):
            call()
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in record.key_averages():
        times[group(event.key)] += event.self_cpu_time_total / 1e3 / repeats
        counts[group(event.key)] += event.count // repeats
    return times, counts


def rows(name: str, folder: Path, dtype: torch.dtype, repeats: int) -> list[list[str]]:
    """Of a model: a prompt, and one token after it."""
    model, _ = exported(str(folder), dtype)
    ids_BT = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def prompt() -> Any:
        return model(ids_BT, use_cache=True, logits_to_keep=1)

    cache = prompt().past_key_values
    calls = {"prompt": prompt, "token": lambda: model(ids_BT[:, :1], past_key_values=cache, use_cache=True)}
    lines = []
    for what, call in calls.items():
        times, counts = profiled(call, repeats)
        whole = sum(times.values())
        shares = [f"{times[part]:.1f} ({times[part] / whole:.0%}, {counts[part]})" for part in GROUPS]
        lines.append([f"{name}, {what}", f"{whole:.1f}", *shares])
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers and the vocabulary, as of forward.py")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch space in a folder of its own in DIR; default: here")
    options = parser.parse_args()
    print(machine_line(machine()))
    lines = []
    base = options.work or Path()
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bam-merge-bench-", dir=base) as work:
        for name, folder in models(Path(work), options.scale).items():
            print(f"profiling {name}", file=sys.stderr)
            lines += rows(name, folder, getattr(torch, options.dtype), options.repeats)
    print(markdown_table([f"{options.dtype}: ms (share, calls)", "all", *GROUPS], lines))


if __name__ == "__main__":
    main()
