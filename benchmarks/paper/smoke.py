"""The whole chain of run.py at the size of smoke.yaml, in a scratch folder, with assertions: `make paper-smoke`."""

import contextlib
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import run
from results import geometric
from settings import graphs, load_config

CONFIG = run.HERE / "smoke.yaml"


def check(folder: Path) -> str:
    """Assert what the run in `folder` must have shown; returns it in words."""
    config = load_config(CONFIG)
    results = json.loads((folder / "results.json").read_text())
    merges = [one for runs in results["merges"].values() for one in runs.values()]
    assert len(merges) == len(config["only"]) and all(one["verified"] and one["checks"] >= 16 for one in merges), merges
    graph = graphs(config)[0]
    trainings = {**graph.dense, **graph.trained}
    for name, stage in trainings.items():
        losses = [loss for _, loss in stage.read(folder / "work", "history.json")["loss"]]
        part = len(losses) // 4
        assert all(map(math.isfinite, losses)) and mean(losses[-part:]) < mean(losses[:part]), (name, losses)
    for name in graph.trained:
        (one,) = results["settings"][name].values()
        start, end = ({key: value for key, value in point.items() if key != "step"} for point in (one["curve"][0], one["curve"][-1]))
        assert set(end) == set(config["domains"]) and geometric(end) < geometric(start), (name, start, end)
    steps = {name: results["settings"][name]["0"]["steps"] for name in graph.trained}
    assert 0 < steps["BAM Expert-KV, equal compute"] < steps["BAM Shared-KV, equal compute"] < steps["BTX top-1"], steps
    page = (folder / "docs" / "paper.md").read_text()
    assert "{{" not in page and all(name in page for name in graph.trained), page
    assert all((folder / "docs" / f"paper-{plot}.png").stat().st_size > 10_000 for plot in ("curves", "experts"))
    return f"{len(trainings)} trainings, their losses finite and falling; {len(merges)} merges verified; page and plots rendered"


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bam-merge-paper-") as scratch:
        folder = Path(scratch)
        places = {"config": CONFIG, "work": folder / "work", "results": folder / "results.json", "docs": folder / "docs"}
        arguments = [part for name, place in places.items() for part in (f"--{name}", str(place))]
        run.main(arguments)
        shown = check(folder)
        again = io.StringIO()
        with contextlib.redirect_stdout(again):
            run.main(arguments)
        assert " stages, 0 to make" in again.getvalue(), again.getvalue()
    print(f"paper-smoke: {shown}; a second run made nothing anew. {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
