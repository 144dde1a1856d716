"""Every sabotage of a merge, its digests mended, fails in the check of `verify` that should see it, naming the place."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from proofs import E1, SQUARE, UNPROVED, Forger, failed, good, swap_ffns
from safetensors.torch import load_file, save_file

from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.values.streams import uniforms
from bam_merge.verifying.levels import LEVELS
from bam_merge.verifying.options import VerifyOptions
from bam_merge.verifying.verification import verify

__all__ = ["good"]


def permute_attention(forge: Forger) -> None:
    for layer in range(2):
        for part in "qkvo":
            forge.swap(*(f"model.layers.{layer}.self_attn.experts.{e}.{part}_proj.weight" for e in (1, 2)))


def flip(forge: Forger, name: str) -> None:
    value = forge.read(name)
    value.view(torch.int32)[1, 5] ^= 1
    forge.write(name, value)


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
    "wrong scoring_func": (lambda f: f.config(scoring_func="sigmoid"), {"config": "scoring_func", "identity": "layer 0"}),
    "sequential block declared parallel": (lambda f: f.config(parallel_block=True), {"config": "parallel_block is True", "expert isolation": "the block's configuration or wiring"}),
    "tied heads declared": (lambda f: f.config(tie_word_embeddings=True), {"layout": "config.json has no place for lm_head.weight", "config": "tie_word_embeddings is True"}),
    "another model card": (lambda f: f.file("README.md", "# Llama"), {"card": "README.md, line 1: found '# Llama'"}),
    "other model code": (lambda f: f.file("modeling_bam.py", "import os"), {"code": "modeling_bam.py is not the model code of bam-merge"}),
    "a tokenizer that loads code": (lambda f: f.file("tokenizer_config.json", '{"\\u0061uto_map": {"AutoTokenizer": "x--y.Z"}}'), {"code": "tokenizer_config.json has auto_map", "companions": "tokenizer_config.json is not in sources.seed"}),
    "another provenance": (lambda f: f.record(lambda m: m["tensors"][NORM].update(expression="seed:x")), {"provenance": "the plan gives"}),
    "code beside it": (lambda f: (f.folder / "generate.PY").write_text(""), {"files": "generate.PY: not of this merge: remove it (code"}),
    "other experts' names": (lambda f: f.config(expert_names=["code", "seed", "law"]), {"config": "expert_names"}),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_found_where_it_is(name: str, level: str, good: tuple[Path, Plan]) -> None:
    """By quick and by full: nothing is left to full."""
    folder, plan = good
    change, expected = SABOTAGE[name]
    change(Forger(folder))
    found = failed(verify(folder, plan, options=VerifyOptions(level)))
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


@pytest.mark.parametrize("make", [
    "{make: ties, base: seed, density: 1.0}",
    "{make: ties, base: seed, density: 0.9, weights: {code: 0.3, law: 0.3}}",
    "{make: dare_ties, base: seed, density: 0.95}",
    "{make: dare_ties, base: seed, density: 0.95, weights: {code: 2.0, law: 2.0}, scale: 0.5}",
])  # fmt: skip
def test_a_value_planted_where_the_elected_sign_is_a_tie(make: str, tmp_path: Path) -> None:
    """Where the branches moved by equal steps in opposite directions the result is the base, and nothing else: neither a huge number, nor
    what one of the branches alone would give, nor the next number."""
    write_sources(tmp_path, SQUARE, dtype="BF16")
    plan = plan_file(write_recipe(tmp_path, f"shared: {make}", "merge"))
    folder = publish(plan, None, UNPROVED)
    name = "lm_head.weight"
    base, code, law = (load_model(tmp_path / source).state_dict()[name] for source in SOURCES)
    forge = Forger(folder)
    right = forge.read(name)
    ties = ((code - base == base - law) & (code != base)).flatten().nonzero()[:, 0].tolist()
    method = next(step.expr.method for step in plan.steps if step.name == name)
    if "dare" in make:  # where one of the two was dropped there is no tie
        masks = [uniforms(method.seed, stream, 0, base.numel()) < method.density for stream in method.streams]
        ties = [place for place in ties if all(mask[place] for mask in masks)]
    assert len(ties) > 3
    assert all(right.flatten()[ties] == base.flatten()[ties])
    assert verify(folder, plan).ok
    place = ties[3]
    of_one = base.flatten()[place] + (code - base).flatten()[place]
    for planted in (30000.0, float(of_one), float(base.flatten()[place]) * (1 + 2.0**-7)):
        wrong = right.clone()
        wrong.view(-1)[place] = planted
        assert not torch.equal(wrong, right)
        forge.write(name, wrong)
        assert f"{name} (element {place} is " in failed(verify(folder, plan))["merges"]


@pytest.mark.parametrize(
    "make", ["{make: ties, base: seed, density: 0.4, weights: {code: 0.3, law: 0.7}}", "{make: dare_ties, base: seed, density: 0.4}"]
)
def test_an_entry_that_the_trim_or_the_drop_took_is_not_put_back(make: str, tmp_path: Path) -> None:
    """Also where only a float64 difference from the threshold tells: the value of the other outcome is found."""
    write_sources(tmp_path, SQUARE)
    for source in SOURCES:
        file = tmp_path / source / "model.safetensors"
        save_file({key: value.double() * (1 + 1e-12) for key, value in load_file(file).items()}, file)
    plan = plan_file(write_recipe(tmp_path, f"shared: {make}", "merge"))
    folder = publish(plan, None, UNPROVED)
    assert verify(folder, plan).ok
    forge = Forger(folder)
    right, base, law = (
        forge.read("lm_head.weight"),
        *(load_file(tmp_path / s / "model.safetensors")["lm_head.weight"] for s in ("seed", "law")),
    )
    place = int((right == base).flatten().nonzero()[0])
    wrong = right.clone()
    wrong.view(-1)[place] = law.flatten()[place]
    forge.write("lm_head.weight", wrong)
    assert f"lm_head.weight (element {place} is " in failed(verify(folder, plan))["merges"]


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
