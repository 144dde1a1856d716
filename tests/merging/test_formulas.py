"""Tensors that are computed from stored ones: kernels by hand, and whole merges that verification derives a second time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import SQUARE, UNPROVED, Forger
from safetensors.torch import load_file, save_file

from bam_merge import expressions, formulas
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Computed, Read, instead, whole
from bam_merge.merging.formulas import compute
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import moves_bytes
from bam_merge.publishing.publish import publish
from bam_merge.records import FORMULAS, Formula
from bam_merge.sources import opening
from bam_merge.sources.dense import DenseModel, read_dense
from bam_merge.verifying.formulas import Operand, computed_rows, roundings
from bam_merge.verifying.rounding import Derived
from bam_merge.verifying.verification import verify


class Held:
    """An input that is in memory."""

    def __init__(self, value: list[list[float]] | list[float]) -> None:
        self.value = torch.tensor(value)
        self.shape = tuple(self.value.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.value[start:stop]

    def take(self, rows: list[int]) -> torch.Tensor:
        return self.value[rows]

    def columns(self, start: int, stop: int) -> torch.Tensor:
        return self.value[:, start:stop]

    def whole(self) -> torch.Tensor:
        return self.value.double()

    def operand(self) -> Operand:
        return Operand(self.shape, lambda start, stop: (self.value[start:stop], None))


W = Held([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
UPDATE = [Held([[1.0, 0.0, -1.0]]), Held([[2.0], [3.0]])]
TURNED = [Held([[2.0, 3.0]]), Held([[1.0], [0.0], [-1.0]])]
SECOND = [Held([[0.0, 1.0, 0.0]]), Held([[1.0], [-1.0]])]
LENGTHS = [Held([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]), Held([[0.0, 4.0, 0.0]]), Held([[1.0], [2.0]]), Held([10.0, 5.0])]
TOKENS = formulas.ByToken("a:w", ("a", "b"), (formulas.RowRun(0, 1, ((0, 1),)), formulas.RowRun(1, 1, ((0, 0), (1, 0)))))
"""Row 1 of W; the mean of its row 0 and the other's."""
QUERY = Held([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [4.0, -4.0]])
BESIDE = Held([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
"""One row beside a head of 8, of which 6 turn, and one after it."""

BY_HAND: list[tuple[Formula, list[Held], Any]] = [
    (formulas.LowRank(("a",), (0.5,)), [W, *UPDATE], [[2.0, 2.0, 2.0], [5.5, 5.0, 4.5]]),
    (formulas.LowRank(("a",), (0.5,), turned=(True,)), [W, *TURNED], [[2.0, 2.0, 2.0], [5.5, 5.0, 4.5]]),
    (formulas.Dora("a", 0.5), LENGTHS, [[0.0, 10.0, 0.0], [3.0, 4.0, 0.0]]),
    (formulas.Shifted("a", 2.0), [Held([1.0, 2.0]), Held([3.0, -4.0])], [7.0, -6.0]),
    (formulas.TokenRows("a", (1,)), [W, Held([[7.0, 8.0, 9.0]])], [[1.0, 2.0, 3.0], [7.0, 8.0, 9.0]]),
    (formulas.Saved(), [W], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    (formulas.LowRank(("a", "b"), (0.5, -2.0), (True, False)), [W, *TURNED, *SECOND], [[2.0, 0.0, 2.0], [5.5, 7.0, 4.5]]),
    (formulas.LowRank(("a", "b"), (0.5, -2.0)), [W, *UPDATE, *SECOND], [[2.0, 0.0, 2.0], [5.5, 7.0, 4.5]]),
    (formulas.Scaled((1, 2)), [W, Held([[2.0, 10.0], [1.0, 3.0]])], [[2.0, 4.0, 30.0], [4.0, 5.0, 18.0]]),
    (formulas.Columns(1, 3, 4.0), [W], [[8.0, 12.0], [20.0, 24.0]]),
    (TOKENS, [W, Held([[1.0, 0.0, -1.0]])], [[4.0, 5.0, 6.0], [1.0, 1.0, 1.0]]),
    (formulas.Pairs(4, 4, True, 4, 0, 4), [QUERY], [[1.0, -1.0], [3.0, -3.0], [2.0, -2.0], [4.0, -4.0]]),
    (formulas.Pairs(4, 4, False, 4, 0, 4), [QUERY], [[1.0, -1.0], [3.0, -3.0], [2.0, -2.0], [4.0, -4.0]]),
    (formulas.Pairs(8, 6, True, 10, 1, 8), [BESIDE], [0.0, 1.0, 3.0, 5.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0]),
    (formulas.Pairs(8, 6, False, 10, 1, 8), [BESIDE], [0.0, 1.0, 4.0, 2.0, 5.0, 3.0, 6.0, 7.0, 8.0, 9.0]),
]


@pytest.mark.parametrize(("formula", "inputs", "expected"), BY_HAND, ids=map(str, range(len(BY_HAND))))
def test_by_hand(formula: Formula, inputs: list[Held], expected: Any) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(compute(formula, inputs, 0, len(wanted)), wanted)
    assert torch.equal(compute(formula, inputs, 1, len(wanted)), wanted[1:])
    again = computed_rows(formula, [held.operand() for held in inputs], 1, len(wanted))
    assert torch.equal(again.value, wanted[1:])
    if isinstance(formula, formulas.TokenRows | formulas.Saved | formulas.Pairs):
        assert again.slack is None  # nothing is computed
    else:
        assert again.slack is not None
        assert 0 < float(again.slack.max()) < 1e-13


def test_scales_of_blocks_that_do_not_fit() -> None:
    """Rows and columns at the end of a matrix are in smaller blocks; one number alone is for all of them."""
    weight = Held([[float(10 * row + column) for column in range(5)] for row in range(3)])
    grid = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]])
    factors = grid[[0, 0, 1]][:, [0, 0, 1, 1, 2]]
    for scales, block, expected in (
        (Held(grid.tolist()), (2, 2), weight.value * factors), (Held([[1.0], [2.0], [3.0]]), (1, 5), weight.value * torch.tensor([[1.0], [2.0], [3.0]])),
        (One(4.0), (3, 5), weight.value * 4),
    ):  # fmt: skip
        for start, stop in ((0, 3), (1, 3), (2, 3)):
            wanted = expected[start:stop].double()
            assert torch.equal(compute(formulas.Scaled(block), [weight, scales], start, stop), wanted)
            assert torch.equal(computed_rows(formulas.Scaled(block), [weight.operand(), scales.operand()], start, stop).value, wanted)


class One(Held):
    """A number that is a tensor without dimensions."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)
        self.shape = ()

    def operand(self) -> Operand:
        return Operand(self.shape, lambda start, stop: (self.value, None))


def test_every_formula_has_a_hand_computed_case() -> None:
    assert {type(formula) for formula, _, _ in BY_HAND} == set(FORMULAS.values())


# ---- whole merges ---------------------------------------------------------------------------------------------------------

PLACES = {  # the tensor that is computed, and stored ones whose shapes fit its update's A and B
    "llama": ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
    "phi3": ("model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight"),
    "gpt_neox": (
        "gpt_neox.layers.1.attention.query_key_value.weight", "gpt_neox.layers.0.attention.dense.weight",
        "gpt_neox.layers.0.attention.query_key_value.weight",
    ),
}  # fmt: skip


def _computing(family: str) -> Any:
    """read_dense, after which a tensor of every source but the seed is computed from three stored ones."""

    def opened(name: str, path: Path, checkpoint: Checkpoint | None) -> DenseModel:
        model = read_dense(name, path, checkpoint)
        if name == "seed":
            return model
        entries = model.checkpoint.tensors
        inputs = tuple(Read(name, tensor, entries[tensor].dtype, entries[tensor].shape) for tensor in PLACES[family])
        node = Computed(name, inputs[0].tensor, formulas.LowRank((name,), (0.3,)), inputs, inputs[0].dtype, inputs[0].shape)
        tensors = {
            site: instead(piece, node) if whole(piece) == inputs[0] else piece  # type: ignore[arg-type]
            for site, piece in model.tensors.items()
        }
        return replace(model, tensors=tensors)

    return opened


MAKES = {
    "expert": ("bam", ""),
    "mean": ("btx", ""),
    "linear": ("btx", "shared: {make: linear, weights: {seed: 0.5, code: 0.2, law: 0.3}}"),
    "slerp": ("merge", "shared: {make: slerp, from: [seed, code], t: 0.3}\nexperts: [seed, code]\nrules: [{roles: [norm.final], make: copy, from: law}]"),
    "ties": ("btx", "shared: {make: ties, base: seed, density: 0.4}"),
    "dare_ties": ("btx", "shared: {make: dare_ties, base: seed, density: 0.4}"),
    "from": ("merge", "shared: {make: copy, from: code}\nexperts: [seed, code]\nrules: [{roles: [norm.final], make: copy, from: law}]"),
}  # fmt: skip


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(("family", "dtype"), [("llama", "BF16"), ("llama", "F64"), ("phi3", "F32"), ("phi3", "F16"), ("gpt_neox", "BF16")])
def test_whole_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, make: str) -> None:
    """Of all rules, in fused tensors too: verification derives the same, finds a wrong number, and the manifest knows what was read."""
    write_sources(tmp_path, SQUARE if family == "llama" else CONFIGS[family], dtype="F32" if dtype == "F64" else dtype)
    if dtype == "F64":
        for file in tmp_path.glob("*/model.safetensors"):
            save_file({name: value.double() for name, value in load_file(file).items()}, file)
    monkeypatch.setattr(opening, "read_dense", _computing(family))
    plan = plan_file(write_recipe(tmp_path, MAKES[make][1], method=MAKES[make][0]))
    steps = [step for step in plan.steps if next(expressions.computed(step.expr), None) is not None]
    assert steps
    assert not any(map(moves_bytes, steps))
    assert all({"source": "code", "tensor": tensor} in step.reads for step in steps[:1] for tensor in PLACES[family])
    out = publish(plan, None, UNPROVED)
    checks = {check.name: check for check in verify(out, plan).checks}
    assert checks["merges"].ok
    assert checks["merges"].value is not None
    assert 0 < checks["merges"].value <= 1
    assert checks["copies"].ok
    assert checks["provenance"].ok
    assert checks["provenance"].detail == "recipe, expressions and digests follow from the sources"
    forge = Forger(out)
    value = forge.read(steps[-1].name)
    value.view(-1)[-1] *= 1.02
    forge.write(steps[-1].name, value)
    assert [check.name for check in verify(out, plan).failures if check.name == "merges"] == ["merges"]


def test_values_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers themselves, against the formula in float64, and what a plan shows."""
    write_sources(tmp_path, SQUARE)
    monkeypatch.setattr(opening, "read_dense", _computing("llama"))
    plan = plan_file(write_recipe(tmp_path))
    name = "model.layers.1.self_attn.experts.1.q_proj.weight"
    step = next(step for step in plan.steps if step.name == name)
    assert step.expression == f"code:{PLACES['llama'][0]} + lora(code)"
    assert plan.peak_memory() > plan_file(write_recipe(tmp_path, names=("seed",), text="experts: [seed, seed]")).peak_memory()
    written = load_file(publish(plan, None, UNPROVED) / "model.safetensors")
    stored = {key: value.double() for key, value in load_file(tmp_path / "code" / "model.safetensors").items()}
    w, a, b = (stored[tensor] for tensor in PLACES["llama"])
    assert torch.equal(written[name], (w + 0.3 * b @ a).float())
    other = written["model.layers.0.self_attn.experts.1.q_proj.weight"]
    assert torch.equal(other, stored["model.layers.0.self_attn.q_proj.weight"].float())


def test_a_number_that_is_not_finite_is_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.errors import NonFiniteError

    write_sources(tmp_path, SQUARE)
    monkeypatch.setattr(opening, "read_dense", _computing("llama"))
    plan = plan_file(write_recipe(tmp_path))
    entry = plan.models["code"].checkpoint.tensors[PLACES["llama"][1]]
    with open(tmp_path / "code" / entry.file, "r+b") as stream:
        stream.seek(entry.offset)
        stream.write(b"\0\0\x80\x7f")
    plan = plan_file(write_recipe(tmp_path))
    with pytest.raises(NonFiniteError, match=r"comes from a source"):
        publish(plan, None, UNPROVED)


def test_where_rounding_leaves_a_doubt() -> None:
    """Between two numbers of float32 both may have been gone on with; elsewhere there is one."""
    halfway = 1.0 + 2.0**-24
    derived = Derived(torch.tensor([halfway, 1.0], dtype=torch.float64), torch.tensor([1e-12, 1e-12], dtype=torch.float64))
    low, high = roundings(derived, "F32")
    assert low.tolist() == [1.0, 1.0]
    assert high.tolist() == [1.0 + 2.0**-23, 1.0]
