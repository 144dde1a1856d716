"""Merges, whole: every output tensor against its sources, for every family; determinism; what transformers makes of the result."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS, SOURCES, STAND_INS, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.checkpoints.header import read_header
from bam_merge.errors import NonFiniteError
from bam_merge.merging import tensor as tensor_module
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def split_qkv(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The family's fused tensors cut apart with transformers' own way of viewing them, under llama's names."""
    heads, layers = config["num_attention_heads"], 2
    result = {}
    for layer in range(layers):
        ours = f"model.layers.{layer}."
        if name.startswith("gpt_neox"):  # modeling_gpt_neox: view(..., heads, 3 * head_dim).chunk(3, -1)
            fused = tensors[f"gpt_neox.layers.{layer}.attention.query_key_value.weight"]
            q, k, v = fused.view(heads, 3, -1, fused.shape[-1]).unbind(1)
            parts = {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
            result |= {f"{ours}self_attn.{part}_proj.weight": w for part, w in parts.items()}
        if name.startswith(
            "qwen3_5"
        ):  # modeling_qwen3_5: view(..., heads, 2 * head_dim).chunk(2, -1), and split by key_dim, key_dim, value_dim
            keys, values = (config[f"linear_num_{part}_heads"] * config[f"linear_{part}_head_dim"] for part in ("key", "value"))
            for kind in ("weight", "bias"):
                fused = tensors.get(f"{ours}self_attn.q_proj.{kind}")
                if fused is not None:
                    q, gate = fused.view(heads, 2 * config["head_dim"], *fused.shape[1:]).chunk(2, 1)
                    result |= {f"{ours}self_attn.{part}_proj.{kind}": w.flatten(0, 1) for part, w in (("q", q), ("gate", gate))}
            for fused_name, part in (("in_proj_qkv", "in_proj"), ("conv1d", "conv")):
                fused = tensors.get(f"{ours}linear_attn.{fused_name}.weight")
                if fused is not None:
                    pieces = zip("qkv", fused.split([keys, keys, values]), strict=True)
                    result |= {f"{ours}self_attn.{part}_{of}.weight": w for of, w in pieces}
        if name == "stablelm_qk_norm":
            heads_of = {
                part: [tensors[f"{ours}self_attn.{part}_layernorm.norms.{h}.weight"] for h in range(n)] for part, n in (("q", 4), ("k", 2))
            }
            result |= {f"{ours}self_attn.{part}_norm.weight": torch.cat(norms) for part, norms in heads_of.items()}
        if name == "phi3":
            fused = tensors[f"{ours}self_attn.qkv_proj.weight"]
            q, k, v = fused.split([32, 16, 16])
            result |= {f"{ours}self_attn.{part}_proj.weight": w for part, w in zip("qkv", (q, k, v), strict=True)}
        for gates in (f"{ours}mlp.gate_up_proj.weight", f"{ours}shared_mlp.input_linear.weight"):  # phi3, glm; granitemoehybrid
            if gates in tensors:
                gate, up = tensors[gates].chunk(2)
                result |= {f"{ours}mlp.gate_proj.weight": gate, f"{ours}mlp.up_proj.weight": up}
        for kind in (
            ("weight", "bias") if name.startswith("falcon") else ()
        ):  # modeling_falcon: view(..., -1, heads // num_kv_heads + 2, head_dim)
            fused = tensors.get(f"transformer.h.{layer}.self_attention.query_key_value.{kind}")
            if fused is not None:
                kv_heads = (
                    config["num_kv_heads"] if config.get("new_decoder_architecture") else 1 if config.get("multi_query", True) else heads
                )
                groups = fused.view(kv_heads, heads // kv_heads + 2, 8, *fused.shape[1:])
                parts = {"q": groups[:, :-2].flatten(0, 2), "k": groups[:, -2].flatten(0, 1), "v": groups[:, -1].flatten(0, 1)}
                result |= {f"{ours}self_attn.{part}_proj.{kind}": w for part, w in parts.items()}
    return result


AROUND = {
    "post_attention_layernorm": "post_self_attn_layernorm", "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}  # fmt: skip
AFTER = {"post_attention_layernorm": "post_self_attn_layernorm", "post_feedforward_layernorm": "post_mlp_layernorm"}
"""No norms before attention and FFN, and those after have names that others have before."""

GEMMA4 = {**AROUND, "layer_scalar": "layer_scale.weight"}

RENAMED = {
    "gemma2": AROUND, "gemma3_text": AROUND, "gemma4_text": GEMMA4, "gemma4_unified_text": GEMMA4, "hyperclovax": {"post_norm1": "post_self_attn_layernorm", "post_norm2": "post_mlp_layernorm"},
    "qwen3_5_text": {"linear_attn": "self_attn"}, "starcoder2": {"c_fc": "up_proj", "c_proj": "down_proj"}, "hunyuan_v1_dense": {"query_layernorm": "q_norm", "key_layernorm": "k_norm"},
    "phi": {
        "self_attn.dense": "self_attn.o_proj", "fc1": "up_proj", "fc2": "down_proj", "final_layernorm": "norm", "q_layernorm": "q_norm", "k_layernorm": "k_norm",
    },
    "olmo2": AFTER, "olmo3": AFTER, "exaone4": AFTER, "vaultgemma": {"pre_feedforward_layernorm": "post_attention_layernorm"}, "granitemoehybrid": {"shared_mlp.output_linear": "mlp.down_proj"},
    "falcon": {
        "self_self_attn": "self_attn", "transformer.word_embeddings": "model.embed_tokens", "transformer.ln_f": "model.norm", "transformer.h.": "model.layers.",
        ".ln_attn.": ".input_layernorm.", ".ln_mlp.": ".post_attention_layernorm.",
    },
    **{family: names for family, (_, _, names) in STAND_INS.items()},
}  # fmt: skip
"""What families call what llama calls otherwise, one after another."""


@pytest.mark.parametrize("name", CONFIGS)
def test_expert_kv_of_every_family(name: str, tmp_path: Path) -> None:
    """Every expert tensor is its source's bit for bit; every mean is the float32 mean."""
    config = CONFIGS[name]
    write_sources(tmp_path, config)
    folder = merge(load_recipe(write_recipe(tmp_path)), options=MergeOptions(verify=False))
    merged = load(folder)
    sources = {source: load(tmp_path / source) for source in SOURCES}
    cut = {source: split_qkv(name, config, tensors) for source, tensors in sources.items()}
    rename = {
        "gpt_neox.embed_in": "model.embed_tokens", "gpt_neox.final_layer_norm": "model.norm", "embed_out": "lm_head",
        "gpt_neox.": "model.", "attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
        **RENAMED.get(config["model_type"], {}),
    }  # fmt: skip
    checked = set()
    for source in SOURCES:
        for old, tensor in {**sources[source], **cut[source]}.items():
            new = old
            for theirs, ours in rename.items():
                new = new.replace(theirs, ours)
            for part in ("self_attn", "mlp"):
                expert = new.replace(f".{part}.", f".{part}.experts.{SOURCES.index(source)}.")
                if expert in merged and expert != new:
                    assert torch.equal(merged[expert], tensor), expert
                    checked.add(expert)
            if new in merged:
                mean = sum(sources[s][old] for s in SOURCES) / torch.tensor(3.0)
                assert torch.equal(merged[new], mean), new
                checked.add(new)
    left = {key for key in merged if key not in checked and not key.endswith("router.weight")}
    fused_biases = {key for key in left if name == "gpt_neox" and key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
    assert left == fused_biases
    for key in fused_biases:
        layer, expert, part = key.split(".")[2], int(key.split(".")[5]), key.split(".")[6][0]
        fused = sources[SOURCES[expert]][f"gpt_neox.layers.{layer}.attention.query_key_value.bias"]
        assert torch.equal(merged[key], fused.view(4, 3, 8)[:, "qkv".index(part)].flatten())
    assert json.loads((folder / "config.json").read_text())["base_model_type"] == config["model_type"]


def test_bfloat16_mean_is_rounded_once(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], dtype="BF16")
    merged = load(merge(load_recipe(write_recipe(tmp_path)), options=MergeOptions(verify=False)))
    sources = [load(tmp_path / source)["model.embed_tokens.weight"] for source in SOURCES]
    total = sources[0].float() + sources[1].float() + sources[2].float()
    assert torch.equal(merged["model.embed_tokens.weight"], (total / 3).bfloat16())
    in_bfloat16 = (sources[0] + sources[1] + sources[2]) / 3
    assert not torch.equal(merged["model.embed_tokens.weight"], in_bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_methods_on_every_family(name: str, tmp_path: Path) -> None:
    """Fused families: a dense merge by role fuses back into the family's own tensors."""
    write_sources(tmp_path, CONFIGS[name])
    recipe = write_recipe(tmp_path, "shared: {make: task_arithmetic, base: seed, scale: 0.5}", "merge")
    merged = load(merge(load_recipe(recipe), options=MergeOptions(verify=False)))
    sources = {source: load(tmp_path / source) for source in SOURCES}
    assert set(merged) == set(sources["seed"])
    for key, value in merged.items():
        if key.endswith(("A_log", "dt_bias")):  # which stay the base's
            assert torch.equal(value, sources["seed"][key])
            continue
        expected = sources["seed"][key] + 0.5 * sum(sources[s][key] - sources["seed"][key] for s in ("code", "law"))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_different_makes_within_one_fused_tensor(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gpt_neox"])
    rules = "rules:\n  - {roles: [attn.q], make: copy, from: code}\n  - {roles: [attn.k], make: slerp, from: [seed, law], t: 0.5}"
    merged = load(merge(load_recipe(write_recipe(tmp_path, rules, "merge")), options=MergeOptions(verify=False)))
    sources = [load(tmp_path / source) for source in SOURCES]
    key = "gpt_neox.layers.1.attention.query_key_value.weight"
    q, k, v = merged[key].view(4, 3, 8, 32).unbind(1)
    views = [tensors[key].view(4, 3, 8, 32) for tensors in sources]
    assert torch.equal(q, views[1][:, 0])
    assert torch.equal(v, sum(view[:, 2] for view in views) / torch.tensor(3.0))
    a, b = views[0][:, 1].double(), views[2][:, 1].double()
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    expected = (a + b) * torch.sin(angle / 2) / torch.sin(angle)
    torch.testing.assert_close(k.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [
    "{make: ties, base: seed, density: 0.3}",
    "{make: dare_ties, base: seed, density: 0.3}",
    "{make: slerp, from: [code, law], t: 0.3}",
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_bytes_do_not_depend_on_workers_chunks_or_shards(name: str, make: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path, CONFIGS[name])
    recipe = write_recipe(tmp_path, f"shared: {make}\n" + "rules: [{roles: [norm.final], make: copy, from: seed}]", "merge")
    first = load(publish(plan_file(recipe), tmp_path / "first", MergeOptions(workers=1, verify=False)))
    monkeypatch.setattr(tensor_module, "CHUNK_ELEMENTS", 37)
    recipe.write_text(recipe.read_text().replace("path: out", "path: out, max_shard_size: 10kB"))
    second = load(publish(plan_file(recipe), tmp_path / "second", MergeOptions(workers=5, verify=False)))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=1e-6 if "slerp" in make else 0, atol=0)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("sections", ["attention: {kv: shared}", "router: {attention: {init: uniform}, ffn: {init: orthogonal}}"])
def test_same_recipe_same_bytes_in_every_file(llamas: Path, sections: str) -> None:
    plan = plan_file(write_recipe(llamas, sections, output="{path: out, max_shard_size: 60kB}"))
    first = publish(plan, llamas / "first", MergeOptions(workers=1, verify=False))
    second = publish(plan, llamas / "second", MergeOptions(workers=4, verify=False))
    assert folder_bytes(first) == folder_bytes(second)
    assert len(list(first.glob("*.safetensors"))) > 1


def test_routers_do_not_change_with_anything_but_seed_and_name(llamas: Path) -> None:
    key = "model.layers.1.mlp.router.weight"

    def router(sections: str, method: str, target: str, output: str = "{path: out}", workers: int = 2) -> torch.Tensor:
        plan = plan_file(write_recipe(llamas, sections, method, output=output))
        return load(publish(plan, llamas / target, MergeOptions(workers=workers, verify=False)))[key]

    first = router("", "bam", "a")
    assert torch.equal(first, router("attention: {kv: shared}", "bam", "b"))
    assert torch.equal(first, router("", "btx", "c"))
    assert torch.equal(first, router("", "bam", "e", "{path: out, max_shard_size: 10kB}", workers=5))
    assert not torch.equal(first, router("random_seed: 1", "bam", "d"))
    assert first.shape == (3, 32)
    assert float(first.std()) == pytest.approx(0.02, rel=0.3)


def test_manifest_and_index_describe_what_is_there(llamas: Path) -> None:
    from bam_merge.checkpoints.reading import digest_range

    plan = plan_file(write_recipe(llamas, output="{path: out, max_shard_size: 60kB}"))
    folder = publish(plan, None, MergeOptions(verify=False))
    manifest = json.loads((folder / "bam_merge.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name: record["file"] for name, record in manifest["tensors"].items()} == index["weight_map"]
    for step in plan.steps:
        assert manifest["tensors"][step.name]["digest"] == digest_range(folder / step.file, step.offset, step.nbytes)
    assert manifest["sources"]["law"]["path"] == "law"
    read = manifest["sources"]["law"]["files"]["model.safetensors"]["tensors"]
    assert set(read) == set(plan.models["law"].checkpoint.tensors)
    assert str(llamas) not in (folder / "bam_merge.json").read_text()
    assert index["metadata"]["total_size"] == sum(step.nbytes for step in plan.steps)


def test_fused_sources_are_digested_too(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["phi3"])
    folder = merge(load_recipe(write_recipe(tmp_path)), options=MergeOptions(verify=False))
    read = json.loads((folder / "bam_merge.json").read_text())["sources"]["code"]["files"]["model.safetensors"]["tensors"]
    assert "model.layers.0.self_attn.qkv_proj.weight" in read
    assert len(set(read.values())) == len(read)


def test_tokenizer_and_generation_files_are_copied_byte_for_byte(llamas: Path) -> None:
    for source in SOURCES:
        (llamas / source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": []}')
    (llamas / "seed" / "generation_config.json").write_text('{"x":  1}')
    (llamas / "seed" / "modeling_evil.py").write_text("raise SystemExit")
    folder = merge(load_recipe(write_recipe(llamas)), options=MergeOptions(verify=False))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (llamas / "seed" / name).read_bytes()
    assert not (folder / "modeling_evil.py").exists()


def test_sharded_sources_give_the_same_result(tmp_path: Path) -> None:
    write_sources(tmp_path / "one", CONFIGS["qwen3"])
    write_sources(tmp_path / "many", CONFIGS["qwen3"], shards=3)
    first, second = (
        load(merge(load_recipe(write_recipe(tmp_path / part)), options=MergeOptions(verify=False))) for part in ("one", "many")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_integer_and_float8_tensors_are_copied_but_not_averaged(llamas: Path, run: Any) -> None:
    for source in SOURCES:
        tensors = load(llamas / source)
        save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, llamas / source / "model.safetensors")
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert "model.embed_tokens.weight is F8_E4M3, and mean computes with F64, F32, F16, BF16 only" in result.err
    assert result.err.count("F8_E4M3") == 1  # one message for all tensors, not one each
    copies = "shared: {make: copy, from: seed}\nrules: [{roles: [attn.*, ffn.*], make: copy, from: code}]"
    merged = load(merge(load_recipe(write_recipe(llamas, copies, "merge", ("seed", "code"))), options=MergeOptions(verify=False)))
    assert torch.equal(merged["model.norm.weight"].view(torch.uint8), load(llamas / "seed")["model.norm.weight"].view(torch.uint8))


def poison(folder: Path, value: float) -> None:
    tensors = load(folder)
    tensors["model.norm.weight"][5] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_or_recorded(llamas: Path, value: float) -> None:
    poison(llamas / "code", value)
    plan = plan_file(write_recipe(llamas))
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight: 1 values from element 5 on are NaN or infinite .*comes from a source"):
        publish(plan, None, MergeOptions(verify=False))
    assert not (llamas / "out").exists()
    folder = publish(plan, None, MergeOptions(allow_nonfinite=True, verify=False))
    assert json.loads((folder / "bam_merge.json").read_text())["tensors"]["model.norm.weight"]["nonfinite"] == 1


def overwrite(path: Path, tensor: str, place: int, patterns: bytes) -> None:
    """Put `patterns` into the stored bytes of a tensor, from byte `place` on."""
    entry = next(entry for entry in read_header(str(path)).tensors if entry.name == tensor)
    with open(path, "r+b") as stream:
        stream.seek(entry.offset + place)
        stream.write(patterns)


UP = "model.layers.1.mlp.up_proj.weight"

NOT_FINITE: dict[str, tuple[torch.dtype, list[bytes], list[bytes]]] = {
    # of each dtype patterns (little-endian) that are NaN or infinite, and neighbours that are numbers
    "F64": (torch.float64, [b"\0\0\0\0\0\0\xf0\x7f", b"\1\0\0\0\0\0\xf0\xff", b"\xff" * 8], [b"\xff" * 6 + b"\xef\xff", b"\xff" * 6 + b"\xef\x7f"]),
    "F32": (torch.float32, [b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\1\0\x80\x7f"], [b"\xff\xff\x7f\xff", b"\0\0\0\x80"]),
    "F16": (torch.float16, [b"\0\x7c", b"\0\xfc", b"\xff\xff", b"\1\x7c"], [b"\xff\x7b", b"\xff\xfb", b"\0\x80"]),
    "BF16": (torch.bfloat16, [b"\x80\x7f", b"\x80\xff", b"\xff\xff", b"\x81\x7f"], [b"\x7f\x7f", b"\x7f\xff", b"\0\x80"]),
    "F8_E5M2": (torch.float8_e5m2, [b"\x7c", b"\xfc", b"\x7d", b"\xff"], [b"\x7b", b"\xfb", b"\x80"]),
    "F8_E4M3": (torch.float8_e4m3fn, [b"\x7f", b"\xff"], [b"\x7e", b"\xfe", b"\x80", b"\x78"]),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, [b"\x80"], [b"\x7f", b"\xff", b"\0"]),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, [b"\x80"], [b"\x7f", b"\xff", b"\0"]),
    "F8_E8M0": (torch.float8_e8m0fnu, [b"\xff"], [b"\xfe", b"\x80", b"\x7f"]),
    "I8": (torch.int8, [], [b"\x7f", b"\x80", b"\xff"]),
    "I32": (torch.int32, [], [b"\0\0\x80\x7f", b"\xff" * 4]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", NOT_FINITE)
def test_nan_and_infinity_in_a_copied_expert(dtype: str, llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without verification: every pattern that is no number is found, in whichever piece, and recorded if that is allowed; none that is."""
    monkeypatch.setattr(tensor_module, "COPY_BUFFER", 52)
    torch_dtype, bad, fine = NOT_FINITE[dtype]
    for source in SOURCES:  # up_proj alone, so that all else can be averaged
        tensors = load(llamas / source)
        tensors[UP] = (tensors[UP] * 100).to(torch_dtype)
        save_file(tensors, llamas / source / "model.safetensors")
    path, size = llamas / "law" / "model.safetensors", torch_dtype.itemsize
    for index, pattern in enumerate(fine):
        overwrite(path, UP, (100 + index) * size, pattern)
    recipe = write_recipe(llamas)
    assert run(recipe, "--no-verify", "--output", llamas / "fine").status == 0
    for index, pattern in enumerate(bad):
        overwrite(path, UP, (700 + 50 * index) * size, pattern)
        result = run(recipe, "--no-verify")
        assert result.status == 2, pattern
        assert "model.layers.1.mlp.experts.2.up_proj.weight: 1 values from element 700 on are NaN or infinite" in result.err
        assert f"(law:{UP}): it comes from a source. With --allow-nonfinite they are written and recorded." in result.err
        assert not (llamas / "out").exists()
    if bad:
        assert run(recipe, "--no-verify", "--allow-nonfinite").status == 0
        record = json.loads((llamas / "out" / "bam_merge.json").read_text())["tensors"]["model.layers.1.mlp.experts.2.up_proj.weight"]
        assert record["nonfinite"] == len(bad)
        report = verify(llamas / "out")
        assert report.ok, report.failures
        overwrite(llamas / "out" / "model.safetensors", "model.layers.1.mlp.experts.1.up_proj.weight", 0, bad[0])
        assert (
            "model.layers.1.mlp.experts.1.up_proj.weight (1 values)"
            in {c.name: c.detail for c in verify(llamas / "out").failures}["finite"]
        )


def test_a_slice_and_a_router_are_searched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a fused tensor, of which the rest is not read for this one; and numbers of a router that its dtype cannot hold."""
    write_sources(tmp_path, CONFIGS["gpt_neox"])
    fused = "gpt_neox.layers.1.attention.query_key_value.weight"
    overwrite(tmp_path / "code" / "model.safetensors", fused, 4 * (32 * 17 + 5), b"\0\0\xc0\x7f")  # of head 0 (24 rows) the second row of v
    with pytest.raises(
        NonFiniteError, match=r"layers\.1\.self_attn\.experts\.1\.v_proj\.weight: 1 values from element 37 on .*comes from a source"
    ):
        publish(plan_file(write_recipe(tmp_path)), None, MergeOptions(verify=False))
    write_sources(tmp_path, CONFIGS["gpt_neox"])
    recipe = write_recipe(tmp_path, "router: {init: uniform, bound: 1000000.0}", output="{path: out, dtype: float16}")
    monkeypatch.setattr("bam_merge.planning.assign.router_problem", lambda init, dtype: None)  # which would refuse it in the plan
    with pytest.raises(NonFiniteError, match=r"router\.weight: \d+ values from element 0 on .*overflows F16"):
        publish(plan_file(recipe), None, MergeOptions(verify=False))


def test_an_overflow_that_is_allowed_verifies(llamas: Path) -> None:
    poison(llamas / "code", 1e6)
    plan = plan_file(write_recipe(llamas, output="{path: out, dtype: float16}"))
    report = verify(publish(plan, None, MergeOptions(verify=False, allow_nonfinite=True)), plan)
    assert report.ok, report.failures


@pytest.mark.parametrize(
    "make",
    [
        "{make: ties, base: seed, density: 1.0}", "{make: ties, base: seed, density: 0.5}", "{make: dare_ties, base: seed, density: 1.0}",
        "{make: ties, base: seed, density: 0.01}", "{make: dare_ties, base: seed, density: 0.01}", "{make: dare_linear, base: seed, density: 0.01}",
        "{make: della, base: seed, density: 0.5, epsilon: 0.4}", "{make: della, base: seed, density: 0.01, epsilon: 0}", "{make: ram, base: seed}",
        "{make: breadcrumbs, base: seed, density: 0.5}", "{make: breadcrumbs, base: seed, density: 0.2, gamma: 0.5}",
        "{make: sce, base: seed, density: 0.5}", "{make: sce, base: seed, density: 0.01}", "{make: sce, base: seed, density: 1}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_election_does_not_swallow_nan(value: float, make: str, llamas: Path) -> None:
    """A difference that is no number has no sign, and is not trimmed, dropped, or left unselected: the result is none either."""
    poison(llamas / "code", value)
    plan = plan_file(write_recipe(llamas, f"shared: {make}", "merge"))
    with pytest.raises(
        NonFiniteError, match=r"model\.norm\.weight: 1 values from element 5 on .* from a source \(code:model\.norm\.weight\)\. "
    ):
        publish(plan, None, MergeOptions(verify=False))
    report = verify(publish(plan, None, MergeOptions(verify=False, allow_nonfinite=True)), plan)
    assert report.ok, report.failures


def test_resuming_does_not_trust_what_this_run_refuses(llamas: Path) -> None:
    """A run that allowed NaN was killed; going on without the permission meets the NaN again."""
    poison(llamas / "code", float("nan"))
    plan = plan_file(write_recipe(llamas))

    class Killed(Exception): ...

    def kill(*args: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bam_merge.publishing.publish.write_companions", kill)
        with pytest.raises(Killed):
            publish(plan, None, MergeOptions(allow_nonfinite=True, verify=False))
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        publish(plan, None, MergeOptions(resume=True, verify=False))


def test_overflow_of_float16_is_refused(llamas: Path) -> None:
    poison(llamas / "code", 1e6)
    with pytest.raises(NonFiniteError, match=r"overflows F16; choose a wider output\.dtype"):
        merge(load_recipe(write_recipe(llamas, output="{path: out, dtype: float16}")))


def test_float64_sources_are_summed_in_float64(llamas: Path) -> None:
    for source in SOURCES:
        save_file({k: v.double() * (1 + 1e-12) for k, v in load(llamas / source).items()}, llamas / source / "model.safetensors")
    merged = load(merge(load_recipe(write_recipe(llamas, "rules: [{roles: [embed], make: mean}]")), options=MergeOptions(verify=False)))[
        "lm_head.weight"
    ]
    sources = [load(llamas / source)["lm_head.weight"] for source in SOURCES]
    assert torch.equal(merged, (sources[0] + sources[1] + sources[2]) / 3)


@pytest.mark.parametrize("wide", ["seed", "law"])
@pytest.mark.parametrize("make", [
    "{make: mean}",
    "{make: linear, weights: {seed: 0.2, code: 0.3, law: 0.5}}",
    "{make: slerp, from: [seed, law], t: 0.3}",
    "{make: task_arithmetic, base: seed, scale: 0.7}",
    "{make: ties, base: seed, density: 0.3, weights: {code: 0.3, law: 0.2}}",
    "{make: dare_ties, base: seed, density: 0.4}",
])  # fmt: skip
def test_one_float64_source_has_all_computed_in_float64(make: str, wide: str, llamas: Path) -> None:
    """Whichever of them it is, the result is that of all sources in float64, rounded once; and it verifies."""
    results = []
    for which in ((wide,), SOURCES):
        for source in which:
            tensors = load(llamas / source)
            finer = 1 + 3e-9 if which == (wide,) else 1.0
            save_file({key: value.double() * finer for key, value in tensors.items()}, llamas / source / "model.safetensors")
        plan = plan_file(write_recipe(llamas, f"shared: {make}", "merge", output="{path: out, dtype: float32}"))
        folder = publish(plan, llamas / f"out-{len(which)}", MergeOptions(verify=False))
        report = verify(folder, plan)
        assert report.ok, report.failures
        results.append(load(folder))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("wide", ["seed", "code"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_fused_tensor_may_have_two_dtypes(dtype: str, wide: str, tmp_path: Path) -> None:
    """gate of one source and up of another, one of them float64: neither is mistaken for bytes of the other's dtype."""
    write_sources(tmp_path, CONFIGS["phi3"])
    file = tmp_path / wide / "model.safetensors"
    save_file({key: value.double() * (1 + 1e-10) for key, value in load_file(file).items()}, file)
    rules = "rules: [{roles: [ffn.gate], make: copy, from: seed}, {roles: [ffn.up], make: copy, from: code}]"
    plan = plan_file(write_recipe(tmp_path, rules, "merge", output=f"{{path: out, dtype: {dtype}}}"))
    folder = publish(plan, None, MergeOptions(verify=False))
    name = "model.layers.1.mlp.gate_up_proj.weight"
    gate, up = load(tmp_path / "seed")[name][:40], load(tmp_path / "code")[name][40:]
    narrow = getattr(torch, dtype)
    assert torch.equal(load(folder)[name], torch.cat([gate.to(narrow), up.to(narrow)]))
    assert verify(folder, plan).ok


def test_a_router_of_float64_sources_is_drawn_in_float64(llamas: Path) -> None:
    for source in SOURCES:
        save_file({key: value.double() for key, value in load(llamas / source).items()}, llamas / source / "model.safetensors")
    plan = plan_file(write_recipe(llamas, "router: {init: orthogonal}"))
    folder = publish(plan, None, MergeOptions(verify=False))
    router = load(folder)["model.layers.0.mlp.router.weight"]
    assert router.dtype == torch.float64
    assert float((router @ router.T - torch.eye(3, dtype=torch.float64)).abs().max()) < 1e-14
    assert verify(folder, plan).ok


def test_arrays_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk borders inside rows, slices and copies leave no trace."""
    write_sources(tmp_path, CONFIGS["gpt_neox"])
    recipe = write_recipe(tmp_path, output="{path: out, dtype: float16}")
    whole = load(publish(plan_file(recipe), tmp_path / "whole", MergeOptions(verify=False)))
    monkeypatch.setattr(tensor_module, "CHUNK_ELEMENTS", 11)
    monkeypatch.setattr(tensor_module, "COPY_BUFFER", 13)
    pieces = load(publish(plan_file(recipe), tmp_path / "pieces", MergeOptions(verify=False)))
    assert all(np.array_equal(whole[key].numpy(), pieces[key].numpy()) for key in whole)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_torch_keeps_the_threads_it_was_given(threads: str, llamas: Path) -> None:
    """Workers use one each; what comes after them, verification above all, has as many as a process that never merged."""
    counted = "import torch; print(torch.get_num_threads())"
    merged = f"""
import bam_merge
bam_merge.merge(bam_merge.load_recipe({str(write_recipe(llamas))!r}), options=bam_merge.MergeOptions(workers=2, verify=False))
{counted}"""
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    plain, after = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment) for code in (counted, merged)
    )
    assert (after.stdout, after.stderr, after.returncode) == (plain.stdout, "", 0)


def test_an_overflow_of_the_arithmetic_is_no_fault_of_a_source(llamas: Path) -> None:
    """1.1 x 3e38 - 0.1 x -3e38 is above float32's largest number, and every source is finite."""
    for name, value in (("seed", 3e38), ("code", -3e38), ("law", 0.0)):
        poison(llamas / name, value)
    recipe = write_recipe(llamas, "shared: {make: linear, weights: {seed: 1.1, code: -0.1, law: 0.0}}")
    with pytest.raises(NonFiniteError, match="overflows float32 while it is computed; choose smaller weights"):
        publish(plan_file(recipe), None, MergeOptions(verify=False))
    poison(llamas / "law", float("nan"))
    with pytest.raises(NonFiniteError, match="it comes from a source"):
        publish(plan_file(recipe), None, MergeOptions(verify=False))
