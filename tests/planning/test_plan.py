"""Plans: golden text, golden numbers of the paper, totality."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Read
from bam_merge.demo.synthetic import write_checkpoint
from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan


def tables(plan: Plan) -> dict[str, str]:
    return {step.name: step.expression for step in plan.steps}


GOLDEN_BAM = """\
model.embed_tokens.weight                               f32 [64, 32]  mean(seed, code, law)
model.layers.{0-1}.input_layernorm.weight               f32 [32]      mean(seed, code, law)
model.layers.{0-1}.post_attention_layernorm.weight      f32 [32]      mean(seed, code, law)
model.layers.{0-1}.self_attn.router.weight              f32 [3, 32]   normal(std=0.02)
model.layers.{0-1}.self_attn.experts.{0-2}.q_proj.weight f32 [32, 32]  {seed,code,law}:model.layers.{layer}.self_attn.q_proj.weight
model.layers.{0-1}.self_attn.experts.{0-2}.k_proj.weight f32 [16, 32]  {seed,code,law}:model.layers.{layer}.self_attn.k_proj.weight
model.layers.{0-1}.self_attn.experts.{0-2}.v_proj.weight f32 [16, 32]  {seed,code,law}:model.layers.{layer}.self_attn.v_proj.weight
model.layers.{0-1}.self_attn.experts.{0-2}.o_proj.weight f32 [32, 32]  {seed,code,law}:model.layers.{layer}.self_attn.o_proj.weight
model.layers.{0-1}.mlp.router.weight                    f32 [3, 32]   normal(std=0.02)
model.layers.{0-1}.mlp.experts.{0-2}.gate_proj.weight   f32 [40, 32]  {seed,code,law}:model.layers.{layer}.mlp.gate_proj.weight
model.layers.{0-1}.mlp.experts.{0-2}.up_proj.weight     f32 [40, 32]  {seed,code,law}:model.layers.{layer}.mlp.up_proj.weight
model.layers.{0-1}.mlp.experts.{0-2}.down_proj.weight   f32 [32, 40]  {seed,code,law}:model.layers.{layer}.mlp.down_proj.weight
model.norm.weight                                       f32 [32]      mean(seed, code, law)
lm_head.weight                                          f32 [64, 32]  mean(seed, code, law)
"""


def folded(text: str) -> list[list[str]]:
    """The lines of a plan with their columns' padding ignored."""
    return [line.split() for line in text.split("\n\n")[0].splitlines()]


def test_plan_text_of_expert_kv(llamas: Path, run: Any) -> None:
    result = run("plan", write_recipe(llamas))
    assert result.status == 0, result.err
    assert folded(result.out) == folded(GOLDEN_BAM)
    assert not (llamas / "out").exists()


def test_plan_lines_read_like_sentences(llamas: Path, run: Any) -> None:
    rules = """
rules:
  - {roles: [norm.*], make: copy, from: code}
  - {roles: [embed, head], make: linear, weights: {seed: 0.5, code: 0.25, law: 0.25}}
  - {roles: [attn.k, attn.v], layers: 1, make: ties, base: seed, density: 0.5}
  - {roles: [router.attn], layers: "0", make: orthogonal}"""
    lines = tables(plan_file(write_recipe(llamas, rules)))
    assert lines["model.norm.weight"] == "code:model.norm.weight"
    assert lines["lm_head.weight"] == "linear(seed, code, law; weights=0.5/0.25/0.25)"
    assert lines["model.layers.1.self_attn.k_proj.weight"] == "ties(code, law; base=seed, density=0.5)"
    assert lines["model.layers.0.self_attn.experts.2.k_proj.weight"] == "law:model.layers.0.self_attn.k_proj.weight"
    assert lines["model.layers.0.self_attn.router.weight"] == "orthogonal"
    assert lines["model.layers.1.self_attn.router.weight"] == "normal(std=0.02)"


def test_shared_kv_and_mixed_kv_in_the_config(llamas: Path) -> None:
    shared = plan_file(write_recipe(llamas, "attention: {kv: shared}"))
    assert shared.config["attention_kv"] == "shared"
    assert (shared.config["num_attention_heads"], shared.config["num_key_value_heads"], shared.config["head_dim"]) == (12, 2, 8)
    assert tables(shared)["model.layers.0.self_attn.k_proj.weight"] == "mean(seed, code, law)"
    mixed = plan_file(write_recipe(llamas, 'rules: [{roles: [attn.k, attn.v], layers: "1-", make: mean}]'))
    assert (mixed.config["attention_kv"], mixed.config["shared_kv_layers"]) == ("expert", [1])
    assert mixed.config["num_key_value_heads"] == 6


def test_top_k_attention_is_recorded(llamas: Path) -> None:
    config = plan_file(write_recipe(llamas, "attention: {routing: top_k, top_k: 2}\nffn: {gate_scale: 3}")).config
    assert (config["attention_routing"], config["num_attention_experts_per_tok"]) == ("top_k", 2)
    assert (config["num_experts_per_tok"], config["norm_topk_prob"], config["gate_scale"]) == (1, False, 3.0)


def test_config_keeps_the_family_and_copies_nothing_that_loads_code(tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], "auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "x", "trust_remote_code": True}
    write_sources(tmp_path, config)
    made = plan_file(write_recipe(tmp_path)).config
    assert made["model_type"] == "bam"
    assert (made["base_model_type"], made["rms_norm_eps"], made["norm_type"]) == ("llama", 1e-5, "rms_norm")
    assert set(made["auto_map"].values()) == {"configuration_bam.BamConfig", "modeling_bam.BamModel", "modeling_bam.BamForCausalLM"}
    assert not {"_attn_implementation", "trust_remote_code"} & set(made)
    public = plan_file(write_recipe(tmp_path, method="btx", output="{path: out, layout: mixtral}")).config
    assert not {"auto_map", "_attn_implementation", "trust_remote_code"} & set(public)


# ---- the paper's 590M shapes (Table 9)

PAPER = {
    "model_type": "cohere", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 256000, "tie_word_embeddings": False, "use_qk_norm": False,
}  # fmt: skip
FOUR = ("seed", "code", "law", "math")


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints of the paper's shapes, their data holes in the files."""
    folder = tmp_path_factory.mktemp("paper")
    for name in FOUR:
        write_checkpoint(folder / name, PAPER, lambda name, shape: None, "BF16")
    return folder


@pytest.mark.parametrize(("method", "sections", "total", "active"), [
    ("bam", "attention: {kv: expert}", 776_002_560, 662_756_352),
    ("bam", "attention: {kv: shared}", 738_253_824, 625_007_616),
    ("btx", "ffn: {top_k: 1}", 700_480_512, 587_234_304),
])  # fmt: skip
def test_golden_parameters(paper: Path, run: Any, method: str, sections: str, total: int, active: int) -> None:
    result = run("plan", write_recipe(paper, sections, method, FOUR), "--json")
    assert result.status == 0, result.err
    document = json.loads(result.out)
    assert document["parameters"] == {"total": total, "active": active}
    assert document["bytes"]["write"] == sum(shard["bytes"] for shard in document["shards"])
    assert document["bytes"]["write"] - 2 * total < 100_000  # the rest is headers


def test_golden_dense_parameters(paper: Path) -> None:
    plan = plan_file(write_recipe(paper, method="merge", names=FOUR))
    assert plan.parameters == plan.active_parameters == 587_209_728


# ---- totality


@pytest.mark.parametrize("method", ["bam", "btx", "merge"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_output_once_and_every_source_tensor_accounted_for(name: str, method: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[name])
    plan = plan_file(write_recipe(tmp_path, method=method))
    names = Counter(step.name for step in plan.steps)
    assert set(names.values()) == {1}
    used = {(read.source, read.tensor) for step in plan.steps for read in expressions.reads(step.expr)}
    for source, model in plan.models.items():
        accounted = {tensor for name, tensor in used if name == source} | set(plan.unused[source])
        assert accounted == set(model.checkpoint.tensors)
        assert not [tensor for tensor in plan.unused[source] if not tensor.endswith(DECAYS)]
    for shard in plan.shards:
        spans = sorted((s.offset, s.offset + s.nbytes) for s in plan.steps if s.file == shard.file)
        assert spans[0][0] == len(shard.header)
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert spans[-1][1] == shard.nbytes


DECAYS = ("linear_attn.A_log", "linear_attn.dt_bias")
"""What of linear attention is not averaged."""


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_merge_of_a_fused_family_keeps_its_tensors(name: str, tmp_path: Path) -> None:
    """Element-wise merges see whole stored tensors again: no slice is left in the plan."""
    write_sources(tmp_path, CONFIGS[name])
    plan = plan_file(write_recipe(tmp_path, method="merge"))
    assert {step.name for step in plan.steps} == set(plan.models["seed"].checkpoint.tensors)
    assert {step.expression for step in plan.steps if not step.name.endswith(DECAYS)} == {"mean(seed, code, law)"}
    assert all(step.expression == f"seed:{step.name}" for step in plan.steps if step.name.endswith(DECAYS))


def test_what_a_rule_leaves_out_is_listed(llamas: Path, run: Any) -> None:
    path = write_recipe(llamas, "rules: [{roles: [norm.final], make: copy, from: seed}]")
    plan = plan_file(path)
    assert plan.unused["code"] == {"model.norm.weight": "rules[0] makes norm.final without code"}
    assert plan.unused["seed"] == {}
    assert "not read     code: 1 tensor (model.norm.weight): rules[0] makes norm.final without code" in run("plan", path).out


def test_mean_counts_each_source_once(llamas: Path) -> None:
    plan = plan_file(write_recipe(llamas, "experts: [seed, code, law, seed, seed]", "btx"))
    assert tables(plan)["model.norm.weight"] == "mean(seed, code, law)"
    assert tables(plan)["model.layers.0.mlp.experts.4.up_proj.weight"] == "seed:model.layers.0.mlp.up_proj.weight"


def test_sparse_upcycling_copies(llamas: Path) -> None:
    plan = plan_file(write_recipe(llamas, "experts: [seed, seed]", "sparse_upcycling", ("seed",)))
    assert {type(step.expr) for step in plan.steps} == {Read, expressions.Init}
    assert plan.config["num_attention_experts"] == 0


def test_two_norms_of_the_parallel_block_survive(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gpt_neox"])
    plan = plan_file(write_recipe(tmp_path))
    assert (plan.config["parallel_block"], plan.config["parallel_norms"]) == (True, 2)
    assert tables(plan)["model.layers.0.post_attention_layernorm.bias"].startswith("mean(seed, code, law)")
    q = tables(plan)["model.layers.0.self_attn.experts.1.q_proj.weight"]
    assert q == "code:gpt_neox.layers.0.attention.query_key_value.weight[4 x 0:8 of 24]"


def test_both_spellings_of_neox_heads_and_the_buffers_of_old_files(tmp_path: Path) -> None:
    """lm_head.weight instead of embed_out.weight in one source; buffers that old files hold are dropped aloud."""
    write_sources(tmp_path, CONFIGS["gpt_neox"], ("seed", "code"))
    write_sources(tmp_path, CONFIGS["gpt_neox"], ("law",), spelling=1)
    tensors = load_file(tmp_path / "code" / "model.safetensors")
    buffers = {f"gpt_neox.layers.0.attention.{name}": torch.zeros(1) for name in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    save_file({**tensors, **buffers}, tmp_path / "code" / "model.safetensors")
    plan = plan_file(write_recipe(tmp_path, method="merge"))
    assert tables(plan)["embed_out.weight"] == "mean(seed, code, law): seed:embed_out.weight, code:embed_out.weight, law:lm_head.weight"
    assert plan.unused["code"] == dict.fromkeys(buffers, "a buffer that loading recomputes")
    assert plan_file(write_recipe(tmp_path)).steps[-1].name == "lm_head.weight"


# ---- shards and dtypes


def test_shards_are_limited_and_larger_tensors_stand_alone(llamas: Path) -> None:
    plan = plan_file(write_recipe(llamas, output="{path: out, max_shard_size: 20kB}"))
    assert len(plan.shards) > 5
    for shard in plan.shards:
        inside = [step for step in plan.steps if step.file == shard.file]
        assert sum(step.nbytes for step in inside) <= 20_000 or len(inside) == 1
    assert plan.shards[0].file == f"model-00001-of-{len(plan.shards):05d}.safetensors"


def test_dtype_is_converted_only_when_asked(llamas: Path) -> None:
    assert {step.dtype for step in plan_file(write_recipe(llamas)).steps} == {"F32"}
    plan = plan_file(write_recipe(llamas, output="{path: out, dtype: bfloat16}"))
    assert {step.dtype for step in plan.steps} == {"BF16"}
    assert plan.config["dtype"] == "bfloat16"
    assert tables(plan)["model.norm.weight"] == "mean(seed, code, law) as BF16"


def test_sources_of_different_dtypes(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "code"))
    write_sources(tmp_path, CONFIGS["llama"], ("law",), "BF16")
    with pytest.raises(
        BamMergeError, match=r"output\.dtype: source keeps what is stored, but the sources disagree: seed:.* is F32; law:.* is BF16"
    ):
        plan_file(write_recipe(tmp_path))
    assert {step.dtype for step in plan_file(write_recipe(tmp_path, output="{path: out, dtype: float32}")).steps} == {"F32"}


# ---- the planning half stays light


def test_planning_imports_neither_torch_nor_numpy(llamas: Path) -> None:
    recipe = write_recipe(llamas)
    code = (
        f"import sys; sys.argv = ['bam-merge', 'plan', {str(recipe)!r}]\n"
        "from bam_merge.cli import main\nmain()\n"
        "print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(("role", "advice"), [("norm.attn", "Use make: mean."), ("embed", "Use make: mean.")])
def test_no_advice_to_use_the_layout_that_is_used(role: str, advice: str, llamas: Path) -> None:
    with pytest.raises(BamMergeError) as error:
        plan_file(write_recipe(llamas, f"rules: [{{roles: [{role}], make: expert}}]"))
    assert [problem.split("stores it shared. ")[1] for problem in error.value.problems] == [advice]


def test_a_layout_of_any_length_is_named_in_few_words(llamas: Path) -> None:
    recipe = write_recipe(llamas, output="{path: out, layout: " + "x" * 20_000 + "}")
    with pytest.raises(BamMergeError, match=r"output.layout: 'xxx.* is no layout") as error:
        plan_file(recipe)
    assert len(str(error.value)) < 1000
