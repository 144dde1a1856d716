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

from bam_merge.architectures.tables import load_architecture
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify


def planned(folder: Path, config: dict[str, Any], layout: str = "qwen2_moe", text: str = "", dtype: str = "F32") -> Plan:
    write_sources(folder, config, dtype=dtype)
    return plan_file(write_recipe(folder, text, "btx", output=f"{{path: out, layout: {layout}}}"))


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
    plan = planned(tmp_path, CONFIGS["llama"])
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
    plan = planned(tmp_path, {**CONFIGS["llama"], **({"head_dim": head_dim} if head_dim else {})})
    assert [said in note for note in plan.notes] == ([True] if said else [])


MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(("layout", "family", "changes", "said"), [
    ("qwen3_moe", "qwen3", {}, None),
    ("qwen3_moe", "qwen3_biased", {}, "qwen3_moe: attention_out_bias is True: vLLM skips the biases of o_proj without a word"),
    ("qwen3_moe", "qwen3", {"hidden_act": "gelu"}, "qwen3_moe: hidden_act is gelu: vLLM computes silu without a word"),
    ("mixtral", "llama", {}, None),
    ("mixtral", "llama", {"hidden_act": "swish"}, None),
    ("mixtral", "mistral", {}, None),
    ("mixtral", "llama", {"hidden_act": "gelu"}, "mixtral: hidden_act is gelu: vLLM computes silu without a word"),
    ("qwen2_moe", "qwen2", {"hidden_act": "relu"}, "qwen2_moe: hidden_act is relu: vLLM does not load the model"),
    ("qwen2_moe", "qwen2", MIXED, "qwen2_moe: sliding is mixed: vLLM has one window for all layers, without a word"),
    ("qwen2_moe", "qwen2", {**MIXED, "max_window_layers": 0}, None),
    ("qwen2_moe", "mistral", {}, None),
])  # fmt: skip
def test_what_an_engine_computes_otherwise_is_said(
    layout: str, family: str, changes: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    notes = planned(tmp_path, {**CONFIGS[family], **changes}, layout).notes
    assert len(notes) == (said is not None)
    assert all(note.startswith(f"output.layout: {said}; transformers ") for note in notes)


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
