"""What the stages measured, in one compact JSON document; and the numbers that a page needs from it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from settings import COMPUTE, Graph, graphs
from stages import RECORD

Results = dict[str, Any]
Perplexities = Mapping[str, float]


# ---- from the stages' folders ----------------------------------------------------------------------------------------------


def collect(config: dict[str, Any], work: Path, machine: dict[str, Any]) -> Results:
    """The results of what is finished; a setting's random seed is there when it is trained and measured."""
    made = graphs(config)
    data = made[0].data
    return {
        "format": 1,
        "machine": machine,
        "config": {key: value for key, value in config.items() if key != "settings"},
        "recipes": {name: setting["recipe"] for name, setting in config["settings"].items()},
        "hours": round(sum(seconds(made, work)) / 3600, 2),
        "data": data.read(work, "sizes.json") if data.done(work) else None,
        "dense": {name: by_seed(made, work, name, dense_run) for name in made[0].dense},
        "merges": {name: by_seed(made, work, name, merge_run) for name in made[0].merged},
        "settings": {name: by_seed(made, work, name, trained_run) for name in made[0].trained},
    }


def seconds(made: Sequence[Graph], work: Path) -> list[float]:
    """What each finished stage took, by the clock."""
    groups = [group for graph in made for group in ({"data": graph.data}, graph.dense, graph.merged, graph.trained, graph.measured)]
    unique = {stage.digest: stage for group in groups for stage in group.values() if stage.done(work)}
    return [stage.read(work, RECORD)["seconds"] for stage in unique.values()]


def by_seed(made: Sequence[Graph], work: Path, name: str, run: Any) -> dict[str, Any]:
    found = {str(graph.random_seed): run(graph, work, name) for graph in made}
    return {random_seed: one for random_seed, one in found.items() if one is not None}


def dense_run(graph: Graph, work: Path, name: str) -> dict[str, Any] | None:
    """A dense model of phase 1 or 2."""
    stage, measured = graph.dense[name], graph.measured[name]
    if not measured.done(work):
        return None
    history = stage.read(work, "history.json")
    return {"steps": history["steps"], "tokens": history["tokens"], "end": rounded(measured.read(work, "measured.json")["perplexity"])}


def merge_run(graph: Graph, work: Path, name: str) -> dict[str, Any] | None:
    """A merge as it was made, before training: what it costs, whether it was proved, its perplexities."""
    stage, measured = graph.merged[name], graph.measured[f"{name}@0"]
    if not measured.done(work):
        return None
    cost, report = stage.read(work, "cost.json"), stage.read(work, "verify.json")
    return {
        "parameters": cost["parameters"]["total"],
        "active": cost["parameters"]["active"],
        "flops_per_token": cost["flops_per_token"]["total"],
        "kv_cache_bytes_per_token": cost["kv_cache_bytes_per_token"],
        "verified": report["ok"],
        "checks": len(report["checks"]),
        "start": rounded(measured.read(work, "measured.json")["perplexity"]),
    }


def trained_run(graph: Graph, work: Path, name: str) -> dict[str, Any] | None:
    """A merge after phase 3: perplexities at the end and on the way, and how its routers divide each domain."""
    stage, measured = graph.trained[name], graph.measured[name]
    if not measured.done(work):
        return None
    history, end = stage.read(work, "history.json"), measured.read(work, "measured.json")
    routing = {
        domain: {router: [layer_numbers(layer, router) for layer in layers] for router, layers in routers.items()}
        for domain, routers in end["routing"].items()
    }
    curve = [{key: significant(value) for key, value in point.items()} for point in history["perplexity"]]
    return {"steps": history["steps"], "tokens": history["tokens"], "end": rounded(end["perplexity"]), "curve": curve, "routing": routing}


def layer_numbers(layer: dict[str, Any], router: str) -> dict[str, Any]:
    """Of the FFN the shares of the tokens' choices, of the attention the mean gates; and the entropy of a token's gates."""
    shares = layer["load" if router == "ffn" else "gate"]
    return {"shares": [round(share, 3) for share in shares], "entropy": round(layer["entropy"], 3)}


def significant(value: float) -> float:
    return float(f"{value:.5g}")


def rounded(perplexities: Perplexities) -> dict[str, float]:
    return {name: significant(value) for name, value in perplexities.items()}


# ---- numbers ---------------------------------------------------------------------------------------------------------------


def arithmetic(perplexities: Perplexities) -> float:
    """The paper's average of perplexities."""
    return mean(perplexities.values())


def geometric(perplexities: Perplexities) -> float:
    """The exponential of the mean loss over domains: no domain counts for more because its perplexity is large."""
    return math.exp(mean(map(math.log, perplexities.values())))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over random seeds; the value alone where there is one."""
    if not values:
        return ""
    shown = f"{mean(values):,.{digits}f}"
    return f"{shown} ± {stdev(values):,.{digits}f}" if len(values) > 1 else shown


def ends(results: Results, name: str) -> dict[str, Perplexities]:
    """Perplexities at the end of training by random seed. `name`: a setting; a dense model; or a merge before training, "NAME@0"."""
    if name.endswith("@0"):
        return {key: run["start"] for key, run in results["merges"].get(name.removesuffix("@0"), {}).items()}
    group = results["settings"] if name in results["settings"] else results["dense"]
    return {key: run["end"] for key, run in group.get(name, {}).items()}


def differences(results: Results, better: str, worse: str) -> list[float]:
    """Of each random seed that has both: by how many percent the geometric mean of `better` lies below that of `worse`."""
    one, other = ends(results, better), ends(results, worse)
    return [100 * (1 - geometric(one[key]) / geometric(other[key])) for key in one if key in other]


def compute_of(results: Results, name: str) -> float | None:
    """FLOPs that phase 3 spent on the forward passes of a setting."""
    runs = list(results["settings"].get(name, {}).values())
    merges = list(results["merges"].get(name.removesuffix(COMPUTE), {}).values())
    return float(runs[0]["tokens"] * merges[0]["flops_per_token"]) if runs and merges else None
