"""Verification: good merges of every kind pass, and every sabotage fails in the check that should see it, naming the place."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import CONFIGS, SOURCES, write_recipe, write_sources

from bam_merge import MergeOptions
from bam_merge.errors import VerificationFailed, VerifyError
from bam_merge.loading import load_model
from bam_merge.plan import Plan, plan_file
from bam_merge.provenance import sealed
from bam_merge.publish import publish
from bam_merge.report import Report
from bam_merge.safetensors_header import read_header
from bam_merge.synthetic import random_values, write_checkpoint
from bam_merge.tensors import TORCH_DTYPES
from bam_merge.verification import verify

UNPROVED = MergeOptions(verify=False)


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.failures}


# ---- good merges pass

WAYS = {
    "expert kv": ("bam", ""),
    "shared kv": ("bam", "attention: {kv: shared}"),
    "mixed kv": ("bam", "rules: [{roles: [attn.k, attn.v, attn.k_norm], layers: 1, make: mean}]"),
    "top-2 attention": ("bam", "attention: {routing: top_k, top_k: 2}\nffn: {top_k: 2, gate_scale: 1.5}"),
    "btx": ("btx", ""),
    "soup": ("merge", ""),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_good_merges_pass(name: str, way: str, tmp_path: Path) -> None:
    method, sections = WAYS[way]
    if way == "mixed kv" and "norm" not in name and "qwen3" not in name:
        sections = sections.replace(", attn.k_norm", "")
    write_sources(tmp_path, CONFIGS[name])
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
        monkeypatch.setattr("bam_merge.verify_function.TOLERANCE", tolerance)
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
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_every_make_rederives(name: str, make: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, small in (("ROWS_BYTES", 300), ("SURVEY_BINS", 8), ("SURVEY_SORTED", 16)):  # as a large tensor would be: in pieces
        monkeypatch.setattr(f"bam_merge.rederive.{limit}", small)
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


RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_merges_and_verifies_by_default(recipe: Path, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path / "checkpoints", CONFIGS["llama"], ("seed", "code", "law", "math"), "BF16")
    (tmp_path / "recipes").mkdir()
    result = run(shutil.copy(recipe, tmp_path / "recipes"))
    assert result.status == 0, result.err
    assert "verified: " in result.out
    again = run("verify", tmp_path / "out" / recipe.stem, "--json")
    assert again.status == 0
    document = json.loads(again.out)
    assert document["ok"] is True
    assert {check["name"]: check["ok"] for check in document["checks"]}["sources"] is True  # found again, from the manifest alone


# ---- sabotage

SQUARE = {**CONFIGS["llama"], "num_key_value_heads": 4}  # q, k and o are all [32, 32]


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, Plan]:
    write_sources(tmp_path, SQUARE)
    plan = plan_file(write_recipe(tmp_path))
    return publish(plan, None, UNPROVED), plan


class Forger:
    """Changes a merged folder and mends the digests in its manifest, so that only what the tensors and config mean can tell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "bam_merge.json"
        self.manifest = json.loads(self.path.read_text())

    def read(self, name: str) -> torch.Tensor:
        entry = self.entry(name)
        data = bytearray((self.folder / entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes])
        return torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def entry(self, name: str) -> Any:
        file = self.manifest["tensors"][name]["file"]
        return next(e for e in read_header(str(self.folder / file)).tensors if e.name == name)

    def write(self, name: str, value: torch.Tensor) -> None:
        entry = self.entry(name)
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert len(data) == entry.nbytes
        with open(self.folder / entry.file, "r+b") as stream:
            stream.seek(entry.offset)
            stream.write(data)
        self.manifest["tensors"][name]["digest"] = xxhash.xxh3_128_hexdigest(data)
        self.path.write_bytes(sealed(self.manifest))

    def swap(self, a: str, b: str) -> None:
        first, second = self.read(a), self.read(b)
        self.write(a, second)
        self.write(b, first)

    def config(self, **changes: Any) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        self.manifest["files"]["config.json"] = xxhash.xxh3_128_hexdigest(path.read_bytes())
        self.path.write_bytes(sealed(self.manifest))


def swap_ffns(forge: Forger) -> None:
    for part in ("gate", "up", "down"):
        forge.swap(*(f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in (0, 1)))


def permute_attention(forge: Forger) -> None:
    for layer in range(2):
        for part in "qkvo":
            forge.swap(*(f"model.layers.{layer}.self_attn.experts.{e}.{part}_proj.weight" for e in (1, 2)))


def flip(forge: Forger, name: str) -> None:
    value = forge.read(name)
    value.view(torch.int32)[1, 5] ^= 1
    forge.write(name, value)


E1 = "model.layers.1.self_attn.experts.1."
F2 = "model.layers.0.mlp.experts.2."
NORM = "model.layers.1.input_layernorm.weight"
ROUTER = "model.layers.0.self_attn.router.weight"

SABOTAGE: dict[str, tuple[Callable[[Forger], Any], dict[str, str]]] = {
    # what is done; the checks that must fail, each with a word that its detail must hold
    "FFNs of two experts swapped": (swap_ffns, {"copies": "model.layers.1.mlp.experts.0.gate_proj.weight", "expert isolation": "layer 1, expert 0 (seed): FFN"}),
    "q and k of one expert swapped": (lambda f: f.swap(f"{E1}q_proj.weight", f"{E1}k_proj.weight"), {"copies": f"{E1}q_proj", "expert isolation": "layer 1, expert 1 (code): attention"}),
    "gate and up swapped": (lambda f: f.swap(f"{F2}gate_proj.weight", f"{F2}up_proj.weight"), {"copies": f"{F2}gate_proj", "expert isolation": "layer 0, expert 2 (law): FFN"}),
    "o_proj transposed": (lambda f: f.write(f"{E1}o_proj.weight", f.read(f"{E1}o_proj.weight").T), {"copies": f"{E1}o_proj", "expert isolation": "layer 1, expert 1 (code): attention"}),
    "attention experts permuted": (permute_attention, {"copies": "self_attn.experts.1.q_proj", "expert isolation": "layer 0, expert 1 (code): attention"}),
    "a bit of a router flipped": (lambda f: flip(f, ROUTER), {"routers": f"{ROUTER} (element 37"}),
    "a tensor through float16": (lambda f: f.write(f"{E1}v_proj.weight", f.read(f"{E1}v_proj.weight").half().float()), {"copies": f"{E1}v_proj"}),
    "a NaN": (lambda f: f.write(NORM, f.read(NORM).index_fill(0, torch.tensor([3]), float("nan"))), {"finite": f"{NORM} (1 values)", "merges": NORM, "finite logits": "NaN"}),
    "wrong rope_theta": (lambda f: f.config(rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}), {"config": "rope_parameters", "expert isolation": "layer 0"}),
    "wrong norm eps": (lambda f: f.config(rms_norm_eps=1e-2), {"config": "rms_norm_eps is 0.01, the sources and the recipe give 1e-05", "expert isolation": "the block's configuration or wiring"}),
    "wrong head_dim": (lambda f: f.config(head_dim=16), {"layout": "q_proj.weight is [32, 32], config.json wants [64, 32]", "config": "head_dim is 16"}),
    "wrong norm_topk_prob": (lambda f: f.config(norm_topk_prob=True), {"config": "norm_topk_prob is True", "identity": "layer 0"}),
    "wrong num_experts_per_tok": (lambda f: f.config(num_experts_per_tok=2), {"config": "num_experts_per_tok is 2", "identity": "layer 0"}),
    "wrong gate_scale": (lambda f: f.config(gate_scale=2.0), {"config": "gate_scale is 2.0", "identity": "layer 0"}),
    "sequential block declared parallel": (lambda f: f.config(parallel_block=True), {"config": "parallel_block is True", "expert isolation": "the block's configuration or wiring"}),
    "tied heads declared": (lambda f: f.config(tie_word_embeddings=True), {"layout": "config.json has no place for lm_head.weight", "config": "tie_word_embeddings is True"}),
    "other experts' names": (lambda f: f.config(expert_names=["code", "seed", "law"]), {"config": "expert_names"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_found_where_it_is(name: str, good: tuple[Path, Plan]) -> None:
    folder, plan = good
    change, expected = SABOTAGE[name]
    change(Forger(folder))
    found = failed(verify(folder, plan))
    assert "digests" not in found  # the forger mended them: the content alone must tell
    for check, words in expected.items():
        assert check in found, found
        assert words in found[check], found[check]


def wrongly_declared(tmp_path: Path, family: str, **config: Any) -> dict[str, str]:
    """The checks that a merge of `family` fails once its config.json says `config`."""
    write_sources(tmp_path, CONFIGS[family])
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    Forger(folder).config(**config)
    return failed(verify(folder, plan))


def test_parallel_block_declared_sequential(tmp_path: Path) -> None:
    found = wrongly_declared(tmp_path, "gpt_neox", parallel_block=False)
    assert "parallel_block is False, the sources and the recipe give True" in found["config"]
    assert "layer 0, expert 0 (seed): the block's configuration or wiring" in found["expert isolation"]


def test_tied_heads_declared_untied(tmp_path: Path) -> None:
    found = wrongly_declared(tmp_path, "llama_tied", tie_word_embeddings=False)
    assert "config.json wants lm_head.weight" in found["layout"]
    assert "tie_word_embeddings is False, the sources and the recipe give True" in found["config"]


def test_experts_swapped_in_a_public_layout(tmp_path: Path) -> None:
    """Mixtral's names: w1 is gate, w3 is up, w2 is down."""
    write_sources(tmp_path, CONFIGS["llama"])
    plan = plan_file(write_recipe(tmp_path, "", "btx", output="{path: out, layout: mixtral}"))
    folder = publish(plan, None, UNPROVED)
    forge = Forger(folder)
    experts = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    forge.swap(experts.format(0, 0, "w1"), experts.format(0, 0, "w3"))
    forge.swap(experts.format(1, 1, "w1"), experts.format(1, 2, "w1"))
    found = failed(verify(folder, plan))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in found["copies"]
    for place in ("layer 0, expert 0 (seed): FFN", "layer 1, expert 1 (code): FFN", "layer 1, expert 2 (law): FFN"):
        assert place in found["expert isolation"]


@pytest.mark.parametrize(("make", "check"), [("copy, from: seed", "copies"), ("mean", "merges")])
def test_a_norm_of_the_wrong_source(make: str, check: str, tmp_path: Path) -> None:
    write_sources(tmp_path, SQUARE)
    plan = plan_file(write_recipe(tmp_path, f"rules: [{{roles: [norm.attn], make: {make}}}]"))
    folder = publish(plan, None, UNPROVED)
    forge = Forger(folder)
    with_law = load_model(tmp_path / "law").state_dict()[NORM]
    forge.write(NORM, with_law)
    assert NORM in failed(verify(folder, plan))[check]


@pytest.mark.parametrize("through", [torch.float16, None])
def test_a_mean_rounded_twice(tmp_path: Path, through: torch.dtype | None) -> None:
    """Once through float16 on the way to bfloat16, once summed in bfloat16: a part of the elements is then half a step off."""
    write_sources(tmp_path, SQUARE, dtype="BF16")
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    sources = [load_model(tmp_path / source).state_dict()["lm_head.weight"] for source in SOURCES]
    mean = sum(sources) / 3
    forge = Forger(folder)
    right = mean.bfloat16()
    wrong = mean.to(through).bfloat16() if through else ((sources[0].bfloat16() + sources[1].bfloat16()) + sources[2].bfloat16()) / 3
    assert torch.equal(forge.read("lm_head.weight"), right)
    assert not torch.equal(wrong, right)
    forge.write("lm_head.weight", wrong)
    assert "lm_head.weight (element" in failed(verify(folder, plan))["merges"]


def test_any_flipped_bit_is_named(good: tuple[Path, Plan]) -> None:
    """One bit in every region of every file, without mended digests and without sources."""
    folder, plan = good
    shutil.rmtree(folder.parent / "law")
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        places = {0, 5, 9, len(data) // 3, len(data) // 2, len(data) - 2}
        if path.name == "bam_merge.json":
            continue  # what the manifest itself says is checked against everything else
        for place in places:
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            found = failed(verify(folder))
            assert found, (path.name, place)
            if path.suffix == ".safetensors" and place > 20_000:
                name = next(s.name for s in plan.steps if s.offset <= place < s.offset + s.nbytes)
                assert name in found["digests"]
            elif path.suffix != ".safetensors":
                assert path.name in found["files"]
        path.write_bytes(data)
    assert verify(folder).ok


def test_missing_and_extra_tensors_and_files(good: tuple[Path, Plan]) -> None:
    folder, plan = good
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert "model-00002-of-00002.safetensors: not of this merge" in failed(verify(folder, plan))["files"]
    (folder / "model.safetensors").unlink()
    assert "headers" in failed(verify(folder, plan))


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
    ('"format": 1', '"format": 9', "format 9, this version reads 1"),
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
    from bam_merge import publish as publish_module

    real = publish_module._write_companions

    def damage(plan: Plan, folder: Path, finished: Any) -> None:
        real(plan, folder, finished)
        step = next(s for s in plan.steps if s.name == f"{E1}o_proj.weight")
        with open(folder / step.file, "r+b") as stream:
            stream.seek(step.offset + 103)  # the sign and exponent of a float32
            stream.write(b"\x3f")

    monkeypatch.setattr(publish_module, "_write_companions", damage)
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
    assert set(document["checks"][0]) == {"name", "ok", "detail", "value", "tolerance"}


def test_library_callers_get_the_error(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_merge.verify_function.TOLERANCE", 0.0)
    with pytest.raises(VerificationFailed, match="was not published"):
        publish(plan_file(write_recipe(llamas)), None, MergeOptions())


def test_verification_has_the_threads_that_were_asked_for() -> None:
    """Also after a merge that has imported torch only in its workers."""
    code = """
from bam_merge.workers import one_torch_thread
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
