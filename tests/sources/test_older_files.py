"""Files as programs wrote them before transformers 5, of every family: older keys, other names, a tied head that is stored. One plan with newer
ones; and where a file says two things of its head, what it holds is looked at.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from conftest import CONFIGS, NO_CLASS, SOURCES, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import applies, in_order
from bam_merge.architectures.tables import head_names, load_architecture
from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan

FIRST = {config["model_type"]: name for name, config in reversed(CONFIGS.items())}
SCALINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another base": {"rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e5},
}
"""What rope_parameters say, where a family's class takes that."""


def loaded(config: dict[str, Any]) -> Any:
    """transformers' own configuration, from a file."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return transformers.AutoConfig.from_pretrained(folder)


def saved(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers writes it today, with everything that its class fills in."""
    return {key: value for key, value in json.loads(loaded(config).to_json_string(use_diff=False)).items() if key != "_name_or_path"}


def without_type(values: Any) -> Any:
    """Without the older word for rope_type, which transformers keeps beside it."""
    return {key: without_type(value) for key, value in values.items() if key != "type"} if isinstance(values, dict) else values


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The same in the keys of before: rope_theta and rope_scaling beside each other, its type called type, torch_dtype."""
    table = load_architecture(config["model_type"])
    result = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    result["torch_dtype"] = config.get("dtype") or "float32"
    rope, word = dict(config["rope_parameters"]), "type"
    if any(isinstance(value, dict) for value in rope.values()):  # one set for each kind of layer; these classes know the newer word alone
        if getattr(table.quirks, "sliding_base", None):
            result[table.quirks.sliding_base] = rope["sliding_attention"]["rope_theta"]
        rope, word = dict(rope["full_attention"]), "rope_type"
    result[table.quirks.rotary_base] = rope.pop("rope_theta")
    share = rope.pop("partial_rotary_factor", None)
    if share is not None and table.quirks.rotary_share:
        result[table.quirks.rotary_share] = share
    kind = rope.pop("rope_type")
    result["rope_scaling"] = {**without_type(rope), word: kind} if kind != "default" else None
    return result


def cases() -> Iterator[tuple[str, str]]:
    """Every variant with every scaling that its class takes, and keeps as it is."""
    for name, config in CONFIGS.items():
        if (
            config["model_type"] in NO_CLASS or load_architecture(config["model_type"]).quirks.rope_sets
        ):  # of whose keys there are no older ones
            continue
        for scaling, keys in SCALINGS.items():
            stated = {**config, **({"rope_parameters": {"rope_type": "default", **keys}} if keys else {})}
            if keys and ("rope_parameters" in config or "rope_scaling" in config or config["model_type"] == "phi3"):
                continue  # a type of its own, or none but longrope
            if {"full_attention"} <= config.get("rope_parameters", {}).keys() and not load_architecture(
                config["model_type"]
            ).quirks.sliding_base:
                continue  # olmo3's two bases: older files have one, and transformers passes over it for layers with a window
            if not keys or "sliding_attention" not in saved(config)["rope_parameters"]:
                assert saved(stated)["rope_parameters"]
                yield name, scaling


def stated(name: str, scaling: str) -> dict[str, Any]:
    keys = SCALINGS[scaling]
    return {**CONFIGS[name], **({"rope_parameters": {"rope_type": "default", **keys}} if keys else {})}


def shown(plan: Plan) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """What a plan would write: config.json and every tensor."""
    return plan.config, [(step.name, step.expression, str(step.dtype)) for step in plan.steps]


@pytest.mark.parametrize(("name", "scaling"), list(cases()))
def test_older_and_newer_files_are_one_plan(name: str, scaling: str, tmp_path: Path) -> None:
    """All old, all new, and one beside two: the same result, and nothing about a config.json in the notes; transformers reads them as one."""
    newer = saved(stated(name, scaling))
    before = older(newer)
    assert "rope_parameters" not in before
    again = saved(before)
    assert {key: without_type(again[key]) for key in newer if key != "dtype"} == {
        key: without_type(value) for key, value in newer.items() if key != "dtype"
    }
    write_sources(tmp_path, CONFIGS[name])
    plans = []
    for files in ((newer, newer, newer), (before, before, before), (newer, before, newer), (before, newer, before)):
        for source, config in zip(SOURCES, files, strict=True):
            (tmp_path / source / "config.json").write_text(json.dumps({**config, "dtype": "float32"} if "dtype" in config else config))
        plans.append(plan_file(write_recipe(tmp_path)))
    assert [note for plan in plans for note in plan.notes if "config.json" in note] == []
    assert all(shown(plan) == shown(plans[0]) for plan in plans)


# ---- the head ------------------------------------------------------------------------------------------------------------------------


def tied_sources(family: str, folder: Path, head: torch.Tensor | None = None) -> str:
    """Sources whose config.json ties, each with a head stored beside the embeddings: their copy, or `head`. Returns its name."""
    table = load_architecture(family)
    config = {**CONFIGS[FIRST[family]], "tie_word_embeddings": True}
    facts = describe(table, config, [])
    embed = next(cell.names[0] for cell in in_order(table, 2) if applies(cell, facts) and cell.row.roles == ("embed",))
    name = head_names(table)[0]
    write_sources(folder, config)
    for source in SOURCES:
        tensors = load_file(folder / source / "model.safetensors")
        tensors[name] = tensors[embed].clone() if head is None else head.clone()
        save_file(tensors, folder / source / "model.safetensors", {"format": "pt"})
    return name


@pytest.mark.parametrize("family", FIRST)
def test_a_tied_head_that_is_stored(family: str, tmp_path: Path) -> None:
    """A copy of the embeddings is dropped aloud; another one is refused, and is the head where config.json says that it is."""
    name = tied_sources(family, tmp_path)
    plan = plan_file(write_recipe(tmp_path))
    assert plan.config["tie_word_embeddings"] is True
    assert not [step for step in plan.steps if step.role == "head"]
    assert plan.unused["law"] == {name: "the head is tied to the embeddings, and this copy equals them"}
    tied_sources(family, tmp_path, torch.full((64, 32), 0.5))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert len([problem for problem in error.value.problems if f"holds {name}, which differs from" in problem]) == 3
    for source in SOURCES:
        path = tmp_path / source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    plan = plan_file(write_recipe(tmp_path))
    assert plan.config["tie_word_embeddings"] is False
    assert len([step for step in plan.steps if step.role == "head"]) == 1


@pytest.mark.parametrize("family", [family for family in FIRST if any(len(row.names) > 1 for row in load_architecture(family).rows)])
def test_other_names_of_tensors_are_one_plan(family: str, tmp_path: Path) -> None:
    config = {**CONFIGS[FIRST[family]], "tie_word_embeddings": False}
    write_sources(tmp_path / "first", config)
    write_sources(tmp_path / "second", config, spelling=1)
    names = [set(load_file(tmp_path / at / "seed" / "model.safetensors")) for at in ("first", "second")]
    assert names[0] != names[1]
    first, second = (plan_file(write_recipe(tmp_path / at)) for at in ("first", "second"))
    assert [(step.name, step.shape) for step in first.steps] == [(step.name, step.shape) for step in second.steps]
    assert first.config == second.config
