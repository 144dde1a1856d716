"""How much of a sequence a cache can decode in two parts and compute what one pass over the whole does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bam_merge.model.model_config import ModelConfig
from bam_merge.model.positions import frequencies


def first_part(tokens: int) -> int:
    """Of so many tokens, how many are in the first of two parts: two thirds."""
    return tokens - max(1, tokens // 3)


def scalings_by_length(config: ModelConfig) -> list[Mapping[str, Any]]:
    """The rotary embeddings of a model whose frequencies depend on how long a sequence is."""
    sets = (config.rope_parameters, config.sliding_rope_parameters)
    return [rope for rope in sets if rope is not None and rope.get("rope_type") in ("dynamic", "longrope")]


def decodable(config: ModelConfig, tokens: int) -> int:
    """How many of so many tokens compute the same at once and in two cached parts, 0 where not even two do.

    Dynamic and LongRoPE scaling change the frequencies beyond a length, so that a cached key and the same key of a longer sequence
    differ by the method's own definition (positions.Cache): there the parts must be of one kind, as both are within the limit.
    """
    changing = scalings_by_length(config)
    if not changing:
        return tokens

    def frequencies_of(length: int) -> Tensor:
        at = torch.tensor([[float(length)]])
        return torch.cat([frequencies(rope, config.head_dim, config.max_position_embeddings, at)[0] for rope in changing], -1)

    spans = (span for span in range(tokens, 1, -1) if torch.equal(frequencies_of(first_part(span)), frequencies_of(span)))
    return next(spans, 0)
