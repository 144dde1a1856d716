"""Sources of 8-bit floats: planned with their scales, merged as what they stand for, verified by a reading of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from damage import edit_config, edit_tensors, said
from proofs import UNPROVED, Forger, failed
from quantised_files import BLOCK, STYLES, compressed, dequantising, quantised_sources
from safetensors.torch import load_file

from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.sources import dequantised
from bam_merge.verifying.verification import verify

UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def once(value: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Float64 rounded as a merge rounds it: to float32, in which it is computed, and to what is stored."""
    return value.float().to(dtype)


@pytest.mark.parametrize("style", STYLES)
def test_every_form_is_the_numbers_that_it_stands_for(style: str, tmp_path: Path) -> None:
    meant = quantised_sources(tmp_path, style)
    plan = plan_file(dequantising(tmp_path))
    out = publish(plan, None, UNPROVED)
    assert failed(verify(out, plan)) == {}
    written = load_file(out / "model.safetensors")
    for name, value in meant.items():
        if "proj" in name:
            place = name.replace("mlp.", "mlp.experts.2.").replace("self_attn.", "self_attn.experts.2.")
            assert torch.equal(written[place], once(value)), name
    step = next(step for step in plan.steps if step.name == EXPERT)
    ending = STYLES[style][1]
    assert step.expression == f"law:{UP} * {ending}"
    assert step.reads == [{"source": "law", "tensor": UP}, {"source": "law", "tensor": UP.removesuffix("weight") + ending}]
    recorded = json.loads((out / "bam_merge.json").read_text())
    assert recorded["recipe"]["sources"]["law"] == {"path": "law", "dequantise": True}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert UP.removesuffix("weight") + ending in recorded["sources"]["law"]["files"]["model.safetensors"]["tensors"]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float8_e5m2, torch.float32), (torch.float8_e4m3fn, torch.bfloat16), (torch.float8_e4m3fn, torch.float8_e8m0fnu), (torch.float8_e4m3fn, torch.float64)])  # fmt: skip
def test_other_dtypes_of_weights_and_scales(dtype: torch.dtype, scale: torch.dtype, tmp_path: Path) -> None:
    meant = quantised_sources(tmp_path, dtype=dtype, scale=scale)
    plan = plan_file(dequantising(tmp_path))
    out = publish(plan, None, UNPROVED)
    assert failed(verify(out, plan)) == {}
    if scale != torch.float64:
        assert torch.equal(load_file(out / "model.safetensors")[EXPERT], once(meant[UP]))


@pytest.mark.parametrize("make", ["{make: mean}", "{make: linear, weights: {seed: 0.5, code: 0.2, law: 0.3}}", "{make: ties, base: seed, density: 0.4}", "{make: task_arithmetic, base: law}"])  # fmt: skip
def test_it_is_an_operand_like_any_other(make: str, tmp_path: Path) -> None:
    quantised_sources(tmp_path, "rows")
    plan = plan_file(dequantising(tmp_path, f"shared: {make}", "merge"))
    assert failed(verify(publish(plan, None, UNPROVED), plan)) == {}


@pytest.mark.parametrize("family", ["phi3", "qwen3", "gpt_neox"])
def test_other_families_and_fused_tensors(family: str, tmp_path: Path) -> None:
    quantised_sources(tmp_path, family=family)
    plan = plan_file(dequantising(tmp_path))
    assert failed(verify(publish(plan, None, UNPROVED), plan)) == {}


@pytest.mark.parametrize(("stated", "output", "expected"), [
    ({}, "source", torch.bfloat16), ({"torch_dtype": "bfloat16"}, "float32", torch.float32), ({"dtype": "float16"}, "float16", torch.float16),
])  # fmt: skip
def test_the_dtype_is_the_configs_or_the_recipes(stated: dict[str, str], output: str, expected: torch.dtype, tmp_path: Path) -> None:
    meant = quantised_sources(tmp_path)
    edit_config(tmp_path / "law", **stated)
    plan = plan_file(dequantising(tmp_path, output=f"{{path: out, dtype: {output}}}"))
    out = publish(plan, None, UNPROVED)
    assert failed(verify(out, plan)) == {}
    assert torch.equal(load_file(out / "model.safetensors")[EXPERT], once(meant[UP], expected))


def test_a_dtype_that_differs_from_the_others_is_said(tmp_path: Path, run: Any) -> None:
    quantised_sources(tmp_path)
    edit_config(tmp_path / "law", dtype="float16")
    (line,) = said(run, tmp_path, "plan", dequantising(tmp_path))
    assert "output.dtype: source keeps what is stored, but the sources disagree" in line
    assert line.endswith("Set dtype: bfloat16 (or another).")


def test_scales_of_activations_and_of_the_cache_are_listed(tmp_path: Path, run: Any) -> None:
    quantised_sources(tmp_path, "tensors")
    added = {"model.layers.0.mlp.up_proj.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.0.self_attn.v_scale": torch.ones(())}  # fmt: skip
    edit_tensors(tmp_path / "law", lambda tensors: tensors.update(added))
    recipe = dequantising(tmp_path)
    text = run("plan", recipe).out
    assert (
        "not read     law: 1 tensor (model.layers.0.mlp.up_proj.input_scale): a scale of activations, which the result does not quantise"
        in text
    )
    assert (
        "law: 2 tensors (model.layers.0.self_attn.k_scale, ...): a scale of a quantised key-value cache, which the result does not have"
        in text
    )
    assert "sources.law: 14 weights of 8-bit floats multiplied with their scales (one for each tensor), as BF16" in text
    plan = plan_file(recipe)
    assert failed(verify(publish(plan, None, UNPROVED), plan)) == {}


def test_an_adapter_on_it(tmp_path: Path) -> None:
    """An update of weights that are computed themselves."""
    adapter_files = pytest.importorskip("adapter_files")
    meant = quantised_sources(tmp_path)
    (tmp_path / "a").mkdir()
    a, b = torch.randn(2, 32), torch.randn(40, 2)
    key = "base_model.model." + UP.removesuffix(".weight")
    adapter_files.save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [UP.removesuffix(".weight")]})
    )
    plan = plan_file(dequantising(tmp_path, "experts: [seed, tuned]", sources="seed: seed, tuned: {base: law, adapter: a}"))
    out = publish(plan, None, UNPROVED)
    assert failed(verify(out, plan)) == {}
    step = next(step for step in plan.steps if step.name == EXPERT.replace(".2.", ".1."))
    assert step.expression == f"law:{UP} * weight_scale_inv + lora(tuned)"
    expected = meant[UP].float().double() + 2.0 * b.double() @ a.double()
    assert torch.equal(load_file(out / "model.safetensors")[step.name], once(expected))


# ---- what verification finds -----------------------------------------------------------------------------------------------


def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    quantised_sources(tmp_path)
    plan = plan_file(dequantising(tmp_path))
    forge = Forger(publish(plan, None, UNPROVED))
    value = forge.read(EXPERT)
    value[-1, -1] *= 1.05
    forge.write(EXPERT, value)
    assert EXPERT in failed(verify(tmp_path / "out", plan))["merges"]


def test_scales_of_another_weight_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that takes the scales of the gate for those of the up projection: its numbers follow from it, but are not the source's."""
    right = dequantised._Scales.scale

    def wrong(self: Any, weight: Any, scale: Any, block: Any) -> None:
        right(self, weight, self.checkpoint.tensors[scale.name.replace("up_proj", "gate_proj")], block)

    quantised_sources(tmp_path)
    monkeypatch.setattr(dequantised._Scales, "scale", wrong)
    plan = plan_file(dequantising(tmp_path))
    problems = failed(verify(publish(plan, None, UNPROVED), plan))
    assert "merges" not in problems and "law" in problems["expert isolation"]


def test_weights_that_are_not_multiplied_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.merging import source_rows

    quantised_sources(tmp_path)
    plan = plan_file(dequantising(tmp_path))
    monkeypatch.setattr(source_rows, "compute", lambda formula, inputs, start, stop: inputs[0].rows(start, stop).double())
    assert {"merges", "expert isolation"} <= failed(verify(publish(plan, None, UNPROVED), plan)).keys()


def test_scales_that_changed_since_are_named(tmp_path: Path) -> None:
    quantised_sources(tmp_path)
    publish(plan_file(dequantising(tmp_path)), None, UNPROVED)
    edit_tensors(tmp_path / "law", lambda tensors: tensors[UP + "_scale_inv"].mul_(2))
    assert f"law:{SCALE} change" in failed(verify(tmp_path / "out"))["merges"]


# ---- what is refused -------------------------------------------------------------------------------------------------------


def with_settings(**settings: Any) -> Callable[[Path], None]:
    return lambda law: edit_config(law, quantization_config={**STYLES["blocks"][0], **settings})


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda law: edit_tensors(law, change)


SCALE = UP + "_scale_inv"
OTHER = "Use the 16-bit model that it was made from."
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not quantised": (lambda law: edit_config(law, quantization_config=...), "dequantise: true, but config.json has no quantization_config. Remove the key, or use the quantised model."),
    "no weight is": (tensors(lambda t: (t.update({n: v.bfloat16() for n, v in t.items() if v.dtype == torch.float8_e4m3fn}), [t.pop(n) for n in list(t) if "scale" in n])), "dequantise: true, but no weight is an 8-bit float. Remove the key, or use the quantised model."),
    "a scale missing": (tensors(lambda t: t.pop(SCALE)), f"{UP}: 1 tensor of 8-bit floats without one scale beside it. Is the download complete?"),
    "two scales": (tensors(lambda t: t.update({UP + "_scale": torch.ones(1)})), f"{UP}: 1 tensor of 8-bit floats without one scale beside it. Is the download complete?"),
    "a weight missing": (tensors(lambda t: t.pop(UP)), f"{SCALE} is a scale, but the weight that it is of is not there. Is the download complete?"),
    "a weight that is none": (tensors(lambda t: t.update({UP: t[UP].bfloat16()})), f"{SCALE} is a scale, but {UP} is BF16, no 8-bit float: it may be multiplied with it already. Use the full-precision model."),
    "a scale of another shape": (tensors(lambda t: t.update({SCALE: torch.ones(3, 3)})), f"{SCALE} is [3, 3], but {UP} is [40, 32] in blocks of 16 x 24, which needs [3, 2]."),
    "scales the wrong way round": (tensors(lambda t: t.update({SCALE: torch.ones(2, 3)})), f"{SCALE} is [2, 3], but {UP} is [40, 32] in blocks of 16 x 24, which needs [3, 2]."),
    "a scale of integers": (tensors(lambda t: t.update({SCALE: torch.ones(3, 2, dtype=torch.uint8)})), f"{SCALE} is U8; a scale must be F32, BF16, F16, F64, F8_E8M0."),
    "blocks that are none": (with_settings(weight_block_size=[0, "x"]), "config.json: the size of blocks must be two positive integers, found [0, 'x']."),
    "grids without blocks": (with_settings(weight_block_size=None), "model.layers.0.mlp.down_proj.weight_scale_inv is [2, 2], but model.layers.0.mlp.down_proj.weight is [32, 40], which needs [1, 1] or [32, 1]."),
    "AWQ": (lambda law: edit_config(law, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128}), f"dequantise: weights of AWQ, 4 bits in groups of 128 are not multiplied out here, only 8-bit floats are. {OTHER}"),
    "packed integers": (lambda law: edit_config(law, quantization_config={**compressed("group", group_size=128), "format": "pack-quantized"}), f"dequantise: compressed-tensors in the format 'pack-quantized', only float-quantized weights are multiplied out here. {OTHER}"),
    "integers": (lambda law: edit_config(law, quantization_config=compressed("channel", type="int")), f"dequantise: compressed-tensors weights of type int of 8 bits, only floats of 8 bits are multiplied out here. {OTHER}"),
    "zero points": (lambda law: edit_config(law, quantization_config=compressed("channel", symmetric=False)), f"dequantise: its weights have zero points (symmetric: false), which no 8-bit float needs. {OTHER}"),
    "sparse": (with_settings(sparsity_config={"format": "sparse-24-bitmask"}), f"dequantise: sparsity_config has format 'sparse-24-bitmask', and its zeros are stored nowhere. {OTHER}"),
    "NVFP4": (lambda law: edit_config(law, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}), f"dequantise: ModelOpt's 'NVFP4', only FP8 weights are multiplied out here. {OTHER}"),
    "a format of its own": (with_settings(fmt="e3m4"), f"dequantise: FP8 in the format 'e3m4'. {OTHER}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_multiplied_out_is_refused(name: str, tmp_path: Path, run: Any) -> None:
    damage, message = REFUSED[name]
    quantised_sources(tmp_path)
    damage(tmp_path / "law")
    assert said(run, tmp_path, "plan", dequantising(tmp_path))[0] == f"sources.law: {message}"


def test_without_the_key_it_is_named(tmp_path: Path, run: Any) -> None:
    quantised_sources(tmp_path)
    assert said(run, tmp_path, "plan", write_recipe(tmp_path)) == [
        "sources.law: config.json has a quantization_config (FP8 in blocks of 16 x 24, 8 bits): 14 weights are 8-bit floats with scales beside "
        "them. To merge what they stand for, write sources: {law: {path: law, dequantise: true}}, which makes bfloat16 of them; or use the "
        "full-precision model."
    ]


def test_a_number_that_is_not_finite_is_the_sources(tmp_path: Path) -> None:
    quantised_sources(tmp_path)
    edit_tensors(tmp_path / "law", lambda tensors: tensors[SCALE].fill_(float("inf")))
    with pytest.raises(Exception, match="comes from a source"):
        publish(plan_file(dequantising(tmp_path)), None, UNPROVED)


def test_the_key_is_true_or_false(tmp_path: Path, run: Any) -> None:
    quantised_sources(tmp_path)
    path = dequantising(tmp_path)
    path.write_text(path.read_text().replace("true", "maybe"))
    assert "sources.law.dequantise" in run("plan", path).err
    with pytest.raises(CheckpointError, match="no such folder"):
        dequantised.read_dequantised("law", tmp_path / "none")


# ---- transformers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_makes_the_same_of_it(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor without 8-bit floats transformers multiplies them out as well; of blocks that fit, which alone it takes."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    monkeypatch.setitem(
        STYLES, "fitting", ({**STYLES["blocks"][0], "weight_block_size": [8, 4]}, "weight_scale_inv", lambda r, c: (8, 4), None)
    )
    assert BLOCK != (8, 4)
    quantised_sources(tmp_path, "fitting", family)
    plan = plan_file(dequantising(tmp_path, "shared: {make: copy, from: law}", "merge", sources="seed: seed, code: code"))
    written = load_file(publish(plan, None, UNPROVED) / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "law", dtype=torch.bfloat16).state_dict()
    assert written.keys() == {name for name in theirs if name in written}
    for name, tensor in written.items():
        assert torch.equal(theirs[name], tensor), name
