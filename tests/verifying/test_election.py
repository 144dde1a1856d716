"""Elected signs (TIES, DARE-TIES) and every sum, against exact fractions; and verification's own way to them, against the kernels."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.merging.kernels import Chunk, combine, survey
from bam_merge.values.streams import uniforms
from bam_merge.values.tensors import TORCH_DTYPES, rounded
from bam_merge.verifying.election import elect
from bam_merge.verifying.rederive.deriving import COMPUTING, Rows, derive, difference
from bam_merge.verifying.rounding import Derived, nearest, worst

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def computed(method: expressions.Method, operands: list[Tensor], base: Tensor | None) -> Tensor:
    """What the kernels make of whole tensors, in their computing dtype."""
    dtype = torch.float64 if operands[0].dtype == torch.float64 else torch.float32
    chunk = Chunk(0, [x.to(dtype) for x in operands], None if base is None else base.to(dtype))
    return combine(method, chunk, survey(method, lambda: iter([chunk]), len(operands[0])))


def exactly(method: Any, operands: list[Tensor], base: Tensor) -> list[Fraction]:
    """TIES or DARE-TIES by its formula, in fractions; the weights are the recipe's decimals, the differences are rounded once."""
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    deltas = [(x.to(dtype) - base.to(dtype)).tolist() for x in operands]
    density = Fraction(repr(method.density))
    if isinstance(method, expressions.Ties):
        keep = max(1, math.floor(method.density * len(base)))
        least = [sorted(map(abs, d))[-keep] for d in deltas]
        kept = [[Fraction(value) if abs(value) >= t else Fraction(0) for value in d] for d, t in zip(deltas, least, strict=True)]
        density = Fraction(1)
    else:
        masks = [uniforms(method.seed, stream, 0, len(base)) < method.density for stream in method.streams]
        kept = [
            [Fraction(value) if keep else Fraction(0) for value, keep in zip(d, mask, strict=True)]
            for d, mask in zip(deltas, masks, strict=True)
        ]
    weights = [Fraction(repr(weight)) for weight in method.weights]
    result = []
    for place, start in enumerate(base.tolist()):
        terms = [(w, d[place]) for w, d in zip(weights, kept, strict=True)]
        total = sum(w * d for w, d in terms)
        agree = [(w, d) for w, d in terms if w * d * total > 0]
        step = sum(w * d for w, d in agree) / density / sum(abs(w) for w, _ in agree) if agree else Fraction(0)
        result.append(Fraction(start) + Fraction(repr(method.scale)) * step)
    return result


def branches(dtype: torch.dtype, count: int, size: int, coarse: bool = False) -> list[Tensor]:
    """A base and `count` branches of it. `coarse`: with as many ties as bfloat16 has, whatever the dtype."""
    generator = torch.Generator().manual_seed(size + count)
    base = torch.randn(size, generator=generator, dtype=torch.float64) * 0.05
    steps = [torch.randn(size, generator=generator, dtype=torch.float64) * 3e-4 for _ in range(count)]
    return [(x.bfloat16() if coarse else x).to(dtype) for x in (base, *(base + step for step in steps))]


WEIGHTS = [
    (1.0, 1.0),
    (0.3, 0.3),
    (1.0, 1.0, 1.0),
    (0.2, 0.3, 0.5),
    (0.1, 0.2, 0.3),
    (0.37, 1.91, 0.004),
    (-1.0, 1.0),
    (0.5, -0.5, 1.0),
    (-0.2, -0.3, 0.5),
    (0.7, 0.0, -0.1),
    (0.0, 0.0),
]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elections_are_the_formula(dtype: torch.dtype, weights: tuple[float, ...], coarse: bool) -> None:
    """Ties included, which are exact whatever the weights and the density: to a few roundings of the computing dtype."""
    base, *operands = branches(dtype, len(weights), 400, coarse)
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    for method in (
        expressions.Ties(0.4, weights, 1.0),
        expressions.Ties(1.0, weights, 0.7),
        expressions.DareTies(0.7, weights, 1.0, 3, ("a", "b", "c")[: len(weights)]),
    ):
        expected = exactly(method, operands, base)
        for place, (found, right) in enumerate(zip(computed(method, operands, base).tolist(), expected, strict=True)):
            size = abs(base[place].item()) + max(abs(x[place].item()) for x in operands)
            assert abs(Fraction(found) - right) <= Fraction(12 * unit * size), (method, place)
        ties = [place for place, value in enumerate(expected) if value == Fraction(base[place].item())]
        assert all(computed(method, operands, base)[place].item() == base[place].item() for place in ties)


def test_a_threshold_of_float64_has_all_its_digits() -> None:
    """Four differences that are one in float32: the two largest are kept, in any order."""
    steps = [1 + 3e-12, 1 + 1e-12, 1 + 4e-12, 1 + 2e-12]
    found = computed(expressions.Ties(0.5, (1.0,), 1.0), [torch.tensor(steps, dtype=torch.float64)], torch.zeros(4, dtype=torch.float64))
    assert found.tolist() == [1 + 3e-12, 0.0, 1 + 4e-12, 0.0]


@pytest.mark.parametrize("values", [[5e-324, 1e-310, 0.0, 2.5e-308], [1e300, 1.5e300, 1e-300, 1.0], [float("nan"), 1.0, float("inf"), 2.0]])
def test_thresholds_at_the_ends_of_float64(values: list[float]) -> None:
    d = torch.tensor(values, dtype=torch.float64)
    found = survey(expressions.Ties(0.5, (1.0,), 1.0), lambda: iter([Chunk(0, [d], torch.zeros_like(d))]), 4)
    assert found == [sorted((math.inf if math.isnan(v) else abs(v) for v in values), reverse=True)[1]]


METHODS: list[Any] = [
    expressions.Mean(), expressions.Linear((0.3, 0.3, 0.4)), expressions.TaskArithmetic((0.3, 1.0, 0.7), 0.6), expressions.Ties(0.3, (0.3, 0.3, 0.7), 1.0),
    expressions.DareTies(0.3, (0.3, 1.0, 0.7), 1.0, 0, ("a", "b", "c")), expressions.DareTies(0.5, (1.0, 1.0, 1.0), -0.4, 0, ("a", "b", "c")),
    expressions.Ties(0.3, (0.3, -0.3, 0.7), 1.0), expressions.DareTies(0.3, (-0.3, 0.0, -0.7), 1.0, 0, ("a", "b", "c")),
]  # fmt: skip


def derived(method: Any, operands: list[Tensor], base: Tensor | None) -> Derived:
    computing = COMPUTING[operands[0].dtype == torch.float64]
    known: Any = None
    if isinstance(method, expressions.Ties):
        assert base is not None
        keep = math.floor(method.density * len(base))
        known = [float(difference(x, base, computing).abs().sort(descending=True).values[keep - 1]) for x in operands]
    return derive(method, Rows(operands, base, known, 0, computing))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_way_agrees_with_the_kernels_and_with_little_else(dtype: torch.dtype, method: Any) -> None:
    """In the computing dtype itself, where nothing hides behind a coarser rounding: within the bound, which a few roundings exceed."""
    wide = "F64" if dtype == torch.float64 else "F32"
    for coarse in (False, True):
        base, *operands = branches(dtype, 3, 5000, coarse)
        start = None if isinstance(method, expressions.Mean | expressions.Linear) else base
        found, second = computed(method, operands, start), derived(method, operands, start)
        if wide == "F64":
            assert second.slack is not None
            second.slack += second.value.abs() * 2.0**-53  # of the last addition here
        assert worst(found, second, wide)[0] <= 1
        assert not second.others
        off = found * (1 + 40 * torch.finfo(found.dtype).eps)
        assert worst(off, second, wide)[0] > 1


def test_a_doubtful_sign_has_three_outcomes_and_no_more() -> None:
    """1 + 2^-60 - 1 is 2^-60, or 0 where the 1 came before it: the mean of the positive differences, the negative one, or the base."""
    base = torch.tensor([[0.25, 0.25]], dtype=torch.float64)
    deltas = [torch.tensor([[d, d]], dtype=torch.float64) for d in (1.0, 2.0**-60, -1.0)]
    deltas[2][0, 1] = -0.5  # here there is no doubt
    result = elect(expressions.Ties(1.0, (1.0, 1.0, 1.0), 1.0), deltas, base, 2.0**-24, 2.0**-149)
    assert {tuple(other.index.tolist()) for other in result.others} == {(0,)}
    for value in (0.25, 0.25 + 0.5, 0.25 - 1.0):
        assert worst(torch.tensor([[value, 0.75]], dtype=torch.bfloat16), result, "BF16")[0] <= 1
    for value in (0.5, 30000.0, -0.5, 0.25 + 1.0, 0.25 + 2.0**-9):
        assert worst(torch.tensor([[value, 0.75]]), result, "F32")[0] > 1
    assert worst(torch.tensor([[0.25, 0.25]]), result, "F32")[0] > 1  # a tie is an outcome of the first only
    assert worst(torch.tensor([[0.25, -0.25]]), result, "F32")[1] == 1


# ---- rounding


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_nearest_is_one_rounding_to_even(wide: torch.dtype, dtype: str) -> None:
    """Halfway between neighbours, a hair beside, at every scale down to the subnormals, and at the end of the range."""
    narrow = TORCH_DTYPES[dtype]
    edges = torch.tensor([65504.0, 65519.0, 65520.0, 3.3895e38, 3.4e38, 6e-8, 2.0**-25, 2.0**-24, 1e-40, 1e-45, 0.0], dtype=wide)
    some = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=wide) * torch.exp2(torch.linspace(-30, 14, 2000, dtype=wide))
    grid = some.to(narrow).to(wide)
    middle = grid * (1 + torch.finfo(narrow).eps / 2)
    values = torch.cat([edges, some, grid, middle, middle * (1 + 4 * torch.finfo(wide).eps), middle * (1 - 4 * torch.finfo(wide).eps)])
    values = torch.cat([values, -values, torch.tensor([math.inf, -math.inf], dtype=wide)])
    found = nearest(values, dtype)
    assert torch.equal(found, rounded(values, dtype).to(wide))
    assert torch.equal(found.to(narrow).to(wide), found)
    finite = found.isfinite()
    below, above = (torch.nextafter(found[finite].to(narrow), torch.tensor(end, dtype=narrow)).to(wide) for end in (-math.inf, math.inf))
    error = (values[finite] - found[finite]).abs()
    assert bool((error <= (values[finite] - below).abs()).all())
    assert bool((error <= (values[finite] - above).abs()).all())
    assert nearest(torch.tensor([math.nan], dtype=wide), dtype).isnan().all()


def test_float64_is_rounded_to_16_bits_once() -> None:
    """A hair above the middle of two bfloat16, which float32 takes for the middle: up, where torch's way goes down to the even one."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).tolist() == [1.0, 1 + 2.0**-6]
    assert rounded(value, "BF16").tolist() == [1 + 2.0**-7, 1 + 2.0**-7]
    exact = Derived(value)
    assert worst(rounded(value, "BF16"), exact, "BF16")[0] <= 1
    assert worst(value.to(torch.bfloat16), exact, "BF16")[0] > 1
