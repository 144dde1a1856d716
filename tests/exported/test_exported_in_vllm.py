"""What vLLM's Transformers backend does with the model code, without vLLM: its attention by that name, its calls, its placeholders.

tests/serving runs vLLM itself.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from safetensors.torch import load_file
from test_exported import KINDS, load
from test_model import build, distance, ids, write_three
from torch import Tensor, nn

from bam_merge.exported.configuration_bam import BamConfig
from bam_merge.exported.modeling_bam import BamAttention, BamAttentionExperts, BamDecoderLayer, BamForCausalLM, BamModel
from bam_merge.planning.make import plan_file

transformers = pytest.importorskip("transformers")

BIASED = {**CONFIGS["qwen3_biased"], "attention_bias": True}
SHAPES: list[list[int]] = []
"""Of the keys that the attention of `engine` was given."""


class PPMissingLayer(nn.Identity):
    """vLLM's placeholder, by its name: it gives its first argument back."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The attention that vLLM registers, of one sequence: causal, with as many k/v heads as there are."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        SHAPES.append(list(key.shape))
        heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return heads.transpose(1, 2).flatten(-2), None

    SHAPES.clear()
    ALL_ATTENTION_FUNCTIONS.register("vllm", attend)
    yield
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("vllm", None)


def config_of(folder: Path, **changes: Any) -> BamConfig:
    config = BamConfig(**{**json.loads((folder / "config.json").read_text()), **changes})
    config._attn_implementation = "vllm"
    return config


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def served(folder: Path) -> BamForCausalLM:
    """The model as vLLM makes it: built under its attention, experts of attention by load_weights, all else by name."""
    config, tensors = config_of(folder), weights(folder)
    model, reference = BamForCausalLM(config), load(folder).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.full_like(parameter, torch.nan) if ".self_attn.experts." in name else reference[name])
    for name, module in model.named_modules():
        if isinstance(module, BamAttentionExperts):
            given = [(key.removeprefix(f"{name}."), tensor) for key, tensor in tensors.items() if key.startswith(f"{name}.")]
            first, rest = given[: len(given) // 2], given[len(given) // 2 :]
            assert module.load_weights(iter(first)) < {key for key, _ in module.named_parameters()}
            assert module.load_weights(iter(rest)) == {key for key, _ in module.named_parameters()}
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen3_biased", "cohere_qk_norm", "glm4", "olmo2", "seed_oss", "granite", "gemma2"])
@torch.no_grad()
def test_what_vllm_loads_is_what_transformers_does(name: str, kind: str, tmp_path: Path) -> None:
    method, text = KINDS[kind]
    config = {**CONFIGS[name], "attn_logit_softcapping": None} if name == "gemma2" else CONFIGS[name]  # which torch's function lacks
    silu = {"hidden_activation": "silu", "hidden_act": "silu", "sliding_window": 64} if name == "gemma2" else {}
    out_bias = {"attention_out_bias": True, "attention_bias": True} if name == "seed_oss" else {}
    write_three(tmp_path, {**config, **silu, **out_bias})
    folder = build(tmp_path, text, method)
    tokens = ids(batch=1)
    expected, model = load(folder)(tokens).logits, served(folder)
    assert distance(model(tokens, use_cache=False).logits, expected) < 1e-5
    assert len({tuple(shape) for shape in SHAPES}) == 1  # caches of one shape
    assert SHAPES[0][1] == model.config.num_key_value_heads


def experts(folder: Path, layer: int = 0, **changes: Any) -> tuple[BamAttentionExperts, dict[str, Tensor]]:
    """Empty attention experts of a layer, and what the folder has for them."""
    module, prefix = BamAttention(config_of(folder, **changes), layer).experts, f"model.layers.{layer}.self_attn.experts."
    return module, {name.removeprefix(prefix): tensor for name, tensor in weights(folder).items() if name.startswith(prefix)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Expert-KV of three models with biases and norms of each head."""
    write_three(tmp_path, BIASED)
    return build(tmp_path, "")


def test_under_tensor_parallelism_each_process_takes_its_heads(folder: Path) -> None:
    """The halves of two processes are the whole, cut between the k/v heads of an expert."""
    whole, given = experts(folder)
    whole.load_weights(given.items())
    halves = []
    for rank in (0, 1):
        half, _ = experts(folder)
        for name, linear in half.named_children():
            if isinstance(linear, nn.Linear) and name != "o_proj_bias":
                linear.weight.data = linear.weight.data.chunk(2, 1 if name == "o_proj" else 0)[0].clone()
                if linear.bias is not None:
                    linear.bias.data = linear.bias.data.chunk(2)[0].clone()
                linear.tp_rank, linear.tp_size = rank, 2
        half.load_weights(given.items())
        halves.append(dict(half.named_parameters()))
    for name, parameter in whole.named_parameters():
        parts = [half[name] for half in halves]
        same = name.partition(".")[0] in ("q_norm", "k_norm", "o_proj_bias")
        assert torch.equal(parts[0] if same else torch.cat(parts, 1 if name == "o_proj.weight" else 0), parameter), name


@pytest.mark.parametrize(("change", "problem"), [
    (lambda module, given: given.update({"0.up_proj.weight": torch.zeros(2, 2)}), r"experts\.0\.up_proj\.weight is no tensor of the 3"),
    (lambda module, given: given.update({"3.q_proj.weight": torch.zeros(48, 32)}), r"experts\.3\.q_proj\.weight is no tensor of the 3"),
    (lambda module, given: given.update({"x.q_proj.weight": torch.zeros(48, 32)}), r"experts\.x\.q_proj\.weight is no tensor of the 3"),
    (lambda module, given: given.update({"1.q_proj.weight": given["1.q_proj.weight"][:, :16]}), r"experts\.1\.q_proj\.weight is \[2, 24, 16\], and its place \[2, 24, 32\]"),
    (lambda module, given: given.update({"1.q_norm.weight": torch.zeros(1)}), r"experts\.1\.q_norm\.weight is \[1, 1\], and its place \[1, 12\]"),
    (lambda module, given: setattr(module.k_proj, "quant_method", SimpleNamespace()), "SimpleNamespace: attention experts cannot be quantised while vLLM"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: Callable[[Any, Any], None], problem: str, folder: Path) -> None:
    module, given = experts(folder)
    change(module, given)
    with pytest.raises(ValueError, match=problem):
        module.load_weights(given.items())


def test_what_is_missing_is_not_said_to_be_there(folder: Path) -> None:
    """vLLM compares what comes back with what it needs."""
    module, given = experts(folder)
    del given["2.v_proj.bias"]
    assert {name for name, _ in module.named_parameters()} - module.load_weights(given.items()) == {"v_proj.bias"}


@pytest.mark.parametrize("name", ["llama", "granite"])
@torch.no_grad()
def test_a_pipeline_of_two_processes_is_the_whole(name: str, tmp_path: Path) -> None:
    """The second one gets hidden states in the place of embeddings, which are scaled once (granite)."""
    write_three(tmp_path, CONFIGS[name])
    folder, tokens = build(tmp_path, ""), ids(batch=1)
    whole, first, second = served(folder).model, served(folder).model, served(folder).model
    first.layers[1], first.norm, second.layers[0], second.embed_tokens = (PPMissingLayer() for _ in range(4))
    between = first(input_ids=tokens, use_cache=False, return_dict=False)[0]
    after = second(inputs_embeds=between, use_cache=False, return_dict=False)[0]
    assert distance(after, whole(input_ids=tokens, use_cache=False, return_dict=False)[0]) == 0
    assert whole.supports_pp_plan
    assert [type(getattr(whole, part)) for part in whole.config.base_model_pp_plan] == [nn.Embedding, nn.ModuleList, type(whole.norm)]


@pytest.mark.parametrize(("changes", "processes", "problem"), [
    ({"hidden_act": "gelu"}, 1, "its FFN experts compute silu, not hidden_act = 'gelu'"),
    ({"gated_ffn": False}, 1, r"its FFN experts have a gate \(gated_ffn = false\)"),
    ({"mlp_bias": True}, 1, r"its FFN experts have no biases \(mlp_bias = true\)"),
    ({"gated_ffn": False, "hidden_act": "relu"}, 1, "hidden_act = 'relu'; its FFN experts have a gate"),
    ({"sizes_by_kind": {"full_attention": {"head_dim": 8}}}, 1, "its layers are of one size"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 1, "rope_type dynamic depends on the length"),
    ({"sliding_rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, 1, "rope_type longrope depends on the length"),
    ({}, 4, r"2 key and value heads of an expert cannot be cut into 4 parts \(tensor_parallel_size\)"),
    ({"qk_norm": True, "qk_norm_shape": "heads"}, 2, r"norms of queries and keys for 'heads' cannot be cut \(tensor_parallel_size = 2\)"),
    ({"qk_norm": True, "qk_norm_shape": "all heads"}, 2, "norms of queries and keys for 'all heads' cannot be cut"),
    ({"qk_norm": True, "qk_norm_bias": True}, 2, "norms of queries and keys for 'head' cannot be cut"),
])  # fmt: skip
def test_what_vllm_would_compute_otherwise_is_refused(
    changes: dict[str, Any], processes: int, problem: str, llamas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(llamas, "")
    parallel = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: processes)
    monkeypatch.setitem(sys.modules, "vllm.distributed", parallel)  # type: ignore[arg-type]
    config = config_of(folder, **changes)
    with pytest.raises(
        ValueError, match=f"vLLM would not compute this model as transformers does: .*{problem}.*Serve it with transformers"
    ):
        BamModel(config)
    config._attn_implementation = "eager"
    BamModel(config)


ALIKE = {"sliding_window": 8, "hidden_size_per_layer_input": 0, "head_dim": 8, "global_head_dim": 8, "hidden_activation": "silu"}
"""What leaves gemma4_text nothing of its own but its rotary embedding."""


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_says_what_the_model_code_refuses(name: str, tmp_path: Path) -> None:
    agreed(CONFIGS[name], tmp_path)


@pytest.mark.parametrize(("rope", "served"), [
    ({"rope_type": "linear", "factor": 2.0}, True),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, True),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}, True),
    ({"rope_type": "dynamic", "factor": 2.0}, False),
    ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}, False),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, True),
], ids=lambda value: value["rope_type"] if isinstance(value, dict) else "")  # fmt: skip
def test_and_so_it_does_of_rotary_scaling(rope: dict[str, Any], served: bool, tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, **rope}
    own = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": rope}
    family = {**CONFIGS["gemma4_text"], **ALIKE, "rope_parameters": own}
    assert agreed(family if rope["rope_type"] == "proportional" else {**CONFIGS["llama"], "rope_parameters": rope}, tmp_path) == served


def agreed(sources: dict[str, Any], folder: Path) -> bool:
    """Whether a merge of such sources is served by vLLM, as its plan and the model code both say."""
    write_sources(folder, sources)
    plan = plan_file(write_recipe(folder))
    (verdict,) = [found for found in plan.serves if found.word == "vllm"]
    config = BamConfig(**plan.config)
    config._attn_implementation = "vllm"
    try:
        BamModel(config)
    except ValueError as error:
        assert "vLLM would not compute this model as transformers does" in str(error)
        assert not verdict.serves, (verdict, error)
        return False
    assert verdict.serves, verdict
    return True


def test_layers_that_vllm_has_not_are_refused(llamas: Path) -> None:
    config = config_of(build(llamas, ""))
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match=r"it has no layers of chunked_attention here \(layer_types\)"):
        BamModel(config)


@pytest.mark.parametrize(("name", "plain"), [("llama", True), ("cohere", False), ("gemma", False), ("olmo", False)])
def test_norms_that_are_no_plain_rms_norms_are_not_taken_for_them(name: str, plain: bool, tmp_path: Path) -> None:
    """vLLM replaces modules by class and names of children, which it remembers from model to model."""
    write_three(tmp_path, CONFIGS[name])
    config = config_of(build(tmp_path, ""), hidden_act="silu")
    layer = BamDecoderLayer(config, 0)
    assert bool(list(layer.input_layernorm.children())) != plain
    assert not list(BamDecoderLayer(BamConfig(**config.to_dict()), 0).input_layernorm.children())  # nowhere else


def test_norms_of_experts_are_not_taken_for_plain_ones(folder: Path) -> None:
    module = BamAttention(config_of(folder), 0)
    assert list(module.experts.q_norm.children())
    shared = BamAttention(config_of(folder, num_key_value_heads=2, attention_kv="shared"), 0)
    assert not list(shared.k_norm.children())


@torch.no_grad()
def test_what_vllm_reads_of_the_configuration(tmp_path: Path) -> None:
    """It multiplies with logit_scale, whatever is there, after it caps; scores it caps by the other families' key."""
    assert BamConfig().logit_scale == BamConfig(logit_scale=None).logit_scale == 1.0
    assert BamConfig().final_logit_softcapping is BamConfig().attn_logit_softcapping is None
    write_three(tmp_path, {**CONFIGS["gemma2"], "hidden_activation": "silu"})
    config = BamConfig.from_pretrained(build(tmp_path, ""), logit_scale=0.25, logit_softcap=3.0, attention_softcap=2.0)
    model, tokens = BamForCausalLM(config).eval(), ids(batch=1)
    for parameter in model.lm_head.parameters():
        parameter.mul_(50.0)
    logits = model.lm_head(model.model(tokens).last_hidden_state)
    theirs = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping) * config.logit_scale
    assert distance(theirs, model(tokens).logits) < 1e-6
    assert float(model(tokens).logits.abs().max()) > 0.5
    assert config.attn_logit_softcapping == 2.0
    assert not {"attn_logit_softcapping", "final_logit_softcapping"} & config.to_dict().keys()
