"""Stored values as numpy arrays: what torch makes of the same bytes."""

import numpy as np
import pytest
import torch

from bam_merge.checkpoints.dtypes import DTYPES, MEASURED
from bam_merge.values.arrays import dot, is_float, steps_apart, stored_integers, widen
from bam_merge.values.tensors import STORED_DTYPES as TORCH


@pytest.mark.parametrize("dtype", sorted(MEASURED & TORCH.keys()))
def test_every_bit_pattern_has_torchs_value(dtype: str) -> None:
    kind = TORCH[dtype]
    data = bytearray(range(256)) if kind.itemsize == 1 else bytearray(np.arange(2**16, dtype="<u2").tobytes())
    if kind == torch.bool:
        data = bytearray([0, 1])
    x = torch.frombuffer(data, dtype=kind)
    expected = (x.float() if kind.itemsize == 1 and kind.is_floating_point else x).double().numpy()
    narrow = kind.is_floating_point and kind.itemsize < 8
    for wide in (np.float64, *((np.float32,) if narrow else ())):
        found = widen(memoryview(data), dtype, np.empty(2**16, wide))
        with np.errstate(invalid="ignore"):  # signalling NaNs
            np.testing.assert_array_equal(found.astype(np.float64), expected)
    assert len(stored_integers(data, dtype)) == len(expected)


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_the_largest_number_is_torchs(dtype: str) -> None:
    if is_float(dtype):
        assert DTYPES[dtype].largest == torch.finfo(TORCH[dtype]).max


@pytest.mark.parametrize(
    ("dtype", "kind"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32), ("F64", torch.float64)]
)
def test_steps_count_the_values_between(dtype: str, kind: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0, 0.0, 3e-5], dtype=kind)
    up = (
        torch.nextafter(x, torch.tensor(float("inf"), dtype=kind))
        if kind != torch.float16
        else (x.view(torch.int16) + torch.tensor([1, -1, 1, 1], dtype=torch.int16)).view(kind)
    )
    a, b = (t.double().numpy() for t in (x, up))
    assert steps_apart(a, b, dtype) == 1 == steps_apart(b, a, dtype) and steps_apart(a, a, dtype) == 0
    assert steps_apart(np.array([0.0]), np.array([-0.0]), dtype) == 0
    assert steps_apart(np.array([1.0]), np.array([1.1]), dtype) > 10


@pytest.mark.parametrize("length", [0, 1, 511, 512, 2**18, 2**18 + 7])
def test_inner_products_are_exact_to_float32(length: int) -> None:
    """Whatever the processor's BLAS does: one that sums a long row in float32 would lose 7e-6 of it."""
    a, b = (np.random.default_rng(seed).standard_normal(length).astype("f4") for seed in (1, 2))
    for one, other in ((a, a), (a, b)):
        exact = float(np.dot(one.astype("f8"), other.astype("f8")))
        scale = float(np.linalg.norm(one.astype("f8")) * np.linalg.norm(other.astype("f8")))
        assert dot(one, other) == pytest.approx(exact, abs=5e-7 * scale)
        assert dot(one.astype("f8"), other.astype("f8")) == pytest.approx(exact, rel=1e-12)
