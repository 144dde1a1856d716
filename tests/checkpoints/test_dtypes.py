"""The table of dtypes: every entry against torch, numpy, the safetensors library and the standards' own figures."""

import json

import numpy as np
import pytest
import safetensors
import torch

from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_NAMES, DTYPES, MEASURED, Dtype, config_name
from bam_merge.recipe.schema import Output
from bam_merge.values import nonfinite
from bam_merge.values.tensors import STORED_DTYPES

FORMAT = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E5M2FNUZ",
    "F8_E4M3FNUZ",
    "F8_E8M0",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
]
"""safetensors' `Dtype`."""


every = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


def test_the_names_are_the_formats() -> None:
    assert sorted(DTYPES) == sorted(FORMAT) and all(name == dtype.name for name, dtype in DTYPES.items())


@every
def test_the_library_takes_so_many_bits_for_an_element(dtype: Dtype) -> None:
    """Eight elements, whose bytes are the element's bits; a byte more or less is refused."""
    for nbytes in (dtype.bits - 1, dtype.bits, dtype.bits + 1):
        header = json.dumps({"x": {"dtype": dtype.name, "shape": [8], "data_offsets": [0, nbytes]}}).encode()
        data = len(header).to_bytes(8, "little") + header + bytes(nbytes)
        if nbytes == dtype.bits:
            ((name, record),) = safetensors.deserialize(data)
            assert (name, record["dtype"], len(record["data"])) == ("x", dtype.name, nbytes)
        else:
            with pytest.raises(safetensors.SafetensorError):
                safetensors.deserialize(data)


@every
def test_torch_has_it_with_these_figures(dtype: Dtype) -> None:
    if dtype.torch is None:
        assert dtype.bits < 8
        return
    found = STORED_DTYPES[dtype.name]
    assert str(found) == f"torch.{dtype.torch}" and found.itemsize * 8 == dtype.bits
    assert found.is_floating_point == (dtype.kind == "float") and found.is_complex == (dtype.kind == "complex")
    if dtype.kind in ("signed", "unsigned"):
        assert torch.iinfo(found).bits == dtype.bits and (torch.iinfo(found).min < 0) == (dtype.kind == "signed")
    if dtype.kind in ("float", "complex"):
        figures = torch.finfo(found)
        assert figures.max == dtype.largest
        if dtype.name != "F8_E5M2FNUZ":  # torch's figure there, 1/8, is not the distance of its own numbers
            assert figures.eps == 2.0**-dtype.mantissa_bits
            assert figures.smallest_normal * figures.eps == dtype.least
        assert figures.smallest_normal == 2.0**dtype.smallest_exponent


@every
def test_one_and_the_next_number_are_where_the_parts_say(dtype: Dtype) -> None:
    if dtype.kind != "float" or dtype.torch is None:
        return
    one = dtype.bias << dtype.mantissa_bits
    data = bytearray(np.array([one, one + 1], f"<u{dtype.bits // 8}").tobytes())
    assert torch.frombuffer(data, dtype=STORED_DTYPES[dtype.name]).double().tolist() == [1.0, 1 + 2.0**-dtype.mantissa_bits]


@every
def test_numpy_has_it_in_the_same_bytes(dtype: Dtype) -> None:
    if dtype.numpy is None:
        assert dtype.kind == "float" and dtype.name not in ("F64", "F32", "F16")
        return
    found = np.dtype(dtype.numpy)
    assert found.itemsize * 8 == dtype.bits and found.newbyteorder("=") == np.dtype(dtype.torch)
    if dtype.kind in ("float", "complex"):
        figures = np.finfo(found)
        assert (figures.nmant, figures.minexp) == (dtype.mantissa_bits, dtype.smallest_exponent)
        assert float(figures.max) == dtype.largest and float(figures.smallest_subnormal) == dtype.least


@every
def test_a_float_is_made_of_its_parts(dtype: Dtype) -> None:
    if dtype.kind not in ("float", "complex"):
        assert dtype.exponent_bits == dtype.mantissa_bits == dtype.bias == 0 and dtype.special == "none"
        return
    sign = 0 if dtype.special == "scale" else 1
    assert (sign + dtype.exponent_bits + dtype.mantissa_bits) * (2 if dtype.kind == "complex" else 1) == dtype.bits
    assert dtype.bias - 2 ** (dtype.exponent_bits - 1) == (0 if dtype.special == "fnuz" else -1)


@pytest.mark.parametrize(("name", "largest", "least"), [("F4", 6, 0.5), ("F6_E2M3", 7.5, 0.125), ("F6_E3M2", 28, 0.0625)])
def test_the_largest_and_least_of_the_microscaling_formats(name: str, largest: float, least: float) -> None:
    """OCP microscaling formats 1.0, tables 3 to 5: the numbers that torch has no dtype for."""
    assert (DTYPES[name].largest, DTYPES[name].least) == (largest, least)


@every
def test_every_pattern_that_is_no_finite_number_is_found(dtype: Dtype) -> None:
    """All patterns of 8 and 16 bits, and of the wider ones those around the limits, as torch sees them."""
    if dtype.torch is None:
        assert dtype.name not in nonfinite.LOWEST | nonfinite.ONE_PATTERN
        return
    size = nonfinite.BYTES.get(dtype.name, 1 if dtype.bits == 8 else dtype.bits // 8)
    top = 1 << (8 * size - 1)
    if size <= 2:
        patterns = list(range(2 * top))
    else:
        limit = nonfinite.LOWEST.get(dtype.name, top - 2)
        patterns = [sign | place for sign in (0, top) for place in (0, 1, limit - 1, limit, limit + 1, top - 1)]
    data = bytearray(np.array(patterns, f"<u{size}").tobytes())
    values = torch.frombuffer(data, dtype=STORED_DTYPES[dtype.name])
    if dtype.kind == "bool":
        data, values = bytearray([0, 1]), torch.tensor([False, True])
    odd = ~torch.isfinite(values.float() if dtype.bits == 8 else values)
    assert nonfinite.nonfinite_places(memoryview(data), dtype.name).tolist() == odd.nonzero()[:, 0].tolist()
    assert bool(odd.any()) == (dtype.special != "none")


def test_what_is_computed_with_is_what_a_recipe_may_ask_for() -> None:
    assert [DTYPES[name].torch for name in ARITHMETIC_DTYPES] == ["float64", "float32", "float16", "bfloat16"]
    asked = Output.model_fields["dtype"].annotation.__args__
    assert {DTYPE_NAMES[name] for name in asked if name != "source"} < set(ARITHMETIC_DTYPES)
    assert all(config_name(DTYPE_NAMES[name]) == name for name in DTYPE_NAMES)
    assert [DTYPES[name].mantissa_bits for name in ARITHMETIC_DTYPES] == [52, 23, 10, 7]  # a merge of several dtypes takes the first
    assert set(ARITHMETIC_DTYPES) < MEASURED == set(DTYPES) - {"C64", "F4", "F6_E2M3", "F6_E3M2"}
