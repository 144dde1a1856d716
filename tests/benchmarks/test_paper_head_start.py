"""benchmarks/paper/head_start.py: what is compared differs in its routers alone, and what run.py has made is not made again."""

import copy
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks" / "paper"
sys.path.insert(0, str(HERE))
import head_start  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import settings  # noqa: E402


@pytest.fixture(params=["config.yaml", "smoke.yaml", "gpu.yaml"])
def base(request):
    return HERE / request.param


def test_random_routers_are_those_of_the_other_page(base):
    plain, own = settings.load_config(base), head_start.head_start_config(base)
    known = {stage.digest for graph in settings.graphs({**plain, "only": list(plain["settings"])}) for stage in graph.trained.values()}
    for graph in settings.graphs(own):
        for name in ("BTX top-1", "BAM Expert-KV", "BAM Shared-KV", "BTX top-2", "BAM renormalised top-2"):
            assert graph.trained[name].digest in known, name


def test_random_and_ridge_differ_in_routers_alone(base):
    config = head_start.head_start_config(base)
    assert set(settings.chosen(config)) == set(config["only"])
    ridge = [name for name in config["only"] if name.endswith(report.ROUTERS_OF_TEXT)]
    assert len(ridge) == 6
    for graph in settings.graphs(config):
        for name in ridge:
            other = name.removesuffix(report.ROUTERS_OF_TEXT)
            one, two = (copy.deepcopy(graph.merged[which].parameters) for which in (other, name))
            one["recipe"].setdefault("ffn", {"top_k": 1, "gate": "softmax_then_topk"})  # bam's, where routers are not made of text
            assert two.pop("texts") == dict(zip(graph.dense, config["domains"], strict=True))
            assert two["recipe"].pop("router") == {"init": "ridge", "tokens": 8192}
            assert one == two
            assert {**graph.merged[other].inputs, "data": graph.data} == graph.merged[name].inputs
            for suffix in ("", settings.COMPUTE):
                assert (f"{name}{suffix}" in graph.trained) == (f"{other}{suffix}" in graph.trained)
                if f"{name}{suffix}" in graph.trained:
                    assert graph.trained[f"{name}{suffix}"].parameters == graph.trained[f"{other}{suffix}"].parameters


def test_every_random_seed_trains_all_of_them():
    config = head_start.head_start_config(HERE / "config.yaml")
    trained = [stage for stage in run.all_stages(config, []) if stage.kind == "mixture"]
    assert len(config["random_seeds"]) == 3
    assert len(trained) == 3 * (12 + 8 + 3), "each setting, those of BAM with equal compute, and those of another scale"


def fake(ends):
    """Results in which every setting ends at the perplexity that `ends` gives for its name and random seed."""
    config = head_start.head_start_config(HERE / "config.yaml")
    graph = settings.graph(config, 0)
    runs = {
        name: {
            str(seed): {
                "steps": 100,
                "end": {"a": ends(name, seed), "b": ends(name, seed)},
                "curve": [{"step": step, "a": ends(name, seed) * factor, "b": ends(name, seed) * factor} for step, factor in ((0, 4), (48, 2), (100, 1))],
            }
            for seed in (0, 1, 2)
        }
        for name in graph.trained
    }  # fmt: skip
    facts = {"cores": 2, "memory_gib": 8, "system": "Linux", "python": "3.11", "torch": "2", "bam_merge": "0"}
    return {"machine": facts, "config": config, "settings": runs, "dense": {}, "merges": {}}


def test_the_table_says_by_how_much_and_how_surely():
    results = fake(lambda name, seed: 9.3 if report.ROUTERS_OF_TEXT in name else 10.0 + seed)
    lines = report.table_routers(results).splitlines()
    (row,) = [line for line in lines if line.startswith("| BTX top-1 ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["44.00 ± 4.00 -> 37.20 ± 0.00", "22.00 ± 2.00 -> 18.60 ± 0.00", "11.00 ± 1.00 -> 9.30 ± 0.00"]
    assert cells[5] == "yes, 3 of 3"
    worse = fake(lambda name, seed: 11.0 if report.ROUTERS_OF_TEXT in name else 10.0)
    assert "no, 0 of 3" in report.table_routers(worse)
    (claim,) = [line for line in lines if line.startswith("| BAM Expert-KV ends below BTX top-1, equal compute")]
    assert claim.count("no, 0 of 3") == 2, "the same at every setting is not below"


def test_nothing_is_claimed_of_what_was_not_measured(tmp_path):
    assert report.table_routers(None) == "Not measured yet: run that command."
    results = fake(lambda name, seed: 1.0)
    results["settings"] = {name: {} for name in results["settings"]}
    assert report.table_routers(results).count("| BTX top-1 ") == 0
    assert "yes" not in report.table_routers(results) and "not measured" in report.table_routers(results)


def test_results_are_written_as_they_are_read(tmp_path):
    results = fake(lambda name, seed: 1.5)
    head_start.write(results, tmp_path / "deep" / "head_start.json")
    assert json.loads((tmp_path / "deep" / "head_start.json").read_text()) == results
    assert len(head_start.pairs(results)) == 10 + 3


def test_settings_of_a_scale_differ_in_it_alone(base):
    config = head_start.head_start_config(base)
    scaled = [name for name in config["only"] if name.endswith(f"{report.ROUTERS_OF_TEXT}, scale 6")]
    assert len(scaled) == 3
    for graph in settings.graphs(config):
        for name in scaled:
            one, two = (copy.deepcopy(graph.merged[which].parameters) for which in (name.removesuffix(", scale 6"), name))
            assert two["recipe"]["router"].pop("scale") == 6
            assert one == two
    assert {(report.from_random(name), name) for name in scaled} <= {*head_start.pairs({"settings": dict.fromkeys(scaled)})}
    assert all(report.from_random(name) in config["only"] for name in scaled)


def test_settings_of_a_scale_are_compared_with_the_random_ones_of_the_page(monkeypatch):
    found = fake(lambda name, seed: 9.0)
    page = fake(lambda name, seed: 10.0)
    page["settings"] = {name: runs for name, runs in page["settings"].items() if report.ROUTERS_OF_TEXT not in name}
    found["settings"] = {name: runs if "scale" in name else {} for name, runs in found["settings"].items()}
    monkeypatch.setattr(report, "read_scaled", lambda: found)
    lines = report.scaled(page).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        f"{name}, scale 6" for name in ("BTX top-1", "BAM Expert-KV", "BAM Shared-KV")
    ]
    assert all("| 10.0 ± 0.0 % | yes, 3 of 3" in " ".join(line.split()) for line in lines[4:]), lines
    monkeypatch.setattr(report, "read_scaled", lambda: None)
    assert report.scaled(page) == "Not measured yet: run that command."
