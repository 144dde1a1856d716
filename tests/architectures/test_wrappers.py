"""Wrappers' tables against transformers' own classes: names on disk and in memory, defaults, ties, and what a text model computes."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import transformers
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bam_merge import MergeOptions
from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import family_tensors, read_name, spellings
from bam_merge.architectures.naming import find_naming
from bam_merge.architectures.tables import find_by_model_type, load_architecture
from bam_merge.architectures.wrappers import find_wrapper, text_models, unwrap, wrappers
from bam_merge.errors import CheckpointError
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model, open_model
from bam_merge.model.wrapped import text_config
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70,
    "max_position_embeddings": 128,
}
OURS = [wrapper.name for wrapper in wrappers() if wrapper.name in CONFIG_MAPPING]
FIXED = {
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mllama": "mllama_text_model",
    "granite_speech": "granite",
    "paligemma": "gemma",
}
"""Wrappers whose text model is of one class."""


NEEDED = {"gemma4_text": {"hidden_size_per_layer_input": 0}}
"""What a text model must say to be one that merges."""


def tiny_text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TINY, **NEEDED.get(model_type, {}), **more}


def on_meta(name: str) -> Any:
    """The wrapper as transformers makes it, without memory, around a small text model."""
    text = FIXED.get(name, "qwen2" if name in ("ovis2", "internvl") else "llama")
    more = {"text_config": tiny_text(text)} if text in text_models() and not find_wrapper(name).refused else {}
    if name == "aya_vision":
        more["vision_config"] = {"model_type": "siglip_vision_model"}
    config = CONFIG_MAPPING[name](**more)
    with torch.device("meta"):
        return getattr(transformers, find_wrapper(name).class_name)(config)


def test_every_wrapper_but_one_is_of_transformers() -> None:
    assert {wrapper.name for wrapper in wrappers()} - set(OURS) == {"internvl_chat"}  # which has model code of its own


@pytest.mark.parametrize("name", OURS)
def test_what_transformers_implies(name: str) -> None:
    wrapper, config = find_wrapper(name), CONFIG_MAPPING[name]()
    assert config.text_config.model_type == wrapper.text
    assert bool(getattr(config, "tie_word_embeddings", None)) == wrapper.tied
    assert hasattr(transformers, wrapper.class_name)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["on disk", "in memory"])
def test_names_are_those_of_transformers(name: str, form: str) -> None:
    """Every tensor is the text model's, by its family's names, or is listed as beside it."""
    wrapper, model = find_wrapper(name), on_meta(name)
    state = model.state_dict()
    names = list(revert_weight_conversion(model, state) if form == "on disk" else state)
    stated = model.config.text_config.model_type
    if stated not in text_models() or wrapper.refused:  # no table of the family yet: the wrapper's own part
        for key in names:
            assert wrapper.what(key) is not None or any(
                key.startswith(s.trunk) or key == f"{s.rest}lm_head.weight" for s in wrapper.spellings
            ), key
        return
    table = find_by_model_type(text_models()[stated].family)
    naming = find_naming(names, table, wrapper)
    assert naming.problem is None
    assert naming.others == ()
    if table.kind == "mixture":  # whose names depend on the number of experts: each is of a row
        assert all(read_name(own, spellings(table)) for own in naming.names)
        assert len(naming.names) + len(naming.beside) == len(names)
        return
    facts = describe(table, unwrap({"model_type": name, "text_config": tiny_text(stated)}).config, [])
    expected = {own for own, _ in family_tensors(table, {**facts, "untied": True})}
    assert set(naming.names) == expected
    assert len(naming.names) + len(naming.beside) == len(names)
    assert naming.note is None


@pytest.mark.parametrize("model_type", [kind for kind, text in text_models().items() if text.defaults])
def test_defaults_are_those_of_the_text_models_class(model_type: str) -> None:
    """A text_config that says nothing means what transformers' class implies, in every fact."""
    text = text_models()[model_type]
    wrapper = next(w for w in wrappers() if w.text == model_type or (w.name == "llava" and model_type not in {w.text for w in wrappers()}))
    theirs = CONFIG_MAPPING[model_type]().to_dict()
    table, problems = load_architecture(text.family), []
    ours = describe(
        table,
        {
            **unwrap({"model_type": wrapper.name, "text_config": {"model_type": model_type, **NEEDED.get(model_type, {})}}).config,
            "tie_word_embeddings": False,
        },
        problems,
    )
    assert problems == []
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "hidden_act",
        *table.function,
    ):
        if key not in ("sliding_window", "layer_types", *NEEDED.get(model_type, {})) and theirs.get(key) is not None:
            assert ours[key] == theirs[key], key
    sets = (
        [ours["rope_parameters"], ours["sliding_rope_parameters"]]
        if "full_attention" in theirs["rope_parameters"]
        else [ours["rope_parameters"]]
    )
    nested = (
        [theirs["rope_parameters"].get(kind) for kind in ("full_attention", "sliding_attention")]
        if len(sets) > 1
        else [theirs["rope_parameters"]]
    )
    assert [rope["rope_theta"] for rope in sets] == [rope["rope_theta"] for rope in nested]
    assert ours["head_dim"] == (theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"])
    assert ours["sliding_window"] == (
        theirs["sliding_window"] if theirs.get("sliding_window") and theirs.get("use_sliding_window", True) else None
    )
    second = text_config({"model_type": wrapper.name, "text_config": {"model_type": model_type}}, has_head=True)
    assert {key: value for key, value in second.items() if key != "tie_word_embeddings"} == dict(
        unwrap({"model_type": wrapper.name, "text_config": {"model_type": model_type}}).config
    )


# ---- what they compute -------------------------------------------------------------------------------------------------------------

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

COMPUTED: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": SIGLIP, "text_config": tiny_text("llama")},
    "llava with a Mistral": {"model_type": "llava", "vision_config": SIGLIP, "text_config": tiny_text("mistral", sliding_window=8)},
    "llava tied": {"model_type": "llava", "vision_config": SIGLIP, "text_config": tiny_text("llama", tie_word_embeddings=True)},
    "llava_onevision": {"vision_config": SIGLIP, "text_config": tiny_text("qwen2")},
    "internvl": {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}, "text_config": tiny_text("qwen2"), "tie_word_embeddings": False},
    "internvl with a Qwen3": {"model_type": "internvl", "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}, "text_config": tiny_text("qwen3", head_dim=12), "tie_word_embeddings": False},
    "mistral3": {"vision_config": {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}, "text_config": tiny_text("mistral", head_dim=12, sliding_window=None), "tie_word_embeddings": False},
    "smolvlm": {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}, "text_config": tiny_text("llama")},
    "qwen2_vl": {"vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}, "text_config": tiny_text("qwen2_vl_text", rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]})},
    "qwen2_vl tied": {"model_type": "qwen2_vl", "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}, "text_config": tiny_text("qwen2_vl_text", rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}), "tie_word_embeddings": True},
    "qwen2_5_vl": {"vision_config": {**QWEN_VISION, "out_hidden_size": 32}, "text_config": tiny_text("qwen2_5_vl_text", rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]})},
    "qwen2_5_vl with yarn": {"model_type": "qwen2_5_vl", "vision_config": {**QWEN_VISION, "out_hidden_size": 32}, "text_config": tiny_text("qwen2_5_vl_text", rope_parameters={**YARN, "rope_theta": 1e6, "mrope_section": [1, 1, 2]})},
    "qwen3_vl": {"vision_config": {**QWEN_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, "text_config": tiny_text("qwen3_vl_text", head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 2, 2], "mrope_interleaved": True})},
    "video_llama_3": {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}, "text_config": tiny_text("qwen2")},
}  # fmt: skip


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A small wrapper as transformers saves it, and itself."""
    return save({"model_type": request.param.split(" ")[0], **COMPUTED[request.param]}, tmp_path)


def save(keys: dict[str, Any], tmp_path: Path) -> tuple[Path, Any]:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[keys.pop("model_type")](**keys)
    model = getattr(transformers, find_wrapper(config.model_type).class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
        model.tie_weights()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


@pytest.mark.parametrize("saved", COMPUTED, indirect=True)
@torch.no_grad()
def test_the_text_model_computes_what_the_wrapper_does(saved: tuple[Path, Any]) -> None:
    """For text, the reference model of the folder gives the wrapper's logits; so it does of names in memory, and under a prefix."""
    folder, theirs = saved
    ids = torch.randint(3, 70, (2, 60), generator=torch.Generator().manual_seed(5))
    expected = theirs(input_ids=ids).logits
    scale = expected.abs().max()
    assert float((load_model(folder)(ids) - expected).abs().max() / scale) < 1e-5
    for rename in (
        {key: value for key, value in theirs.state_dict().items() if not (key == "lm_head.weight" and theirs.config.tie_word_embeddings)},
        {f"module._orig_mod.{key}": value for key, value in load_file(folder / "model.safetensors").items()},
    ):
        save_file({key: value.clone() for key, value in rename.items()}, folder / "model.safetensors", {"format": "pt"})
        assert float((load_model(folder)(ids) - expected).abs().max() / scale) < 1e-5
    config = json.loads((folder / "config.json").read_text())
    plain, again = dict(unwrap(config).config), text_config(config, has_head=not theirs.config.tie_word_embeddings)
    assert plain == {key: value for key, value in again.items() if key != "tie_word_embeddings"}
    assert again["tie_word_embeddings"] is bool(theirs.config.tie_word_embeddings)
    assert open_model(folder).config.num_hidden_layers == 2


@pytest.mark.parametrize("saved", COMPUTED, indirect=True)
@torch.no_grad()
def test_a_dense_merge_of_wrappers_is_a_plain_model_that_computes_the_same(saved: tuple[Path, Any]) -> None:
    """A wrapper with itself: transformers loads the result as the text model's family, and nothing of the wrapper is left in it."""
    folder, theirs = saved
    copytree(folder, folder.parent / "again")
    (folder.parent / "recipe.yaml").write_text("method: merge\nsources: {seed: saved, law: again}\noutput: {path: out}\n")
    plan = plan_file(folder.parent / "recipe.yaml")
    made = publish(plan, None, MergeOptions(verify=False))
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == text_models()[theirs.config.text_config.model_type].family
    assert not {"vision_config", "text_config", "image_token_id", "mrope_section"} & set(config)
    assert not any("mrope" in key for key in config.get("rope_parameters") or {})
    ids = torch.randint(3, 70, (2, 60), generator=torch.Generator().manual_seed(5))
    expected = theirs(input_ids=ids).logits
    plain = transformers.AutoModelForCausalLM.from_pretrained(made).eval()
    assert float((plain(input_ids=ids).logits - expected).abs().max() / expected.abs().max()) < 1e-5


FIRST = {config["model_type"]: config for config in reversed(CONFIGS.values())}


NO_PART = {"falcon"}
"""Model types whose class transformers cannot run inside another one."""


@pytest.mark.parametrize("family", [kind for kind in FIRST if kind in CONFIG_MAPPING and kind not in NO_PART])
@torch.no_grad()
def test_llava_over_every_family(family: str, tmp_path: Path) -> None:
    """What transformers builds around any text model: its text is read as that family's, with the same hidden states as in the whole.

    Its logits are the family's: the wrapper's own head has neither the family's factor or cap (which change no order) nor its bias.
    """
    folder, theirs = save({"model_type": "llava", "vision_config": SIGLIP, "text_config": {"pad_token_id": 0, **FIRST[family]}}, tmp_path)
    if model_config(FIRST[family]).head_bias:
        with pytest.raises(CheckpointError, match=r"lm_head\.bias missing"):
            load_model(folder)
        return
    plain = transformers.AutoModelForCausalLM.from_config(theirs.config.text_config).eval()
    plain.base_model.load_state_dict(theirs.model.language_model.state_dict())
    plain.get_output_embeddings().weight.copy_(theirs.lm_head.weight)
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(5))
    assert torch.equal(theirs.model(input_ids=ids).last_hidden_state, plain.base_model(input_ids=ids).last_hidden_state)
    expected = plain(input_ids=ids).logits
    assert float((load_model(folder)(ids) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_text_model_that_is_none_of_its_family_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "paligemma", "text_config": {**FIRST["gemma"]}, "vision_config": {}}
    assert unwrap(config).problems == (
        "config.json: model_type 'paligemma': its text model sees the whole of a prompt in both directions, which cannot be merged.",
    )
    with pytest.raises(CheckpointError, match="sees the whole of a prompt in both directions"):
        text_config(config, has_head=False)
