"""benchmarks/paper: texts, stages and settings. The chain itself is run by `make paper-smoke`."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks" / "paper"
sys.path.insert(0, str(HERE))
import run  # noqa: E402
import settings  # noqa: E402
import stages  # noqa: E402
import texts  # noqa: E402
import work  # noqa: E402

from bam_merge.recipe.load import load_recipe  # noqa: E402

CONFIGS = ("config.yaml", "smoke.yaml", "gpu.yaml")


@pytest.fixture(params=CONFIGS)
def config(request):
    return settings.load_config(HERE / request.param)


# ---- texts -----------------------------------------------------------------------------------------------------------------


def sentence(number: int) -> str:
    return " ".join(f"word{number}x{i}" for i in range(30))


def test_no_paragraph_stands_twice_and_none_is_held_out_that_training_nearly_has():
    near = sentence(3).replace("word3x29", "changed")
    documents = ["\n\n".join(map(sentence, range(20))), sentence(5), "\n\n".join([near, sentence(100), sentence(101), sentence(7)])]
    text = texts.split(documents, training=100_000, heldout=10_000)
    training, heldout = (part.split("\n\n") for part in (text.training, text.heldout))
    assert training == [sentence(i) for i in range(17)]
    assert heldout == [sentence(i) for i in (17, 18, 19, 100, 101)]


def test_parts_are_no_longer_than_asked():
    text = texts.split(["\n\n".join(map(sentence, range(60)))], training=3000, heldout=700)
    assert len(text.training) == 3000 and 0 < len(text.heldout) <= 700


def test_the_share_of_known_words_in_a_row():
    known = set(texts.shingles(sentence(1)))
    assert texts.shared(sentence(1).upper(), known) == 1
    assert texts.shared(sentence(2), known) == 0
    assert texts.shared("too few words", known) == 0


# ---- stages ----------------------------------------------------------------------------------------------------------------


def chain(steps: int = 1) -> tuple[stages.Stage, stages.Stage]:
    first = stages.Stage("first", "count", {"steps": steps}, {})
    return first, stages.Stage("second", "count", {"steps": 2}, {"model": first})


def test_a_digest_follows_from_parameters_and_inputs_and_not_from_names():
    first, second = chain()
    assert stages.Stage("other name", "count", {"steps": 1}, {}).digest == first.digest
    assert first.digest != second.digest
    assert chain(steps=3)[1].digest != second.digest


def test_a_stage_is_absent_or_whole(tmp_path, monkeypatch):
    def count(out, parameters, inputs):
        before = json.loads((inputs["model"] / "count.json").read_text()) if inputs else 0
        assert before or not inputs
        (out / "count.json").write_text(str(before + parameters["steps"]))
        if parameters.get("fail"):
            raise RuntimeError("halfway")

    monkeypatch.setitem(work.KINDS, "count", count)
    first, second = chain()
    broken = stages.Stage("broken", "count", {"steps": 1, "fail": True}, {})
    with pytest.raises(RuntimeError, match="halfway"):
        stages.make(broken, tmp_path)
    assert not broken.done(tmp_path)
    stages.make(first, tmp_path)
    stages.make(second, tmp_path)
    assert second.read(tmp_path, "count.json") == 3
    record = second.read(tmp_path, stages.RECORD)
    assert record["inputs"] == {"model": first.folder(tmp_path).name} and record["parameters"] == {"steps": 2}


def test_what_is_finished_is_not_made_again(tmp_path, capsys):
    first, second = chain()
    for stage in (first, second):
        stage.folder(tmp_path).mkdir()
    stages.make_all([first, second], tmp_path, workers=1, threads=1)
    assert "2 stages, 0 to make" in capsys.readouterr().out


# ---- settings --------------------------------------------------------------------------------------------------------------


def test_every_stage_comes_after_its_inputs_and_once(config):
    order = [stage.digest for stage in run.all_stages(config, [])]
    assert len(set(order)) == len(order)
    for place, stage in enumerate(run.all_stages(config, [])):
        assert all(order.index(given.digest) < place for given in stage.inputs.values())


def test_every_graph_has_its_own_models_and_all_share_the_data(config):
    made = settings.graphs(config)
    assert len({graph.data.digest for graph in made}) == 1
    assert (
        len({graph.dense["seed"].digest for graph in made}) == len({graph.trained["BAM Expert-KV"].digest for graph in made}) == len(made)
    )


def test_recipes_are_sound_and_their_experts_in_order(config, tmp_path):
    graph = settings.graphs(config)[0]
    assert len(graph.dense) == 4 and set(graph.merged) == set(settings.chosen(config))
    for name, stage in graph.merged.items():
        file = tmp_path / "recipe.yaml"
        sources = {source: str(tmp_path / source) for source in stage.parameters["sources"]}
        output = {"path": "model", **stage.parameters["recipe"].get("output", {})}
        file.write_text(json.dumps({**stage.parameters["recipe"], "sources": sources, "output": output}))
        assert load_recipe(file).method == stage.parameters["recipe"]["method"], name
        assert list(stage.inputs) == stage.parameters["sources"]
    six = graph.merged["BTX 6 experts top-3"].parameters["recipe"]["experts"]
    assert six == [*graph.dense, "seed", "seed"]


def test_equal_compute_is_a_training_with_a_reference(config):
    graph = settings.graphs(config)[0]
    stage = graph.trained[f"BAM Expert-KV{settings.COMPUTE}"]
    assert stage.inputs["reference"] is graph.merged["BTX top-1"]
    assert stage.parameters == graph.trained["BAM Expert-KV"].parameters
    assert stage.digest != graph.trained["BAM Expert-KV"].digest


def test_only_asks_for_no_other_setting():
    config = settings.load_config(HERE / "config.yaml")
    kinds = [stage.kind for stage in run.all_stages(config, ["average"])]
    assert kinds.count("merged") == kinds.count("dense") - 3 * len(config["random_seeds"]) == len(config["random_seeds"])
    assert "mixture" not in kinds


def test_a_configuration_overlays_another(tmp_path):
    (tmp_path / "below.yaml").write_text("a: {b: 1, c: 2}\nd: [1]\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\na: {b: 3}\nd: [2]\n")
    assert settings.load_config(tmp_path / "above.yaml") == {"a": {"b": 3, "c": 2}, "d": [2]}
