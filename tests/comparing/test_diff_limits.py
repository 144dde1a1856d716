"""What `diff` calls the same and different, at the limits of its figures: 64-bit integers, float64 beyond its squares, NaN, tolerances."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from safetensors.torch import save_file

from bam_merge.comparing.two_models import diff
from bam_merge.errors import CheckpointError
from bam_merge.showing.comparison import remarks

GENERATOR = torch.Generator().manual_seed(5)
F64, I64, U64 = torch.float64, torch.int64, torch.uint64


def bits(dtype: torch.dtype, *stored: int) -> torch.Tensor:
    return torch.tensor(stored, dtype={1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: I64}[dtype.itemsize]).view(dtype)


UNLIKE = {
    "int64 that no float64 tells apart": (torch.tensor([2**62, 5]), torch.tensor([2**62 + 1, 5])),
    "uint64": (torch.tensor([2**64 - 1], dtype=U64), torch.tensor([2**64 - 2], dtype=U64)),
    "int64 and uint64": (torch.tensor([2**62]), torch.tensor([2**62 + 1], dtype=U64)),
    "int64 and float64": (torch.tensor([2**53 + 1]), torch.tensor([2.0**53], dtype=F64)),
    "a relative difference below float64": (torch.tensor([1e200, 1e-200], dtype=F64), torch.tensor([1e200, 2e-200], dtype=F64)),
    "denormals beside huge numbers": (torch.tensor([1e300, 1e-310], dtype=F64), torch.tensor([1e300, 2e-310], dtype=F64)),
    "the least denormals": (bits(F64, 1, 2**52), bits(F64, 2, 2**52)),
    "bfloat16 denormals": (bits(torch.bfloat16, 1, 0x3F80), bits(torch.bfloat16, 2, 0x3F80)),
    "bools of other bytes": (bits(torch.bool, 1, 0), bits(torch.bool, 2, 0)),
    "float8 without -0.0": (bits(torch.float8_e4m3fnuz, 0, 9), bits(torch.float8_e4m3fnuz, 128, 9)),  # which is its NaN
    "a NaN elsewhere": (torch.tensor([math.nan, 1]), torch.tensor([1, math.nan])),
    "another infinity": (torch.tensor([math.inf, 1]), torch.tensor([-math.inf, 1])),
    "complex numbers": (torch.tensor([1 + 2j]), torch.tensor([1 + 3j])),
    "float64 of unlike signs": (torch.tensor([2.0], dtype=F64), torch.tensor([-2.0], dtype=F64)),
}  # fmt: skip


def two_files(folder: Path, a: torch.Tensor, b: torch.Tensor) -> tuple[Path, Path]:
    for name, x in (("a", a), ("b", b)):
        save_file({"x": x.contiguous()}, folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def figures(done: Result) -> Any:
    return json.loads(done.out, parse_constant=lambda text: pytest.fail(text))


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_listed_as_different_is_not_the_same(name: str, tmp_path: Path, run: Any) -> None:
    pair = two_files(tmp_path, *UNLIKE[name])
    done: Result = run("diff", *pair)
    assert done.status == 1 and done.out.endswith("\ndifferent\n")
    document = figures(run("diff", *pair, "--json"))
    assert not document["equal"] and len(document["changed"]) == 1 and document["changed"][0]["changed"] >= 1
    assert run("diff", pair[0], pair[0]).status == 0 == run("diff", pair[1], pair[1]).status
    assert run("diff", *pair, "--html", tmp_path / "page.html").status == 1


def test_differences_of_64_bit_integers_are_exact(tmp_path: Path) -> None:
    (found,) = diff(*two_files(tmp_path, *UNLIKE["int64 that no float64 tells apart"])).compared
    assert (found.max_abs, found.relative_l2, found.verdict) == (1.0, pytest.approx(2.0**-62), "different")
    assert found.change is not None and found.change.text.startswith("only element [0]: 4611686018427387904 in A, 4611686018427387905 in B")
    assert diff(*two_files(tmp_path, torch.tensor([2**62 + 1]), torch.tensor([2**62 + 1], dtype=U64))).equal


def test_a_difference_too_small_for_figures_is_said(tmp_path: Path, run: Any) -> None:
    pair = two_files(tmp_path, *UNLIKE["a relative difference below float64"])
    (only,) = figures(run("diff", *pair, "--json"))["changed"]
    assert (only["changed"], only["max_abs"], only["out_of_range"]) == (1, 1e-200, {"relative_l2": "below 4.9e-324"})
    text = " ".join(run("diff", *pair).out.split())
    assert "x: 1 element differs below what figures show: |B - A| / |A| is below 4.9e-324" in text and "<4.94e-322%" in text
    text = " ".join(run("diff", *two_files(tmp_path, *UNLIKE["bools of other bytes"])).out.split())
    assert "x: 1 element differs in their bytes, not in the values that they stand for" in text
    assert "differ" not in " ".join(text for _, text in remarks(diff(*two_files(tmp_path, *UNLIKE["a NaN elsewhere"])).compared[0]))


def test_no_tolerance_hides_a_nan(tmp_path: Path, run: Any) -> None:
    for name in ("a NaN elsewhere", "another infinity"):
        done: Result = run("diff", *two_files(tmp_path, *UNLIKE[name]), "--tol", "0.5")
        assert done.status == 1 and "of another place or sign: " in done.out


def test_equal_values_of_other_bits_are_counted(tmp_path: Path, run: Any) -> None:
    """The documented exceptions: the sign of a zero, the payload of a NaN."""
    for dtype, stored in ((torch.float32, (0x7FC00000, 0x7F800001)), (torch.bfloat16, (0x7FC0, 0x7FC1)), (torch.float8_e5m2, (126, 127))):
        done: Result = run("diff", *two_files(tmp_path, bits(dtype, stored[0], 1, 2, 3), bits(dtype, stored[1], 1, 2, 3)))
        assert done.status == 0 and "x: 1 NaN of other bits" in done.out


@pytest.mark.parametrize("tol", ["nan", "NaN", "inf", "1e999", "-inf", "-1", "x"])
def test_a_tolerance_is_a_number(tol: str, tmp_path: Path, run: Any) -> None:
    done: Result = run("diff", *two_files(tmp_path, torch.ones(2), torch.ones(2)), "--tol", tol)
    assert done.status == 2 and "Invalid value for '--tol'" in done.err and not done.out


def test_a_tolerance_is_a_number_in_python_too(tmp_path: Path) -> None:
    pair = two_files(tmp_path, torch.ones(2), torch.ones(2))
    for tol in (math.nan, math.inf, -1.0):
        with pytest.raises(CheckpointError, match=r"tol is .+, expected a number from 0 on"):
            diff(*pair, tol=tol)


HUGE = torch.randn(200, 300, dtype=F64, generator=GENERATOR)
STEP = torch.randn(200, 300, dtype=F64, generator=GENERATOR)


@pytest.mark.parametrize("size", [1e300, 1e-310, 1e-160, 1e160])
def test_figures_do_not_depend_on_the_size_of_the_numbers(size: float, tmp_path: Path, run: Any) -> None:
    a, b = HUGE, HUGE + 0.3 * STEP
    done: Result = run("diff", *two_files(tmp_path, a * size, b * size), "--json")
    (only,) = figures(done)["changed"]
    assert only["relative_l2"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-9)
    assert only["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-9)
    assert only["max_abs"] == pytest.approx(float((b - a).abs().max()) * size, rel=1e-9) and only["change"]["kind"] == "noise"
    low_rank = a + torch.outer(STEP[:, 0], STEP[0])
    (found,) = diff(*two_files(tmp_path, a * size, low_rank * size)).changed
    assert found.change is not None and found.change.text.startswith("A plus a matrix of rank 1")


def test_figures_of_unlike_sizes(tmp_path: Path, run: Any) -> None:
    """Sums whose parts cancel give no cosine of their own: a product is taken."""
    (only,) = figures(run("diff", *two_files(tmp_path, HUGE, STEP * 1e200), "--json"))["changed"]
    assert only["cosine"] == pytest.approx(float((HUGE * STEP).sum() / HUGE.norm() / STEP.norm()), abs=1e-12)
    (only,) = figures(run("diff", *two_files(tmp_path, HUGE * 1e-200, HUGE * 1e200), "--json"))["changed"]
    assert only["relative_l2"] is None and only["out_of_range"] == {"relative_l2": "above 1.8e308"} and only["cosine"] == 1
    assert only["change"]["text"] == "1e+400 x A"
    assert run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--html", tmp_path / "page.html").status == 1
    assert "Infinity" not in (tmp_path / "page.html").read_text().partition("<script>")[0]
    assert run("diff", "--seed", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--html", tmp_path / "drift.html").status == 1
    assert figures(run("diff", "--seed", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json"))["stop"]
    done: Result = run("diff", *two_files(tmp_path, torch.tensor([1e308, 1], dtype=F64), torch.tensor([-1.7e308, 1], dtype=F64)), "--json")
    (only,) = figures(done)["changed"]
    assert (only["relative_l2"], only["max_abs"], only["cosine"]) == (pytest.approx(2.7), None, -1)
    assert only["out_of_range"] == {"max_abs": "above 1.8e308"}
    text = run("diff", *two_files(tmp_path, torch.tensor([1e308, 1], dtype=F64), torch.tensor([-1.7e308, 1], dtype=F64))).out
    assert ">1.8e308" in text and "nan" not in text
