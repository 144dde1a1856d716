"""Hybrids: gated delta nets among layers of attention. Against transformers, in float64 too; as experts; what a recipe and a file say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, DELTA, FULL, LINEAR, SOURCES, write_recipe, write_sources
from damage import edit_config
from proofs import UNPROVED, Forger, failed
from scenes import recipe, router, write_scene
from test_exported import assert_equals_reference, assert_same_tensors, exact, load
from test_model import build, distance, ids, stepwise, theirs, write_dense, write_three
from toys import as_toy, toy_family

from bam_merge.architectures.config import describe
from bam_merge.architectures.tables import load_architecture
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.inspecting.inspection import inspect
from bam_merge.model.loading import load_model
from bam_merge.model.model_config import ModelConfig
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.sources import dense
from bam_merge.verifying.verification import verify

__all__ = ["toy_family"]

HYBRID = CONFIGS["qwen3_5_text"]
SMALL_EPS = {**HYBRID, "rms_norm_eps": 1e-6, "num_hidden_layers": 4, "layer_types": [LINEAR, LINEAR, FULL, LINEAR]}


def in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' delta rule, norms and rotary embedding, which cast to float32, cast to float64."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    rotary = model.model.rotary_emb
    pairs = torch.arange(0, 2 * len(rotary.inv_freq), 2, dtype=torch.float64) / (2 * len(rotary.inv_freq))
    rotary.inv_freq = 1 / rotary.config.rope_parameters["rope_theta"] ** pairs  # which it has worked out in float32
    wide = SimpleNamespace(**{**vars(torch), "float32": torch.float64, "float": torch.float64})
    monkeypatch.setattr(modeling_qwen3_5, "torch", wide)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 40, 150])
def test_the_recurrence_is_transformers_chunks_in_float64(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokens = write_dense(tmp_path / "dense", {**SMALL_EPS, "max_position_embeddings": 256}), ids(length)
    model = theirs(folder).double()
    in_float64(model, monkeypatch)
    expected = model(input_ids=tokens).logits
    assert expected.dtype == torch.float64
    assert float(expected.std()) > 0.1
    assert distance(load_model(folder, torch.float64)(tokens), expected) < 1e-12


@torch.no_grad()
def test_states_and_padding_are_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at a time after a prompt, which the convolutions see less of than they can; and padded on the left."""
    folder, tokens = write_dense(tmp_path / "dense", SMALL_EPS), ids(12)
    model, own = theirs(folder).double(), load_model(folder, torch.float64)
    in_float64(model, monkeypatch)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    expected = model(input_ids=tokens, attention_mask=mask).logits
    assert distance(own(tokens, attention_mask_BT=mask)[mask.bool()], expected[mask.bool()]) < 1e-12
    assert distance(own(tokens, attention_mask_BT=mask)[:1, 5:], own(tokens[:1, 5:])) < 1e-12
    for prompt in (1, 2, 7):
        assert distance(stepwise(own, tokens, prompt), model(input_ids=tokens).logits) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("linear", ["expert", "mean", "code"])
def test_equal_experts_are_the_dense_model_and_a_forced_one_its_own(linear: str, tmp_path: Path) -> None:
    for source in SOURCES:
        write_dense(tmp_path / source, SMALL_EPS)
    sections = f"attention: {{linear: {linear}}}\nffn: {{top_k: 2, gate: topk_then_softmax}}"
    two = ("seed", "code")  # of two equal numbers the mean is exactly the number
    folder, own = build(tmp_path, sections, names=two), load_model(tmp_path / "seed", torch.float64)
    expected = own(ids(150))
    assert distance(load_model(folder, torch.float64)(ids(150)), expected) < 1e-12
    assert distance(exact(load(folder))(ids(150)).logits, expected) < 1e-12
    shutil.rmtree(folder)
    for seed, source in enumerate(SOURCES):
        write_dense(tmp_path / source, SMALL_EPS, seed)
    copied = "rules: [{roles: [embed, head, norm.*], make: copy, from: law}]"
    mixture = load_model(build(tmp_path, f"{copied}\nattention: {{linear: {'law' if linear == 'code' else linear}}}"), torch.float64)
    law = load_model(tmp_path / "law", torch.float64)(ids())
    far = distance(mixture(ids(), force_expert=2), law)
    assert far < 1e-12 if linear != "mean" else far > 0.01
    assert distance(mixture(ids(), force_expert=1), law) > 0.01


@pytest.mark.parametrize("sections", ["", "attention: {kv: shared}", "attention: {routing: top_k, top_k: 2}", "attention: {linear: mean}"])
def test_chunks_of_all_experts_are_the_recurrence_of_each(sections: str, tmp_path: Path) -> None:
    """Over more than two chunks; and what is saved is what was loaded, with a router in every layer that has experts."""
    write_three(tmp_path, HYBRID)
    folder = build(tmp_path, sections)
    assert_equals_reference(folder, ids(150))
    load(folder).save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")


def test_what_the_plan_makes_of_linear_attention(tmp_path: Path) -> None:
    write_sources(tmp_path, HYBRID)
    decay, value = "model.layers.1.linear_attn.A_log", "model.layers.1.linear_attn.in_proj_qkv.weight"

    def expressions(sections: str, method: str = "bam") -> dict[str, str]:
        plan = plan_file(write_recipe(tmp_path, sections, method))
        return {step.name.removeprefix("model.layers.1."): str(step.expr) for step in plan.steps if step.layer == 1}

    found = expressions("")
    assert found["self_attn.experts.2.A_log"] == f"law:{decay}"
    assert found["self_attn.experts.2.in_proj_k.weight"] == f"law:{value}[12:24]"
    assert "self_attn.router.weight" in found
    found = expressions("attention: {linear: mean}")
    assert found["self_attn.A_log"] == f"seed:{decay}"
    assert found["self_attn.in_proj_k.weight"] == f"mean(seed, code, law): {value}[12:24]"
    assert "self_attn.router.weight" not in found
    assert expressions("attention: {linear: code}")["self_attn.A_log"] == f"code:{decay}"
    assert expressions("", "btx")["self_attn.A_log"] == f"seed:{decay}"
    assert expressions("", "merge")["linear_attn.A_log"] == f"seed:{decay}"
    assert expressions("shared: {make: copy, from: law}", "merge")["linear_attn.A_log"] == f"law:{decay}"
    assert expressions("shared: {make: task_arithmetic, base: code}", "merge")["linear_attn.dt_bias"].startswith("code:")
    asked = "rules: [{roles: [linear.A_log], make: mean}]"
    assert expressions(asked, "merge")["linear_attn.A_log"] == f"mean(seed, code, law): {decay}"


@pytest.mark.parametrize(("family", "sections", "message"), [
    ("qwen3_5_text", "attention: {linear: exprt}", "attention.linear: 'exprt' is neither expert nor mean nor among the sources; did you mean 'expert'?"),
    ("llama", "attention: {linear: expert}", "attention.linear: no layer of these sources has linear attention. Remove this key."),
    ("qwen3_5_text", "rules: [{roles: [linear.norm], make: mean}]", "and 9 more per expert, linear.norm shared; an expert of linear attention is all of them. Give linear.* one rule."),
    ("qwen3_5_text", "rules: [{roles: ['attn.*'], make: mean}]", "linear.* is per expert, attn.* shared. Make attn.* expert too, or linear.* shared."),
    ("qwen3_5_text", "rules: [{roles: [linear.A_lgo], make: mean}]", "'linear.A_lgo' is no role"),
    ("qwen3_5_text", "output: {path: out, layout: mixtral}", "layout"),
])  # fmt: skip
def test_what_does_not_fit_is_said(family: str, sections: str, message: str, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS[family])
    layout = sections if sections.startswith("output") else ""
    recipe = write_recipe(
        tmp_path, "" if layout else sections, **({"method": "btx", "output": "{path: out, layout: mixtral}"} if layout else {})
    )
    result = run("plan", recipe)
    assert result.status == 2
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("keys", "message"), [
    ({"linear_num_key_heads": 3}, "linear_num_value_heads 4 is not a multiple of linear_num_key_heads 3."),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim must be a positive integer, found 0."),
    ({"linear_key_head_dim": "6"}, "linear_key_head_dim must be a positive integer, found '6'."),
    ({"full_attention_interval": 2}, "full_attention_interval = 2 says that one of every 2 layers has full attention, layer_types otherwise"),
    ({"full_attention_interval": 0}, "full_attention_interval must be a positive integer, found 0."),
    ({"layer_types": [LINEAR, FULL]}, "model.layers.0.self_attn.q_proj.weight is present, but config.json has linear_attention in layer 0"),
    ({"layer_types": [FULL, "sliding_attention"]}, "layer_types names 'sliding_attention'; qwen3_5_text merges here only where"),
])  # fmt: skip
def test_a_config_that_is_wrong_is_refused(keys: dict[str, Any], message: str, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, HYBRID)
    for source in SOURCES:
        edit_config(tmp_path / source, **keys)
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert "Traceback" not in result.err
    assert message in result.err
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "law")


def test_a_model_without_attention_is_refused(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, {**HYBRID, "layer_types": [LINEAR, LINEAR]})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert "sources.seed: config.json: layer_types has no layer with attention; transformers counts a text's tokens by those" in result.err


def test_other_families_have_no_linear_attention(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, {**CONFIGS["qwen2"], "layer_types": [FULL, LINEAR]})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert "layer_types names 'linear_attention', which is not known here. Known: full_attention, sliding_attention." in result.err


@pytest.mark.parametrize(
    "keys", [{}, {"full_attention_interval": 2}, {"layer_types": None, "full_attention_interval": 3}, {"layer_types": None}]
)
def test_which_layers_are_linear_is_what_transformers_says(keys: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in HYBRID.items() if key != "layer_types"} | {"num_hidden_layers": 7} | keys
    expected = transformers.AutoConfig.for_model("qwen3_5_text", **{k: v for k, v in config.items() if k != "model_type"})
    facts = describe(load_architecture("qwen3_5_text"), config, [])
    assert facts["layer_types"] == expected.layer_types
    assert facts["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_key_heads_that_are_misread_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads of six channels, or four of three: no shape shows it."""
    write_sources(tmp_path, HYBRID)
    right = describe
    monkeypatch.setattr(dense, "describe", lambda *args: {**right(*args), "linear_num_key_heads": 4, "linear_key_head_dim": 3})
    plan = plan_file(write_recipe(tmp_path))
    assert "sizes of linear attention" in failed(verify(publish(plan, None, UNPROVED), plan))["source configs"]


@pytest.mark.parametrize(("changes", "check"), [
    ({"linear_num_key_heads": 4, "linear_key_head_dim": 3}, "config"),
    ({"attention_linear": "shared"}, "config"),
    ({"attention_gate": False}, "config"),
    ({"linear_conv_kernel_dim": None}, "config"),
    ({"layer_types": [FULL, FULL]}, "config"),
])  # fmt: skip
def test_a_result_whose_config_says_otherwise_is_found(changes: dict[str, Any], check: str, tmp_path: Path) -> None:
    write_sources(tmp_path, HYBRID)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    assert verify(folder, plan).ok
    Forger(folder).config(**changes)
    assert check in failed(verify(folder, plan))


def test_every_part_of_a_reference_block_is_what_a_config_says() -> None:
    config = ModelConfig.from_dict({**DELTA, "layer_types": [FULL, LINEAR], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads_per_expert": 2, "num_key_value_heads_per_expert": 1, "head_dim": 4})  # fmt: skip
    assert [config.is_linear(layer) for layer in range(2)] == [False, True]
    assert config.linear_sizes == (2, 4, 6, 10, 4)


def test_what_it_costs(tmp_path: Path) -> None:
    """By hand: a state of 4 x 6 x 10 numbers, and 64 channels of which 4 tokens are seen, both of 4 bytes; keys and values of one layer."""
    write_sources(tmp_path, HYBRID)
    document = inspect(tmp_path / "seed").document()
    assert document["state_bytes_per_sequence"] == 4 * (4 * 6 * 10 + 64 * 4)
    assert document["kv_cache_bytes_per_token"] == 4 * 2 * 2 * 16
    flops = document["flops_per_token"]["by_layer"][1]
    assert flops["scores"] == 6 * 4 * 6 * 10
    assert flops["output"] == 2 * 40 * 32
    assert flops["qkv"] == 2 * 32 * (64 + 40 + 4 + 4) + 2 * 64 * 4
    folder = publish(plan_file(write_recipe(tmp_path)), None, UNPROVED)
    assert inspect(folder).document()["state_bytes_per_sequence"] == 3 * document["state_bytes_per_sequence"]
    assert inspect(folder).document()["missing"] == []


def test_layers_behind_one_another_keep_their_kinds(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, SMALL_EPS)
    stack = "{path: out, layers: [{from: seed, layers: 0-2}, {from: law, layers: 0-3}]}"
    write_recipe(tmp_path, method="merge", output=stack, names=("seed", "law"))
    result = run("merge", tmp_path / "recipe.yaml")
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [LINEAR, LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR]


def test_dtypes_that_differ_are_kept(tmp_path: Path) -> None:
    """A_log in float32 beside bfloat16, as files of such models have it."""
    from safetensors.torch import load_file, save_file

    write_sources(tmp_path, HYBRID, dtype="BF16")
    for source in SOURCES:
        file = tmp_path / source / "model.safetensors"
        tensors = {name: value.float() if name.endswith(("A_log", "norm.weight")) else value for name, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    folder = publish(plan_file(write_recipe(tmp_path)), None, UNPROVED)
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.1.self_attn.experts.0.A_log"].dtype == torch.float32
    assert stored["model.layers.1.self_attn.experts.0.in_proj_a.weight"].dtype == torch.bfloat16
    assert failed(verify(folder)) == {}
    try:
        plan_file(write_recipe(tmp_path, "attention: {linear: mean}"))
    except BamMergeError as error:  # pragma: no cover
        raise AssertionError(error) from error


NEXT = as_toy(
    "qwen3_5_text", "nexter",
    ('{ roles = ["linear.q", "linear.k", "linear.v"], name = "model.layers.{layer}.linear_attn.in_proj_qkv.weight", shape = ["2*Hk*Dk+Hv*Dv", "d"], parts = ["Hk*Dk", "Hk*Dk", "Hv*Dv"]',
     '{ roles = ["linear.q", "linear.k", "linear.v", "linear.z"], name = "model.layers.{layer}.linear_attn.in_proj_qkvz.weight", shape = ["2*Hk*Dk+2*Hv*Dv", "d"], groups = "Hk", parts = ["Dk", "Dk", "Hv/Hk*Dv", "Hv/Hk*Dv"]'),
    ('    { role = "linear.z", name = "model.layers.{layer}.linear_attn.in_proj_z.weight", shape = ["Hv*Dv", "d"], kinds = ["linear_attention"] },\n', ""),
    ('{ role = "linear.b", name = "model.layers.{layer}.linear_attn.in_proj_b.weight", shape = ["Hv", "d"]',
     '{ roles = ["linear.b", "linear.a"], name = "model.layers.{layer}.linear_attn.in_proj_ba.weight", shape = ["2*Hv", "d"], groups = "Hk", parts = ["Hv/Hk", "Hv/Hk"]'),
    ('    { role = "linear.a", name = "model.layers.{layer}.linear_attn.in_proj_a.weight", shape = ["Hv", "d"], kinds = ["linear_attention"] },\n', ""),
)  # fmt: skip
"""Qwen3-Next with an FFN in every layer: q, k, v and z of a key head after one another, in one tensor, and b and a so in another."""


@torch.no_grad()
def test_another_hybrid_is_a_table(tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    """Read from files of transformers' Qwen3-Next, merged to what its class loads again, and as a mixture proved and exported."""
    transformers = pytest.importorskip("transformers")
    toy_family(NEXT)
    settings = {key: value for key, value in HYBRID.items() if key != "model_type"} | {"mlp_only_layers": [0, 1], "initializer_range": 0.2}
    models = []
    for seed, source in enumerate(SOURCES):
        torch.manual_seed(seed)
        models.append(transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**json.loads(json.dumps(settings)))).eval())
        models[-1].save_pretrained(tmp_path / source)
        config = {**HYBRID, "model_type": "nexter", "tie_word_embeddings": False}
        (tmp_path / source / "config.json").write_text(json.dumps(config))
        assert distance(load_model(tmp_path / source)(ids()), models[-1](input_ids=ids()).logits) < 1e-5
    assert failed(verify(publish(plan_file(write_recipe(tmp_path)), None, UNPROVED))) == {}
    assert_equals_reference(tmp_path / "out", ids())
    folder = publish(plan_file(write_recipe(tmp_path, method="merge", output="{path: dense}")), None, UNPROVED)
    config = {**json.loads((tmp_path / "seed" / "config.json").read_text()), **settings, "model_type": "qwen3_next"}
    expected = load_model(folder)(ids())
    (folder / "config.json").write_text(json.dumps(config))
    again, info = transformers.Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert distance(again.eval()(input_ids=ids()).logits, expected) < 1e-5


@pytest.mark.parametrize("inputs", ["seed", "mixture"])
def test_routers_of_hybrids_are_made_of_texts(inputs: str, tmp_path: Path) -> None:
    """What a router of linear attention sees is what its norm gives, as in the other layers; verification works the routers out again."""
    write_scene(tmp_path, HYBRID)
    plan = plan_file(recipe(tmp_path, router(inputs=inputs)))
    folder = publish(plan, None, UNPROVED)
    assert failed(verify(folder, plan)) == {}
    forger, name = Forger(folder), "model.layers.1.self_attn.router.weight"
    assert float(forger.read(name).std()) > 0
    forger.write(name, forger.read(name).flip(0))
    assert failed(verify(folder, plan))


def test_a_new_model_forgets_at_rates_of_many_sizes(tmp_path: Path) -> None:
    """As transformers begins such models, whether the layer has experts or not."""
    transformers = pytest.importorskip("transformers")
    write_sources(tmp_path, HYBRID)
    for sections in ("", "attention: {linear: mean}"):
        folder = publish(plan_file(write_recipe(tmp_path, sections, output=f"{{path: out{len(sections)}}}")), None, UNPROVED)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        layer = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).model.layers[1].self_attn
        own = layer.experts if layer.mixed else layer
        assert layer.mixed == (sections == "")
        assert float(own.A_log.detach().std()) > 0.1
        assert bool((own.dt_bias == 1).all())
        assert bool((own.norm.weight == 1).all())
