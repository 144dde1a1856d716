"""FLOPs per token of one block, from the shapes of its tensors by role.

They follow arXiv 2408.08274, Tables 7 and 10: 2 per multiply-add of every matrix that a token goes through; norms, biases and softmax
are not counted. Scores are 2 n n_ctx d there: scores and values take 4 d per position seen, and over a prompt of n_ctx tokens a token
sees half of them on average. That is prefill; a token that is decoded after n_ctx others sees them all, and takes twice as much.
Linear attention looks up, corrects and asks a state of every value head: 6 for each of its numbers, whatever the context.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

QKV = (
    "attn.q", "attn.k", "attn.v", "attn.gate", "attn.q+attn.k+attn.v", "attn.q_a", "attn.q_b", "attn.kv_a", "attn.kv_b",
    *(f"linear.{part}" for part in "qkvzba"),
)  # fmt: skip


CONVOLUTIONS = ("linear.q_conv", "linear.k_conv", "linear.v_conv")


FFN = tuple(f"ffn.{shared}{part}" for shared in ("", "shared.") for part in ("gate", "up", "down", "router")) + ("ffn.gate+ffn.up",)


@dataclass(frozen=True)
class Piece:
    """One role in one layer: `copies` tensors of `shape` are stored (one per expert), a token goes through `used` of them."""

    role: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    copies: int = 1
    used: int | None = 1
    per_expert: bool = False

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of one block, by the columns of Table 7; or sums of them."""

    qkv: int = 0
    scores: int = 0
    output: int = 0
    ffn: int = 0
    attention_router: int = 0
    ffn_router: int = 0

    @property
    def attention(self) -> int:
        return self.qkv + self.scores + self.output

    @property
    def router(self) -> int:
        return self.attention_router + self.ffn_router

    @property
    def total(self) -> int:
        return self.attention + self.ffn + self.router

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def document(self) -> dict[str, int]:
        names = ("qkv", "scores", "output", "attention", "ffn", "attention_router", "ffn_router", "router", "total")
        return {name: getattr(self, name) for name in names}


def seen_twice(context: int, window: int | None, decode: bool) -> int:
    """Twice the positions that a token attends to: on average over a prompt (n_ctx / 2, as the paper counts), or at its end."""
    seen = min(context, window or context)
    return 2 * seen if decode else 2 * seen - seen * seen // context


def numbers_of_state(block: Mapping[str, list[Piece]], heads: Piece, key_channels: int) -> int:
    """The numbers of the states of linear attention, one of whose tensors of value heads is `heads`."""
    return heads.size * key_channels * block["linear.norm"][0].size


def block_flops(block: Mapping[str, list[Piece]], seen: int, key_channels: int = 0) -> Flops:
    def matrices(roles: Iterable[str], size: Callable[[Piece], int]) -> int:
        return sum((piece.used or 0) * size(piece) for role in roles for piece in block.get(role, []) if len(piece.shape) == 2)

    def double(piece: Piece) -> int:
        return 2 * piece.size

    values = matrices(["attn.o"], lambda piece: piece.shape[1])
    keys = matrices(["attn.q", "attn.q_b"], lambda piece: piece.shape[0]) or values
    convolved = sum((piece.used or 0) * double(piece) for role in CONVOLUTIONS for piece in block.get(role, []))
    asked = sum((piece.used or 0) * 6 * numbers_of_state(block, piece, key_channels) for piece in block.get("linear.A_log", []))
    return Flops(
        qkv=matrices(QKV, double) + convolved,
        scores=seen * (keys + values) + asked,
        output=matrices(["attn.o", "linear.o"], double),
        ffn=matrices(FFN, double),
        attention_router=matrices(["router.attn"], double),
        ffn_router=matrices(["router.ffn"], double),
    )
