"""Seeded randomness against a second generator, written here from the papers: merge and verification have only one between them."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from bam_merge import expressions
from bam_merge.values.streams import NORMALS, generator, initialise, uniforms
from bam_merge.values.streams import normals as streamed

MASK = 2**64 - 1


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011, figure 1): four 64-bit words of a 256-bit counter and a 128-bit key."""
    a, b, c, d = (counter >> shift & MASK for shift in (0, 64, 128, 192))
    left, right = key & MASK, key >> 64
    for _ in range(10):
        one, other = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (other >> 64) ^ b ^ left, other & MASK, (one >> 64) ^ d ^ right, one & MASK
        left, right = left + 0x9E3779B97F4A7C15 & MASK, right + 0xBB67AE8584CAA73B & MASK
    return [a, b, c, d]


def stream(seed: int, name: str) -> Iterator[float]:
    """Numbers in [0, 1) of 53 bits; the counter is raised before it is first used."""
    key, counter = xxhash.xxh3_128_intdigest(f"{seed}:{name}".encode()), 0
    while True:
        counter += 1
        yield from ((word >> 11) * 2.0**-53 for word in philox(counter, key))


def normals(seed: int, name: str, count: int) -> list[float]:
    """Marsaglia's polar method (1964): of each pair the second number comes first."""
    numbers, found = stream(seed, name), []
    while len(found) < count:
        x, y = (2 * next(numbers) - 1 for _ in range(2))
        square = x * x + y * y
        if 0 < square < 1:
            factor = math.sqrt(-2 * math.log(square) / square)
            found += [factor * y, factor * x]
    return found[:count]


def test_philox_gives_the_published_answer() -> None:
    """Random123's known answer for zeros."""
    assert philox(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


def test_a_stream_is_this_one_for_good() -> None:
    """The first numbers, and the key of a seed and a name: what a recipe made once it must make again."""
    assert xxhash.xxh3_128_intdigest(b"3:dare:law:attn.q:0") == 0xC7BEDE149BCEDE30D0D8F001CA34EF0E
    words = [0x3CCEECBBA0BBC377, 0xD31E6824E2782DFA, 0x0A49E63486573C65, 0x4855F8464A018E74]
    assert uniforms(3, "dare:law:attn.q:0", 0, 4).tolist() == [(word >> 11) * 2.0**-53 for word in words]


@given(st.integers(0, 2**63), st.text(max_size=20), st.integers(0, 50), st.integers(0, 20))
def test_any_part_of_a_stream_is_that_part_of_it(seed: int, name: str, start: int, count: int) -> None:
    numbers = stream(seed, name)
    expected = [next(numbers) for _ in range(start + count)][start:]
    assert uniforms(seed, name, start, count).tolist() == expected


@given(st.integers(0, 2**63), st.integers(0, 2 * NORMALS), st.integers(0, 50))
def test_any_part_of_a_stream_of_normal_numbers_is_that_part_of_it(seed: int, start: int, count: int) -> None:
    """Block b of it is the stream `name:b`."""
    whole = np.concatenate([generator(seed, f"noise:{block}").standard_normal(NORMALS) for block in range(4)])
    assert streamed(seed, "noise", start, count).tolist() == whole[start : start + count].tolist()


def test_a_stream_of_normal_numbers_is_this_one_for_good() -> None:
    assert streamed(5, "noise", 0, 63).tolist() == pytest.approx(normals(5, "noise:0", 63), rel=1e-14)
    assert streamed(5, "noise", NORMALS - 1, 3).tolist()[1:] == pytest.approx(normals(5, "noise:1", 2), rel=1e-14)


@pytest.mark.parametrize(("bound", "limit"), [(0.3, 0.3), (None, 5**-0.5)])
def test_uniform_is_its_stream(bound: float | None, limit: float) -> None:
    found = initialise(expressions.Uniform(bound), (7, 5), 11, "router", torch.float64)
    numbers = stream(11, "router")
    assert found.flatten().tolist() == [(2 * next(numbers) - 1) * limit for _ in range(35)]


def test_normal_is_its_stream() -> None:
    found = initialise(expressions.Normal(0.02), (9, 7), 5, "router", torch.float64)
    assert found.flatten().tolist() == pytest.approx([0.02 * x for x in normals(5, "router", 63)], rel=1e-14)


def test_orthogonal_rows_are_those_of_the_normal_ones() -> None:
    """Gram and Schmidt, twice: from normal rows it gives the uniform distribution, and only one matrix of that orientation."""
    rows = np.array(normals(5, "router", 4 * 9)).reshape(4, 9)
    made: list[np.ndarray] = []
    for row in rows:
        for _ in range(2):
            row = row - sum((one * (one @ row) for one in made), np.zeros(9))
        made.append(row / np.linalg.norm(row))
    found = initialise(expressions.Orthogonal(3.0), (4, 9), 5, "router", torch.float64)
    np.testing.assert_allclose(found.numpy(), 3 * np.array(made), rtol=0, atol=1e-14)
