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
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.errors import NonFiniteError
from bam_merge.merging import tensor as tensor_module
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def split_qkv(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The family's fused tensors cut apart with transformers' own way of viewing them, under llama's names."""
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    result = {}
    for layer in range(layers):
        ours = f"model.layers.{layer}."
        if name.startswith("gpt_neox"):  # modeling_gpt_neox: view(..., heads, 3 * head_dim).chunk(3, -1)
            fused = tensors[f"gpt_neox.layers.{layer}.attention.query_key_value.weight"]
            q, k, v = fused.view(heads, 3, -1, fused.shape[-1]).unbind(1)
            parts = {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
            result |= {f"{ours}self_attn.{part}_proj.weight": w for part, w in parts.items()}
        if name == "phi3":
            fused = tensors[f"{ours}self_attn.qkv_proj.weight"]
            q, k, v = fused.split([32, 16, 16])
            gate, up = tensors[f"{ours}mlp.gate_up_proj.weight"].chunk(2)
            result |= {f"{ours}self_attn.{part}_proj.weight": w for part, w in zip("qkv", (q, k, v), strict=True)}
            result |= {f"{ours}mlp.gate_proj.weight": gate, f"{ours}mlp.up_proj.weight": up}
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_expert_kv_of_every_family(name: str, tmp_path: Path) -> None:
    """Every expert tensor is its source's bit for bit; every mean is the float32 mean."""
    config = CONFIGS[name]
    write_sources(tmp_path, config)
    folder = merge(load_recipe(write_recipe(tmp_path)))
    merged = load(folder)
    sources = {source: load(tmp_path / source) for source in SOURCES}
    cut = {source: split_qkv(name, config, tensors) for source, tensors in sources.items()}
    rename = {
        "gpt_neox.embed_in": "model.embed_tokens", "gpt_neox.final_layer_norm": "model.norm", "embed_out": "lm_head",
        "gpt_neox.": "model.", "attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
    }  # fmt: skip
    checked = set()
    for source in SOURCES:
        for old, tensor in [*sources[source].items(), *cut[source].items()]:
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
    merged = load(merge(load_recipe(write_recipe(tmp_path))))
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
    merged = load(merge(load_recipe(recipe)))
    sources = {source: load(tmp_path / source) for source in SOURCES}
    assert set(merged) == set(sources["seed"])
    for key, value in merged.items():
        expected = sources["seed"][key] + 0.5 * sum(sources[s][key] - sources["seed"][key] for s in ("code", "law"))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_different_makes_within_one_fused_tensor(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gpt_neox"])
    rules = "rules:\n  - {roles: [attn.q], make: copy, from: code}\n  - {roles: [attn.k], make: slerp, from: [seed, law], t: 0.5}"
    merged = load(merge(load_recipe(write_recipe(tmp_path, rules, "merge"))))
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
    first = load(publish(plan_file(recipe), tmp_path / "first", MergeOptions(workers=1)))
    monkeypatch.setattr(tensor_module, "CHUNK_ELEMENTS", 37)
    recipe.write_text(recipe.read_text().replace("path: out", "path: out, max_shard_size: 10kB"))
    second = load(publish(plan_file(recipe), tmp_path / "second", MergeOptions(workers=5)))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=1e-6 if "slerp" in make else 0, atol=0)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("sections", ["attention: {kv: shared}", "router: {attention: {init: uniform}, ffn: {init: orthogonal}}"])
def test_same_recipe_same_bytes_in_every_file(llamas: Path, sections: str) -> None:
    plan = plan_file(write_recipe(llamas, sections, output="{path: out, max_shard_size: 60kB}"))
    first = publish(plan, llamas / "first", MergeOptions(workers=1))
    second = publish(plan, llamas / "second", MergeOptions(workers=4))
    assert folder_bytes(first) == folder_bytes(second)
    assert len(list(first.glob("*.safetensors"))) > 1


def test_routers_do_not_change_with_anything_but_seed_and_name(llamas: Path) -> None:
    key = "model.layers.1.mlp.router.weight"

    def router(sections: str, method: str, target: str, output: str = "{path: out}", workers: int = 2) -> torch.Tensor:
        plan = plan_file(write_recipe(llamas, sections, method, output=output))
        return load(publish(plan, llamas / target, MergeOptions(workers=workers)))[key]

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
    folder = publish(plan, None, MergeOptions())
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
    folder = merge(load_recipe(write_recipe(tmp_path)))
    read = json.loads((folder / "bam_merge.json").read_text())["sources"]["code"]["files"]["model.safetensors"]["tensors"]
    assert "model.layers.0.self_attn.qkv_proj.weight" in read
    assert len(set(read.values())) == len(read)


def test_tokenizer_and_generation_files_are_copied_byte_for_byte(llamas: Path) -> None:
    for source in SOURCES:
        (llamas / source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": []}')
    (llamas / "seed" / "generation_config.json").write_text('{"x":  1}')
    (llamas / "seed" / "modeling_evil.py").write_text("raise SystemExit")
    folder = merge(load_recipe(write_recipe(llamas)))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (llamas / "seed" / name).read_bytes()
    assert not (folder / "modeling_evil.py").exists()


def test_sharded_sources_give_the_same_result(tmp_path: Path) -> None:
    write_sources(tmp_path / "one", CONFIGS["qwen3"])
    write_sources(tmp_path / "many", CONFIGS["qwen3"], shards=3)
    first, second = (load(merge(load_recipe(write_recipe(tmp_path / part)))) for part in ("one", "many"))
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
    merged = load(merge(load_recipe(write_recipe(llamas, copies, "merge", ("seed", "code")))))
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
        publish(plan, None, MergeOptions())
    assert not (llamas / "out").exists()
    folder = publish(plan, None, MergeOptions(allow_nonfinite=True))
    assert json.loads((folder / "bam_merge.json").read_text())["tensors"]["model.norm.weight"]["nonfinite"] == 1


def test_resuming_does_not_trust_what_this_run_refuses(llamas: Path) -> None:
    """A run that allowed NaN was killed; going on without the permission meets the NaN again."""
    poison(llamas / "code", float("nan"))
    plan = plan_file(write_recipe(llamas))

    class Killed(Exception): ...

    def kill(plan: Any, folder: Path, finished: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bam_merge.publishing.publish.write_companions", kill)
        with pytest.raises(Killed):
            publish(plan, None, MergeOptions(allow_nonfinite=True))
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        publish(plan, None, MergeOptions(resume=True))


def test_overflow_of_float16_is_refused(llamas: Path) -> None:
    poison(llamas / "code", 1e6)
    with pytest.raises(NonFiniteError, match=r"overflows F16; choose a wider output\.dtype"):
        merge(load_recipe(write_recipe(llamas, output="{path: out, dtype: float16}")))


def test_float64_sources_are_summed_in_float64(llamas: Path) -> None:
    for source in SOURCES:
        save_file({k: v.double() * (1 + 1e-12) for k, v in load(llamas / source).items()}, llamas / source / "model.safetensors")
    merged = load(merge(load_recipe(write_recipe(llamas, "rules: [{roles: [embed], make: mean}]"))))["lm_head.weight"]
    sources = [load(llamas / source)["lm_head.weight"] for source in SOURCES]
    assert torch.equal(merged, (sources[0] + sources[1] + sources[2]) / 3)


def test_arrays_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk borders inside rows, slices and copies leave no trace."""
    write_sources(tmp_path, CONFIGS["gpt_neox"])
    recipe = write_recipe(tmp_path, output="{path: out, dtype: float16}")
    whole = load(publish(plan_file(recipe), tmp_path / "whole", MergeOptions()))
    monkeypatch.setattr(tensor_module, "CHUNK_ELEMENTS", 11)
    monkeypatch.setattr(tensor_module, "COPY_BUFFER", 13)
    pieces = load(publish(plan_file(recipe), tmp_path / "pieces", MergeOptions()))
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
