"""The output's config.json, from an allow-list: nothing of a source's config is copied that a table does not know."""

from collections.abc import Mapping
from typing import Any

from bam_merge.architectures.config import COMMON_FUNCTION, NEUTRAL, ROPE_KEYS
from bam_merge.architectures.nulls import KEPT
from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.vocabulary import GATING, QUIET, SHARED_ROLES, UNSAID
from bam_merge.checkpoints.dtypes import config_name
from bam_merge.planning.assign import Made
from bam_merge.recipe.schema import Attention, Ffn, Recipe
from bam_merge.sources.dense import DenseModel, Site

REMEDIES = {
    "norm_topk_prob": "ffn.gate: topk_then_softmax sums to one",
    "gate_scale": "leave ffn.gate_scale at 1",
    "scoring_func": "ffn.gate: topk_then_sigmoid makes gates of sigmoids, the others make them of a softmax",
    "several_experts": "or two experts and more",
}


WHERE_WINDOWS_ARE = "where windows are"
"""What a layout says of rope_layers where its layers with a sliding window rotate, and no others."""


NO_SHARED_EXPERT = 64
"""Units of a shared expert that must be there and adds nothing: of zeros."""


def merge_values(recipe: Recipe, layout: Architecture, model: DenseModel, made: Mapping[Site, Made]) -> dict[str, Any]:
    """Everything a layout's config table can ask for by "$NAME", and its `accepts` can test."""
    facts = {key: value for key, value in model.facts.items() if key not in QUIET or value != QUIET[key]}
    rope = facts["rope_parameters"]
    layers = range(facts["num_hidden_layers"])
    count = len(recipe.expert_names)
    attention = recipe.attention or Attention()
    top_k, renormalised = recipe.gates
    per_expert = any(made[site].per_expert for site in made if site[0] in ("attn.q", "linear.o"))
    attending = [layer for layer in layers if ("attn.k", layer) in made]
    shared_kv = [layer for layer in attending if not made["attn.k", layer].per_expert] if per_expert else []
    all_shared = per_expert and bool(attending) and len(shared_kv) == len(attending)
    linear = [item.per_expert for (role, _), item in made.items() if role == "linear.o"]
    heads, kv_heads = facts["num_attention_heads"], facts["num_key_value_heads"]
    filled = any(row.make and row.roles[0] in SHARED_ROLES for row in layout.rows)  # a layout that has a shared expert in any case
    return {
        **facts,
        "intermediate_size": facts["intermediate_size"] // recipe.shards,
        "base_model_type": model.family.name,
        "rope_theta": rope["rope_theta"],
        "rope_parameters_by_kind": {"full_attention": rope, "sliding_attention": facts.get("sliding_rope_parameters") or rope},
        "rope_type": rope["rope_type"],
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if rope["rope_type"] != "default" else None,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "dense_intermediate_size": NO_SHARED_EXPERT,
        "num_attention_heads": heads * count if per_expert else heads,
        "num_key_value_heads": kv_heads * count if per_expert and not all_shared else kv_heads,
        "num_attention_heads_per_expert": heads,
        "num_key_value_heads_per_expert": kv_heads,
        "num_experts": count,
        "expert_names": list(recipe.expert_names),
        "num_experts_per_tok": top_k,
        "norm_topk_prob": renormalised,
        "shared_expert_intermediate_size": facts["intermediate_size"] if recipe.shared_source else NO_SHARED_EXPERT,
        "shared_experts": recipe.shards if recipe.shared_source else int(filled),
        "shared_expert_mix": "average",
        "gate_scale": (recipe.ffn or Ffn()).gate_scale,
        **({"scoring_func": "sigmoid"} if recipe.sigmoid else {}),
        "several_experts": count > 1,
        "mlp_layer_types": ["sparse" for _ in layers],
        "position_embedding_type": "rope" if facts.get("rope_layers") is None else None,
        "num_attention_experts": count if per_expert else 0,
        "attention_kv": "shared" if all_shared else "expert" if per_expert else None,
        "shared_kv_layers": shared_kv if shared_kv and not all_shared else None,
        "attention_linear": ("expert" if all(linear) else "shared") if linear and per_expert else None,
        "attention_routing": attention.routing if per_expert else None,
        "num_attention_experts_per_tok": (attention.top_k or count) if per_expert else None,
    }


def refusals(layout: Architecture, values: Mapping[str, Any], file: str) -> list[str]:
    """Why `layout` cannot express this merge, one message per feature."""
    problems = []
    kept = layout.kind == "dense"  # its sources' own keys
    said = {*layout.accepts, *layout.implies, *_words(layout), *layout.traits}
    said |= {"sizes_by_kind"} if layout.sizes else set()
    unsaid = {} if kept else {key: value for key, value in {**UNSAID, **GATING}.items() if key not in said}
    if "parallel_block" in said:
        unsaid.pop("parallel_norms", None)  # of a parallel block alone
    if "attention_out_bias" in unsaid:  # a layout with one word for the biases of q, k, v and o
        unsaid["attention_out_bias"] = values.get("attention_bias")
    for key, accepted in (*layout.accepts.items(), *unsaid.items()):
        options = accepted if isinstance(accepted, list) else ["none" if accepted is None else accepted]
        value = values.get(key, {**QUIET, **GATING}.get(key))
        if accepted == WHERE_WINDOWS_ARE and value == _windowed(values):
            value = WHERE_WINDOWS_ARE
        if ("none" if value is None else value) not in options:
            remedy = f" ({REMEDIES[key]})" if key in REMEDIES else ""
            problems.append(
                f"{file}: output.layout: {layout.name} needs {key} = {' or '.join(map(_shown, options))}, this merge has {_shown(value)}. "
                f"Use layout: bam{remedy}."
            )
    return problems


def _windowed(values: Mapping[str, Any]) -> list[int] | None:
    """The layers with a sliding window; None for all of them."""
    types = values.get("layer_types") or () if values.get("sliding_window") else ()
    found = [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]
    return None if types and len(found) == len(types) else found


def _words(layout: Architecture) -> set[str]:
    """The facts that a layout's config.json has."""
    words = {value.removeprefix("$") for value in layout.config.values() if isinstance(value, str)}
    return words | ({"sliding_rope_parameters"} if "rope_parameters_by_kind" in words else set())


def _of_traits(layout: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys from which a layout's [traits] are read, with what gives the merge's: the power undone, and 1 where there is no factor."""
    keys = {}
    for trait, text in layout.traits.items():
        key, _, power = str(text).removeprefix("config:").partition("^")
        value = values.get(trait)
        if value is None:
            value = values["head_dim"] ** -0.5 if trait == "attention_scale" else 1.0
        keys[key] = _root(value, float(power)) if power else value
    return keys


def _root(value: float, power: float) -> float:
    """The number whose power is `value`: of several, that differ in their last bits, one that is short."""
    found = value ** (1 / power)
    return next((short for digits in range(1, 18) if (short := float(f"{found:.{digits}g}")) ** power == value), found)


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_written(source: Mapping[str, Any], key: str) -> bool:
    return key in source and (source[key] is not None or key in KEPT)


def output_config(layout: Architecture, seed: DenseModel, values: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of the output, keys sorted. For a dense layout: the seed's known keys, spelled as there."""
    source = seed.config
    config: dict[str, Any] = {
        "architectures": [layout.class_name],
        "model_type": layout.model_types[0],
        "dtype": config_name(dtype),
    }
    if layout.kind == "dense":
        keys = (*COMMON_FUNCTION, *ROPE_KEYS, *layout.function, *layout.neutral, *NEUTRAL)
        config.update({key: source[key] for key in keys if _is_written(source, key)})
        followed = [key for key in ("head_dim", "num_key_value_heads") if key in source and source[key] is None]
        config.update({key: values[key] for key in followed})  # null there is not everywhere what a key left out is
        if values["tie_word_embeddings"] != source.get("tie_word_embeddings", layout.defaults["tie_word_embeddings"]):
            config["tie_word_embeddings"] = values["tie_word_embeddings"]  # a head that equals the embeddings, beside tied sources
        return dict(sorted(config.items()))
    config.update({key: source[key] for key in NEUTRAL if _is_written(source, key)})
    config.update(_of_traits(layout, values))
    for key, value in layout.config.items():
        if isinstance(value, str) and value.startswith("$"):
            value = values.get(value[1:])
        if value is not None:
            config[key] = value
    for key in layout.nulls:
        config.setdefault(key, None)
    return dict(sorted(config.items()))
