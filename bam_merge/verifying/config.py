"""Does the result's config.json mean what each source's means? Both are read by the reference model's own reading, not by the plan's.

Tensors tell sizes, biases and norms; what they do not tell is compared here: rotary embedding, windows, activation, norms' epsilons,
wiring, and which tensor the head is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bam_merge.architectures.vocabulary import KINDS_OF_LAYERS
from bam_merge.model.activations import ACTIVATIONS
from bam_merge.model.loading import StoredModel
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.positions import frequencies
from bam_merge.model.streaming import Computing, streamed_embeddings, streamed_head
from bam_merge.text import printable, some
from bam_merge.verifying.report import Check

HEAD_TOLERANCE = 1e-6
"""Largest difference of logits, relative to the largest: both come from the same weights by the same sums."""


def same_function(result: StoredModel, sources: Mapping[str, StoredModel]) -> Iterator[Check]:
    """One check of what config.json says, key by key."""
    mine = meaning(result.config)
    wrong = []
    for name, source in sources.items():
        theirs = meaning(source.config)
        wrong += [f"{name}: {key} is {_brief(theirs[key])}, the result has {_brief(mine[key])}" for key in mine if mine[key] != theirs[key]]
    passed = f"{len(sources)} sources, each read on its own, mean what the result's config.json means"
    yield Check("source configs", not wrong, some(wrong, 6) if wrong else passed)


def meaning(config: ModelConfig) -> dict[str, Any]:
    """What `config` makes of the tensors, so that two spellings of one function are equal."""
    layered = config.norm_type == "layer_norm"
    limit = config.max_position_embeddings or 1
    lengths = torch.tensor([[1.0], [limit], [limit + 1], [4 * limit]], dtype=torch.float64)
    own = [config.of_kind(kind) for kind in (KINDS_OF_LAYERS if config.sizes_by_kind else KINDS_OF_LAYERS[:1])]
    sets = [config.rope_parameters, *([config.sliding_rope_parameters] if config.sliding_rope_parameters else [])]
    turned = [(rope, size) for rope in sets for size in dict.fromkeys(kind.head_dim for kind in own)]
    found = [frequencies(rope, size, config.max_position_embeddings, lengths) for rope, size in turned]
    by_length = [radians.expand(len(lengths), -1) for radians, _ in found]
    turning = any(rope["rope_type"] in ("dynamic", "longrope") for rope in sets)  # others have one set of frequencies for all lengths
    types = config.layer_types or ["sliding_attention"] * config.num_hidden_layers
    return {
        "number of heads": _one(
            [(kind.num_attention_heads_per_expert, kind.num_key_value_heads_per_expert, kind.head_dim) for kind in own]
        ),
        "width of the FFN": [kind.intermediate_size for kind in own] if config.sizes_by_kind else None,
        "norm": (config.norm_type, config.layer_norm_eps if layered else config.rms_norm_eps),
        "norm offset": config.norm_offset,
        "norm weights": config.norm_weights,
        "clipped": config.attention_clip,
        "norms before attention and FFN": config.pre_norms,
        "norms after attention and FFN": config.post_norms,
        "block": (config.parallel_block, config.parallel_norms if config.parallel_block else 2),
        "activation": ACTIVATIONS[config.hidden_act],
        "gated FFN": config.gated_ffn,
        "qk norm": (config.qk_norm_weights, "biased" if config.qk_norm_bias else "unbiased") if config.qk_norm else None,
        "qk norm stands": "after rotary" if config.qk_norm and config.qk_norm_after_rotary else "before rotary",
        "score scale": _one([kind.head_dim**-0.5 if config.attention_scale is None else config.attention_scale for kind in own]),
        "query growth": None
        if config.query_growth is None
        else (config.query_growth, config.rope_parameters["original_max_position_embeddings"]),
        "residual scale": 1.0 if config.residual_scale is None else config.residual_scale,
        "embedding scale": 1.0 if config.embedding_scale is None else config.embedding_scale,
        "embedding scale rounded": config.embedding_scale is not None and config.embedding_scale_in_dtype,
        "head bias": config.head_bias,
        "rotary pairs": "neighbours" if config.rope_interleaved else "halves",
        "rotary frequencies": _one([tuple((of if turning else of[:1]).flatten().tolist()) for of in by_length]),
        "rotary factor": _one([factor for _, factor in found]),
        "context": limit if turning else None,
        "layers that rotate": tuple(range(config.num_hidden_layers)) if config.rope_layers is None else tuple(sorted(config.rope_layers)),
        "windows": tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types),
        "attention gate": config.attention_gate,
        "norm of values": config.value_norm,
        "values are keys": config.values_are_keys,
        "layer scale": config.layer_scale,
        "linear attention": tuple(layer for layer, kind in enumerate(types) if kind == "linear_attention"),
        "sizes of linear attention": config.linear_sizes,
        "score softcap": config.attention_softcap,
        "logit softcap": config.logit_softcap,
        "logit scale": 1.0 if config.logit_scale is None else config.logit_scale,
    }


def _one(values: list[Any]) -> Any:
    """What all layers have; of kinds of layers that have not the same, all of it."""
    return values[0] if len(values) == 1 else values


@torch.no_grad()
def same_head(result: StoredModel, sources: Mapping[str, StoredModel], ids_BT: Tensor, computing: Computing) -> Iterator[Check]:
    """One check that final norm and head, as the result has them, give each source's logits with that source's weights."""
    worst, wrong = 0.0, []
    for name, source in sources.items():
        tied = source.config.tie_word_embeddings
        if tied and not result.config.tie_word_embeddings and not result.equals_embeddings():
            wrong.append(f"{name}: its head is its embeddings, the result has a head of its own that is not its embeddings")
            continue
        if not tied and result.config.tie_word_embeddings and not source.equals_embeddings():
            wrong.append(f"{name}: its head is not its embeddings, the result's is")
        x_BTD = streamed_embeddings(source, ids_BT[:, -1:], computing)
        expected = streamed_head(source, x_BTD, computing)
        try:
            as_result = replace(
                result.config, vocab_size=source.config.vocab_size, tie_word_embeddings=tied or result.config.tie_word_embeddings
            )
            got = streamed_head(replace(source, config=as_result), x_BTD, computing)
        except (KeyError, RuntimeError):
            wrong.append(f"{name}: has not the final norm and head that the result's config.json asks for")
            continue
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        worst = max(worst, error)
        if not error <= HEAD_TOLERANCE:
            wrong.append(f"{name}: logits differ by {error:.3g} of the largest")
    passed = "final norm and head, with a source's weights, give that source's logits"
    yield Check("head", not wrong, some(wrong, 6) if wrong else passed, worst, HEAD_TOLERANCE)


def _brief(value: Any) -> str:
    if callable(value):
        return getattr(value, "__name__", "another function")
    return printable(str(value), 60)
