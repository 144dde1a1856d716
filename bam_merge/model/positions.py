"""How the tokens of a sequence stand to each other: rotary positions, who sees whom, and the cache. Torch only.

Shape suffixes: B sequences, T tokens of this call, S tokens so far, H heads, C channels of a head, P rotary pairs of channels,
x an axis of size one.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bam_merge.architectures.rotary import ROPE_TYPES


def frequencies(rope: Mapping[str, Any], channels: int, limit: int | None, lengths_Bx: Tensor) -> tuple[Tensor, float]:
    """Radians per position [B or 1, P], in the dtype of `lengths_Bx`, and the factor on cosines and sines (RoFormer, arXiv 2104.09864).

    `rope` is config.json's `rope_parameters`, `channels` the size C of a head, `limit` max_position_embeddings, `lengths_Bx` the
    tokens of each sequence. Sources: linear (arXiv 2306.15595), dynamic NTK and YaRN (2309.00071), LongRoPE (2402.13753), Llama 3.1.
    """
    theta, most = rope["rope_theta"], limit or 1
    original = rope.get("original_max_position_embeddings") or most
    factor = rope.get("factor") or most / original
    rotary = int(channels * rope.get("partial_rotary_factor", 1.0))
    pairs_P = torch.arange(0, rotary, 2, dtype=lengths_Bx.dtype, device=lengths_Bx.device)
    freqs_P = 1.0 / theta ** (pairs_P / rotary)
    match rope["rope_type"]:
        case "default":
            return freqs_P[None], 1.0
        case "linear":
            return freqs_P[None] / factor, 1.0
        case "dynamic":
            stretch_Bx = factor * lengths_Bx.clamp(min=most) / most - (factor - 1)
            return 1.0 / (theta * stretch_Bx ** (rotary / (rotary - 2))) ** (pairs_P / rotary), 1.0
        case "llama3":  # by the turns within the original context: few, and the pair is stretched; many, and it is kept
            few, many = rope["low_freq_factor"], rope["high_freq_factor"]
            kept_P = ((original * freqs_P / (2 * math.pi) - few) / (many - few)).clamp(0, 1)
            return (kept_P * freqs_P + (1 - kept_P) * freqs_P / factor)[None], 1.0
        case "yarn":
            stretched_P = _yarn_ramp(rope, theta, original, rotary, pairs_P)
            return (stretched_P * freqs_P / factor + (1 - stretched_P) * freqs_P)[None], _yarn_factor(rope, factor)
        case "proportional":  # a share of all pairs turns, each as if all did; the others stay
            angles = int(rope.get("partial_rotary_factor", 1.0) * channels // 2)
            turning_P = 1.0 / theta ** (torch.arange(0, 2 * angles, 2).to(pairs_P) / channels)
            return torch.nn.functional.pad(turning_P / (rope.get("factor") or 1.0), (0, channels // 2 - angles))[None], 1.0
        case "longrope":
            short_P, long_P = (pairs_P.new_tensor(rope[key]) for key in ("short_factor", "long_factor"))
            scale = rope.get("attention_factor") or (math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0)
            return freqs_P / torch.where(lengths_Bx > original, long_P, short_P), float(scale)
        case other:
            raise ValueError(f"rope_type {other!r}; known are {', '.join(ROPE_TYPES)}")


def _yarn_ramp(rope: Mapping[str, Any], theta: float, original: int, rotary: int, pairs_P: Tensor) -> Tensor:
    """How much each pair is stretched [P], 0 to 1: pairs with over `beta_fast` turns in the original context not at all."""
    betas = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    first, last = (rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in betas)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary - 1)
    return ((pairs_P / 2 - first) / (last - first if last != first else 0.001)).clamp(0, 1)


def _yarn_factor(rope: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4), or DeepSeek's ratio of two such terms."""

    def term(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return float(rope.get("attention_factor") or (term(rope["mscale"]) / term(rope["mscale_all_dim"]) if both else term(1)))


def turns(rope: Mapping[str, Any], channels: int, limit: int | None, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, P] of the angles at `positions_BT`, the last of their sequences, in `dtype` or float32 if wider.

    Where frequencies depend on the length, each sequence has its own, so that a batch computes what its sequences alone do.
    """
    position_BT = positions_BT.to(torch.promote_types(dtype, torch.float32))
    freqs_BP, factor = frequencies(rope, channels, limit, position_BT.amax(-1, keepdim=True) + 1)
    angles_BTxP = (position_BT[..., None] * freqs_BP[:, None])[:, :, None]
    return angles_BTxP.cos() * factor, angles_BTxP.sin() * factor


def grown(beta: float | None, rope: Mapping[str, Any], positions_BT: Tensor, x_BTHC: Tensor) -> Tensor:
    """Queries times 1 + beta ln(1 + floor(position / original context)): more of it the further from where training began (Llama 4)."""
    if beta is None:
        return x_BTHC
    turns_BT: Tensor = (positions_BT.clamp(min=0) / rope["original_max_position_embeddings"]).floor()
    factor_BT: Tensor = 1 + beta * turns_BT.to(torch.promote_types(x_BTHC.dtype, torch.float32)).log1p()
    return x_BTHC * factor_BT[..., None, None].to(x_BTHC.dtype)


def rotate(x_BTHC: Tensor, cos_BTxP: Tensor, sin_BTxP: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair of channels by its angle; channels beyond the pairs pass. A pair is (i, i + P), or neighbours if interleaved."""
    P = cos_BTxP.shape[-1]
    turning, passing = x_BTHC[..., : 2 * P], x_BTHC[..., 2 * P :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :P], turning[..., P:])
    turned = (a * cos_BTxP - b * sin_BTxP, b * cos_BTxP + a * sin_BTxP)
    turned_BTHR = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((turned_BTHR.to(x_BTHC.dtype), passing), -1)


class Cache:
    """What earlier tokens leave to later ones: positions, rotated keys, and values [B, S, ...], by layer and name.

    Decoding step by step equals one pass, but for dynamic and longrope scaling beyond their limits, where a token's frequencies
    depend on how long the sequence was when it was computed.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, str], Tensor] = {}

    def extend(self, layer: int, name: str, new_BT: Tensor) -> Tensor:
        """Append these tokens' [B, T, ...], and return all so far [B, S, ...]."""
        old_BS = self.tensors.get((layer, name))
        self.tensors[layer, name] = new_BT if old_BS is None else torch.cat((old_BS, new_BT), 1)
        return self.tensors[layer, name]

    def kept(self, layer: int, name: str) -> Tensor | None:
        """What is kept under a name in the place of all tokens so far: a state. None before the first."""
        return self.tensors.get((layer, name))

    def keep(self, layer: int, name: str, state: Tensor) -> None:
        """Keep it in the place of what was kept."""
        self.tensors[layer, name] = state

    def next_positions(self, mask_BT: Tensor) -> Tensor:
        """Positions of the next tokens [B, T]: counted on from the last where `mask_BT` is 1; -1, for padding, where it is 0."""
        old_BS = self.tensors.get((0, "positions"))
        last = -1 if old_BS is None else old_BS.amax(-1, keepdim=True)
        return (last + mask_BT.long().cumsum(-1)).masked_fill(mask_BT == 0, -1)


def visible(positions_BT: Tensor, positions_BS: Tensor, window: int | None) -> Tensor:
    """Which of the S tokens each of the T attends to [B, T, S]: earlier or the same, no padding, less than `window` back."""
    back_BTS = positions_BT[:, :, None] - positions_BS[:, None]
    seen_BTS = (back_BTS >= 0) & (positions_BS[:, None] >= 0)
    return seen_BTS if window is None else seen_BTS & (back_BTS < window)
