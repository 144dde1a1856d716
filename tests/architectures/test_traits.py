"""Traits: what a family's table can say of a model, and that nothing which no layout has a word for is written in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, MORE, write_recipe, write_sources

from bam_merge.architectures.config import describe
from bam_merge.architectures.table_files import left_out
from bam_merge.architectures.tables import dense_families, load_architecture, mixture_layouts
from bam_merge.architectures.vocabulary import QUIET, TRAITS, UNSAID
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.model.config import model_config
from bam_merge.planning.make import plan_file
from bam_merge.planning.output_config import refusals

OTHER: dict[str, Any] = {
    "norm_type": "layer_norm", "parallel_norms": 1, "norm_offset": 1, "attention_scale": 0.3, "embedding_scale": 2.0, "residual_scale": 0.5,
    "qk_norm_shape": "all heads", "attention_clip": 0.5, "logit_scale": 0.5, "rope_layers": [0], "query_growth": 0.5,
}  # fmt: skip
"""A value of each trait that is not the usual one; of those that are true or false, the other one."""

LAYOUTS = [layout.name for layout in mixture_layouts() if layout.name != "bam"]


def plain(layout: str) -> dict[str, Any]:
    """What a merge has that a layout can express."""
    accepts = load_architecture(layout).accepts
    first = {key: value[0] if isinstance(value, list) else value for key, value in accepts.items()}
    return {**UNSAID, **QUIET, **{key: None if value == "none" else value for key, value in first.items()}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_takes_what_it_can_say(layout: str) -> None:
    assert refusals(load_architecture(layout), plain(layout), "r") == []


@pytest.mark.parametrize("trait", UNSAID)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_layout_cannot_say_is_refused(layout: str, trait: str) -> None:
    """Every trait, those that its table does not name too: one that a later family brings is refused until a layout says it."""
    table, values = load_architecture(layout), plain(layout)
    usual = values[trait]
    other = OTHER.get(trait, not usual)
    other = {"norm_type": "rms_norm", "qk_norm_shape": "head", "parallel_norms": 2}.get(trait, UNSAID[trait]) if other == usual else other
    problems = refusals(table, {**values, trait: other}, "recipe.yaml")
    if trait == "parallel_norms" and not table.accepts["parallel_block"]:  # of a parallel block, which is refused as such
        assert problems == []
        return
    by_kind = trait == "sliding_rope_parameters" and "$rope_parameters_by_kind" in table.config.values()
    by_kind = by_kind or (trait == "sizes_by_kind" and bool(table.sizes))
    said = by_kind or trait in table.implies or trait in table.traits or f"${trait}" in table.config.values()
    if said and trait == "attention_bias" and "attention_out_bias" not in (*table.accepts, *table.config):
        said = False  # its one key says both, and here they differ
    assert (problems == []) == said
    if not said:
        named = "attention_out_bias" if trait == "attention_bias" and trait not in table.accepts else trait
        assert any(f"{layout} needs {named} = " in problem and "Use layout: bam" in problem for problem in problems)


def test_every_trait_has_a_word_in_bam_and_a_reader() -> None:
    """A trait that bam's config.json or the reference model knew nothing of would be lost."""
    written = [value for value in load_architecture("bam").config.values() if isinstance(value, str)]
    config = vars(model_config(CONFIGS["llama"]))
    for trait in (*TRAITS, "rope_layers", "query_growth", "sliding_rope_parameters", "sizes_by_kind"):
        assert f"${trait}" in written
        assert trait in config


@pytest.mark.parametrize(("name", "layout", "needs"), [
    ("gemma", "mixtral", "norm_offset = 0, this merge has 1"), ("granite", "mixtral", "attention_scale = none, this merge has 0.2"),
    ("granite", "mixtral", "residual_scale = none, this merge has 0.5"), ("smollm3", "mixtral", "rope_layers = none, this merge has [0]"),
    ("hunyuan_v1_dense", "qwen3_moe", "qk_norm_after_rotary = false, this merge has true"), ("phi", "mixtral", "head_bias = false, this merge has true"),
    ("gemma", "qwen2_moe", "embedding_scale = none, this merge has 5.656854249492381"),
])  # fmt: skip
def test_the_plan_says_so(name: str, layout: str, needs: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[name])
    with pytest.raises(BamMergeError, match=layout) as error:
        plan_file(write_recipe(tmp_path, method="btx", output=f"{{path: out, layout: {layout}}}"))
    assert any(f"output.layout: {layout} needs {needs}" in problem for problem in error.value.problems)


@pytest.mark.parametrize("name", ["iquestcoder", "internlm3_tied", "ministral_sliding", "seed_oss"])
def test_families_that_are_others_under_another_name_go_into_public_layouts(name: str, tmp_path: Path) -> None:
    layout = "qwen2_moe" if name == "seed_oss" else "mixtral"
    write_sources(tmp_path, CONFIGS[name])
    assert plan_file(write_recipe(tmp_path, method="btx", output=f"{{path: out, layout: {layout}}}")).config["model_type"] == layout


def test_a_mixture_of_plain_families_has_none_of_the_new_words(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["qwen3"])
    assert not set(QUIET) & set(plan_file(write_recipe(tmp_path)).config)
    write_sources(tmp_path, CONFIGS["gemma"])
    assert set(QUIET) & set(plan_file(write_recipe(tmp_path)).config) == {"norm_offset", "embedding_scale", "embedding_scale_in_dtype"}


def test_no_python_names_a_family() -> None:
    """A family is a table: its name stands in no code."""
    import bam_merge

    home = Path(bam_merge.__file__).parent
    names = {family.name for family in dense_families()} & {config["model_type"] for config in MORE.values()}
    names -= {"phi", "gemma", "granite"}  # words of other things: benchmarks, wrappers
    code = {path: path.read_text(encoding="utf-8") for path in home.rglob("*.py")}
    assert [(path.name, name) for path, text in code.items() for name in names if f'"{name}"' in text] == []


# ---- what a config.json of such a family can say wrongly -------------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no division by nothing": ("granite", {"logits_scaling": 0.0}, "logits_scaling must be above 0, and less than 1e30, found 0.0."),
    "a division beyond float": ("granite", {"logits_scaling": 10**400}, "logits_scaling must be above 0, and less than 1e30, found 1000"),
    "an alpha beyond float": ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1e300}}, "alpha in rope_parameters must be a number above 0, and less than 1e30"),
    "an activation that is a list": ("gemma", {"hidden_act": ["gelu"]}, "hidden_act must be text"),
    "no list of strings": ("smollm3", {"no_rope_layers": ["a", "b"]}, "no_rope_layers must have a 1 or a 0 for each of the 2 layers, found ['a', 'b']."),
    "a list too short": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must have a 1 or a 0 for each of the 2 layers, found [1]."),
    "no interval": ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be at least 1, found 0."),
    "no pattern": ("cohere2", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integer, found 0."),
    "sight of what comes": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not known here, only false"),
    "norms that may be absent": ("hunyuan_v1_dense", {"use_qk_norm": False}, "use_qk_norm = false is not known here, only true: what such a model computes would be a guess."),
    "a compression": ("ernie4_5", {"compression_ratio": 2.0}, "compression_ratio = 2.0 is not known here, only 1.0 or 1"),
    "an epsilon under another name": ("starcoder2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06 is not known here, only 1e-05"),
    "a null under one of two names": ("internlm3", {"attention_bias": None}, "attention_bias is null, which is no value of it: transformers does not load such a model."),
    "a null under the other": ("internlm3_tied", {"qkv_bias": None}, "qkv_bias is null, which is no value of it: transformers does not load such a model."),
    "one bias by two keys": ("internlm3", {"attention_bias": False}, "qkv_bias = true and attention_bias = false are two spellings of one fact, and differ."),
    "no rotary embedding said": ("cwm", {"rope_parameters": None}, "rope_parameters is missing; cwm without it is given a scaling that no file says."),
    "an alpha below 0": ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": -2}}, "alpha in rope_parameters must be a number above 0, and less than 1e30, for heads of more than 2, found -2."),
    "no growth said": ("ministral3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters.llama_4_scaling_beta must be a number"),
    "no context to grow from": ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}, "rope_parameters.original_max_position_embeddings must be above 0"),
    "positions by distance": ("falcon", {"alibi": True}, "alibi = true cannot be merged here: its scores are shifted by distance (ALiBi)"),
    "no norms at all": ("falcon_grouped", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3 is not known here, only 1 or 2"),
    "no model of transformers": ("falcon_grouped", {"parallel_attn": False}, "new_decoder_architecture = true, parallel_attn = false: the new architecture is always parallel"),
    "two norms of the old kind": ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2: only the new architecture has two norms"),
    "a head that a class works out": ("falcon", {"head_dim": 8}, "head_dim = 8 cannot be merged here: it is always hidden_size / num_attention_heads"),
    "an FFN under a key of its own": ("falcon", {"ffn_hidden_size": 0}, "ffn_hidden_size must be a positive integer, found 0."),
    "another FFN under the common key": ("falcon", {"intermediate_size": 48}, "intermediate_size = 48 and ffn_hidden_size = 40 are two spellings of the size of the FFN, and differ; transformers takes ffn_hidden_size"),
    "another activation": ("falcon", {"hidden_act": "relu"}, "hidden_act = 'relu' is another spelling of the activation, which transformers takes from activation for falcon"),
    "a mixture already": ("granitemoehybrid", {"num_local_experts": 8}, "num_local_experts = 8 cannot be merged here: such a Granite 4 is a mixture already; those without experts have num_local_experts = 0. One of its experts can be a source: write #experts.0 behind its place."),
    "a mixture already, unsaid": ("granitemoehybrid", {"num_local_experts": ...}, "num_local_experts = 8, which is meant where it is left out, cannot be merged here"),
    "layers with states": ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "layer_types names 'mamba'; granitemoehybrid merges here only where all its layers are full_attention."),
    "layers that nothing says": ("granitemoehybrid", {"layer_types": ...}, "layer_types is missing, and what granitemoehybrid is without it is not known here. Add it."),
    "an epsilon that classes differ in": ("exaone", {"layer_norm_epsilon": ...}, "layer_norm_epsilon is missing, and what exaone is without it is not known here."),
    "an activation under the common key": ("exaone", {"hidden_act": "relu"}, "hidden_act = 'relu' and activation_function = 'silu' are two spellings of the activation, and differ"),
    "a share of heads": ("exaone", {"rotary_pct": 0.25}, "the share of a head that turns is always 1.0"),
    "two numbers of layers": ("exaone", {"num_hidden_layers": 3}, "num_layers = 2 and num_hidden_layers = 3 are two spellings of one fact, and differ."),
    "clipped to nothing": ("olmo_clipped", {"clip_qkv": 0.0}, "clip_qkv must be above 0, and less than 1e30, or null for no cap, found 0.0."),
    "an epsilon that nobody reads": ("olmo", {"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06 cannot be merged here: transformers' class has 0.00001, whatever the file says."),
    "no number": ("granite", {"residual_multiplier": "0.2"}, "residual_multiplier must be a number, found '0.2'."),
    "a window that is not": ("cohere2", {"sliding_window": None}, "sliding_window is no number, and layers of cohere2 slide unless layer_types says otherwise."),
    "two patterns": ("cohere2_biased", {"sliding_window_pattern": 2}, "layer_types says that layers 1 slide, sliding_window_pattern = 2 that all but each 2th do"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(case: str, tmp_path: Path) -> None:
    name, keys, message = WRONG[case]
    write_sources(tmp_path, CONFIGS[name])
    path = tmp_path / "law" / "config.json"
    stated = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not ...}))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert any(problem.startswith("sources.law: config.json: ") and message in problem for problem in error.value.problems)


@pytest.mark.parametrize(("name", "keys", "named"), [
    ("granite", {"residual_multiplier": 0.4}, "residual_multiplier = 0.4"), ("granite", {"logits_scaling": 2.0}, "logits_scaling = 2.0"),
    ("smollm3", {"no_rope_layers": [0, 1]}, "rope_layers"), ("falcon_grouped", {"activation": "relu"}, "hidden_act = 'relu'"),
    ("exaone4", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window_pattern": None}, "layer_types"), ("nemotron", {"norm_eps": 1e-3}, "norm_eps = 0.001"),
    ("starcoder2", {"norm_epsilon": 1e-3}, "norm_epsilon = 0.001"),
])  # fmt: skip
def test_sources_that_differ_in_a_trait_are_refused_once(name: str, keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[name])
    path = tmp_path / "law" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    found = [problem for problem in error.value.problems if problem.startswith("sources.law")]
    assert any(named in problem for problem in found)
    assert len(found) == 1


@pytest.mark.parametrize(("model_type", "reason"), [
    ("lfm2", ": most of its layers are short convolutions, which have no attention to mix."), ("apertus", ": the activation of its FFN (xIELU) has numbers of its own in every layer"),
    ("gpt9", "."),
])  # fmt: skip
def test_what_is_left_out_is_refused_with_its_reason(model_type: str, reason: str, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    path = tmp_path / "law" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))
    planned, seen = run("plan", write_recipe(tmp_path)), run("inspect", tmp_path / "law", "--json")
    assert f"sources.law: model_type '{model_type}' is not a dense family known here{reason}" in planned.err
    assert any(f"model_type '{model_type}' is in no table{reason}" in finding for finding in json.loads(seen.out)["findings"])


def test_what_is_left_out_is_no_family() -> None:
    """A family that comes later is no longer among them, and every type that is exists."""
    transformers = pytest.importorskip("transformers")
    assert not left_out().keys() & {model_type for family in dense_families() for model_type in family.model_types}
    assert left_out().keys() <= set(transformers.CONFIG_MAPPING.keys())


# ---- spellings of one function -------------------------------------------------------------------------------------------------

SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gelu is tanh": ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
    "gelu beside its meaning": ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, {}),
    "a list and its interval": ("smollm3", {"no_rope_layers": [1, 0]}, {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    "a pattern and its layers": ("cohere2", {}, {"sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    "a key that nothing reads": ("starcoder2", {}, {"activation_function": "gelu", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}),
    "keys of the first code": ("hunyuan_v1_dense", {}, {"use_qk_norm": True, "attention_head_dim": 12, "norm_type": "rms", "use_cla": False}),
    "biases under both names": ("internlm3", {}, {"attention_bias": True, "mlp_bias": True}),
    "a scale that is the usual one": ("granite", {"attention_multiplier": 12**-0.5}, {"attention_multiplier": 12**-0.5, "head_dim": 12}),
    "the older name of a width": ("falcon", {}, {"hidden_size": ..., "n_embed": 32}),
    "an FFN of four times the width, and one that says so": ("falcon_grouped", {}, {"ffn_hidden_size": 128}),
    "one head for keys, said twice": ("falcon", {}, {"num_kv_heads": 71, "alibi": False}),
    "letters for windows": ("exaone4", {}, {"sliding_window_pattern": "LG", "layer_types": ["sliding_attention", "full_attention"]}),
    "no pattern beside no window": ("exaone4_full", {}, {"sliding_window_pattern": None}),
    "a pattern of nothing": ("exaone4_full", {}, {"sliding_window_pattern": 0}),
    "the common key of layers": ("exaone", {}, {"num_layers": ..., "num_hidden_layers": 2}),
    "an FFN of four times the width unsaid": ("exaone_tied", {}, {"intermediate_size": 128}),
    "no clip, said": ("olmo", {}, {"clip_qkv": None}), "the epsilon that stands in the code": ("olmo", {}, {"layer_norm_eps": 1e-5}),
    "an older word for full attention": ("granitemoehybrid", {}, {"layer_types": ["full_attention"] * 2}),
    "an older key for kinds of layers": ("granitemoehybrid", {}, {"layer_types": ..., "layers_block_type": ["attention"] * 2}),
    "alpha and the base that it makes": (
        "hunyuan_v1_dense", {}, {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4 * 1000.0 ** (12 / 10)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_two_spellings_are_one_model(case: str, tmp_path: Path) -> None:
    name, mine, theirs = SAME[case]
    write_sources(tmp_path, CONFIGS[name])
    for source in ("seed", "code", "law"):
        path = tmp_path / source / "config.json"
        stated = {**json.loads(path.read_text()), **(theirs if source == "law" else mine)}
        path.write_text(json.dumps({key: value for key, value in stated.items() if value is not ...}))
    assert [note for note in plan_file(write_recipe(tmp_path)).notes if "config.json" in note] == []


def test_factors_in_bams_words() -> None:
    granite = describe(load_architecture("granite"), CONFIGS["granite"], [])
    assert (granite["attention_scale"], granite["embedding_scale"], granite["residual_scale"], granite["logit_scale"]) == (
        0.2,
        3.0,
        0.5,
        0.25,
    )
    bare = describe(load_architecture("granite"), CONFIGS["granite_plain"], [])
    assert (bare["attention_scale"], bare["embedding_scale"], bare["residual_scale"], bare["logit_scale"]) == (1.0, None, None, None)


def test_inspect_shows_them(tmp_path: Path, run: Any) -> None:
    for name, words in {
        "granite": ("embeddings x 3", "residual branches x 0.5", "logits x 0.25", "scores x 0.2"), "gemma": ("norms of 1 + w", "embeddings x 5.657"),
        "olmo": ("norms without weights",), "olmo_clipped": ("q, k and v within 0.5",), "olmo2": ("q and k normed over all heads", "norms after attention and FFN"),
        "granitemoehybrid_nope": ("in 0 of 2 layers",), "falcon": ("4 heads of 8, 1 for keys and values", "parallel, 1 norm"),
        "smollm3": ("rotary, theta 2,000,000 in 1 of 2 layers",), "cohere2": ("in 1 of 2 layers", "window 8"),
    }.items():  # fmt: skip
        write_sources(tmp_path / name, CONFIGS[name], ("seed",))
        text = " ".join(run("inspect", tmp_path / name / "seed").out.split())
        assert all(word in text for word in words), (text, words)
    facts = json.loads(run("inspect", tmp_path / "granite" / "seed", "--json").out)["facts"]
    assert (facts["attention_scale"], facts["residual_scale"]) == (0.2, 0.5)
    assert "norm_offset" not in facts
