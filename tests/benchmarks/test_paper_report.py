"""docs/paper.md: what it says follows from benchmarks/paper/results.json."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "benchmarks" / "paper"
sys.path.insert(0, str(HERE))
import report  # noqa: E402
import results  # noqa: E402
import settings  # noqa: E402


def measured() -> dict:
    return json.loads((HERE / "results.json").read_text())


def test_the_page_is_what_the_results_say():
    assert (ROOT / "docs" / "paper.md").read_text() == report.page(measured(), report.read_forward())


def test_the_results_are_of_the_configuration():
    config = settings.load_config(HERE / "config.yaml")
    assert measured()["config"] == {key: value for key, value in config.items() if key != "settings"}
    assert measured()["recipes"] == {name: setting["recipe"] for name, setting in config["settings"].items()}


def test_every_merge_of_the_results_passed_verify():
    merges = [run for runs in measured()["merges"].values() for run in runs.values()]
    assert merges and all(run["verified"] and run["checks"] >= 16 for run in merges)


@pytest.mark.parametrize("file", ["head_start", "head_start_scale", "methods", "results_gpu"])
def test_other_results_are_of_merges_that_passed_verify(file):
    found = json.loads((HERE / f"{file}.json").read_text())
    merges = [run for runs in found["merges"].values() for run in runs.values()]
    assert merges and all(run["verified"] and run["checks"] >= 16 for run in merges)
    ends = [run["end"] for runs in found["settings"].values() for run in runs.values()]
    assert ends and all(set(end) == set(found["config"]["domains"]) and all(map(math.isfinite, end.values())) for end in ends)


def test_of_an_experiment_that_was_stopped_only_what_was_finished_is_shown():
    shown = report.table_gpu(report.read_gpu())
    assert "not measured" not in shown and "| BAM Expert-KV" in shown and "Sparse Upcycling" not in shown
    assert report.table_gpu(None) == "Not measured yet: run that command."


def test_every_setting_that_the_report_names_exists():
    known = {*measured()["settings"], *measured()["dense"], *(f"{name}@0" for name in measured()["merges"])}
    assert {name for _, _, *pair in report.CLAIMS for name in pair} <= known
    assert {*report.PAPER_AVERAGE, *report.PAPER_ROUTING} <= known


def test_averages_and_spread():
    assert results.arithmetic({"a": 2, "b": 8}) == 5
    assert results.geometric({"a": 2, "b": 8}) == pytest.approx(4)
    assert results.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert results.spread([1234.5], 1) == "1,234.5"


@pytest.mark.parametrize(
    ("values", "words"),
    [([1.0, 2.0], "yes, 2 of 2"), ([-1.0, -2.0], "no, 0 of 2"), ([1.0, -2.0, 1.0], "undecided, 2 of 3"), ([], "not measured")],
)
def test_a_claim_holds_only_where_every_random_seed_says_so(values, words):
    assert report.verdict(values) == words


def test_differences_are_taken_within_a_random_seed():
    document = measured()
    document["settings"] = {
        "low": {"0": {"end": {"a": 9.0, "b": 9.0}}, "1": {"end": {"a": 50.0, "b": 50.0}}},
        "high": {"0": {"end": {"a": 10.0, "b": 10.0}}, "2": {"end": {"a": 1.0, "b": 1.0}}},
    }
    assert results.differences(document, "low", "high") == pytest.approx([10.0])


def test_gates_of_the_results_are_distributions():
    for runs in measured()["settings"].values():
        for run in runs.values():
            for routers in run["routing"].values():
                for layer in (layer for layers in routers.values() for layer in layers):
                    assert sum(layer["shares"]) == pytest.approx(1, abs=0.005)
                    assert 0 <= layer["entropy"] <= math.log(len(layer["shares"])) + 1e-3


def test_inference_is_shown_beside_the_papers_ratios():
    names = {"dense": 1.0, "BTX": 2.0, "BAM Expert-KV": 2.4, "BAM Shared-KV": 2.2}
    rows = {
        f"{name}, exported": {"generate": [t, 2 * t], "forward": [t, t], "peak_bytes": [10**9, 10**9], "cache_bytes": 10**6}
        for name, t in names.items()
    }
    facts = {"cores": 2, "memory_gib": 8, "system": "Linux", "python": "3.11", "torch": "2", "bam_merge": "0"}
    shown = report.table_forward({"machine": facts, "scale": 1.0, "pairs": 2, "dtypes": {"bfloat16": rows}})
    line = next(line for line in shown.splitlines() if line.startswith("| BAM Expert-KV"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["3.60 (2.40 to 4.80)", "1.20 (1.20 to 1.20)", "6.17"]
    assert cells[4] == f"{6.17 / 4.81:.2f}" and cells[-2:] == ["1,000", "1.0"]


def test_inference_in_vllm_and_token_by_token_is_shown_where_it_was_measured():
    """Of a prompt that takes half of the time, the tokens after the first take the other half."""
    times = {"dense": 1.0, "BTX": 2.0, "BAM Expert-KV": 3.0, "BAM Shared-KV": 2.5}
    rows = {}
    for name, t in times.items():
        both = {"generate": [t, t], "prompt": [0.5, t / 2], "peak_bytes": [10**9, 10**9]}
        rows |= {
            f"{name}, exported": {**both, "forward": [t, t], "cache_bytes": 10**6},
            f"{name}, vllm": {**both, "forward": [], "cache_bytes": 0},
        }
    facts = {"cores": 2, "memory_gib": 8, "system": "Linux", "python": "3.11", "torch": "2", "bam_merge": "0"}
    shown = report.table_forward({"machine": facts, "scale": 1.0, "pairs": 2, "dtypes": {"bfloat16": rows}})
    ours, theirs = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("| BAM Expert-KV")
    )
    assert ours[5:] == ["1.25 (1.00 to 1.50)", "1.58 (1.50 to 1.67)", "3.00 (3.00 to 3.00)", "1.50 (1.50 to 1.50)", "1,000", "1.0"]
    assert theirs == [*ours[:8], "1,000"]
    assert "bfloat16, in vLLM" in shown
