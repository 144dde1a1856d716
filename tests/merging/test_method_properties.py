"""What each merge method promises, on tensors that hypothesis draws: many equal entries, zeros, opposite and equal sources, one row and several."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Read
from bam_merge.merging.kernels import Chunk, combine, survey
from bam_merge.values.streams import uniforms
from bam_merge.values.tensors import TORCH_DTYPES, rounded
from bam_merge.verifying.rederive import rederive, survey_all
from bam_merge.verifying.rounding import worst

STREAMS = ("a", "b", "c", "d", "e")


def merged(method: Any, operands: list[Tensor], base: Tensor | None, most: int = 4) -> Tensor:
    """What the kernels make of tensors of one shape, in chunks of about `most` elements, whole rows where the method works by them."""
    dtype = torch.float64 if operands[0].dtype == torch.float64 else torch.float32
    shape, total = operands[0].shape, operands[0].numel()
    row = shape[-1] if len(shape) > 1 else None
    step = max(1, most // row) * row if row and method.about.by_rows else most
    wide = [None if x is None else x.to(dtype).flatten() for x in (*operands, base)]

    def chunks() -> Any:
        for start in range(0, total, step):
            *parts, base_C = (None if x is None else x[start : start + step].clone() for x in wide)
            yield Chunk(start, cast(Any, parts), base_C, row)

    known = survey(method, chunks, total)
    return torch.cat([combine(method, chunk, known) for chunk in chunks()]).view(shape)


class Stored:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def piece(self, expr: Any, start: int, stop: int) -> Tensor:
        return self.tensors[int(expr.tensor)][start:stop]


def off_by(found: Tensor, method: Any, operands: list[Tensor], base: Tensor | None, dtype: str, first: int = 0) -> float:
    """How far `found`, rows from `first` on, is from the second way's, in units of what is allowed."""
    names = {value: key for key, value in TORCH_DTYPES.items()}
    tensors = [*operands, *([] if base is None else [base])]
    reads = [(str(i), Read("seed", str(i), names[x.dtype], tuple(x.shape))) for i, x in enumerate(tensors)]
    wide = next(name for name in ("F64", "F32", "F16", "BF16") if name in {names[x.dtype] for x in tensors})
    merge = expressions.Merge(method, tuple(reads[: len(operands)]), None if base is None else reads[-1], wide, tuple(operands[0].shape))
    sources = cast(Any, Stored(tensors))
    return worst(found[first:], rederive(merge, sources, survey_all(merge, sources), first, len(operands[0]), dtype), dtype)[0]


# ---- both ways agree -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A method of `count` operands, its numbers drawn."""

    make: Callable[[int, float, float, tuple[float, ...]], Any]
    least: int = 1


CASES = {
    "dare_linear": Case(lambda n, density, share, weights: expressions.DareLinear(density, weights, 0.7, 1, STREAMS[:n])),
    "breadcrumbs": Case(lambda n, density, share, weights: expressions.Breadcrumbs(density, share, weights, 0.7)),
    "della": Case(
        lambda n, density, share, weights: expressions.Della(
            density, share * min(density, 1 - density) * 0.99, weights, 0.7, 1, STREAMS[:n]
        )
    ),
    "ties": Case(lambda n, density, share, weights: expressions.Ties(density, weights, 0.7)),
    "dare_ties": Case(lambda n, density, share, weights: expressions.DareTies(density, weights, 0.7, 1, STREAMS[:n])),
    "ram": Case(lambda n, density, share, weights: expressions.Ram(0.25 * share + 1e-5)),
    "sce": Case(lambda n, density, share, weights: expressions.Sce(density)),
    "model_stock": Case(lambda n, density, share, weights: expressions.ModelStock()),
    "karcher": Case(lambda n, density, share, weights: expressions.Karcher(), 1),
    "nuslerp": Case(lambda n, density, share, weights: expressions.Nuslerp(share, "rows"), 2),
    "nuslerp of tensors": Case(lambda n, density, share, weights: expressions.Nuslerp(share, "tensor"), 2),
}
GRID = st.sampled_from([0.0, 0.0, 0.25, -0.25, 0.5, 1.0, -1.0, 1.5]) | st.integers(-40, 40).map(lambda value: value / 16)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@st.composite
def tensors(draw: st.DrawFn, least: int) -> tuple[list[Tensor], Tensor]:
    """Operands and a base, of one row or of several; sometimes two are alike or opposite, and all are some thousandths from the base."""
    shape = draw(st.sampled_from([(1,), (2,), (7,), (16,), (1, 1), (1, 9), (3, 1), (4, 5), (2, 3, 4)]))
    count = 2 if least == 2 else draw(st.integers(least, 4))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    size = math.prod(shape)
    values = st.lists(GRID, min_size=size, max_size=size)
    base = torch.tensor(draw(values), dtype=torch.float64)
    deltas = [torch.tensor(draw(values), dtype=torch.float64) * draw(st.sampled_from([1.0, 1.0, 1 / 300, 0.0])) for _ in range(count)]
    alike = draw(st.sampled_from(["", "", "same", "opposite"]))
    if alike and count > 1:
        deltas[1] = deltas[0] if alike == "same" else -deltas[0]
    if draw(st.booleans()):
        base = base * 0
    return [(base + delta).to(dtype).view(shape) for delta in deltas], base.to(dtype).view(shape)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_both_ways_agree(name: str, data: st.DataObject) -> None:
    """From any row on, whatever the chunks; and the second way says so when a number is off."""
    operands, base = data.draw(tensors(CASES[name].least))
    density = data.draw(st.sampled_from([0.1, 0.34, 0.5, 0.9, 1.0]))
    weights = tuple(data.draw(st.lists(st.sampled_from([1.0, 0.5, 0.3, -0.5, 0.0, 2.0]), min_size=len(operands), max_size=len(operands))))
    method = CASES[name].make(len(operands), density, data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])), weights)
    start = base if method.about.base else None
    dtype = next(key for key, value in DTYPES.items() if value == operands[0].dtype)
    computed = merged(method, operands, start)
    written = rounded(computed, dtype)
    first = data.draw(st.integers(0, len(base) - 1))
    assert off_by(written, method, operands, start, dtype, first) <= 1
    if not method.about.surveyed or dtype != "F64":  # sums of other parts differ in the last digits, which float64 shows
        torch.testing.assert_close(merged(method, operands, start, 1000), computed, rtol=1e-6, atol=1e-7)
    wrong = written.clone()
    wrong[-1] += torch.where(wrong[-1] < 0, -1.0, 1.0) * (wrong[-1].abs() + 1) * 2.0**-6
    assert off_by(wrong, method, operands, start, dtype) > 1


# ---- what each promises ----------------------------------------------------------------------------------------------------

vectors = st.lists(st.integers(-64, 64).map(lambda value: value / 16), min_size=8, max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)
several = st.lists(vectors, min_size=2, max_size=4)


def angle(a: Tensor, b: Tensor) -> float:
    a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


@settings(max_examples=60, deadline=None)
@given(several, vectors)
def test_model_stock_is_on_the_line_from_the_base_to_the_mean(operands: list[Tensor], base: Tensor) -> None:
    """At the share of the mean cosine, whatever the order of the sources."""
    found = merged(expressions.ModelStock(), operands, base)
    deltas = [x - base for x in operands]
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[:i]]
    c = sum(math.cos(angle(a, b)) if a.any() and b.any() else 0.0 for a, b in pairs) / len(pairs)
    bottom = 1 + (len(deltas) - 1) * c
    if abs(bottom) > 1e-3:
        step = len(deltas) * c / bottom * sum(d.double() for d in deltas) / len(deltas)
        torch.testing.assert_close(found.double(), base + step, rtol=1e-5, atol=1e-5 + 1e-6 / bottom**2)
        torch.testing.assert_close(found, merged(expressions.ModelStock(), operands[::-1], base), rtol=1e-5, atol=1e-5 + 1e-6 / bottom**2)


@settings(max_examples=60, deadline=None)
@given(vectors, vectors, st.integers(2, 5))
def test_model_stock_of_equal_sources_is_that_one_and_of_none_the_base(base: Tensor, one: Tensor, count: int) -> None:
    torch.testing.assert_close(merged(expressions.ModelStock(), [one] * count, base), one, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged(expressions.ModelStock(), [base] * count, base), base)


@settings(max_examples=60, deadline=None)
@given(several, vectors, st.floats(0.05, 1.0))
def test_sce_selects_by_variance_and_stays_among_its_sources(operands: list[Tensor], base: Tensor, density: float) -> None:
    found = merged(expressions.Sce(density), operands, base)
    stacked = torch.stack(operands)
    variance = stacked.double().var(0, unbiased=False)
    keep = math.floor(density * int((stacked != stacked[0]).any(0).sum()))
    if density < 1:
        least = float(variance.sort(descending=True).values[keep - 1]) if keep else math.inf
        assert torch.equal(found[variance < least * (1 - 1e-6)], base[variance < least * (1 - 1e-6)])
    low, high = torch.minimum(stacked.amin(0), base), torch.maximum(stacked.amax(0), base)
    assert bool(((found >= low - 1e-5) & (found <= high + 1e-5)).all())
    torch.testing.assert_close(found, merged(expressions.Sce(density), operands[::-1], base), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(several, vectors, st.sampled_from([1e-5, 0.5, 1.0]))
def test_ram_is_the_mean_of_what_is_active(operands: list[Tensor], base: Tensor, epsilon: float) -> None:
    found = merged(expressions.Ram(epsilon), operands, base)
    for place in range(len(base)):
        active = [float(x[place] - base[place]) for x in operands if abs(float(x[place] - base[place])) > epsilon]
        assert float(found[place]) == pytest.approx(float(base[place]) + (sum(active) / len(active) if active else 0.0), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(several, vectors, st.floats(0.05, 1.0), st.sampled_from([0.0, 0.1, 0.3, 0.9]))
def test_breadcrumbs_is_task_arithmetic_of_the_middle(operands: list[Tensor], base: Tensor, density: float, gamma: float) -> None:
    """Against a sort: what is between the two magnitudes that stand at the ends of what is kept."""
    size, expected = len(base), base.double()
    keep = max(1, math.floor(density * size)) if density < 1 else size
    first = max(0, size - keep - math.floor(gamma * size))
    for x in operands:
        delta = (x - base).double()
        order = delta.abs().sort().values
        expected = expected + torch.where((delta.abs() >= order[first]) & (delta.abs() <= order[first + keep - 1]), delta, 0.0)
    found = merged(expressions.Breadcrumbs(density, gamma, (1.0,) * len(operands), 1.0), operands, base)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(several, vectors, st.floats(0.05, 1.0))
def test_dare_linear_keeps_what_it_draws_and_is_task_arithmetic_of_it(operands: list[Tensor], base: Tensor, density: float) -> None:
    weights = (0.5, -1.0, 2.0, 0.25)[: len(operands)]
    found = merged(expressions.DareLinear(density, weights, 2.0, 3, STREAMS[: len(operands)]), operands, base)
    kept = [torch.from_numpy(uniforms(3, stream, 0, len(base)) < density) for stream in STREAMS[: len(operands)]]
    expected = base + 2 * sum(w * mask * (x - base).double() / density for w, x, mask in zip(weights, operands, kept, strict=True))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    whole = merged(expressions.DareLinear(1.0, weights, 2.0, 3, STREAMS[: len(operands)]), operands, base)
    assert torch.equal(whole, merged(expressions.TaskArithmetic(weights, 2.0), operands, base))


@settings(max_examples=60, deadline=None)
@given(vectors, vectors, st.floats(0.05, 0.95), st.floats(0.0, 1.0))
def test_della_keeps_an_entry_by_its_rank_and_divides_by_its_probability(x: Tensor, base: Tensor, density: float, part: float) -> None:
    epsilon = part * min(density, 1 - density) * 0.99
    delta = (x - base).double()
    found = merged(expressions.Della(density, epsilon, (1.0,), 1.0, 3, ("a",)), [x], base)
    drawn = uniforms(3, "a", 0, len(base))
    for place, value in enumerate(delta.tolist()):
        smaller, equal = int((delta.abs() < abs(value)).sum()), int((delta.abs() == abs(value)).sum())
        p = density + epsilon * (2 * (smaller + (equal - 1) / 2) / (len(base) - 1) - 1)
        assert density - epsilon - 1e-12 <= p <= density + epsilon + 1e-12
        expected = float(base[place]) + (value / p if drawn[place] < p else 0.0)
        assert float(found[place]) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_della_of_rows_is_della_of_each(tmp_path: Any) -> None:
    """The ranks are those of a row, wherever a chunk ends; the stream runs through the tensor."""
    base, x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    method = expressions.Della(0.5, 0.4, (1.0,), 1.0, 3, ("a",))
    found = merged(method, [x], base, 1)
    assert torch.equal(found, merged(method, [x], base, 1000))
    assert not torch.equal(found.flatten(), merged(method, [x.flatten()], base.flatten()))
    order = (x - base).abs().argsort(1).argsort(1)
    p = 0.5 + 0.4 * (2 * order.double() / 4 - 1)
    kept = torch.from_numpy(uniforms(3, "a", 0, 30)).view(6, 5) < p
    torch.testing.assert_close(found.double(), base + torch.where(kept, (x - base) / p, 0.0), rtol=1e-6, atol=1e-6)


def test_della_keeps_the_large_ones_more_often() -> None:
    """Of 4000 rows [1, 2, 3] at density 0.5 and epsilon 0.4: with probabilities 0.1, 0.5 and 0.9, to four standard deviations."""
    x = torch.tensor([[1.0, 2.0, 3.0]]).repeat(4000, 1)
    found = merged(expressions.Della(0.5, 0.4, (1.0,), 1.0, 0, ("a",)), [x], torch.zeros_like(x), 3000)
    for column, p in enumerate((0.1, 0.5, 0.9)):
        kept = found[:, column] != 0
        assert float(kept.float().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))
        torch.testing.assert_close(
            found[kept, column].double(), torch.full((int(kept.sum()),), (column + 1) / p, dtype=torch.float64), rtol=1e-6, atol=0
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(vectors.filter(lambda x: bool(x.any())), min_size=2, max_size=4), vectors)
def test_karcher_has_no_pull_and_the_mean_length(operands: list[Tensor], centre: Tensor) -> None:
    """The mean of the tangents from it to the directions is 0: what defines it. The sources are turned towards a common direction."""
    operands = [x + 8 + centre for x in operands]
    found = merged(expressions.Karcher(), operands, None).double()
    assert float(found.norm()) == pytest.approx(sum(float(x.double().norm()) for x in operands) / len(operands), rel=1e-5)
    m = found / found.norm()
    pull = torch.zeros_like(m)
    for x in operands:
        u = x.double() / x.double().norm()
        flat = u - (u @ m) * m
        pull += angle(u, m) * flat / flat.norm() if float(flat.norm()) > 1e-9 else 0.0
    assert float(pull.norm()) < 1e-5
    torch.testing.assert_close(found.float(), merged(expressions.Karcher(), operands[::-1], None), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(vectors.filter(lambda x: bool(x.any())), vectors.filter(lambda x: bool(x.any())))
def test_karcher_of_two_is_half_way_on_the_arc(a: Tensor, b: Tensor) -> None:
    """Slerp of the directions at 1/2, of the mean length."""
    if angle(a, b) > 3.1:
        return
    found = merged(expressions.Karcher(), [a, b], None).double()
    half = merged(expressions.Slerp(0.5), [a.double() / a.double().norm(), b.double() / b.double().norm()], None)
    torch.testing.assert_close(found, half * (a.double().norm() + b.double().norm()) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("operands", "expected"), [
    ([[1, 2], [-1, -2]], [0, 0]),  # opposite: no mean direction
    ([[2, 0], [-1, 0]], [0.5, 0]),
    ([[0, 0], [3, 4]], [1.5, 2.0]),  # 0 has no direction, and shortens
    ([[0, 0], [0, 0]], [0, 0]),
    ([[1, 0], [-0.5, 0.9], [-0.5, -0.9]], [0, 0]),  # all around
    ([[1, 1], [1, 1], [1, 1]], [1, 1]),
    ([[3, 4]], [3, 4]),
    ([[2e38, 0], [0, 1e-3]], [7.0710677e37, 7.0710677e37]),  # the second one's weight is no float32
])  # fmt: skip
def test_karcher_where_there_is_no_arc(operands: list[list[float]], expected: list[float]) -> None:
    found = merged(expressions.Karcher(), [torch.tensor(x, dtype=torch.float32) for x in operands], None)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("degrees", [
    (0, 0, 150, 135), (-85, -80, 85, 88), (85, 85, -85, -85), (0, 0, 0, 115, 130, 140), (80, -80), (-87, -80, 80, 85, 2),
], ids=str)  # fmt: skip
def test_karcher_of_wide_directions_of_a_plane_is_their_mean_angle(degrees: tuple[int, ...]) -> None:
    """By either way; with them nearly as wide apart as there is a mean."""
    operands = [(1 + place) * direction(own) for place, own in enumerate(degrees)]
    expected = sum(range(1, len(degrees) + 1)) / len(degrees) * direction(sum(degrees) / len(degrees))
    method = expressions.Karcher()
    torch.testing.assert_close(merged(method, operands, None), expected, rtol=1e-12, atol=1e-12)
    assert off_by(expected, method, operands, None, "F64") <= 1


def direction(degrees: float) -> Tensor:
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.lists(vectors, min_size=2, max_size=2), st.floats(0, 1))
def test_nuslerp_by_rows_is_slerp_of_each_row(operands: list[Tensor], t: float) -> None:
    rows = [x.view(2, 4) for x in operands]
    found = merged(expressions.Nuslerp(t, "rows"), rows, None)
    for place in range(2):
        expected = merged(expressions.Slerp(t), [x[place] for x in rows], None)
        torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged(expressions.Nuslerp(t, "tensor"), rows, None), merged(expressions.Slerp(t), rows, None))


@pytest.mark.parametrize("method", [
    expressions.Sce(0.5), expressions.Sce(1.0), expressions.ModelStock(), expressions.Ram(1e-5), expressions.Breadcrumbs(0.5, 0.1, (1.0, 1.0), 1.0),
    expressions.Della(0.5, 0.2, (1.0, 1.0), 1.0, 0, ("a", "b")), expressions.DareLinear(0.5, (1.0, 1.0), 1.0, 0, ("a", "b")),
], ids=lambda method: method.name)  # fmt: skip
def test_without_differences_it_is_the_base(method: Any) -> None:
    base = torch.tensor([[0.1, -2.0, 3.0], [0.0, 5.0, -0.7]])
    assert torch.equal(merged(method, [base, base], base), base)


@pytest.mark.parametrize("name", ["sce", "model_stock", "ram"])
def test_opposite_differences(name: str) -> None:
    """They cancel: nothing is elected, no mean to go to, and no mean but 0."""
    base, step = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -0.25, 1.0])
    method = CASES[name].make(2, 1.0, 0.0, (1.0, 1.0))
    torch.testing.assert_close(merged(method, [base + step, base - step], base), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", CASES)
def test_narrow_sources_are_summed_in_float32_and_rounded_once(name: str, dtype: str) -> None:
    """What a sum or a product in the narrow dtype itself gives is found to be off."""
    generator = torch.Generator().manual_seed(3)
    base = (torch.randn(4, 50, generator=generator)).to(DTYPES[dtype])
    operands = [
        (base.float() + 0.05 * torch.randn(4, 50, generator=generator)).to(DTYPES[dtype]) for _ in range(2 if CASES[name].least == 2 else 3)
    ]
    method = CASES[name].make(len(operands), 0.6, 0.3, (0.7, 0.3, 0.9)[: len(operands)])
    start = base if method.about.base else None
    computed = merged(method, operands, start)
    assert computed.dtype == torch.float32
    assert off_by(rounded(computed, dtype), method, operands, start, dtype) <= 1
    twice = (computed.to(DTYPES[dtype]) * torch.tensor(3.0, dtype=DTYPES[dtype])) / torch.tensor(3.0, dtype=DTYPES[dtype])
    assert off_by(twice, method, operands, start, dtype) > 1
