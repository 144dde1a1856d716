"""Every merge method on tensors small enough to work out by hand, and the properties that its paper states."""

import math
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Read
from bam_merge.merging.kernels import Chunk, combine, survey
from bam_merge.merging.kernels.task_vectors import ties_thresholds
from bam_merge.values.streams import initialise
from bam_merge.values.tensors import TORCH_DTYPES, rounded
from bam_merge.verifying.rederive import rederive, survey_all
from bam_merge.verifying.rounding import worst


def run(method: expressions.Method, operands: list[list[float]], base: list[float] | None = None, chunk: int = 2) -> list[float]:
    """The merged vector, computed in chunks of `chunk` elements."""
    x_KC = [torch.tensor(values, dtype=torch.float32) for values in operands]
    base_C = None if base is None else torch.tensor(base, dtype=torch.float32)
    starts = range(0, len(operands[0]), chunk)

    def chunks():
        for start in starts:
            cut = slice(start, start + chunk)
            yield Chunk(start, [x_C[cut] for x_C in x_KC], None if base_C is None else base_C[cut])

    known = survey(method, chunks, len(operands[0]))
    return torch.cat([combine(method, piece, known) for piece in chunks()]).tolist()


class ByHand(NamedTuple):
    """A merge small enough to work out by hand, in the numbers that float32 holds exactly but for slerp's."""

    method: Any
    operands: list[list[float]]
    base: list[float] | None
    expected: list[float]


BY_HAND = {
    "mean": ByHand(expressions.Mean(), [[1, 2, 3], [3, 4, 8]], None, [2.0, 3.0, 5.5]),
    "linear": ByHand(expressions.Linear((0.25, 0.75)), [[4, 8], [0, 4]], None, [1.0, 5.0]),
    # a right angle: at t = 1/3 the weights are sin 60 and sin 30
    "slerp": ByHand(expressions.Slerp(1 / 3), [[2, 0], [0, 2]], None, [2 * math.sin(math.pi / 3), 2 * math.sin(math.pi / 6)]),
    # base + scale * (w1 (x1 - base) + w2 (x2 - base))
    "task_arithmetic": ByHand(expressions.TaskArithmetic((1.0, 0.5), 2.0), [[2, 1], [1, 5]], [1, 1], [3.0, 5.0]),
    # base 0, density 1/2 of six entries: each operand keeps its three largest.
    # trimmed  [5, 0, -3, 0, 0, 2]   (kept |5|, |3|, |2|)
    #          [4, 0, 6, 0, -7, 0]   (kept |4|, |6|, |7|)
    # sums     [9, 0, 3, 0, -7, 2]   signs + . + . - +; means of what agrees, by weights 3 and 1 where both do: (3*5 + 4)/4; times 2
    "ties": ByHand(
        expressions.Ties(0.5, (3.0, 1.0), 2.0), [[5, 1, -3, 0.5, 1, 2], [4, 1, 12, 1, -7, -0.5]], [0] * 6, [9.5, 0.0, 24.0, 0.0, -14.0, 4.0]
    ),
    # the streams of seed 0 begin .41 .24 .14 .64 and .63 .54 .54 .51, so at density 5/8 the kept are [5, 10, -5, 0] and [0, 5, 10, -15];
    # sums [5, 20, 15, -30] by weights 1 and 2; weighted means of what agrees [5, 20/3, 10, -15], divided by 5/8, times 3/8
    "dare_ties": ByHand(
        expressions.DareTies(0.625, (1.0, 2.0), 0.375, 0, ("stream", "other")),
        [[5, 10, -5, 7], [3, 5, 10, -15]], [0] * 4, [3.0, 4.0, 6.0, -9.0],
    ),
    # the stream "units" of seed 0 begins .32 .46 .55 .18: units 3 and 0 are dropped, of mean 4 and deviation sqrt(9 + 9);
    # the numbers begin -.8263 -.3591
    "drop": ByHand(
        expressions.Drop(0.5, "rows", 0, ("units", "numbers")), [[1, 5, 3, 7]], None,
        [4 - 18**0.5 * 0.8263199675785325, 5.0, 3.0, 4 - 18**0.5 * 0.3591414623937942],
    ),
    # the stream "where" begins .29 .44 .76 .49
    "noise": ByHand(
        expressions.Noise(0.5, 0.45, 0, ("where", "numbers")), [[1, 5, 3, 7]], None,
        [1 - 0.5 * 0.8263199675785325, 5 - 0.5 * 0.3591414623937942, 3.0, 7.0],
    ),
    # a column has one singular value: at rank 1 the expert is all there; tests/merging/test_experts.py has matrices
    "low_rank": ByHand(expressions.LowRank(1), [[3, 1, 6]], [1, 1, 2], [3.0, 1.0, 6.0]),
    # the streams of seed 0 begin .41 .24 .14 .64, so at density 1/2 the kept are [4, 8, 2, 0], doubled; times 1/4
    "dare_linear": ByHand(expressions.DareLinear(0.5, (0.5,), 0.5, 0, ("stream",)), [[4, 8, 2, 6]], [0] * 4, [2.0, 4.0, 1.0, 0.0]),
    # of five magnitudes the one largest goes (gamma 1/5), and of the rest the three largest stay (density 3/5):
    # [0, -5, 3, 2, 0] of [9, -5, 3, 2, 1], and [0, 4, -2, 0, 6] of [1, 4, -2, 8, 6]; weights 1 and 1/2
    "breadcrumbs": ByHand(
        expressions.Breadcrumbs(0.6, 0.2, (1.0, 0.5), 2.0), [[10, -4, 4, 3, 2], [2, 5, -1, 9, 7]], [1] * 5, [1.0, -5.0, 5.0, 5.0, 7.0]
    ),
    # of the row [8, -1, 2, -4] the ranks are 3, 0, 1, 2 and the probabilities 3/4, 1/4, 5/12, 7/12, below which .41 .24 .14 .64 lie thrice
    "della": ByHand(
        expressions.Della(0.5, 0.25, (2.0,), 0.5, 0, ("stream",)), [[8, -1, 2, -4]], [0] * 4, [8 / 0.75 / 2, -1 / 0.25 / 2, 2.4, 0.0]
    ),
    # larger than 1/2 are [4, 0, -2, 0] and [2, 3, 0, 0]
    "ram": ByHand(expressions.Ram(0.5), [[5, 1, -1, 1.5], [3, 4, 1, 0.5]], [1] * 4, [4.0, 4.0, -1.0, 1.0]),
    # differences [4, 1, 2, 3] and [0, 1, -1, 2]: half their distances are 2, 0, 3/2, 1/2. Of the three that are not 0 two thirds are selected:
    # [4, 0, 2, 0] and [0, 0, -1, 0], of squares 20 and 1. The sums are 4 and 1, so that of the third entry 2 stays
    "sce": ByHand(expressions.Sce(2 / 3), [[5, 2, 3, 4], [1, 2, 0, 3]], [1] * 4, [5.0, 1.0, 3.0, 1.0]),
    # differences [3, 4] and [4, 3]: cosine 24/25, so t = 48/49; means [4.5, 4.5] and base [1, 1]
    "model_stock": ByHand(expressions.ModelStock(), [[4, 5], [5, 4]], [1, 1], [1 + 48 / 49 * 3.5] * 2),
    # each row by itself at t = 1/3: a right angle, with the weights sin 60 and sin 30; and one direction, where it is the line
    "nuslerp": ByHand(expressions.Nuslerp(1 / 3, "rows"), [[2, 0], [0, 2]], None, [2 * math.sin(math.pi / 3), 2 * math.sin(math.pi / 6)]),
    # a right angle between lengths 1 and 3: the bisector, of length 2
    "karcher": ByHand(expressions.Karcher(), [[1, 0], [0, 3]], None, [math.sqrt(2), math.sqrt(2)]),
}  # fmt: skip
"""By the method's name. tests/test_methods.py asks for one of each."""


@pytest.mark.parametrize("name", BY_HAND)
def test_kernel_by_hand(name: str) -> None:
    method, operands, base, expected = BY_HAND[name]
    assert run(method, operands, base) == pytest.approx(expected, rel=1e-6)
    if name not in (
        "slerp",
        "dare_ties",
        "drop",
        "noise",
        "low_rank",
        "della",
        "model_stock",
        "nuslerp",
        "karcher",
    ):  # whose steps are not of numbers that float32 has
        assert run(method, operands, base) == expected


class Stored:
    """Tensors by name, in the place of a plan's sources."""

    def __init__(self, tensors: list[list[float]]) -> None:
        self.tensors = tensors

    def piece(self, expr: Any, start: int, stop: int) -> torch.Tensor:
        return torch.tensor(self.tensors[int(expr.tensor)], dtype=torch.float32)[start:stop]


@pytest.mark.parametrize("name", BY_HAND)
def test_second_way_by_hand(name: str) -> None:
    method, operands, base, expected = BY_HAND[name]
    sources = Stored([*operands, *([base] if base else [])])
    reads = [(str(i), Read("seed", str(i), "F32", (len(expected),))) for i in range(len(sources.tensors))]
    merge = expressions.Merge(method, tuple(reads[: len(operands)]), reads[-1] if base else None, "F32", (len(expected),))
    found = rederive(merge, cast(Any, sources), survey_all(merge, cast(Any, sources)), 0, len(expected), "F32")
    assert found.value.tolist() == pytest.approx(expected, rel=1e-9)
    assert worst(torch.tensor(expected, dtype=torch.float32), found, "F32")[0] <= 1
    assert worst(torch.tensor(expected, dtype=torch.float32) * 1.00001 + 1e-9, found, "F32")[0] > 1


def test_ties_of_equal_weights_by_hand() -> None:
    """As above with weights 1, where the mean of what agrees is (5+4)/2, 0, 6, 0, -7, 2."""
    first, second = [5, 1, -3, 0.5, 1, 2], [4, 1, 6, 1, -7, -0.5]
    assert run(expressions.Ties(0.5, (1.0, 1.0), 1.0), [first, second], [0] * 6) == [4.5, 0.0, 6.0, 0.0, -7.0, 2.0]


def test_mean_is_summed_in_float32_and_rounded_once() -> None:
    """Three bfloat16 numbers whose running sum needs more than bfloat16's 8 bits."""
    values = [256.0, 1.0, 1.0]
    (mean,) = run(expressions.Mean(), [[v] for v in values])
    assert mean == float(torch.tensor(258.0) / 3)
    by_bf16 = (
        torch.tensor(256.0, dtype=torch.bfloat16) + torch.tensor(1.0, dtype=torch.bfloat16) + torch.tensor(1.0, dtype=torch.bfloat16)
    ) / 3
    assert float(by_bf16) != float(torch.tensor(mean).bfloat16())


def test_slerp_of_orthogonal_vectors() -> None:
    """A right angle: at t = 1/3 the weights are sin 60 and sin 30."""
    a, b = run(expressions.Slerp(1 / 3), [[2, 0], [0, 2]])
    assert a == pytest.approx(2 * math.sin(math.pi / 3), rel=1e-6)
    assert b == pytest.approx(2 * math.sin(math.pi / 6), rel=1e-6)


def test_slerp_keeps_the_norm_where_a_line_would_not() -> None:
    merged = run(expressions.Slerp(0.5), [[1, 0, 0], [0, 1, 0]])
    assert math.hypot(*merged) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("t", "expected"), [(0.0, [1.0, 2.0]), (1.0, [3.0, -1.0])])
def test_slerp_ends(t: float, expected: list[float]) -> None:
    assert run(expressions.Slerp(t), [[1, 2], [3, -1]]) == pytest.approx(expected)


@pytest.mark.parametrize(("a", "b"), [([1, 2], [2, 4]), ([1, 2], [-1, -2]), ([0, 0], [1, 1])])
def test_slerp_of_parallel_opposite_or_zero_vectors_is_the_line(a: list[float], b: list[float]) -> None:
    assert run(expressions.Slerp(0.25), [a, b]) == pytest.approx([0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)])


def test_ties_scale_and_weights() -> None:
    """The mean of what agrees is weighted, and the scale multiplies it."""
    merged = run(expressions.Ties(1.0, (3.0, 1.0), 2.0), [[2, 1], [6, -4]], [1, 1])
    # differences [1, 0] and [5, -5]: weighted sums 8 and -5; means (3*1 + 5)/4 = 2 and -5
    assert merged == [1 + 2 * 2.0, 1 + 2 * -5.0]


def test_a_negative_weight_is_the_opposite_difference() -> None:
    """Differences [4, -2, 1, 3] and [2, 2, 1, 0] by weights 1 and -0.5: they stand for 4, -2, 1, 3 and -2, -2, -1, 0 by weights 1 and 0.5.

    Sums [3, -3, 0.5, 3]: means [4, (-2 - 1) / 1.5, 1, 3].
    """
    assert run(expressions.Ties(1.0, (1.0, -0.5), 1.0), [[4, -2, 1, 3], [2, 2, 1, 0]], [0] * 4) == [4.0, -2.0, 1.0, 3.0]
    assert run(expressions.Ties(1.0, (-2.0,), 1.0), [[4, -2]], [1, 1]) == [-2.0, 4.0]
    assert run(expressions.Ties(1.0, (0.0, 0.0), 1.0), [[4, -2], [3, 3]], [1, 1]) == [1.0, 1.0]
    assert run(expressions.Ties(1.0, (1.0, 0.0), 1.0), [[4, -2], [-9, -9]], [1, 1]) == [4.0, -2.0]


def test_ties_of_opposite_differences_is_the_base() -> None:
    assert run(expressions.Ties(1.0, (1.0, 1.0), 1.0), [[3, 0], [-3, 0]], [0, 0]) == [0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.floats(0.01, 1.0),
    st.integers(1, 7),
)
def test_ties_threshold_is_the_kth_largest_magnitude(values: list[float], density: float, chunk: int) -> None:
    d = torch.tensor(values, dtype=torch.float32)
    pieces = [Chunk(s, [d[s : s + chunk]], torch.zeros_like(d[s : s + chunk])) for s in range(0, len(d), chunk)]
    keep = max(1, math.floor(density * len(d)))
    expected = 0.0 if keep == len(d) else float(d.abs().sort(descending=True).values[keep - 1])
    assert ties_thresholds(expressions.Ties(density, (1.0,), 1.0), lambda: iter(pieces), len(d)) == [expected]


def dare(density: float, seed: int = 0) -> expressions.DareTies:
    return expressions.DareTies(density, (1.0,), 1.0, seed, ("stream",))


def test_dare_rescales_what_it_keeps() -> None:
    merged = run(dare(0.25), [[1.0] * 4000], [0.0] * 4000)
    assert set(merged) == {0.0, 4.0}
    assert merged.count(4.0) / 4000 == pytest.approx(0.25, abs=0.03)  # 4 standard deviations


def test_dare_does_not_depend_on_chunks() -> None:
    values = [float(i) for i in range(101)]
    whole = run(dare(0.5), [values], [0.0] * 101, chunk=101)
    assert all(run(dare(0.5), [values], [0.0] * 101, chunk=size) == whole for size in (1, 2, 3, 7, 64))
    assert run(dare(0.5, seed=1), [values], [0.0] * 101) != whole


def test_dare_of_density_one_is_task_arithmetic_of_one() -> None:
    assert run(dare(1.0), [[2, 3, 4]], [1, 1, 1]) == [2.0, 3.0, 4.0]


# ---- initialisers


class Drawn(NamedTuple):
    """What an initialiser draws, of shape [2, 2], for seed 0 and the name "w"."""

    method: Any
    expected: list[list[float]]


DRAWN_BY_HAND = {
    "normal": Drawn(expressions.Normal(0.5), [[0.05153925, 0.28533474], [0.43733895, 0.07733358]]),
    # 0.9523622, 0.5817090, 0.5714778, 0.9042234 of the generator, doubled, less 1, times the bound
    "uniform": Drawn(expressions.Uniform(0.25), [[0.22618112, 0.04085449], [0.03573892, 0.20211171]]),
    "zeros": Drawn(expressions.Zeros(), [[0.0, 0.0], [0.0, 0.0]]),
    "ones": Drawn(expressions.Ones(), [[1.0, 1.0], [1.0, 1.0]]),
    # a row of the generator, twice
    "grouped": Drawn(expressions.Grouped(expressions.Normal(0.5), 2), [[0.05153925, 0.28533474], [0.05153925, 0.28533474]]),
    # a = (.10307850, .57066947) and b = (.87467790, .15466715): a / |a|, and what b has beside it, each of length 2
    "orthogonal": Drawn(expressions.Orthogonal(2.0), [[0.35550186, 1.96815097], [1.96815097, -0.35550186]]),
}  # fmt: skip
"""By the initialiser's name. tests/test_methods.py asks for one of each."""


@pytest.mark.parametrize("name", DRAWN_BY_HAND)
def test_drawn_by_hand(name: str) -> None:
    method, expected = DRAWN_BY_HAND[name]
    torch.testing.assert_close(initialise(method, (2, 2), 0, "w"), torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("wide", ["F32", "F64"])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(2, 2), (1, 7), (8, 8), (6, 300)])
@pytest.mark.parametrize("name", DRAWN_BY_HAND)
def test_the_second_way_to_a_new_tensor_is_the_first(name: str, shape: tuple[int, int], dtype: str, wide: str) -> None:
    """From any row on, rounded once; a number that is a few roundings off is found, also where it should be 0."""
    method = DRAWN_BY_HAND[name].method
    init = expressions.Init(method, "w", 3, wide, shape)
    written = rounded(initialise(method, shape, 3, "w", TORCH_DTYPES[wide]), dtype)
    for start in range(shape[0]):
        assert worst(written[start:], rederive(init, cast(Any, None), {}, start, shape[0], dtype), dtype)[0] <= 1
    coarse = torch.finfo(torch.float32 if (dtype, wide) == ("F64", "F32") else written.dtype)
    step = 2.0**14 if dtype == wide == "F64" else 8.0  # two ways to an orthogonal matrix differ in float64's last digits
    off = written.clone()
    off[-1, -1] = off[-1, -1].double() * (1 + step * coarse.eps) + coarse.tiny
    assert worst(off, rederive(init, cast(Any, None), {}, 0, shape[0], dtype), dtype)[0] > 1


def test_normal_has_the_stated_distribution() -> None:
    w = initialise(expressions.Normal(0.02), (64, 512), 0, "w")
    assert float(w.mean()) == pytest.approx(0.0, abs=5 * 0.02 / math.sqrt(w.numel()))
    assert float(w.std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * w.numel()))
    kurtosis = float((w / w.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=0.15)


def test_normal_is_this_stream_for_good() -> None:
    """Literal values: what a recipe made once it must make again, on any machine and with any later numpy."""
    w = initialise(expressions.Normal(1.0), (1, 4), 0, "model.layers.0.mlp.router.weight").flatten().tolist()
    assert w == pytest.approx([1.3313144813574536, -0.8343493396268815, -0.04953526299449843, 0.6577279475849572], abs=1e-7)


@pytest.mark.parametrize(("bound", "limit"), [(0.3, 0.3), (None, 1 / 16)])
def test_uniform(bound: float | None, limit: float) -> None:
    w = initialise(expressions.Uniform(bound), (16, 256), 0, "w")
    assert float(w.abs().max()) <= limit
    assert float(w.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_orthogonal_rows() -> None:
    w = initialise(expressions.Orthogonal(2.0), (4, 32), 0, "w")
    torch.testing.assert_close(w @ w.T, 4.0 * torch.eye(4))


def test_zeros() -> None:
    assert not initialise(expressions.Zeros(), (3, 5), 0, "w").any()


def test_randomness_depends_on_seed_and_name_alone() -> None:
    first = initialise(expressions.Normal(1.0), (4, 8), 0, "a")
    assert torch.equal(first, initialise(expressions.Normal(1.0), (4, 8), 0, "a"))
    assert not torch.equal(first, initialise(expressions.Normal(1.0), (4, 8), 0, "b"))
    assert not torch.equal(first, initialise(expressions.Normal(1.0), (4, 8), 1, "a"))
