"""Models of the hub with what else may be said of sources: 8-bit floats, wrappers, adapters, vocabularies, heads, pickled files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import write_adapter
from conftest import CONFIGS, write_sources
from damage import edit_config
from hub_models import hub as hub  # a fixture
from hub_models import write_hub_recipe
from hub_server import FakeHub
from quantised_files import quantise
from safetensors.torch import load_file, save_file
from test_hub import commits
from test_wrapped import NEW, TOWER, wrap
from vocabularies import three

from bam_merge.planning.make import plan_file

NAMES = ("seed", "code", "law")


def on_hub(hub: FakeHub, folder: Path, *more: str) -> None:
    """What stands in `folder` as models of acme's."""
    for name in (*NAMES, *more):
        if (folder / name).is_dir():
            hub.add(f"acme/{name}", folder / name)


def planned_and_merged(run: Any, recipe: Path, folder: Path, text: str, sources: str) -> tuple[str, dict[str, Any]]:
    """What the plan prints, by headers; and the manifest of the merge, whose weights and config.json are those of the merge of the folders."""
    plan = run("plan", recipe)
    assert plan.status == 0, plan.err
    assert " to download" in plan.out
    result = run("merge", recipe)
    assert result.status == 0, result.err
    plain = folder / "recipe.yaml"
    plain.write_text(f"method: bam\nsources: {sources}\n{text}\noutput: {{path: plain}}\n")
    assert run("merge", plain).status == 0
    out = recipe.parent / "out"
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (folder / "plain" / name).read_bytes()
    for level in ("quick", "full"):
        assert json.loads(run("verify", out, "--verify", level, "--json").out)["ok"] is True
    return str(plan.out), json.loads((out / "bam_merge.json").read_text())


def test_8_bit_floats_in_a_wrapper(hub: FakeHub, tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "models"
    write_sources(folder, CONFIGS["llama"], dtype="BF16")
    quantise(folder / "law", "blocks")
    wrap(folder / "law", "llava", "text_config", NEW, {f"model.{name}": value for name, value in TOWER.items()})
    on_hub(hub, folder)
    recipe = write_hub_recipe(tmp_path, "{seed: acme/seed, code: acme/code, law: {path: acme/law, dequantise: true}}")
    plain = "{seed: seed, code: code, law: {path: law, dequantise: true}}"
    said, manifest = planned_and_merged(run, recipe, folder, "", plain)
    assert "vision tower of llava: the text model alone is read" in said
    assert manifest["recipe"]["sources"]["law"] == {"path": f"acme/law@{commits(hub)['law']}", "dequantise": True}


def test_an_adapter_on_a_wrapped_base(hub: FakeHub, tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "models"
    write_sources(folder, CONFIGS["llama"], ("seed",), "BF16")
    for number, name in enumerate(("code", "law")):
        write_adapter(folder / name, folder / "seed", seed=number, base_model_name_or_path="acme/seed")
    wrap(folder / "seed", "llava", "text_config", NEW, {f"model.{name}": value for name, value in TOWER.items()})
    on_hub(hub, folder)
    recipe = write_hub_recipe(tmp_path, "{code: {base: acme/seed, adapter: acme/code}, law: {base: acme/seed, adapter: hf://acme/law}}")
    said, manifest = planned_and_merged(run, recipe, folder, "", "{code: {base: seed, adapter: code}, law: {base: ./seed, adapter: law}}")
    assert "names the base" not in said  # it is that one, though its folder is called by its commit
    assert manifest["recipe"]["sources"]["law"] == {
        "base": f"acme/seed@{commits(hub)['seed']}",
        "adapter": f"acme/law@{commits(hub)['law']}",
    }


def test_a_union_of_vocabularies(hub: FakeHub, tmp_path: Path, run: Any) -> None:
    """A plan by headers has read the tokenizers, since rows depend on them."""
    folder = tmp_path / "models"
    three(folder)
    on_hub(hub, folder)
    text = "tokenizer: {source: union}"
    plan = plan_file(write_hub_recipe(tmp_path, text=text))
    assert plan.remotes and plan.alignment is not None
    weights = [request for request in hub.requests if "safetensors" in request.path and request.sent]
    assert all(request.span for request in weights)
    planned_and_merged(run, write_hub_recipe(tmp_path, text=text), folder, text, "{seed: seed, code: code, law: law}")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "plain/tokenizer.json").read_bytes()


@pytest.mark.parametrize("accept", ["stored", "tied"])
def test_a_head_that_is_accepted(accept: str, hub: FakeHub, tmp_path: Path, run: Any) -> None:
    """By headers it cannot be seen whether it differs; the plan says so, and the merge sees it."""
    folder = tmp_path / "models"
    write_sources(folder, CONFIGS["llama"])
    edit_config(folder / "law", tie_word_embeddings=True)
    for name in ("seed", "code"):
        tensors = load_file(folder / name / "model.safetensors")
        tensors.pop("lm_head.weight")
        save_file(tensors, folder / name / "model.safetensors")
        edit_config(folder / name, tie_word_embeddings=True)
    on_hub(hub, folder)
    refused = run("merge", write_hub_recipe(tmp_path))
    assert refused.status == 2
    assert "Or say it in the recipe: accept: {head: stored}" in refused.err
    text = f"accept: {{head: {accept}}}"
    plan = run("plan", write_hub_recipe(tmp_path, text=text, output="elsewhere"))
    assert plan.status == 0, plan.err
    result = run("merge", write_hub_recipe(tmp_path, text=text))
    assert result.status == 0, result.err
    assert "accepted" in (tmp_path / "out/README.md").read_text().lower()
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) == (accept == "stored")


def test_pickled_weights_are_not_converted_from_there(hub: FakeHub, tmp_path: Path, run: Any) -> None:
    """They are not downloaded at all; the message says how to go on."""
    write_sources(tmp_path / "models", CONFIGS["llama"], ("seed",))
    torch.save({}, tmp_path / "models/seed/pytorch_model.bin")
    (tmp_path / "models/seed/model.safetensors").unlink()
    hub.add("acme/seed", tmp_path / "models/seed")
    for place in ("acme/seed", "hf://acme/seed", "acme/seed@main"):
        result = run("convert", place, tmp_path / "out")
        assert result.status == 2
        assert "of models of the hub pickled weights are never downloaded here" in result.err
        assert "(hf download acme/seed --local-dir FOLDER), and convert FOLDER" in result.err
    plan = run("plan", write_hub_recipe(tmp_path, "{seed: acme/seed}", "experts: [seed, seed]"))
    assert plan.status == 2
    assert "bam-merge convert FOLDER NEW_FOLDER" in plan.err
    assert not hub.asked(r"\.bin")
    assert not (tmp_path / "out").exists()
