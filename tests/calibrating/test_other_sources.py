"""Texts through sources that are not plain folders: aligned vocabularies, 8-bit floats, wrappers; each proved by verification's own reading."""

import json
from pathlib import Path

import pytest
import torch
from damage import edit_config
from hub_models import hub as hub  # a fixture
from hub_server import FakeHub
from quantised_files import quantised_sources
from runs import options
from scenes import LETTERS, router, texts, write_texts
from vocabularies import three, tokenizer_json

from bam_merge import load_model, merge, verify
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe

NAMES = ("seed", "code", "law")


def write(folder: Path, sources: dict[str, str], more: str = "", names: tuple[str, ...] = NAMES, inputs: str = "seed") -> Path:
    write_texts(folder, names)
    path = folder / "recipe.yaml"
    listed = ", ".join(f"{name}: {place}" for name, place in sources.items())
    path.write_text(f"method: bam\nsources: {{{listed}}}\n{router(names=names, inputs=inputs)}\n{more}\noutput: {{path: out}}\n")
    return path


@pytest.mark.parametrize("inputs", ["seed", "mixture"])
@pytest.mark.parametrize("source", ["union", "code"])
def test_aligned_vocabularies(source: str, inputs: str, tmp_path: Path) -> None:
    """The texts are read by the tokenizer that gives the result's ids, whosever it is."""
    three(tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir() if (path / "config.json").is_file())
    seed, code, law = "seed", *(name for name in found if name != "seed")
    path = write(
        tmp_path,
        dict.fromkeys((seed, code, law)) | {name: name for name in (seed, code, law)},
        f"tokenizer: {{source: {source if source == 'union' else code}}}",
        (seed, code, law),
        inputs,
    )
    out = merge(load_recipe(path), options=options(verify=True)[0])
    assert verify(out).ok


def test_eight_bit_floats_for_the_seed(tmp_path: Path) -> None:
    """Which is the first expert, as none is called so."""
    quantised_sources(tmp_path)
    for name in ("law", "code"):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    sources = {"law": "{path: law, dequantise: true}", "code": "code"}
    path = write(tmp_path, sources, names=("law", "code"))
    path.write_text(path.read_text().replace("{path: out}", "{path: out, dtype: bfloat16}"))
    out = merge(load_recipe(path), options=options(verify=True)[0])
    assert verify(out).ok


def test_the_seed_is_the_first_expert_where_none_is_called_so(tmp_path: Path) -> None:
    from scenes import write_scene

    write_scene(tmp_path, names=("code", "law"))
    path = write(tmp_path, {"code": "code", "law": "law"}, names=("code", "law"))
    plan = plan_file(path)
    out = publish(plan, None, options(verify=True)[0])
    seen: list[torch.Tensor] = []
    model = load_model(tmp_path / "code")
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = encode(open_tokenizer(out), LETTERS["law"] * 3)
    model(torch.tensor([ids]))
    gates = seen[0][0, 1:] @ load_model(out).state_dict()["model.layers.1.mlp.router.weight"].T
    assert float((gates.argmax(-1) == 1).float().mean()) > 0.5


def test_a_config_with_few_positions_and_a_sliding_window(tmp_path: Path) -> None:
    from scenes import write_scene

    write_scene(tmp_path, "mistral")
    for name in NAMES:
        edit_config(tmp_path / name, sliding_window=4, max_position_embeddings=32)
    out = merge(load_recipe(write(tmp_path, {name: name for name in NAMES})), options=options(verify=True)[0])
    assert verify(out).ok
    assert texts() in (tmp_path / "recipe.yaml").read_text()


def test_models_of_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """Planned by headers and tokenizers, and downloaded for the merge: the same as of folders."""
    from scenes import write_scene

    write_scene(tmp_path / "models")
    for name in NAMES:
        hub.add(f"acme/{name}", tmp_path / "models" / name)
    plan = plan_file(write(tmp_path, {name: f"acme/{name}" for name in NAMES}))
    assert plan.remotes and plan.calibration is not None and plan.calibration.tokens > 900
    out = publish(plan, None, options(verify=True)[0])
    folders = merge(load_recipe(write(tmp_path / "models", {name: name for name in NAMES})), options=options()[0])
    assert (out / "model.safetensors").read_bytes() == (folders / "model.safetensors").read_bytes()
    assert verify(out).ok
