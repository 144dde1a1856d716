"""Verification: good merges of every kind pass, what is wrong is said so that it helps, and what it measures is right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapter_files import write_adapter
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from proofs import E1, SQUARE, UNPROVED, Forger, failed, good, swap_ffns
from safetensors.torch import load_file, save_file
from scenes import FOUR, write_read_texts

from bam_merge import MergeOptions
from bam_merge.demo.synthetic import Dense, branched_values, random_values, write_checkpoint
from bam_merge.errors import VerificationFailed, VerifyError
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.sources.dense import read_dense
from bam_merge.verifying.verification import verify

__all__ = ["good"]

# ---- good merges pass

WAYS = {
    "expert kv": ("bam", ""),
    "shared kv": ("bam", "attention: {kv: shared}"),
    "mixed kv": ("bam", "rules: [{roles: [attn.k, attn.v, attn.k_norm], layers: 1, make: mean}]"),
    "top-2 attention": ("bam", "attention: {routing: top_k, top_k: 2}\nffn: {top_k: 2, gate_scale: 1.5}"),
    "btx": ("btx", ""),
    "soup": ("merge", ""),
}


def norms_of_keys(folder: Path) -> list[str]:
    """The roles of what a model norms its keys with."""
    return sorted({role for role, _ in read_dense("seed", folder).tensors if role.startswith("attn.k_norm")})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_good_merges_pass(name: str, way: str, tmp_path: Path) -> None:
    method, sections = WAYS[way]
    write_sources(tmp_path, CONFIGS[name])
    sections = sections.replace(", attn.k_norm", "".join(f", {role}" for role in norms_of_keys(tmp_path / "seed")))
    if "linear_attention" in CONFIGS[name].get("layer_types", ()):  # in layer 1
        sections = sections.replace("layers: 1", "layers: 0")
    plan = plan_file(write_recipe(tmp_path, sections, method))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    names = {check.name for check in report.checks}
    assert {"files", "headers", "layout", "digests", "config", "copies", "merges", "routers", "finite", "causality", "padding"} <= names
    assert ({"expert isolation", "identity"} <= names) == (method != "merge")


def test_float64_decides_where_float32_is_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tolerance that float32 cannot meet, a good merge still passes, on values measured in float64."""
    write_sources(tmp_path, CONFIGS["llama"])
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    values = []
    for tolerance in (1e-5, 1e-13):
        monkeypatch.setattr("bam_merge.verifying.measuring.TOLERANCE", tolerance)
        report = verify(folder, plan)
        assert report.ok, failed(report)
        values.append({check.name: check.value for check in report.checks}["cached decoding"])
    assert values[0] > 1e-9 > 1e-12 > values[1]


@pytest.mark.parametrize(("family", "layout"), [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")])
def test_public_layouts_pass(family: str, layout: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[family])
    plan = plan_file(write_recipe(tmp_path, "", "btx", output=f"{{path: out, layout: {layout}}}"))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("make", [
    "{make: linear, weights: {seed: 0.2, code: 0.3, law: 0.5}}",
    "{make: slerp, from: [code, law], t: 0.3}",
    "{make: task_arithmetic, base: seed, scale: 0.7}",
    "{make: ties, base: seed, density: 0.3, weights: {code: 1, law: 2}}",
    "{make: dare_ties, base: seed, density: 0.4}",
    "{make: ties, base: seed, density: 0.6, weights: {code: 1, law: -0.5}}",
    "{make: dare_linear, base: seed, density: [0.4, 0.8]}",
    "{make: breadcrumbs, base: seed, density: 0.5, gamma: 0.1}",
    "{make: della, base: seed, density: 0.5, epsilon: 0.4}",
    "{make: ram, base: seed, epsilon: 0.01}",
    "{make: sce, base: seed, density: 0.3}",
    "{make: model_stock, base: seed}",
    "{make: karcher}",
    "{make: nuslerp, from: [code, law], t: 0.3, by: rows}",
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_every_make_rederives(name: str, make: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, small in (
        ("rows.ROWS_BYTES", 300),
        ("rederive.thresholds.SURVEY_BINS", 8),
        ("rederive.thresholds.SURVEY_SORTED", 16),
    ):  # as a large tensor would be: in pieces
        monkeypatch.setattr(f"bam_merge.verifying.{limit}", small)
    write_sources(tmp_path, CONFIGS[name], dtype=dtype)
    rules = "rules: [{roles: [norm.final], make: mean}]"
    plan = plan_file(write_recipe(tmp_path, f"shared: {make}\n{rules}", "merge"))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_converted_merges_pass(dtype: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    plan = plan_file(write_recipe(tmp_path, output=f"{{path: out, dtype: {dtype}}}"))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)


def large(values: Dense) -> Dense:
    """The same with all but the norms times 40: a standard deviation of 2."""

    def scaled(name: str, shape: tuple[int, ...]) -> Any:
        return values(name, shape) * numpy.float32(1 if "norm" in name else 40)

    return scaled


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_large_weights_are_converted_without_a_false_alarm_and_with_a_true_one(name: str, dtype: str, tmp_path: Path) -> None:
    """Weights of standard deviation 2, from float32: every layer is the converted dense model's to float32's rounding, and one number that
    is the next one, or a single matrix that is 0.8 % too large, is found: by its bytes, and the matrix by what it computes."""
    for branch, source in enumerate(SOURCES):
        write_checkpoint(tmp_path / source, CONFIGS[name], large(branched_values(7, branch) if branch else random_values(7)))
    plan = plan_file(write_recipe(tmp_path, output=f"{{path: out, dtype: {dtype}}}"))
    folder = publish(plan, None, UNPROVED)
    report = verify(folder, plan)
    assert report.ok, failed(report)
    isolation = next(check for check in report.checks if check.name == "expert isolation")
    assert (isolation.value, isolation.tolerance) == (pytest.approx(0, abs=1e-6), 1e-5)
    forge, up = Forger(folder), "model.layers.1.mlp.experts.1.up_proj.weight"
    right = forge.read(up)
    next_one = right.clone()
    next_one.view(torch.int16)[3, 5] += 1
    forge.write(up, next_one)
    assert f"{up} (element {3 * 32 + 5} is " in failed(verify(folder, plan))["merges"]
    forge.write(up, (right.double() * (1 + 2.0**-7)).to(right.dtype))
    found = failed(verify(folder, plan))
    assert up in found["merges"] and "layer 1, expert 1 (code): FFN" in found["expert isolation"]


def test_float64_sources_in_every_narrower_dtype(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["qwen3"])
    for source in SOURCES:
        file = tmp_path / source / "model.safetensors"
        save_file({key: value.double() * (1 + 1e-10) for key, value in load_file(file).items()}, file)
    for dtype in ("float32", "bfloat16", "float16"):
        plan = plan_file(write_recipe(tmp_path, output=f"{{path: {dtype}, dtype: {dtype}}}"))
        report = verify(publish(plan, None, UNPROVED), plan)
        assert report.ok, failed(report)


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_merges_and_verifies_by_default(recipe: Path, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path / "checkpoints", CONFIGS["llama"], FOUR, "BF16")
    for name in FOUR[1:]:
        write_adapter(tmp_path / "checkpoints" / "adapters" / name, tmp_path / "checkpoints" / "seed", seed=len(name))
    write_read_texts(tmp_path)
    (tmp_path / "recipes").mkdir()
    result = run(shutil.copy(recipe, tmp_path / "recipes"))
    assert result.status == 0, result.err
    assert "verified: " in result.out
    again = run("verify", tmp_path / "out" / recipe.stem, "--json")
    assert again.status == 0
    document = json.loads(again.out)
    assert document["ok"] is True
    assert {check["name"]: check["ok"] for check in document["checks"]}["sources"] is True  # found again, from the manifest alone


# ---- without sources, and what it says


def test_without_sources_it_says_digests_only(good: tuple[Path, Plan], run: Any) -> None:
    folder, _ = good
    shutil.rmtree(folder.parent / "law")
    result = run("verify", folder)
    assert result.status == 0
    out = " ".join(result.out.split())
    assert re.search(r" sources -- not at hand, so digests only: sources\.law", out)
    assert out.endswith(" verified as far as it could be; not checked: sources")


def test_changed_sources_are_noticed(good: tuple[Path, Plan]) -> None:
    folder, _ = good
    write_checkpoint(folder.parent / "law", {**SQUARE, "vocab_size": 64}, random_values(1), shards=2)
    (folder.parent / "law" / "model.safetensors").unlink()
    report = verify(folder)
    assert report.ok
    assert next(c for c in report.checks if c.name == "sources").detail == "changed since the merge, so digests only: law/model.safetensors"


def test_a_source_of_other_values_is_to_blame(good: tuple[Path, Plan], run: Any) -> None:
    """Of the same size and header, so that only its values tell."""
    folder, _ = good
    path = folder.parent / "law" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    found = failed(verify(folder))
    assert set(found) == {"merges"}
    assert "expected mean(seed, code, law); law:lm_head.weight changed since the merge)" in found["merges"]


def test_a_moved_result_finds_its_sources_by_the_recipe(good: tuple[Path, Plan], run: Any, tmp_path: Path) -> None:
    folder, _ = good
    moved = tmp_path / "a" / "b" / "c"
    shutil.move(folder, moved)
    assert "digests only" in " ".join(run("verify", moved).out.split())
    assert "digests only" not in " ".join(run("verify", moved, "--recipe", tmp_path / "recipe.yaml").out.split())


def test_a_folder_that_is_no_merge(llamas: Path, run: Any) -> None:
    with pytest.raises(VerifyError, match=r"no bam_merge\.json"):
        verify(llamas / "seed")
    for path, message in (("seed", "no bam_merge.json"), ("nowhere", "nowhere: no such folder"), ("seed/config.json", "not a folder")):
        result = run("verify", llamas / path)
        assert result.status == 2
        assert message in result.err


def test_an_empty_config_is_named_in_short(good: tuple[Path, Plan]) -> None:
    Forger(good[0]).config()
    (good[0] / "config.json").write_text("{}")
    found = failed(verify(*good))
    assert found["config"].startswith("architectures is missing, the sources and the recipe give ['BamForCausalLM']; ")
    assert re.search(r"; and \d+ more keys$", found["config"])
    assert "model_type None is not known here" in found["layout"]


@pytest.mark.parametrize(("old", "new", "message"), [
    ('\n  "tensors"', '\n  "tensorz"', "tensors missing or damaged"),
    ('"digest"', '"digezt"', "missing or damaged"),
    ('"files"', '"filez"', "missing or damaged"),
    ('"format": 2', '"format": 9', "format 9, this version reads 1 and 2: it was written by a newer bam-merge"),
    ('"format": 2', '"format": true', "format True, this version reads 1 and 2."),
    ('"reads"', '"readz"', "missing or damaged"),
    ('"source": "law"', '"source": 7', "missing or damaged"),
    ('"tool"', "tool", "not valid JSON"),
])  # fmt: skip
def test_a_damaged_manifest_is_said_to_be(good: tuple[Path, Plan], run: Any, old: str, new: str, message: str) -> None:
    path = good[0] / "bam_merge.json"
    path.write_text(path.read_text().replace(old, new))
    result = run("verify", good[0])
    assert result.status == 2
    assert message in result.err


# ---- as part of a merge


def test_a_merge_that_fails_its_proof_is_not_published(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is damaged between writing and proving: exit 1, the place is named, the result is kept under a name that says so."""
    from bam_merge.publishing import publish as publish_module

    real = publish_module.write_companions

    def damage(plan: Plan, folder: Path, finished: Any, descriptor: int) -> None:
        real(plan, folder, finished, descriptor)
        step = next(s for s in plan.steps if s.name == f"{E1}o_proj.weight")
        with open(folder / step.file, "r+b") as stream:
            stream.seek(step.offset + 103)  # the sign and exponent of a float32
            stream.write(b"\x3f")

    monkeypatch.setattr(publish_module, "write_companions", damage)
    recipe = write_recipe(llamas)
    for kept in (["out.failed"], ["out.failed", "out.failed-2"]):  # what a failure left is not the next one's to delete
        result = run(recipe)
        assert result.status == 1
        assert f"error: digests: {E1}o_proj.weight in model.safetensors: bytes changed since the merge" in result.err
        assert "layer 1, expert 1 (code): attention" in result.err
        assert f"{llamas}/out was not published; the result is kept for inspection in {llamas}/{kept[-1]}." in result.err
        assert sorted(p.name for p in llamas.iterdir()) == ["code", "law", *kept, "recipe.yaml", "seed"]
    assert run(recipe, "--no-verify").status == 0


def test_failed_verification_exits_1(good: tuple[Path, Plan], run: Any) -> None:
    folder, _ = good
    swap_ffns(Forger(folder))
    result = run("verify", folder)
    assert result.status == 1
    assert re.search(r"^expert isolation +FAILED ", result.out, re.MULTILINE)
    document = json.loads(run("verify", folder, "--json").out)
    assert document["ok"] is False
    assert set(document["checks"][0]) == {"name", "ok", "detail", "value", "tolerance", "seconds"}


def test_library_callers_get_the_error(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_merge.verifying.measuring.TOLERANCE", 0.0)
    with pytest.raises(VerificationFailed, match="was not published"):
        publish(plan_file(write_recipe(llamas)), None, MergeOptions())


def test_verification_has_the_threads_that_were_asked_for() -> None:
    """Also after a merge that has imported torch only in its workers."""
    code = """
from bam_merge.values.torch_threads import one_torch_thread
with one_torch_thread() as single_threaded:
    single_threaded()
import torch
print(torch.get_num_threads())"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "1"


# ---- what it measures


def test_identity_states_the_factor(tmp_path: Path) -> None:
    """Zero routers: un-renormalised top-1 of three gates is 1/3, times gate_scale 3 exactly the dense model; BTX always is."""
    write_sources(tmp_path, CONFIGS["llama"])
    for sections, method, words in (
        ("router: {init: zeros}", "bam", "its FFN times 0.3333"),
        ("router: {init: zeros}\nffn: {gate_scale: 3}", "bam", "the dense model exactly"),
        ("", "btx", "the dense model exactly"),
    ):
        plan = plan_file(write_recipe(tmp_path, sections, method))
        report = verify(publish(plan, None, MergeOptions(verify=False, force=True)), plan)
        assert words in next(c for c in report.checks if c.name == "identity").detail


def test_degenerate_routers_are_named(tmp_path: Path) -> None:
    """Zero routers give equal gates, so that the first expert gets every token; normal ones share."""
    write_sources(tmp_path, CONFIGS["llama"])
    plan = plan_file(write_recipe(tmp_path, "router: {init: zeros}", "btx"))
    report = verify(publish(plan, None, UNPROVED), plan)
    rows = [row for row in report.routing if row["router"] == "ffn"]
    assert [row["entropy"] for row in rows] == pytest.approx([torch.tensor(3.0).log().item()] * 2)
    for row in rows:
        assert sum(row["share"]) == pytest.approx(1.0)
    top1 = plan_file(write_recipe(tmp_path, "router: {init: zeros}\nffn: {top_k: 1}", "btx"))
    detail = next(
        c for c in verify(publish(top1, None, MergeOptions(verify=False, force=True)), top1).checks if c.name == "router load"
    ).detail
    assert "degenerate: layer 0 ffn (expert 0: 100%), layer 1 ffn (expert 0: 100%)" in detail


def words_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_perplexity_table(tmp_path: Path, run: Any) -> None:
    """Against a direct computation with whole models; the mixture of one model's copies has that model's perplexity."""
    write_sources(tmp_path, CONFIGS["llama"])
    words_tokenizer(tmp_path / "seed")
    ids = torch.randint(64, (600,), generator=torch.Generator().manual_seed(1))
    text = tmp_path / "held.txt"
    text.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    plan = plan_file(write_recipe(tmp_path, "", "btx"))
    folder = publish(plan, None, UNPROVED)
    (row,) = verify(folder, plan, [text]).perplexity
    assert set(row["perplexity"]) == {"seed", "code", "law", "average", "merged"}
    assert row["tokens"] == 512
    batch = ids[:512].view(2, 256)
    models = {name: load_model(tmp_path / name) for name in SOURCES} | {"merged": load_model(folder)}
    average = load_model(tmp_path / "seed")
    states = [models[name].state_dict() for name in SOURCES]
    average.load_state_dict({key: sum(state[key] for state in states) / 3 for key in states[0]})
    for name, model in {**models, "average": average}.items():
        with torch.no_grad():
            logits = model(batch)[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).exp().item()
        assert row["perplexity"][name] == pytest.approx(expected, rel=1e-5)
    shutil.copy(text, tmp_path / "again.txt")
    shown = run("verify", folder, "--text", text, tmp_path / "again.txt")
    assert shown.status == 0
    assert [line.split()[:2] for line in shown.out.splitlines() if ".txt" in line] == [["held.txt", "512"], ["again.txt", "512"]]


def test_perplexity_needs_a_tokenizer_and_a_text(good: tuple[Path, Plan], run: Any, tmp_path: Path) -> None:
    folder, _ = good
    result = run("verify", folder, "--text", folder / "none.txt")
    assert result.status == 2
    assert "none.txt: No such file or directory." in result.err
    assert "no tokenizer.json, so a text cannot be read" in result.err
    assert not result.out
    words_tokenizer(folder)
    short = tmp_path / "short.txt"
    short.write_text("w1 " * 255)
    result = run("verify", folder, "--text", short)
    assert result.status == 2
    assert "short.txt: 255 tokens, at least 256 are needed" in result.err


def test_verification_needs_no_write_access(good: tuple[Path, Plan]) -> None:
    folder, plan = good
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    os.chmod(folder, 0o555)
    try:
        assert verify(folder, plan).ok
    finally:
        os.chmod(folder, 0o755)
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_public_names_are_functions(llamas: Path) -> None:
    """Also once the modules behind them are imported: a submodule must not hide a function of the same name."""
    import bam_merge

    folder = bam_merge.merge(bam_merge.load_recipe(write_recipe(llamas)))
    assert bam_merge.verify(folder).ok
    logits = bam_merge.load_model(folder, dtype=torch.float32)(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 64)
    for name in bam_merge.__all__:
        assert not isinstance(getattr(bam_merge, name), type(bam_merge)), name


def test_logits_must_be_finite_in_float32(tmp_path: Path) -> None:
    """What overflows float32 is garbage in every engine, though float64 holds it."""
    write_sources(tmp_path, CONFIGS["llama"])
    for name in SOURCES:
        tensors = load_file(tmp_path / name / "model.safetensors")
        for large in ("model.norm.weight", "lm_head.weight"):
            tensors[large] = tensors[large] * 1e25
        save_file(tensors, tmp_path / name / "model.safetensors")
    plan = plan_file(write_recipe(tmp_path))
    assert "logits are NaN or infinite" in failed(verify(publish(plan, None, UNPROVED), plan))["finite logits"]


@pytest.mark.parametrize(("shape", "dtype"), [((32, 16), torch.float32), ((8, 8, 8), torch.float32), ((32, 32), torch.float16)])
def test_a_tensor_of_another_form_is_a_finding(good: tuple[Path, Plan], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    folder, plan = good
    name = f"{E1}q_proj.weight"
    file = next(step.file for step in plan.steps if step.name == name)
    save_file({**load_file(folder / file), name: torch.ones(shape, dtype=dtype)}, folder / file)
    copies = failed(verify(folder, plan))["copies"]
    assert f"{name} ({'F16' if dtype == torch.float16 else 'F32'} {list(shape)}, expected F32 [32, 32])" in copies
