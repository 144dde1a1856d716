"""The page's plots: perplexity over phase 3, and how the experts divide the domains. Needs matplotlib."""

import math
from pathlib import Path
from statistics import mean

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from results import Results, geometric
from settings import COMPUTE

matplotlib.use("Agg")
EXPERT_KV, SHARED_KV, BTX1, BTX2 = "BAM Expert-KV", "BAM Shared-KV", "BTX top-1", "BTX top-2"
PANELS = {
    "methods": [BTX1, BTX2, EXPERT_KV, SHARED_KV, f"{EXPERT_KV}{COMPUTE}", f"{SHARED_KV}{COMPUTE}", "average", "Sparse Upcycling"],
    "parameters, attention routing": [
        BTX1,
        EXPERT_KV,
        "BTX 6 experts top-3",
        "BTX 6 experts top-1",
        "BAM attention top-2",
        "BAM attention top-1",
    ],
    "gates": [BTX1, EXPERT_KV, "BAM gate_scale 4", "BAM renormalised top-1", "BAM renormalised top-2"],
}


def draw(results: Results, out: Path) -> None:
    """paper-curves.png and paper-experts.png."""
    curves(results, out / "paper-curves.png")
    experts(results, out / "paper-experts.png")


def curves(results: Results, file: Path) -> None:
    """Held-out perplexity, geometric mean over domains: a line is the mean over random seeds, its band from smallest to largest."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 5), sharey=True, layout="constrained")
    every = dict.fromkeys(name for names in PANELS.values() for name in names)
    colours = dict(zip(every, matplotlib.colormaps["tab20"].colors[::2] + matplotlib.colormaps["tab20"].colors[1::2], strict=False))
    per_step = results["config"]["training"]["batch"] * results["config"]["data"]["window"]
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            runs = [run["curve"] for run in results["settings"].get(name, {}).values()]
            if runs:
                line(axis, runs, per_step, name, colours[name])
        axis.set(title=title, xlabel="tokens of phase 3, millions", yscale="log")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("held-out perplexity, geometric mean of the domains")
    save(figure, file)


def line(axis: Axes, runs: list[list[dict[str, float]]], per_step: int, name: str, colour: str) -> None:
    points = [[geometric({key: value for key, value in point.items() if key != "step"}) for point in run] for run in runs]
    tokens = [point["step"] * per_step / 1e6 for point in runs[0]]
    columns = list(zip(*points, strict=True))
    style = "--" if name.endswith(COMPUTE) else "-"
    axis.plot(tokens, [mean(column) for column in columns], style, color=colour, label=name, linewidth=1.4)
    axis.fill_between(
        tokens, [min(column) for column in columns], [max(column) for column in columns], color=colour, alpha=0.15, linewidth=0
    )


def experts(results: Results, file: Path) -> None:
    """Shares of the experts by layer, a panel per setting and router: a group of rows per domain, darker is more."""
    wanted = [(name, router) for name in (EXPERT_KV, SHARED_KV, BTX1) for router in ("ffn", "attention")]
    domains = results["config"]["domains"]
    panels = []
    for name, router in wanted:
        runs = [run["routing"] for run in results["settings"].get(name, {}).values()]
        if runs and runs[0][domains[0]].get(router):
            panels.append((f"{name}, {router}", shares(runs, domains, router)))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 4.2), sharey=True, layout="constrained", squeeze=False)
    names, image = ["seed", *domains[1:]], None
    for axis, (title, rows) in zip(axes[0], panels, strict=True):
        image = axis.imshow(rows, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(names)), [f"expert\n{name}" for name in names], fontsize=7)
        layers = len(rows) // len(domains)
        axis.set_yticks(range(len(rows)), [f"{domain}, layer {layer}" for domain in domains for layer in range(layers)], fontsize=7)
        for border in range(1, len(domains)):
            axis.axhline(border * layers - 0.5, color="black", linewidth=0.6)
    if image is not None:
        figure.colorbar(image, ax=axes, label="share of the tokens' choices; of attention, mean gate", shrink=0.8)
    save(figure, file)


def shares(runs: list[dict[str, dict[str, list[dict[str, list[float]]]]]], domains: list[str], router: str) -> list[list[float]]:
    """[domains x layers, experts], the mean over random seeds."""
    layers = len(runs[0][domains[0]][router])
    by_run = [[run[domain][router][layer]["shares"] for run in runs] for domain in domains for layer in range(layers)]
    return [[math.fsum(column) / len(column) for column in zip(*rows, strict=True)] for rows in by_run]


def save(figure: "plt.Figure", file: Path) -> None:
    figure.savefig(file, dpi=80, metadata={"Software": None})
    plt.close(figure)
