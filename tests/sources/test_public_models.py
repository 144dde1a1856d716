"""Public models at their true size: a header-only file by each config.json gives the published number of parameters, or the right refusal.

public_models.json and more_public_models.json have one model a line: the keys of its config.json, the parameters of its text model and, of
a wrapper, of all of it (`published`). (The factors of longrope are stand-ins of the right number.) Files are holes, so that 120 billion
parameters take no disk. With `-m ecosystem`, each config is held against transformers' own class of it, on the meta device: names, shapes and
both numbers. A model of the second file whose family has no table yet waits: it is skipped, and a refusal of it in the first file holds.
"""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_CLASS, write_recipe

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import family_tensors
from bam_merge.architectures.naming import find_naming
from bam_merge.architectures.tables import dense_families, find_by_model_type, load_architecture
from bam_merge.architectures.wrappers import NESTED, find_wrapper, text_models, unwrap
from bam_merge.checkpoints.header import encode_header
from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file


def listed(file: str) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in json.loads((Path(__file__).parent / file).read_text())}


def text_type(model: dict[str, Any]) -> str:
    """The model type of a model's text: its own, or that of what it wraps."""
    inside = (model["config"].get(key) for key in NESTED)
    return str(next((config for config in inside if config), model["config"])["model_type"])


def waits(model: dict[str, Any]) -> bool:
    """Whether no table can read the model yet: one of its family, and of a wrapper one for what is inside."""
    wraps = any(key in model["config"] for key in NESTED)
    return text_type(model) not in text_models() if wraps else find_by_model_type(text_type(model)) is None


MORE = listed("more_public_models.json")
WAITING = [name for name, model in MORE.items() if waits(model)]
MODELS = listed("public_models.json") | {name: model for name, model in MORE.items() if name not in WAITING}
FINE = [name for name, model in MODELS.items() if "refused" not in model]
WRAPPED = [name for name in FINE if "published" in MODELS[name]]
STORED_HEAD = ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral-community/pixtral-12b")
"""Wrappers that say nothing of ties; their files hold a head."""


def shapes(model: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of a model's text, as its files name them."""
    inside, problems = unwrap(model["config"]), []
    said = inside.wrapper is not None and inside.wrapper.tied and model["name"] not in STORED_HEAD
    tied = (said if inside.ties is None else inside.ties) if inside.wrapper else bool(inside.config.get("tie_word_embeddings"))
    config = {**inside.config, **({"tie_word_embeddings": tied} if inside.wrapper else {})}
    family = load_architecture(config["model_type"])
    facts = describe(family, config, problems)
    assert problems == []
    tensors = list(family_tensors(family, facts))
    if inside.wrapper is None:
        return tensors
    spelling = inside.wrapper.spellings[0]
    own = [spelling.trunk + name.removeprefix("model.") if name.startswith("model.") else spelling.rest + name for name, _ in tensors]
    return list(zip(own, (shape for _, shape in tensors), strict=True))


def write_holes(folder: Path, model: dict[str, Any]) -> Path:
    """A folder with the model's config.json and a file of holes, with one tensor of everything that stands beside its text model."""
    wrapper = find_wrapper(model["config"]["model_type"])
    beside = [(f"{starts[0]}.x.weight", (3, 5)) for starts in wrapper.beside.values()] if wrapper else []
    header, spans = encode_header((name, "BF16", shape) for name, shape in [*shapes(model), *beside])
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(header)
        os.truncate(stream.fileno(), spans[-1][0] + spans[-1][1])
    (folder / "config.json").write_text(json.dumps(model["config"]))
    return folder


def test_there_are_enough_of_them() -> None:
    assert len(FINE) >= 60
    assert len(WRAPPED) >= 12
    assert len(MODELS) - len(FINE) >= 15


FEWER = {
    "arcee": 2, "ernie4_5": 2, "smollm3": 2, "internlm3": 1, "iquestcoder": 2, "helium": 2, "vaultgemma": 1,
    "hyperclovax": 1, "jais2": 1,
    "gemma4_text": 2, "gemma4_unified_text": 2,
    "ministral": 0,  # published as mistral
}  # fmt: skip
"""Families of which fewer than three models are published, or known here."""


@pytest.mark.parametrize("family", [family.name for family in dense_families()])
def test_every_family_has_three_of_them(family: str) -> None:
    """Add the most used ones to more_public_models.json: what their config.json says, and how many parameters are published."""
    own = {family, *(kind for kind, text in text_models().items() if text.family == family)}
    assert len([name for name in FINE if text_type(MODELS[name]) in own]) >= FEWER.get(family, 3)


@pytest.mark.parametrize("name", MORE)
def test_a_model_waits_for_a_table_that_is_not_there(name: str) -> None:
    """And for nothing else: with its family's table, or the table of what its wrapper wraps, it must be among those that are tried."""
    tables = {kind for family in dense_families() for kind in family.model_types}
    if name in WAITING:
        assert text_type(MORE[name]) not in tables, f"{name} is skipped, and its family has a table"
        assert find_by_model_type(text_type(MORE[name])) is None
        pytest.skip(f"no table for {text_type(MORE[name])}")
    assert MODELS[name] is MORE[name]
    assert name in FINE


@pytest.mark.parametrize("name", FINE)
def test_the_published_number_of_parameters(name: str, tmp_path: Path, run: Any) -> None:
    model = MODELS[name]
    folder = write_holes(tmp_path / "source", model)
    found = json.loads(run("inspect", folder, "--json").out)
    assert found["parameters"]["total"] == model["parameters"]
    assert found["missing"] == found["unknown"] == []
    (tmp_path / "recipe.yaml").write_text("method: sparse_upcycling\nsources: {s: source}\nexperts: [s, s]\noutput: {path: out}\n")
    plan = plan_file(tmp_path / "recipe.yaml")
    experts = sum(prod(step.shape) for step in plan.steps if step.expert == 1)
    routers = sum(prod(step.shape) for step in plan.steps if step.role.startswith("router"))
    assert plan.parameters - experts - routers == model["parameters"]
    assert not any("not known to" in note for note in plan.notes), plan.notes


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if "refused" in model])
def test_the_right_refusal(name: str, tmp_path: Path, run: Any) -> None:
    model = MODELS[name]
    header, spans = encode_header([("model.embed_tokens.weight", "BF16", (8, 8))])
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(header + bytes(spans[0][1]))
    (tmp_path / "source" / "config.json").write_text(json.dumps(model["config"]))
    (tmp_path / "recipe.yaml").write_text("method: sparse_upcycling\nsources: {s: source}\nexperts: [s, s]\noutput: {path: out}\n")
    result = run("plan", tmp_path / "recipe.yaml")
    assert result.status == 2
    assert model["refused"] in result.err
    assert "Traceback" not in result.err


def test_qwen_2_5_with_its_instruct(tmp_path: Path) -> None:
    """One writes use_mrope: false, the other does not; windows that no layer has differ: nothing to accept."""
    for name, model in (("seed", "Qwen/Qwen2.5-7B"), ("law", "Qwen/Qwen2.5-7B-Instruct")):
        write_holes(tmp_path / name, MODELS[model])
    assert plan_file(write_recipe(tmp_path, names=("seed", "law"))).accepted == ()
    notes = plan_file(write_recipe(tmp_path, "accept: {config: [use_mrope]}", names=("seed", "law"))).notes
    assert "accept.config: use_mrope need not be accepted: it changes nothing at these values." in notes


@pytest.mark.parametrize(("text", "wrapper", "alike"), [
    ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-VL-7B-Instruct", True), ("Qwen/Qwen3-8B", "Qwen/Qwen3-VL-8B-Instruct", False),
    ("mistralai/Mistral-Small-24B-Base-2501", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", False),
])  # fmt: skip
def test_a_text_model_with_a_wrapper_of_its_kind(text: str, wrapper: str, alike: bool, tmp_path: Path) -> None:
    """Their rotary bases may differ: that is said, and can be accepted; nothing else stands against it."""
    for name, model in (("seed", text), ("law", wrapper)):
        write_holes(tmp_path / name, MODELS[model])
    recipe = write_recipe(tmp_path, names=("seed", "law"))
    if alike:
        plan = plan_file(recipe)
    else:
        with pytest.raises(CheckpointError) as error:
            plan_file(recipe)
        assert len(error.value.problems) == 1
        assert error.value.problems[0].startswith("sources.law: rotary embedding differs from sources.seed: rope_theta ")
        plan = plan_file(write_recipe(tmp_path, "accept: {facts: {rope_parameters: law}}", names=("seed", "law")))
        assert plan.accepted[0].startswith("rope_parameters of law counts for all sources (seed: rope_theta ")
    assert plan.unused["law"]


# ---- against transformers ----------------------------------------------------------------------------------------------------------


def on_meta(config: dict[str, Any]) -> Any:
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    wrapper = find_wrapper(config["model_type"])
    with torch.device("meta"):
        return getattr(transformers, wrapper.class_name)(made) if wrapper else transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.ecosystem
@pytest.mark.parametrize("name", [name for name in FINE if MODELS[name]["config"]["model_type"] not in {"internvl_chat", *NO_CLASS}])
def test_transformers_own_class_has_these_tensors(name: str) -> None:
    """Names and shapes of the text model, and the published number of the whole (a tied head counted once)."""
    from transformers.core_model_loading import revert_weight_conversion

    model = MODELS[name]
    made = on_meta(model["config"])
    state = dict(revert_weight_conversion(made, made.state_dict()))
    config = model["config"]
    inside = unwrap(config)
    expected = dict(shapes(model))
    heads = [key for key in state if key.endswith(("lm_head.weight", "embed_out.weight"))]
    if not any(key.endswith(("lm_head.weight", "embed_out.weight")) for key in expected):
        for head in heads:
            del state[head]
    table = load_architecture(inside.config["model_type"])
    naming = find_naming(list(state), table, inside.wrapper)
    assert (naming.problem, naming.others) == (None, ())
    text = {stored: tuple(state[stored].shape) for stored in naming.names.values()}
    rename = {"lm_head.weight": "embed_out.weight"} if table.name == "gpt_neox" else {}  # one is the hub's name, one transformers'
    assert {rename.get(key, key): shape for key, shape in text.items()} == expected
    assert sum(map(prod, text.values())) == model["parameters"]
    if "published" in model:
        buffers = sum(tensor.numel() for key, tensor in made.named_buffers() if key in made.state_dict())
        assert sum(tensor.numel() for tensor in state.values()) - buffers == model["published"]


def test_internvl_as_published() -> None:
    """Whose class transformers has not: its text model is a Qwen2, and its tower and projector are InternViT-300M and an MLP."""
    tower = 304_012_288
    for name in ("OpenGVLab/InternVL3-1B", "OpenGVLab/InternVL3-8B"):
        model = MODELS[name]
        d = model["config"]["llm_config"]["hidden_size"]
        projector = 2 * 4096 + 4096 * d + d + d * d + d
        assert model["parameters"] + tower + projector == model["published"]
