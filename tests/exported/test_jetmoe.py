"""A second opinion on Shared-KV with soft routing that is no code of ours: transformers' JetMoE, which can hold such a mixture exactly.

JetMoE (arXiv 2404.07413) has one k and v, experts of q and o with as many heads as there are of k and v, and gates that are a softmax over the
best k experts of attention and FFN alike. With k = all of them both routers are soft. A dense model of H = g K query heads per expert takes g
JetMoE experts: the r-th has of each k/v head i the query head i g + r, and all g repeat the expert's router row, so that each has gate / g and
o_proj is multiplied by g. The FFN experts stand g times likewise, and their gates add up again.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, write_recipe, write_sources
from safetensors.torch import load_file
from test_model import distance, ids
from torch import Tensor

from bam_merge import MergeOptions, load_model, load_recipe, merge

transformers = pytest.importorskip("transformers")

SECTIONS = "attention: {kv: shared}\nffn: {top_k: 3, gate: topk_then_softmax}\nrouter: {init: normal, std: 0.5}"
SHAPES = {
    "a head of its own for each key": {"model_type": "llama", **BASE, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    "two heads to a key, tied": {"model_type": "llama", **BASE, "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "three heads to a key": {
        "model_type": "mistral", **BASE, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": None,
        "rms_norm_eps": 1e-6, "rope_theta": 5e3,
    },
}  # fmt: skip


def jetmoe(folder: Path) -> Any:
    """The mixture in `folder`, of layout bam with Shared-KV and soft routing, as a JetMoeForCausalLM."""
    config = json.loads((folder / "config.json").read_text())
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    N, C, K = config["num_experts"], config["head_dim"], config["num_key_value_heads_per_expert"]
    g = config["num_attention_heads_per_expert"] // K
    model = transformers.JetMoeForCausalLM(
        transformers.JetMoeConfig(
            **{key: config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")},
            num_key_value_heads=K, kv_channels=C, num_local_experts=N * g, num_experts_per_tok=N * g,
            tie_word_embeddings=config["tie_word_embeddings"], max_position_embeddings=config["max_position_embeddings"],
            rope_parameters={key: config["rope_parameters"][key] for key in ("rope_type", "rope_theta")},
            pad_token_id=0, attn_implementation="eager",
        )
    )  # fmt: skip

    def slots(tensors: list[Tensor], dim: int) -> Tensor:
        """Of each expert's q (rows) or o (columns) the heads of every slot, [N * g, ...]."""
        by_head = (tensor.unflatten(dim, (K, g, C)) for tensor in tensors)
        return torch.stack([part.select(dim + 1, r).flatten(dim, dim + 1) for part in by_head for r in range(g)])

    state: dict[str, Tensor] = {name: stored[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    state["lm_head.weight"] = stored.get("lm_head.weight", stored["model.embed_tokens.weight"])
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}."
        own = {name.removeprefix(here): tensor for name, tensor in stored.items() if name.startswith(here)}
        attention = [{part: own[f"self_attn.experts.{e}.{part}_proj.weight"] for part in "qo"} for e in range(N)]
        ffn = [{part: own[f"mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")} for e in range(N)]
        made = {
            "self_attention.kv_proj.weight": torch.cat([own["self_attn.k_proj.weight"], own["self_attn.v_proj.weight"]]),
            "self_attention.experts.router.layer.weight": own["self_attn.router.weight"].repeat_interleave(g, 0),
            "self_attention.experts.input_linear.weight": slots([expert["q"] for expert in attention], 0),
            "self_attention.experts.output_linear.weight": g * slots([expert["o"] for expert in attention], 1),
            "mlp.router.layer.weight": own["mlp.router.weight"].repeat_interleave(g, 0),
            "mlp.input_linear.weight": torch.stack([torch.cat([expert["gate"], expert["up"]]) for expert in ffn]).repeat_interleave(g, 0),
            "mlp.output_linear.weight": torch.stack([expert["down"] for expert in ffn]).repeat_interleave(g, 0),
            **{f"{part}.bias": torch.zeros(config["hidden_size"]) for part in ("self_attention.experts", "mlp")},
            **{f"{norm}.weight": own[f"{norm}.weight"] for norm in ("input_layernorm", "post_attention_layernorm")},
        }
        state |= {here + name: tensor for name, tensor in made.items()}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_jetmoe_computes_what_our_models_do(name: str, tmp_path: Path) -> None:
    write_sources(tmp_path, SHAPES[name])
    folder = merge(load_recipe(write_recipe(tmp_path, SECTIONS)), options=MergeOptions(verify=False))
    theirs = jetmoe(folder)(ids()).logits
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert float(theirs.std()) > 0.1  # a function worth comparing
    assert distance(exported(ids()).logits, theirs) < 1e-5
    assert distance(load_model(folder)(ids()), theirs) < 1e-5


@torch.no_grad()
def test_jetmoe_sees_which_router_is_which(tmp_path: Path) -> None:
    """The comparison can fail: with the rows of one layer's attention router in another order the logits are others."""
    write_sources(tmp_path, SHAPES["two heads to a key, tied"])
    folder = merge(load_recipe(write_recipe(tmp_path, SECTIONS)), options=MergeOptions(verify=False))
    model = jetmoe(folder)
    router = model.model.layers[0].self_attention.experts.router.layer.weight
    router.copy_(router.roll(2, 0))
    assert distance(model(ids()).logits, load_model(folder)(ids())) > 1e-3
