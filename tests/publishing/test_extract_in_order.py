"""Experts whose rows of q and k a layout put in another order of rotary pairs: dense models again, bit for bit, in their family's order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from safetensors.torch import save_file
from test_extract import COPIES, facts, logits, same, tensors, written
from vocabularies import source as vocabulary

from bam_merge import (
    BamMergeError,
    CheckpointError,
    MergeOptions,
    VerifyOptions,
    diff,
    drift,
    extract,
    inspect,
    load_recipe,
    make_plan,
    merge,
    verify,
)
from bam_merge.architectures.tables import find_by_model_type, mixture_layouts
from bam_merge.checkpoints.pieces import Computed, Read, Slice, byte_runs, stored
from bam_merge.formulas import Pairs
from bam_merge.merging.planned_model import planned_model
from bam_merge.model.loading import load_model
from bam_merge.sources import pairs

QUICK = MergeOptions(verify=False)
ONE_WAY = {
    table.name: table.accepts["rope_interleaved"] for table in mixture_layouts() if table.accepts.get("rope_interleaved") is not None
}


def interleaved(name: str) -> bool:
    family = find_by_model_type(CONFIGS[name]["model_type"])
    assert family is not None
    return family.traits.get("rope_interleaved") is True


OTHERWISE = [(layout, name) for layout, way in ONE_WAY.items() for name in CONFIGS if isinstance(way, bool) and interleaved(name) != way]


def mixture(folder: Path, family: str, layout: str, text: str = COPIES, **options: Any) -> Path:
    write_sources(folder, CONFIGS[family], **options)
    return merge(load_recipe(write_recipe(folder, text, "btx", output=f"{{path: out, layout: {layout}}}")), options=QUICK)


# ---- the model again -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", dict.fromkeys(layout for layout, _ in OTHERWISE))
def test_every_family_that_a_layout_turns_is_put_back(layout: str, tmp_path: Path) -> None:
    """All that it holds, biased, partly turning, with heads that are not the width, in one dtype and in the other."""
    read = []
    for number, name in enumerate(name for one, name in OTHERWISE if one == layout):
        recipe = written(tmp_path / name, name, layout, "BF16" if number % 2 else "F32")
        if recipe is None:
            continue
        out = merge(recipe, options=QUICK)
        assert not same(tensors(out), tensors(tmp_path / name / "code"))
        back = extract(f"{out}#experts.code", tmp_path / name / "back", CONFIGS[name]["model_type"])  # proved before it appears
        assert same(tensors(back), tensors(tmp_path / name / "code")), name
        assert facts(back) == facts(tmp_path / name / "code"), name
        read.append(name)
    assert bool(read) == (layout not in NONE_FITS)


NONE_FITS = {"cohere2_moe", "qwen3_moe", "qwen3_5_moe", "gemma4", "flex_olmo", "dots1", "mellum", "hunyuan_v1_moe", "olmoe"}
"""Layouts that hold no family of the other order: of parallel blocks, normed queries, or norms after them."""


@pytest.mark.parametrize(
    ("layout", "family"), [("mixtral", "helium"), ("qwen2_moe", "ernie4_5"), ("ernie4_5_moe", "phi3"), ("glm4_moe", "glm")]
)
def test_it_computes_what_its_source_does_in_transformers(layout: str, family: str, tmp_path: Path) -> None:
    recipe = written(tmp_path, family, layout)
    assert recipe is not None
    back = extract(f"{merge(recipe, options=QUICK)}#experts.1", tmp_path / "back")
    assert torch.equal(logits(back), logits(tmp_path / "code"))
    assert verify(back, options=VerifyOptions("full")).ok


def test_what_was_averaged_is_the_mixtures_in_the_familys_order(tmp_path: Path) -> None:
    """Means of rows that were put are the rows of the means: those of the same merge in layout bam, which turns as its sources do."""
    out = mixture(tmp_path / "one", "helium", "mixtral", "")
    write_sources(tmp_path / "two", CONFIGS["helium"])
    plain = merge(load_recipe(write_recipe(tmp_path / "two", "", "btx")), options=QUICK)
    one, two = (tensors(extract(f"{of}#experts.law", of.parent / "back")) for of in (out, plain))
    assert same(one, two)


def test_without_a_record_families_of_the_mixtures_own_order_come_first(tmp_path: Path) -> None:
    """A mixture that was trained has none; who says another family gets that one."""
    out = mixture(tmp_path, "helium", "mixtral")
    (out / "bam_merge.json").unlink()
    with pytest.raises(CheckpointError, match="Say which: --family NAME") as caught:
        extract(f"{out}#experts.1", tmp_path / "back")
    assert "helium" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"a cohere2 model has parallel_block = true, and this mixture has false\."):
        extract(f"{out}#experts.1", tmp_path / "back", "cohere2")
    assert same(tensors(extract(f"{out}#experts.1", tmp_path / "back", "helium")), tensors(tmp_path / "code"))
    turned = tensors(extract(f"{out}#experts.1", tmp_path / "llama", "llama"))
    assert same(turned, {name: tensors(out).get(name, turned[name]) for name in turned})


def test_rows_that_are_no_heads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = mixture(tmp_path, "helium", "mixtral")
    monkeypatch.setattr(pairs, "_in_pairs", lambda *_: None)
    with pytest.raises(
        CheckpointError, match=r"a helium model turns neighbouring channels together .* the halves of a head, and its rows of q"
    ):
        extract(f"{out}#experts.code", tmp_path / "back")


def test_norms_of_heads_and_of_all_heads_go_with_their_rows() -> None:
    """Weights of a norm of each head, and of one across heads; one that holds heads in its columns has no such rows."""
    facts = {"head_dim": 6, "rope_parameters": {"partial_rotary_factor": 2 / 3}, "sizes_by_kind": None, "layer_types": None}
    shapes = {"attn.q": (12, 5), "attn.q.bias": (12,), "attn.q_norm": (6,), "attn.k_norm": (12,), "attn.v": (12, 5)}
    held = {(role, 0): Read("m", role, "BF16", shape) for role, shape in shapes.items()}
    found = pairs.in_order(held, facts, to_halves=True)
    assert found is not None
    of_a_head = [0, 2, 1, 3, 4, 5]
    for (role, layer), read in held.items():
        expr = found[role, layer]
        if role == "attn.v":
            assert expr == read
            continue
        assert isinstance(expr, Computed)
        assert [expr.formula.source(row) for row in range(read.shape[0])] == [
            head + row for head in range(0, read.shape[0], 6) for row in of_a_head
        ]
    assert pairs.in_order(found, facts, to_halves=False) == held
    assert pairs.in_order({("attn.k_norm", 0): Read("m", "k", "BF16", (2, 6))}, facts, to_halves=True) is None
    assert pairs.in_order({("attn.q", 0): Read("m", "q", "BF16", (13, 5))}, facts, to_halves=True) is None
    assert pairs.in_order({("attn.q", 0): Read("m", "q", "F4", (12, 5))}, facts, to_halves=True) is None


# ---- as sources --------------------------------------------------------------------------------------------------------------------


def again(folder: Path, text: str, output: str, method: str = "btx") -> Path:
    recipe = folder / f"{output}.yaml"
    recipe.write_text(text.replace("METHOD", method))
    return merge(load_recipe(recipe))


SOURCES = "sources: {seed: seed, code: 'out#experts.code', law: 'out#experts.law'}"
STACKED = "sources: {seed: seed, code: 'out#experts.code'}\nmethod: METHOD\noutput: {path: stack, layers: [{from: seed, layers: 0-1}, {from: code, layers: 1-1}]}\n"


@pytest.mark.parametrize(("family", "layout"), [("helium", "mixtral"), ("phi3", "ernie4_5_moe")])
@pytest.mark.parametrize("into", ["bam", "mixtral", "ernie4_5_moe"])
def test_experts_are_sources_as_their_folders_are(family: str, layout: str, into: str, tmp_path: Path) -> None:
    """Beside a model of the family: in a layout that turns as it does, in the one they come from, there and back again, and in one that turns
    the other way."""
    mixture(tmp_path, family, layout, "shared: {make: copy, from: law}", dtype="BF16")
    for name in ("code", "law"):
        extract(f"{tmp_path}/out#experts.{name}", tmp_path / f"{name}_alone", options=QUICK)
    settings = f"ffn: {{top_k: 2}}\nmethod: METHOD\noutput: {{layout: {into}, path: "
    one = again(tmp_path, f"{SOURCES}\n{settings}one}}\n", "one")
    two = again(tmp_path, f"sources: {{seed: seed, code: code_alone, law: law_alone}}\n{settings}two}}\n", "two")
    assert same(tensors(one), tensors(two))
    assert verify(one, options=VerifyOptions("full")).ok


def test_dense_merges_and_stacks_of_them(tmp_path: Path) -> None:
    mixture(tmp_path, "helium", "mixtral", "shared: {make: copy, from: law}")
    mean = again(tmp_path, f"method: METHOD\n{SOURCES}\nshared: {{make: mean}}\noutput: {{path: mean}}\n", "mean", "merge")
    stack = again(tmp_path, STACKED, "stack", "merge")
    seed, law = tensors(tmp_path / "seed"), tensors(tmp_path / "law")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(tensors(mean)[name], (seed[name] + 2 * law[name]) / 3, atol=1e-6)
    assert torch.equal(tensors(stack)[name.replace("1", "2")], law[name])
    assert torch.equal(tensors(stack)[name], seed[name])


@pytest.mark.parametrize("method", ["merge", "btx"])
def test_in_another_dtype_and_with_tokens_of_their_own(method: str, tmp_path: Path) -> None:
    """Rows by token and rows of pairs, rounded once: beside a model of one token more."""
    for branch, name in enumerate(("seed", "code", "law")):
        vocabulary(tmp_path, name, ("<x>",), 20, branch, "ernie4_5")
    merge(load_recipe(write_recipe(tmp_path, COPIES, "btx", output="{path: out, layout: mixtral}")), options=QUICK)
    vocabulary(tmp_path, "more", ("<x>", "<y>"), 20, 3, "ernie4_5")
    text = "sources: {more: more, code: 'out#experts.code', law: 'out#experts.law'}\ntokenizer: {source: union}\nmethod: METHOD\n"
    made = again(tmp_path, text + "output: {path: made, dtype: bfloat16}\n", "made", method)
    found = verify(made, options=VerifyOptions("full"))
    assert found.ok
    assert {"experts", "experts' rotary order"} <= {check.name for check in found.checks}


def test_routers_of_texts_see_the_expert_as_it_computes(tmp_path: Path) -> None:
    """What a merge reads of it, put in order, computes what the source did."""
    mixture(tmp_path, "ernie4_5", "mixtral")
    recipe = tmp_path / "plan.yaml"
    recipe.write_text("method: btx\nsources: {seed: seed, code: 'out#experts.code'}\noutput: {path: made}\n")
    plan, ids = make_plan(load_recipe(recipe)), torch.arange(3, 27).view(2, 12)
    with planned_model(plan, "code") as found, torch.no_grad():
        assert torch.equal(found.model()(ids), load_model(tmp_path / "code")(ids))


# ---- a wrong order is found ------------------------------------------------------------------------------------------------------------


def wrong_rows(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = pairs._in_pairs

    def other(expr: Any, head: int, turning: int, to_halves: bool) -> Any:
        if wrong == "not at all":
            return expr
        if wrong == "the other way":
            return right(expr, head, turning, not to_halves)
        return right(expr, head // 2, turning // 2, to_halves) if wrong == "smaller heads" else right(expr, head, turning // 2, to_halves)

    monkeypatch.setattr(pairs, "_in_pairs", other)


@pytest.mark.parametrize("wrong", ["not at all", "the other way", "smaller heads", "half of what turns"])
def test_a_wrong_order_is_not_published(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = mixture(tmp_path, "helium", "mixtral")
    wrong_rows(monkeypatch, wrong)
    with pytest.raises(BamMergeError, match=r"experts: code: attn\.q is other rows of .*q_proj\.weight than the expert's"):
        extract(f"{out}#experts.code", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_rows_of_one_role_that_stay_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that is forgotten, of all that is put."""
    out = merge(written(tmp_path, "glm", "glm4_moe"), options=QUICK)
    monkeypatch.setattr(pairs, "TURNED", tuple(role for role in pairs.TURNED if role != "attn.k.bias"))
    with pytest.raises(BamMergeError, match=r"experts: code: attn\.k\.bias is other rows"):
        extract(f"{out}#experts.code", tmp_path / "back")


def test_a_stack_of_wrong_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture(tmp_path, "helium", "mixtral")
    wrong_rows(monkeypatch, "not at all")
    with pytest.raises(BamMergeError, match=r"layers: layer 2 is not layer 1 of code: self_attn\.(q|k)_proj"):
        again(tmp_path, STACKED, "stack", "merge")


@pytest.mark.parametrize("wrong", ["not at all", "the other way", "half of what turns"])
def test_the_proof_does_not_take_its_own_order_on_trust(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the second reading as wrong as the first, what the rows compute would tell: in the mixture, and in the result."""
    from bam_merge.verifying import pairs as second

    wrong_rows(monkeypatch, wrong)
    right = second.Ordered._order

    def other(self: Any, parameter: str) -> Any:
        order = right(self, parameter)
        if order is None or wrong == "not at all":
            return None
        if wrong == "the other way":
            return torch.argsort(order)
        D, P = self.config.head_dim, self.config.head_dim // 2
        formula = Pairs(D, P, not self.config.rope_interleaved, len(order), 0, len(order))
        return torch.tensor([formula.source(row) for row in range(len(order))])

    monkeypatch.setattr(second.Ordered, "_order", other)
    write_sources(tmp_path, {**CONFIGS["helium"], "head_dim": 8})
    monkeypatch.setattr("bam_merge.planning.pairs.in_order", lambda tensors, facts, to_halves: dict(tensors))
    out = merge(load_recipe(write_recipe(tmp_path, COPIES, "btx", output="{path: out, layout: mixtral}")), options=QUICK)
    with pytest.raises(BamMergeError, match=r"experts' rotary order: sources\.code: layer 0"):
        extract(f"{out}#experts.code", tmp_path / "back")


def test_verify_finds_rows_that_were_swapped_since(tmp_path: Path) -> None:
    back = extract(f"{mixture(tmp_path, 'helium', 'mixtral')}#experts.code", tmp_path / "back", options=QUICK)
    held, name = tensors(back), "model.layers.1.self_attn.k_proj.weight"
    held[name] = held[name][[1, 0, *range(2, len(held[name]))]].contiguous()
    save_file(held, back / "model.safetensors", metadata={"format": "pt"})
    assert not verify(back).ok


# ---- looked at -------------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_dense_model(tmp_path: Path) -> None:
    found, dense = inspect(f"{mixture(tmp_path, 'helium', 'mixtral')}#experts.code", stats=True), inspect(tmp_path / "code", stats=True)
    assert found.document()["parameters"] == dense.document()["parameters"]
    assert found.document()["model_type"] == "helium"
    assert "rows of q and k in its order of rotary pairs again" in found.document()["findings"][0]


@pytest.mark.parametrize(("family", "layout"), [("helium", "mixtral"), ("phi3", "ernie4_5_moe")])
def test_diff_compares_rows_of_the_same_pair(family: str, layout: str, tmp_path: Path, run: Any) -> None:
    """Of an expert, in its family's order; of a mixture beside a dense model, in the order of the first of the two."""
    out = mixture(tmp_path, family, layout)
    assert run("diff", f"{out}#experts.code", tmp_path / "code").status == 0
    assert run("diff", f"{out}#experts.code", tmp_path / "law").status == 1
    for a, b in ((out, tmp_path / "code"), (tmp_path / "code", out)):
        found = diff(a, b)
        assert not found.changed
        assert [finding.kind for finding in found.findings if "rope_interleaved" in finding.text or "rotary" in finding.kind] == [
            "rotary order"
        ]
        assert {"attn.q", "attn.k"} <= {place for place, *_ in (each.place for each in found.compared)}
    assert run("diff", tmp_path / "code", out, "--only", "attn.*").status == 0
    drifted = drift(tmp_path / "code", [f"{out}#experts.code", f"{out}#experts.1"])
    assert [finding.text for finding in drifted.findings if "rope_interleaved" in finding.text] == []
    assert drifted.equal


def test_diff_says_of_rows_that_cannot_be_put_what_config_json_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = mixture(tmp_path, "helium", "mixtral")
    monkeypatch.setattr(pairs, "_in_pairs", lambda *_: None)
    found = diff(out, tmp_path / "code", only=["attn.*"])
    assert {each.place[0] for each in found.changed} == {"attn.q", "attn.k"}
    assert any("rope_interleaved is false in A, true in B" in finding.text for finding in found.findings)


def test_what_a_layout_fills_in_is_no_difference(tmp_path: Path, run: Any) -> None:
    """Biases of zeros, and a shared expert of them; if they were trained, they are."""
    out = mixture(tmp_path, "llama", "qwen2_moe")
    result = run("diff", f"{out}#experts.code", tmp_path / "code")
    assert result.status == 0, result.out
    assert "of a shared expert that adds nothing" in result.out.replace("\n", " ")
    held = tensors(out)
    held["model.layers.0.self_attn.q_proj.bias"] += 1
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    result = run("diff", f"{out}#experts.code", tmp_path / "code")
    assert result.status == 1
    assert "attention_bias is true in A, false in B" in result.out.replace("\n", " ")


def test_runs_of_rows_in_another_order_are_cut_anywhere() -> None:
    """Elements of a tensor, of a slice of it and of one that is put twice, from any to any."""
    formula = Pairs(6, 4, True, 12, 0, 6)
    of = Read("seed", "w", "F32", (24, 3))
    node = Computed("seed", "w", formula, (of,), "F32", (24, 3))
    twice = Computed("seed", "w", formula, (node,), "F32", (24, 3))
    for leaf in (node, twice, Slice(node, 2, 0, 6, (12, 3)), Slice(twice, 2, 2, 5, (10, 3))):
        rows = range(24) if not isinstance(leaf, Slice) else [12 * block + leaf.start + row for block in (0, 1) for row in range(leaf.rows)]
        for _ in range(2 if leaf is twice or (isinstance(leaf, Slice) and leaf.of is twice) else 1):
            rows = [formula.source(row) for row in rows]
        wanted = [row * 3 + column for row in rows for column in range(3)]
        for start in range(len(wanted)):
            for stop in (start + 1, start + 5, len(wanted)):
                found = [byte // 4 + at for byte, count in byte_runs(leaf, start, min(stop, len(wanted))) for at in range(count // 4)]
                assert found == wanted[start:stop]
        assert stored(leaf) == of
