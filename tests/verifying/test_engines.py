"""What engines beside transformers need of a layout: it is filled in, said in the plan, and missed by verify in folders that lack it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED, failed
from safetensors.torch import load_file, save_file

from bam_merge.architectures.strict_tables import TableError
from bam_merge.architectures.table_files import table_text
from bam_merge.architectures.tables import load_architecture, read_table
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify


def planned(folder: Path, config: dict[str, Any], layout: str = "qwen2_moe", text: str = "", dtype: str = "F32") -> Plan:
    write_sources(folder, config, dtype=dtype)
    return plan_file(write_recipe(folder, text, "btx", output=f"{{path: out, layout: {layout}}}"))


RAW = "ffn: {gate: softmax_then_topk}"
"""Gates that are not renormalised, in a recipe."""


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


# ---- what a merge in qwen2_moe has


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "phi3", "qwen2"])
def test_qwen2_moe_has_what_engines_need(name: str, dtype: str, tmp_path: Path) -> None:
    """Biases of q, k and v (vLLM), a gate of the shared expert that is not zero and a head (llama.cpp); the shared expert adds nothing."""
    plan = planned(tmp_path, CONFIGS[name], dtype=dtype)
    folder = publish(plan, None, UNPROVED)
    config, tensors = json.loads((folder / "config.json").read_text()), stored(folder)
    assert (config["qkv_bias"], config["tie_word_embeddings"]) == (True, False)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q", 32), ("k", 16), ("v", 16)):
            bias = tensors[f"{prefix}self_attn.{part}_proj.bias"]
            assert (tuple(bias.shape), bool(bias.any())) == ((rows,), name == "qwen2")
        assert torch.equal(tensors[f"{prefix}mlp.shared_expert_gate.weight"].float(), torch.ones(1, 32))
        assert not tensors[f"{prefix}mlp.shared_expert.down_proj.weight"].any()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32 if dtype == "F32" else torch.bfloat16}
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]) == (name == "llama_tied")
    report = verify(folder, plan)
    assert report.ok, failed(report)
    assert next(check for check in report.checks if check.name == "engines").detail == "5 roles that engines need are there"


@pytest.mark.parametrize("make", ["{make: dare_ties, base: seed, density: 0.4}", "{make: copy, from: law}"])
def test_a_tied_head_is_stored_once_more_however_the_embeddings_are_made(make: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, CONFIGS["llama_tied"], text=f"rules: [{{roles: [embed], make: {make[7:-1]}}}]")
    tensors = stored(publish(plan, None, UNPROVED))
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    [note] = [note for note in plan.notes if "head" in note]
    assert "stored once more" in note
    assert "Layout bam" in note


def test_untied_sources_keep_their_own_head_and_need_no_note(tmp_path: Path) -> None:
    plan = planned(tmp_path, CONFIGS["llama"], text=RAW)
    assert not plan.notes
    assert {step.name: step.expression for step in plan.steps}["lm_head.weight"] == "mean(seed, code, law)"


@pytest.mark.parametrize("layout", ["mixtral", "qwen3_moe", "bam"])
def test_other_layouts_stay_tied(layout: str, tmp_path: Path) -> None:
    config = {**CONFIGS["qwen3" if layout == "qwen3_moe" else "llama"], "tie_word_embeddings": True}
    plan = planned(tmp_path, config, layout)
    assert plan.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in {step.name for step in plan.steps}


# ---- what the plan says


@pytest.mark.parametrize(("head_dim", "said"), [
    (None, ""), (8, ""),
    (16, "H*D = 64 is not d = 32: vLLM and llama.cpp take hidden_size / num_attention_heads for head_dim and do not load the model"),
    (4, "H*D = 16 is not d = 32: vLLM"),
])  # fmt: skip
def test_a_head_dim_that_engines_do_not_read_is_said(head_dim: int | None, said: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, {**CONFIGS["llama"], **({"head_dim": head_dim} if head_dim else {})}, text=RAW)
    assert [said in note for note in plan.notes] == ([True] if said else [])


MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
RENORMALISED = "ffn: {gate: topk_then_softmax}"
WINDOWS = "sliding is {}: llama.cpp attends to all tokens before, without a word; transformers to those in the window"
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
UNSCALED = "rope_type is llama3: llama.cpp does not scale, without a word"
DYNAMIC = "rope_type is dynamic: llama.cpp does not scale beyond max_position_embeddings, without a word"
SILU = "hidden_act is {}: vLLM and llama.cpp compute silu without a word"
NOT_LOADED = "hidden_act is relu: vLLM does not load the model, llama.cpp computes silu without a word"
BIASED = "attention_out_bias is True: vLLM skips the biases of o_proj without a word, llama.cpp does not load the model"


YARN = "rope_parameters.{} is {}: llama.cpp {}, without a word"


def scaled(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": rope_type, "factor": 4.0, **more}}


@pytest.mark.parametrize(("layout", "family", "changes", "said"), [
    ("qwen3_moe", "qwen3", {}, []),
    ("qwen3_moe", "qwen3_biased", {}, [BIASED]),
    ("qwen3_moe", "qwen3", {"hidden_act": "gelu"}, [SILU.format("gelu")]),
    ("qwen3_moe", "qwen3", {**MIXED, "max_window_layers": 0}, [WINDOWS.format("all")]),
    ("qwen3_moe", "qwen3", {"rope_parameters": LLAMA_3}, [UNSCALED]),
    ("qwen3_moe", "qwen3", scaled("dynamic"), [DYNAMIC]),
    ("qwen3_moe", "qwen3", scaled("yarn"), []),
    ("mixtral", "llama", {}, []),
    ("mixtral", "llama", scaled("yarn", attention_factor=0.7), [YARN.format("attention_factor", 0.7, "works yarn's factor out of the scaling")]),
    ("qwen3_moe", "qwen3", scaled("yarn", mscale=0.5, mscale_all_dim=1.0), [YARN.format("mscale", 0.5, "works yarn's factor out of the scaling")]),
    ("qwen2_moe", "qwen2", scaled("yarn", beta_fast=16.0, beta_slow=1.0), [YARN.format("beta_fast", 16.0, "takes 32")]),
    ("mixtral", "llama", scaled("yarn", beta_fast=32.0, beta_slow=2.0), [YARN.format("beta_slow", 2.0, "takes 1")]),
    ("mixtral", "llama", scaled("yarn", truncate=False), [YARN.format("truncate", False, "rounds where yarn's ramp begins and ends")]),
    ("mixtral", "llama", scaled("yarn", truncate=True, beta_fast=32, beta_slow=1), []),
    ("mixtral", "llama", {"hidden_act": "swish"}, []),
    ("mixtral", "mistral", {}, [WINDOWS.format("all")]),
    ("mixtral", "mistral", {"sliding_window": None}, []),
    ("mixtral", "llama", {"hidden_act": "gelu"}, [SILU.format("gelu")]),
    ("mixtral", "llama", {"rope_parameters": LLAMA_3}, []),
    ("mixtral", "llama", scaled("linear"), []),
    ("mixtral", "llama", scaled("dynamic"), [DYNAMIC]),
    ("qwen2_moe", "qwen2", {"hidden_act": "relu"}, [NOT_LOADED]),
    ("qwen2_moe", "qwen2", MIXED, [WINDOWS.format("mixed"), "sliding is mixed: vLLM has one window for all layers, without a word"]),
    ("qwen2_moe", "qwen2", {**MIXED, "max_window_layers": 0}, [WINDOWS.format("all")]),
    ("qwen2_moe", "qwen2", {**MIXED, "use_sliding_window": False}, []),
    ("qwen2_moe", "mistral", {}, [WINDOWS.format("all")]),
    ("qwen2_moe", "llama", {"rope_parameters": LLAMA_3}, [UNSCALED]),
    ("qwen2_moe", "llama", scaled("linear"), []),
    ("qwen2_moe", "llama", scaled("dynamic"), [DYNAMIC]),
])  # fmt: skip
def test_what_an_engine_computes_otherwise_is_said(
    layout: str, family: str, changes: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    gates = RAW if layout == "qwen2_moe" else RENORMALISED  # what llama.cpp computes
    notes = planned(tmp_path, {**CONFIGS[family], **changes}, layout, gates).notes
    assert len(notes) == len(said)
    for note, beginning in zip(notes, said, strict=True):
        assert note.startswith(f"output.layout: {layout}: {beginning}")
        assert "; transformers " in note


@pytest.mark.parametrize(("layout", "family", "gates", "said"), [
    ("qwen2_moe", "qwen2", RENORMALISED, "norm_topk_prob is True: llama.cpp never renormalises gates, without a word; transformers and vLLM"),
    ("qwen2_moe", "llama", "", "norm_topk_prob is True: llama.cpp never renormalises gates, without a word"),
    ("qwen2_moe", "llama", RAW, None),
    ("qwen3_moe", "qwen3", RAW, "norm_topk_prob is False: llama.cpp always renormalises gates, without a word; transformers and vLLM"),
    ("qwen3_moe", "qwen3", RENORMALISED, None),
    ("qwen3_moe", "qwen3", "", None),
])  # fmt: skip
def test_gates_that_llama_cpp_does_not_compute_are_said(layout: str, family: str, gates: str, said: str | None, tmp_path: Path) -> None:
    """Of the default gates too: those of btx are renormalised, and a qwen2_moe made with them is another model in llama.cpp."""
    notes = planned(tmp_path, CONFIGS[family], layout, gates).notes
    assert [note.startswith(f"output.layout: {layout}: {said}") for note in notes] == ([True] if said else [])
    assert all(("softmax_then_topk" if layout == "qwen2_moe" else "topk_then_softmax") in note for note in notes)


# ---- folders written before


def published_before(folder: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge as it was written when the table had neither biases nor a head to fill in, and zeros in the shared expert's gate."""
    layout = load_architecture("qwen2_moe")
    rows = (replace(row, make="zeros" if row.roles[0].startswith("ffn.shared.") else None) for row in layout.rows)
    with monkeypatch.context() as patch:
        old = replace(layout, rows=tuple(rows), implies={}, limits=())
        patch.setattr("bam_merge.planning.make.load_architecture", lambda name: old)
        return publish(planned(folder, config), None, UNPROVED)


@pytest.mark.parametrize("sources_at_hand", [True, False])
@pytest.mark.parametrize(("name", "faults"), [
    ("llama", [".q_proj.bias", "missing: vLLM", "shared_expert_gate.weight all zeros: llama.cpp"]),
    ("llama_tied", [".k_proj.bias", "missing: vLLM", "all zeros: llama.cpp", "lm_head.weight missing: llama.cpp does not load"]),
    ("mistral", ["missing: vLLM", "all zeros: llama.cpp"]),
    ("qwen2", ["shared_expert_gate.weight all zeros: llama.cpp"]),
])  # fmt: skip
def test_a_folder_in_the_old_form_is_told_so(
    name: str, faults: list[str], sources_at_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published_before(tmp_path, CONFIGS[name], monkeypatch)
    assert not stored(folder)["model.layers.0.mlp.shared_expert_gate.weight"].any()
    if not sources_at_hand:
        (tmp_path / "seed" / "config.json").unlink()
    report = verify(folder)
    assert report.ok is False
    detail = failed(report)["engines"]
    assert all(fault in detail for fault in faults)
    assert ("vLLM" in detail, "lm_head" in detail) == (name != "qwen2", name == "llama_tied")
    assert detail.endswith("transformers computes the model as it should. An older bam-merge wrote it so: merge again")
    assert sources_at_hand or set(failed(report)) == {"engines"}


def test_the_old_and_the_new_form_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = load_model(published_before(tmp_path / "old", CONFIGS["llama_tied"], monkeypatch))
    new = load_model(publish(planned(tmp_path / "new", CONFIGS["llama_tied"]), None, UNPROVED))
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(old(ids), new(ids))
        assert float(new(ids).std()) > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_other_layouts_have_no_such_check(name: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, CONFIGS[name], {"llama": "mixtral", "qwen3": "qwen3_moe"}[name])
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    assert "engines" not in {check.name for check in report.checks}


@pytest.mark.parametrize("shape", [[], [1, 4], [32]])
def test_a_gate_of_the_wrong_shape_is_the_layouts_failure(shape: list[int], tmp_path: Path) -> None:
    """A damaged folder is looked at without a traceback: what is missing or all zeros is told beside what is not of this layout."""
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    folder = publish(planned(tmp_path, CONFIGS["llama"]), None, UNPROVED)
    save_file({**stored(folder), name: torch.zeros(shape)}, folder / "model.safetensors")
    (tmp_path / "seed" / "config.json").unlink()
    found = failed(verify(folder))
    assert f"{name} is {shape}" in found["layout"]
    assert found["engines"].startswith(f"{name} all zeros: llama.cpp computes the gate as 0/0")


def test_a_limit_is_of_an_engine_that_the_table_names() -> None:
    text = table_text("mixtral")
    with pytest.raises(TableError, match=r"limits\[0\]\.engines: 'lama\.cpp' is none of \[\[engines\]\]; did you mean 'llama\.cpp'\?"):
        read_table(text.replace('engines = ["llama.cpp"]', 'engines = ["lama.cpp"]', 1), "mixtral.toml")
    with pytest.raises(TableError, match=r"limits\[0\]\.engines is missing"):
        read_table(text.replace('engines = ["llama.cpp"]\n', "", 1), "mixtral.toml")
    with pytest.raises(TableError, match=r"engines\[0\]\.how is missing"):
        read_table(text.replace('how = "4', 'hw = "4', 1), "mixtral.toml")
