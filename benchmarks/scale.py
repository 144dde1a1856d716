"""Beyond one machine: how long a plan of very large models in parts takes, and what several hosts could make of it.

python benchmarks/scale.py --plan              16 models of 405B, headers alone (sparse files), planned in 64 parts
python benchmarks/scale.py --hosts 1 4 16      expected wall time of 8 x 70B and 16 x 405B, by bandwidths
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import bam_merge, machine, machine_line, markdown_table, run, write_recipe
from workload import bam_recipe, holes, llama, llama_70b, write_models

GOAL_SECONDS, GOAL_BYTES = 5.0, 1e9

SHARDS = 191
"""Files of a published model of 405B parameters."""


def llama_405b() -> dict[str, Any]:
    """Llama 3.1 405B's shape."""
    return llama(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, vocab_size=128256
    )


def sparse_models(work: Path, config: dict[str, Any], number: int, shards: int) -> dict[str, str]:
    """So many models whose files have headers and holes: no disk space."""
    assert holes("", ()) is None
    return write_models(work / "models", config, [f"model{index:02d}" for index in range(number)], sparse=True, shards=shards)


def plan_in_parts(work: Path, config: dict[str, Any], number: int, shards: int, parts: int, runs: int) -> dict[str, Any]:
    """Wall time and memory of `plan --json --parts`, the median of several runs."""
    recipe = write_recipe(work / "recipe.json.yaml", bam_recipe(sparse_models(work, config, number, shards)))
    found = [run([bam_merge(), "plan", recipe, "--json", "--parts", str(parts)], allowed=(0, 2)) for _ in range(runs)]  # 2: no such disk
    last = found[-1].output
    document, _ = json.JSONDecoder().raw_decode(last[last.index("{") :])
    sizes = [part["bytes"] for part in document["parts"]]
    ordered = sorted(found, key=lambda one: one.seconds)
    return {
        "models": number, "parts": len(sizes), "files": len(document["shards"]), "tensors": len(document["tensors"]),
        "bytes": sum(sizes), "uneven": max(sizes) / min(sizes), "seconds": ordered[len(ordered) // 2].seconds,
        "peak_bytes": max(one.peak_bytes for one in found), "read": [part["bytes_read"] for part in document["parts"]], "written": sizes,
    }  # fmt: skip


# ---- what several hosts could make of it --------------------------------------------------------------------------------------


def expected_seconds(read: Sequence[int], written: Sequence[int], hosts: int, host: float, store: float) -> float:
    """Wall time of parts, taken by so many hosts as they come, that share a store: bytes a second of one host, and of the store.

    Every moment the hosts that are still at work share the store equally, and none is faster than its own connection.
    """
    waiting = sorted((r + w for r, w in zip(read, written, strict=True)), reverse=True)
    at_work: list[float] = [float(waiting.pop(0)) for _ in range(min(hosts, len(waiting)))]
    passed = 0.0
    while at_work:
        speed = min(host, store / len(at_work))
        step = min(at_work) / speed
        passed += step
        at_work = [left - step * speed for left in at_work]
        for index, left in enumerate(at_work):
            if left <= 1e-3 and waiting:
                at_work[index] = float(waiting.pop(0))
        at_work = [left for left in at_work if left > 1e-3]
    return passed


def simulation(found: dict[str, dict[str, Any]], hosts: Sequence[int], host: float, stores: Sequence[float]) -> str:
    """Minutes for each number of hosts, with stores of different speed. Reading for verification is as much again."""
    rows = []
    for label, plan in found.items():
        for store in stores:
            minutes = [expected_seconds(plan["read"], plan["written"], count, host, store) / 60 for count in hosts]
            limit = next((str(count) for count in hosts if count * host >= store), f"over {max(hosts)}")
            rows.append([label, f"{store / 1e9:g} GB/s", *(f"{value:.1f}" for value in minutes), limit])
    return markdown_table(["minutes", "store", *(f"{count} hosts" for count in hosts), "the store is the limit from"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="measure the plan alone, and fail over 5 s or 1 GB")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--host", type=float, default=2e9, help="bytes a second of one host (default 2e9)")
    parser.add_argument("--stores", type=float, nargs="+", default=[2e9, 10e9, 40e9], help="bytes a second of the store")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where sparse files are made (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = {"16 x 405B": plan_in_parts(Path(folder, "405b"), llama_405b(), 16, SHARDS, 64, options.runs)}
        if not options.plan:
            found["8 x 70B"] = plan_in_parts(Path(folder, "70b"), llama_70b(), 8, 30, 64, 1)
    print(machine_line(machine()))
    for label, plan in found.items():
        print(
            f"{label}: {plan['tensors']:,} tensors, {plan['bytes'] / 1e12:.2f} TB in {plan['files']:,} files and {plan['parts']} parts "
            f"(largest / smallest {plan['uneven']:.3f}): planned in {plan['seconds']:.2f} s with {plan['peak_bytes'] / 1e6:.0f} MB"
        )
    if options.plan:
        slow = found["16 x 405B"]
        sys.exit(0 if slow["seconds"] < GOAL_SECONDS and slow["peak_bytes"] < GOAL_BYTES else 1)
    print(simulation(found, options.hosts, options.host, options.stores))


if __name__ == "__main__":
    main()
