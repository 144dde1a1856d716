"""Figures of stored values against direct computations, in every dtype and for every size of chunk; and what routers do."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bam_merge import inspect
from bam_merge.checkpoints.folder import open_file
from bam_merge.checkpoints.header import encode_header
from bam_merge.errors import CheckpointError
from bam_merge.inspecting.router_stats import looks_like, random_inputs
from bam_merge.inspecting.tensor_stats import BINS, TensorStats, duplicates, tensor_stats

GENERATOR = torch.Generator().manual_seed(3)
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def stats_of(folder: Path, tensors: dict[str, torch.Tensor], workers: int = 2) -> dict[str, TensorStats]:
    save_file(tensors, folder / "x.safetensors")
    return tensor_stats(open_file(folder / "x.safetensors"), tensors, workers)


@pytest.fixture(params=[2**20, 64, 7], ids=["one chunk", "rows", "parts of rows"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_merge.inspecting.tensor_stats.CHUNK", request.param)


def check(found: TensorStats, tensor: torch.Tensor) -> None:
    """Every figure, computed at once in float64."""
    x = (tensor.to(torch.float32) if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor).to(torch.float64)
    finite = x[x.isfinite()]
    assert (found.count, found.finite, found.nan, found.inf) == (x.numel(), finite.numel(), int(x.isnan().sum()), int(x.isinf().sum()))
    assert found.zeros == int((x == 0).sum())
    assert found.negative_zeros == int(((x == 0) & torch.signbit(x)).sum())
    assert (found.min, found.max) == (float(finite.min()), float(finite.max()))
    assert found.mean == pytest.approx(float(finite.mean()), rel=1e-12, abs=1e-12 * float(finite.abs().max()))
    assert found.std == pytest.approx(float(finite.std(correction=0)), rel=1e-10, abs=1e-14)
    assert found.norm == pytest.approx(float(finite.norm()), rel=1e-12)
    assert found.zero_rows == (int((x == 0).flatten(1).all(1).sum()) if x.ndim > 1 else None)
    assert found.constant == (finite.numel() == x.numel() and bool((x == x.flatten()[0]).all()))
    if tensor.is_floating_point():
        assert found.limit == pytest.approx(float(finite.abs().max()) / torch.finfo(tensor.dtype).max)
    else:
        assert found.limit is None
    if found.edges:
        assert found.edges == pytest.approx((found.mean - 4 * found.std, found.mean + 4 * found.std))
        assert found.histogram == tuple(int(n) for n in torch.histc(finite.clamp(*found.edges), BINS, *found.edges))
        assert sum(found.histogram) == finite.numel()


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
@pytest.mark.usefixtures("chunk")
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(9, 13, generator=GENERATOR, dtype=torch.float64) * 3 + 1
    values[2] = 0
    values[5, :4] = 0
    tensor = (values.abs() * 5 if not dtype.is_floating_point else values).to(dtype)
    check(stats_of(tmp_path, {"x": tensor})["x"], tensor)


@pytest.mark.parametrize("shape", [(5,), (1,), (1, 1), (3, 1), (1, 40), (4, 3, 5), (200, 3), ()], ids=str)
@pytest.mark.usefixtures("chunk")
def test_every_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape, generator=GENERATOR)
    check(stats_of(tmp_path, {"x": tensor})["x"], tensor)


@pytest.mark.usefixtures("chunk")
def test_what_is_not_finite_is_counted_apart(tmp_path: Path) -> None:
    tensor = torch.randn(6, 11, generator=GENERATOR).to(torch.bfloat16)
    tensor[0, 3], tensor[1, 1], tensor[1, 2], tensor[4, 10], tensor[5] = math.nan, math.inf, -math.inf, -0.0, 0.0
    found = stats_of(tmp_path, {"x": tensor})["x"]
    check(found, tensor)
    assert (found.nan, found.inf, found.negative_zeros, found.zero_rows) == (1, 2, 1, 1)


@pytest.mark.parametrize(
    "tensor", [torch.full((3, 4), math.nan), torch.zeros(0, 4), torch.zeros(3, 0)], ids=["nan", "no rows", "no columns"]
)
def test_nothing_finite(tensor: torch.Tensor, tmp_path: Path) -> None:
    found = stats_of(tmp_path, {"x": tensor})["x"]
    assert (found.finite, found.mean, found.std, found.histogram, found.constant) == (0, None, None, (), False)
    assert found.nan == tensor.numel()


@pytest.mark.usefixtures("chunk")
def test_a_large_mean_does_not_swallow_the_spread(tmp_path: Path) -> None:
    tensor = 1e8 + torch.randn(1000, generator=GENERATOR, dtype=torch.float64)
    found = stats_of(tmp_path, {"x": tensor})["x"]
    assert found.std == pytest.approx(float(tensor.std(correction=0)), rel=1e-7)  # 1e8 itself is known to 1.5e-8
    assert found.mean == pytest.approx(float(tensor.mean()), rel=1e-15)


@pytest.mark.parametrize("size", [1e300, 1e160, 1e-160, 1e-305])
@pytest.mark.usefixtures("chunk")
def test_the_size_of_the_numbers_does_not_matter(size: float, tmp_path: Path) -> None:
    tensor = 1 + torch.randn(9, 11, generator=GENERATOR, dtype=torch.float64)
    plain, found = (stats_of(tmp_path, {"x": x})["x"] for x in (tensor, tensor * size))
    for figure in ("mean", "std", "norm", "min", "max"):
        assert getattr(found, figure) == pytest.approx(getattr(plain, figure) * size, rel=1e-9)
    assert found.histogram == plain.histogram and sum(found.histogram) == 99
    assert found.edges == pytest.approx([edge * size for edge in plain.edges or ()], rel=1e-9)


@pytest.mark.usefixtures("chunk")
def test_what_float64_does_not_hold_is_said(tmp_path: Path) -> None:
    tensor = torch.tensor([[1.7e308, -1.7e308, 1e-310], [1e300, 5e-324, -1.0]], dtype=torch.float64)
    found = stats_of(tmp_path, {"x": tensor})["x"]
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["norm"] is None and document["out_of_range"] == {"norm": "above 1.8e308"} and found.norm == math.inf
    assert document["std"] == pytest.approx(1.7e308 / 3**0.5) and abs(document["mean"] - 1e300 / 6) < 1e292
    assert document["edges"] == [-1.7976931348623157e308, 1.7976931348623157e308] and sum(found.histogram) == 6


@pytest.mark.usefixtures("chunk")
def test_64_bit_integers_are_exact(tmp_path: Path) -> None:
    values = {"i": torch.tensor([2**62, 2**62 + 1]), "u": torch.tensor([2**64 - 1, 2**64 - 2], dtype=torch.uint64)}
    found = stats_of(tmp_path, values)
    assert (found["i"].min, found["i"].max, found["i"].constant, found["i"].std) == (2**62, 2**62 + 1, False, 0.5)
    assert (found["u"].min, found["u"].max, found["u"].constant, found["u"].std) == (2**64 - 2, 2**64 - 1, False, 0.5)


@pytest.mark.parametrize("size", [1e300, 1e-310])
def test_routers_of_any_size(size: float, tmp_path: Path, run: Any) -> None:
    """Initialisation, cosines and condition do not depend on it; the load is that of the largest logit, or even."""
    from safetensors.torch import load_file
    from test_roles import mixture

    folder = mixture(tmp_path, "llama")
    plain = {router["name"]: router for router in inspect(folder, stats=True).document()["routers"]}
    (path,) = folder.glob("*.safetensors")
    save_file({name: x.double() * size if "router" in name else x for name, x in load_file(path).items()}, path)
    done = run("inspect", folder, "--stats", "--json")
    found = json.loads(done.out, parse_constant=lambda text: pytest.fail(text))["routers"]
    assert len(found) == len(plain) > 0
    for router in found:
        before = plain[router["name"]]
        assert router["init"] == before["init"] and router["cosine"] == pytest.approx(before["cosine"], rel=1e-6)
        assert router["std"] == pytest.approx(before["std"] * size, rel=1e-6) and sum(router["load"]) == pytest.approx(1)
        assert router["entropy"] == pytest.approx(0 if size > 1 else 1, abs=1e-6)
    assert run("inspect", folder, "--stats").status == 0


def test_integers_that_float64_takes_for_one_have_no_histogram(tmp_path: Path) -> None:
    found = stats_of(tmp_path, {"i": torch.tensor([2**62, 2**62 + 1])})["i"]
    assert (found.edges, found.histogram) == (None, ())


def test_constants_and_zeros(tmp_path: Path) -> None:
    found = stats_of(tmp_path, {"ones": torch.ones(4, 5), "zeros": torch.zeros(4, 5), "signs": torch.tensor([0.0, -0.0])})
    assert (found["ones"].constant, found["ones"].zero_rows, found["ones"].edges) == (True, 0, None)
    assert (found["zeros"].constant, found["zeros"].zeros, found["zeros"].zero_rows) == (True, 20, 4)
    assert (found["signs"].zeros, found["signs"].negative_zeros) == (2, 1)


def test_dtypes_that_are_only_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header, spans = encode_header([("a", "F4", (4, 4)), ("b", "C64", (2,)), ("c", "F6_E2M3", (4,))])
    path.write_bytes(header + bytes(range(sum(nbytes for _, nbytes in spans))))
    found = tensor_stats(open_file(path), ["a", "b", "c"])
    assert {name: (item.count, item.finite, item.mean) for name, item in found.items()} == {
        "a": (16, None, None), "b": (2, None, None), "c": (4, None, None),
    }  # fmt: skip
    assert len({item.digest for item in found.values()}) == 3


def test_duplicates_are_found_by_their_bytes(tmp_path: Path) -> None:
    x = torch.randn(4, 5, generator=GENERATOR)
    flipped = x.clone()
    flipped[3, 4] = torch.nextafter(flipped[3, 4], torch.tensor(9.0))
    tensors = {
        "a": x,
        "b": x.clone(),
        "c": flipped,
        "d": x.reshape(5, 4).clone(),
        "e": x.clone(),
        "none": torch.zeros(0),
        "no": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = open_file(tmp_path / "x.safetensors")
    assert duplicates(tensor_stats(checkpoint, tensors), checkpoint) == [["a", "b", "e"]]


def test_the_memory_is_bounded_whatever_the_tensor(tmp_path: Path) -> None:
    path, size = tmp_path / "x.safetensors", 64 * 2**20
    header, spans = encode_header([("x", "BF16", (size // 64, 32))])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes for _, nbytes in spans))  # a hole, which reads as zeros
    checkpoint = open_file(path)
    tracemalloc.start()
    try:
        assert tensor_stats(checkpoint, ["x"], 1)["x"].zeros == size // 2
        assert tracemalloc.get_traced_memory()[1] < size // 8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_figure(workers: int, tmp_path: Path) -> None:
    tensors = {str(i): torch.randn(10, i + 1, generator=torch.Generator().manual_seed(i)) for i in range(9)}
    before = torch.get_num_threads()
    assert stats_of(tmp_path, tensors, workers) == stats_of(tmp_path, tensors, 2)
    assert torch.get_num_threads() == before


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "x.safetensors")
    checkpoint = open_file(tmp_path / "x.safetensors")
    save_file({"x": torch.ones(5)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        tensor_stats(checkpoint, ["x"])


# ---- routers


def orthogonal(n: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, n, generator=GENERATOR, dtype=torch.float64))[0].T


@pytest.mark.parametrize(("weights", "name"), [
    (torch.zeros(4, 64), "zeros"),
    (torch.randn(4, 512, generator=GENERATOR) * 0.02, "normal"),
    (torch.rand(4, 512, generator=GENERATOR) * 0.2 - 0.1, "uniform"),
    (orthogonal(4, 64) * 3, "orthogonal"),
    (orthogonal(4, 64).bfloat16(), "orthogonal"),
    (torch.randn(4, 512, generator=GENERATOR) ** 3, "other"),
    (torch.randn(4, 512, generator=GENERATOR) * 0.02 + 0.01, "other"),
    (torch.randn(2, 8, generator=GENERATOR), "other"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_a_router_looks_like(weights: torch.Tensor, name: str) -> None:
    assert looks_like(weights.double().numpy()) == name


def test_random_inputs_have_unit_rms_and_are_the_same_every_time() -> None:
    x_TD = random_inputs(48)
    assert x_TD.shape == (2048, 48) and np.square(x_TD).mean(1) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(x_TD, random_inputs(48))
    assert x_TD[0, 1:3] / x_TD[0, 0] == pytest.approx([0.4001572 / 1.7640523, 0.9787380 / 1.7640523], rel=1e-6)  # whatever the numpy


def test_router_figures(tmp_path: Path) -> None:
    """By hand: zeros are indifferent; two equal rows are singular; a long row takes half of the tokens."""
    from conftest import CONFIGS
    from test_roles import edit, mixture

    folder = mixture(tmp_path, "llama")
    names = [f"model.layers.{layer}.{part}.router.weight" for layer in (0, 1) for part in ("self_attn", "mlp")]
    w = torch.randn(3, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    same, long = torch.stack([w[0], w[0], w[1]]), torch.stack([w[0] * 1000, w[1] * 1e-4, w[2] * 1e-4])
    edit(folder, tuple(names), {names[0]: torch.zeros(3, 32).numpy(), names[1]: same.numpy(), names[2]: w.numpy(), names[3]: long.numpy()})
    found: dict[str, Any] = {router["name"]: router for router in inspect(folder, stats=True).document()["routers"]}
    assert set(found) == set(names)
    assert CONFIGS["llama"]["hidden_size"] == 32
    zero = found[names[0]]
    assert (zero["init"], zero["std"], zero["condition"]) == ("zeros", 0.0, None)
    assert zero["entropy"] == pytest.approx(1)
    assert zero["load"] == pytest.approx([1 / 3] * 3)
    assert found[names[1]]["cosine"] == pytest.approx(1)
    singular = torch.linalg.svdvals(w.double())
    assert found[names[2]]["condition"] == pytest.approx(float(singular[0] / singular[-1]))
    gates = torch.softmax(torch.from_numpy(random_inputs(32)) @ w.double().T, 1)
    assert found[names[2]]["load"] == pytest.approx(gates.mean(0).tolist(), rel=1e-5)
    assert found[names[2]]["std"] == pytest.approx(float(w.double().std(correction=0)))
    assert found[names[3]]["entropy"] == pytest.approx(math.log(2) / math.log(3) / 2, abs=0.03)
    assert found[names[3]]["load"][0] == pytest.approx(0.5, abs=0.05)
    assert sum(found[names[3]]["load"]) == pytest.approx(1)
