"""How much of a sequence a cache can decode in two parts and compute what one pass over the whole does."""

import torch
from torch import Tensor

from bam_merge.model.model_config import ModelConfig
from bam_merge.model.positions import frequencies


def first_part(tokens: int) -> int:
    """Of so many tokens, how many are in the first of two parts: two thirds."""
    return tokens - max(1, tokens // 3)


def decodable(config: ModelConfig, tokens: int) -> int:
    """How many of so many tokens compute the same at once and in two cached parts, 0 where not even two do.

    Dynamic and LongRoPE scaling change the frequencies beyond a length, so that a cached key and the same key of a longer sequence
    differ by the method's own definition (positions.Cache): there the parts must be of one kind, as both are within the limit.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return tokens

    def frequencies_of(length: int) -> Tensor:
        return frequencies(rope, config.head_dim, config.max_position_embeddings, torch.tensor([[float(length)]]))[0]

    spans = (span for span in range(tokens, 1, -1) if torch.equal(frequencies_of(first_part(span)), frequencies_of(span)))
    return next(spans, 0)
