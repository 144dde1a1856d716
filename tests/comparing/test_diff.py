"""`diff A B`: planted changes are found and named, nothing is found where nothing changed, and figures are those of a direct computation."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.comparing import two_models
from bam_merge.comparing.tensor_difference import Difference
from bam_merge.comparing.two_models import Comparison, diff
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import CheckpointError

Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def model(folder: Path, dtype: str = "F32", config: str = "llama", seed: int = 1, **options: Any) -> Path:
    write_checkpoint(folder, CONFIGS[config], random_values(seed, 0.1), dtype=dtype, **options)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return model(tmp_path / "a"), model(tmp_path / "b")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def of(found: Comparison, name: str) -> Difference:
    (one,) = [d for d in found.compared if d.name_a == name]
    return one


# ---- planted changes ---------------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(5)
NOISE, LEFT, RIGHT = (torch.randn(shape, generator=GENERATOR) for shape in ((200, 300), (200, 4), (4, 300)))


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(value, dtype=t.dtype))


def flip(t: torch.Tensor) -> torch.Tensor:
    kind = torch.int32 if t.element_size() == 4 else torch.int16
    bits = t.clone().view(kind)
    bits.view(-1)[637] ^= 8
    return bits.view(t.dtype)


def added(noise: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: (t + 0.3 * noise * t.float().std() / noise.std()).to(t.dtype)


PLANTED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "noise": (added(NOISE), "noise", "A plus normal noise of 30"),
    "scale": (lambda t: 1.5 * t, "scaled", "1.5 x A"),
    "negated": (lambda t: -t, "scaled", "-1 x A"),
    "zeroed rows": (lambda t: t.index_fill(0, torch.tensor([1, 2, 7]), 0.0), "rows", "3 rows zeroed ({1-2,7})"),
    "zeroed columns": (lambda t: t.index_fill(1, torch.tensor([299]), 0.0), "columns", "1 column zeroed (299)"),
    "zeroed rows and noise": (lambda t: added(NOISE)(t).index_fill(0, torch.tensor([9]), 0.0), "rows", "1 row zeroed (9), and other elements"),
    "pruned": (lambda t: t.where(t.abs() > t.abs().median(), 0.0), "zeroed", "pruned: 50."),
    "all zero": (torch.zeros_like, "zeroed", "all zero"),
    "one flipped bit": (flip, "bit", "only element [2, 37]: "),
    "one element": (put(77.0), "element", "only element [2, 3]: "),
    "a NaN": (put(math.nan), "element", "nan in B"),
    "an infinity": (put(-math.inf), "element", "-inf in B"),
    "low rank": (added(LEFT @ RIGHT), "low rank", "A plus a matrix of rank 4"),
    "other order of rows": (lambda t: t.flip(0), "permuted", "the rows of A in another order"),
    "another tensor": (lambda t: t.std() * NOISE.to(t.dtype), "unrelated", "unrelated to A (cosine"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_is_found_and_named_and_nothing_else(name: str, dtype: torch.dtype, tmp_path: Path, run: Any) -> None:
    change, kind, text = PLANTED[name]
    generator = torch.Generator().manual_seed(1)
    tensors = {f"w{index}": (0.02 * torch.randn(200, 300, generator=generator)).to(dtype) for index in range(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({**tensors, "w1": change(tensors["w1"]).contiguous()}, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [d.name_a for d in found.changed] == ["w1"] and not found.findings
    (only,) = found.changed
    assert only.change is not None and only.change.kind == kind and text in only.change.text, only
    done: Result = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert done.status == 1 and " ".join(f"w1: {only.change.text}".split()) in " ".join(done.out.split())


def test_what_training_does_has_no_name(pair: tuple[Path, Path]) -> None:
    """A difference of full rank whose rows, and whose elements in them, have unlike sizes: neither noise nor anything else that is known."""
    uneven = torch.linspace(0.1, 3, 32)[:, None] * torch.randn(32, 32, generator=GENERATOR) ** 3
    edit(pair[1], lambda tensors: tensors.update({Q: tensors[Q] + 0.001 * uneven}))
    (only,) = diff(*pair).changed
    assert only.verdict == "different" and only.change is None


def test_a_planted_change_in_a_model_stands_at_its_role_and_layer(pair: tuple[Path, Path], run: Any) -> None:
    edit(pair[1], lambda tensors: tensors.update({Q: 1.5 * tensors[Q]}))
    document = json.loads(run("diff", *pair, "--json").out)
    (only,) = document["changed"]
    assert (only["name"], only["role"], only["layer"], only["change"]["kind"]) == (Q, "attn.q", 1, "scaled")
    assert only["relative_l2"] == pytest.approx(0.5, rel=1e-5)
    assert (
        document["by_role"]["attn.q"]["changed"] == 1 == document["by_layer"]["1"]["changed"] and document["by_layer"]["0"]["changed"] == 0
    )


def test_nothing_is_found_where_nothing_changed(pair: tuple[Path, Path], run: Any) -> None:
    done: Result = run("diff", *pair)
    assert (done.status, done.err) == (0, "") and "21  identical bytes" in done.out and done.out.endswith("the same\n")
    document = json.loads(run("diff", *pair, "--json").out)
    assert document["equal"] and document["changed"] == document["only_in_a"] == document["only_in_b"] == []
    assert document["verdicts"] == {"identical": 21}


def test_signs_of_zeros_are_no_difference_but_are_counted(pair: tuple[Path, Path], run: Any) -> None:
    for folder, zero in zip(pair, (0.0, -0.0), strict=True):
        edit(folder, lambda tensors, zero=zero: tensors.update({Q: put(zero)(tensors[Q])}))
    found = diff(*pair)
    assert found.equal and of(found, Q).verdict == "equal" and of(found, Q).zero_signs == 1
    done: Result = run("diff", *pair)
    assert done.status == 0 and f"{Q}: 1 zero of another sign (-0.0)" in " ".join(done.out.split())


def test_equal_nans_are_equal(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        edit(folder, lambda tensors: tensors.update({Q: put(math.nan)(tensors[Q])}))
    found = diff(*pair)
    assert found.equal and of(found, Q).nan == (1, 1)


def test_swapped_layers_are_named(pair: tuple[Path, Path], run: Any) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            other = name.replace(".0.", ".1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit(pair[1], swap)
    findings = [finding.text for finding in diff(*pair).findings]
    assert findings[0].startswith("layer 0 and layer 1 are swapped: 9 tensors, model.layers.0.")


def test_tensors_in_each_others_place_are_named(pair: tuple[Path, Path]) -> None:
    gate = UP.replace("up_proj", "gate_proj")
    edit(pair[1], lambda tensors: tensors.update({UP: tensors[gate], gate: tensors[UP]}))
    moved = [finding.text for finding in diff(*pair).findings if finding.kind == "moved"]
    assert len(moved) == 1 and moved[0].startswith("ffn.gate, layer 0 and ffn.up, layer 0 are swapped")


def test_missing_extra_and_renamed_tensors_are_named(pair: tuple[Path, Path], run: Any) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.attention.wq.weight"] = tensors.pop(Q)
        tensors["extra"] = torch.ones(3)
        del tensors[UP]

    edit(pair[1], rename)
    document = json.loads(run("diff", *pair, "--json").out)
    assert not document["equal"] and document["only_in_a"] == [UP] and document["only_in_b"] == ["extra"]
    assert [f["names"] for f in document["findings"] if f["kind"] == "renamed"] == [[Q, "model.layers.1.attention.wq.weight"]]


def test_other_shards_are_the_same_model(tmp_path: Path, run: Any) -> None:
    a, b = model(tmp_path / "a"), model(tmp_path / "b", shards=3)
    done: Result = run("diff", a, b)
    assert done.status == 0 and "1 file in A, 3 in B" in done.out


def test_other_shapes_are_not_compared(pair: tuple[Path, Path]) -> None:
    edit(pair[1], lambda tensors: tensors.update({UP: tensors[UP][:-1].contiguous()}))
    (only,) = diff(*pair).changed
    assert only.verdict == "shape" and only.relative_l2 is None


def test_configs_and_tokenizers_are_compared(pair: tuple[Path, Path], run: Any) -> None:
    config = json.loads((pair[1] / "config.json").read_text())
    (pair[1] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25, "transformers_version": "9"}))
    for folder, text in zip(pair, ("{}", '{"a": 1}'), strict=True):
        (folder / "tokenizer.json").write_text(text)
    found = diff(*pair)
    assert not found.changed and not found.equal
    assert {finding.text for finding in found.findings if finding.counts} == {
        'config.json: rms_norm_eps is 1e-05 in A, 0.25 in B', "tokenizer.json differs"
    }  # fmt: skip
    assert [finding.names for finding in found.findings if not finding.counts] == [("transformers_version",)]


# ---- figures -----------------------------------------------------------------------------------------------------------------

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_figures_are_those_of_a_direct_computation(dtype: str, tmp_path: Path) -> None:
    kind, generator = DTYPES[dtype], torch.Generator().manual_seed(3)
    a, noise = (torch.randn(700, 500, generator=generator) for _ in range(2))  # more than one chunk
    pair = [20 * x if not kind.is_floating_point else x for x in (a.abs(), (a + 0.3 * noise).abs())]
    for name, x in zip("ab", pair, strict=True):
        save_file({"x": x.to(kind)}, tmp_path / f"{name}.safetensors")
    (found,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").compared
    x, y = (t.to(kind).double() for t in pair)
    d = y - x
    assert found.changed == int((d != 0).sum()) and found.verdict == "different"
    assert found.relative_l2 == pytest.approx(float(d.norm() / x.norm()), rel=1e-6)
    assert found.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-7)
    assert found.at is not None and found.max_abs == pytest.approx(float(d.abs().max()), rel=1e-6)
    assert float(d.abs().flatten()[found.at]) == float(d.abs().max())
    assert (found.first, found.zeroed) == (int((d != 0).flatten().int().argmax()), int(((y == 0) & (x != 0)).sum()))


def test_large_integers_and_extreme_floats(tmp_path: Path) -> None:
    a = {"i": torch.tensor([2**60, 5]), "big": torch.full((4,), 1e30), "small": torch.full((4,), 1e-30)}
    b = {"i": torch.tensor([2**60 + 1, 5]), "big": torch.full((4,), 2e30), "small": torch.full((4,), 2e-30)}
    for name, tensors in (("a", a), ("b", b)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    found = {d.name_a: d for d in diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").compared}
    assert (found["i"].changed, found["i"].same) == (1, False)
    assert found["big"].relative_l2 == pytest.approx(1, rel=1e-5) == found["small"].relative_l2


def test_a_cast_is_within_rounding_and_casting_up_is_equal(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", "F32"), model(tmp_path / "b", "BF16")
    found = diff(a, b)
    assert {d.verdict for d in found.compared if d.shapes[0] != (32,)} == {"rounding"} and all((d.ulps or 0) <= 1 for d in found.compared)
    assert not found.equal and diff(a, b, tol=0.01).equal
    edit(b, lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()}))
    assert diff(model(tmp_path / "c", "BF16"), b).equal  # the same values, in a wider dtype


# ---- matching ------------------------------------------------------------------------------------------------------------------


def test_an_expert_is_its_dense_model(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    merge(load_recipe(write_recipe(tmp_path)), options=MergeOptions(verify=False))
    for address in ("out#experts.code", "out#code", "out#1"):
        found = diff(tmp_path / address, tmp_path / "code")
        changed = {d.place[0] for d in found.changed}
        assert changed == {"embed", "head", "norm.attn", "norm.ffn", "norm.final"}  # averaged: not an expert's own
        assert len(found.ignored) == 2 * (2 * 7 + 2) + 0  # per layer two other experts' tensors, and the routers
    assert diff(tmp_path / "out#code", tmp_path / "code", only=["attn.*"]).equal
    done: Result = run("diff", tmp_path / "out#cod", tmp_path / "code")
    assert done.status == 2 and "no expert 'cod'; did you mean 'code'? There are seed, code, law." in done.err.replace("\n", " ")
    done = run("diff", tmp_path / "code#math", tmp_path / "code")
    assert done.status == 2 and "no mixture" in done.err


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_fused_and_split_tensors_match_by_role(family: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[family])
    merge(load_recipe(write_recipe(tmp_path)), options=MergeOptions(verify=False))
    found = diff(tmp_path / "out#law", tmp_path / "law", only=["attn.*"])
    assert found.equal and {"attn.q", "attn.k", "attn.v"} <= {d.place[0] for d in found.compared}
    assert [finding.kind for finding in found.findings if finding.kind == "names"] == ["names"]


def test_what_is_left_out_is_said(pair: tuple[Path, Path], run: Any) -> None:
    edit(pair[1], lambda tensors: tensors.update({Q: 2 * tensors[Q]}))
    assert diff(*pair, ignore=["*q_proj*"]).equal and diff(*pair, only=["ffn.*"]).equal
    done: Result = run("diff", *pair, "--ignore", "attn.q")
    assert done.status == 0 and "2  --ignore attn.q" in done.out
    done = run("diff", *pair, "--ignore", "attn.x", "--only", "nothing")
    assert done.status == 2 and "--ignore attn.x: no tensor and no role matches." in done.err and "--only nothing" in done.err


# ---- bad input -----------------------------------------------------------------------------------------------------------------


def test_nothing_in_common(pair: tuple[Path, Path], tmp_path: Path, run: Any) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    done: Result = run("diff", pair[0], tmp_path / "x.safetensors")
    assert done.status == 2 and "there is nothing to compare" in done.err


def test_a_file_that_changes_is_noticed(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = two_models.open_side

    def change_after(address: Any, *ranges: bool) -> Any:
        side = opened(address, *ranges)
        os.utime(next(Path(address).glob("*.safetensors")), (1, 1))
        return side

    monkeypatch.setattr(two_models, "open_side", change_after)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        diff(*pair)


@pytest.mark.parametrize("arguments", [["a"], ["a", "b", "c"], ["--seed", "s", "--tol", "1", "a"], []])
def test_usage(arguments: list[str], run: Any) -> None:
    assert run("diff", *arguments).status == 2


def test_names_cannot_reach_the_terminal_raw(tmp_path: Path, run: Any) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"x\x1b[31m": torch.full((3,), value)}, tmp_path / f"{name}.safetensors")
    done: Result = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert done.status == 1 and "\x1b" not in done.out and max(map(len, done.out.split("\n"))) <= 80


@pytest.mark.parametrize("options", [{}, {"width": 120}, {"colour": True}, {"unicode": False}])
def test_the_picture_fits(options: dict[str, Any], pair: tuple[Path, Path]) -> None:
    from bam_merge.showing.comparison import comparison_text
    from bam_merge.showing.terminal import Terminal

    edit(pair[1], lambda tensors: tensors.update({Q: put(math.nan)(tensors[Q]), UP: 1.5 * tensors[UP], "extra": torch.ones(2)}))
    terminal = Terminal(**options)
    text = comparison_text(diff(*pair, ignore=["norm.*"]), terminal, every=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.split("\n"))) <= terminal.width and ("\x1b" in text) == terminal.colour
    for word in (
        "apart from values",
        "only in B: 1 tensor, extra",
        "identical bytes",
        "attn.q",
        "! NaN or infinity",
        "recognised",
        "furthest apart",
    ):
        assert word in plain
    assert plain.rstrip().endswith("different") and (terminal.unicode or plain.isascii())
    (row,) = [line for line in plain.split("\n") if line.startswith("  attn.q ")]
    ranked = plain[plain.index("furthest apart") :]
    assert "!" in row and ranked.index(Q) < ranked.index(UP)  # what is no number comes first


def test_the_page_of_a_comparison_marks_what_is_no_number(pair: tuple[Path, Path], tmp_path: Path, run: Any) -> None:
    edit(pair[1], lambda tensors: tensors.update({Q: put(math.nan)(tensors[Q])}))
    page = tmp_path / "page.html"
    assert run("diff", *pair, "--html", page).status == 1
    text = page.read_text()
    assert 'class="odd"' in text and "NaN or infinity" in text and "NaN: 0 in A, 1 in B" in text
    json.loads(run("diff", *pair, "--json").out, parse_constant=lambda word: pytest.fail(word))


def test_a_page_takes_the_place_of_no_pipe(pair: tuple[Path, Path], tmp_path: Path, run: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = run("diff", *pair, "--html", tmp_path / "pipe", "--force")
    assert (done.status, "pipe: is a device, pipe or socket, which no file takes the place of. Name a file." in done.err) == (2, True)
    assert (tmp_path / "pipe").is_fifo()
