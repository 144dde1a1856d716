"""Norms after attention and FFN, and blocks without norms before them: what a block computes, how its gates are chosen, what is found."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SOURCES, Result, write_recipe, write_sources
from proofs import UNPROVED, Forger, failed
from test_exported import KINDS, assert_equals_reference
from test_model import TOLERANCE, build, distance, ids, write_three
from torch.nn.functional import rms_norm
from toys import as_toy, toy_family

from bam_merge.model.config import model_config
from bam_merge.model.model import Block, Model
from bam_merge.model.positions import Cache
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

__all__ = ["toy_family"]

BOTH = CONFIGS["hyperclovax"]
ONE_HEAD = {**CONFIGS["llama"], "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 12}

POST_ONLY = as_toy(
    "qwen3", "posty",
    ('gated_ffn = true', 'gated_ffn = true\npre_norms = false\npost_norms = true'),
    ('"norm.attn", name = "model.layers.{layer}.input_layernorm', '"norm.attn.post", name = "model.layers.{layer}.post_attention_layernorm'),
    ('"norm.ffn", name = "model.layers.{layer}.post_attention_layernorm', '"norm.ffn.post", name = "model.layers.{layer}.post_feedforward_layernorm'),
)  # fmt: skip
"""Norms after attention and FFN alone."""


def block_of(config: dict[str, Any], **changes: Any) -> Block:
    block = Block(replace(model_config(config), **changes), 0).double()
    draw = torch.Generator().manual_seed(3)
    block.load_state_dict({name: 0.2 * torch.randn(t.shape, generator=draw, dtype=t.dtype) + 0.5 for name, t in block.state_dict().items()})
    return block


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("pre", [True, False])
@torch.no_grad()
def test_a_block_by_hand(pre: bool, scale: float | None) -> None:
    """h = x + s N(attn(LN1 x)), then h + s N(ffn(LN2 h)); LN1 and LN2 are nothing where there are none."""
    block = block_of(CONFIGS["llama"], pre_norms=pre, post_norms=True, residual_scale=scale)
    W, x_BTD = block.state_dict(), torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positions_BT, s = torch.arange(5)[None], 1.0 if scale is None else scale

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (32,), W[f"{name}.weight"], block.post_mlp_layernorm.eps)

    first, second = (norm(name, x_BTD) if pre else x_BTD for name in ("input_layernorm", "input_layernorm"))
    h_BTD = x_BTD + s * norm("post_self_attn_layernorm", block.self_attn(first, positions_BT, Cache(), None)[0])
    second = norm("post_attention_layernorm", h_BTD) if pre else h_BTD
    expected = h_BTD + s * norm("post_mlp_layernorm", block.mlp(second))
    assert ("input_layernorm.weight" in W) == pre
    assert distance(block(x_BTD, positions_BT).hidden, expected) < 1e-12


@torch.no_grad()
def test_norms_after_alone_are_transformers_olmo2() -> None:
    """Whose norm of q and k over all heads is that of each, where there is one head."""
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in ONE_HEAD.items() if key != "model_type"}
    torch.manual_seed(0)
    other = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**{**config, "initializer_range": 0.2})).eval()
    renamed = {"post_attention_layernorm": "post_self_attn_layernorm", "post_feedforward_layernorm": "post_mlp_layernorm"}
    state = other.state_dict()
    for old, new in renamed.items():
        state = {name.replace(old, new): 1 + 0.2 * torch.randn_like(t) if old in name else t for name, t in state.items()}
    for name, t in other.state_dict().items():
        t.copy_(next(value for key, value in state.items() if key == name or any(name.replace(*pair) == key for pair in renamed.items())))
    ours = Model(replace(model_config(ONE_HEAD), pre_norms=False, post_norms=True, qk_norm=True, rms_norm_eps=other.config.rms_norm_eps))
    ours.load_state_dict(state)
    expected = other(input_ids=ids()).logits
    assert float(expected.std()) > 0.1
    assert distance(ours(ids()), expected) < TOLERANCE


# ---- mixtures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_without_norms_before_is_merged_and_exported(
    kind: str, tmp_path: Path, toy_family: Callable[[str], None], run: Callable[..., Result]
) -> None:
    toy_family(POST_ONLY)
    write_three(tmp_path, {**CONFIGS["qwen3"], "model_type": "posty"})
    method, text = KINDS[kind]
    plan = plan_file(write_recipe(tmp_path, f"{text}\nrouter: {{init: normal, std: 0.5}}", method))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    assert_equals_reference(build(tmp_path, text, method), ids())
    seen = run("inspect", tmp_path / "out").out
    assert "norms after attention and FFN" in " ".join(seen.split())
    assert "findings" not in seen


def test_inspect_shows_where_norms_stand(tmp_path: Path, run: Callable[..., Result]) -> None:
    write_sources(tmp_path, BOTH, ("seed",))
    assert "norms before and after attention and FFN" in " ".join(run("inspect", tmp_path / "seed").out.split())


@pytest.mark.parametrize(
    ("name", "asked", "top_k"), [("hyperclovax", [], 2), ("hyperclovax", ["--top-k", 3], 3), ("hyperclovax_biased", [], 1)]
)
def test_inspect_foretells_the_gates_that_a_merge_has(
    name: str, asked: list[Any], top_k: int, tmp_path: Path, run: Callable[..., Result]
) -> None:
    write_sources(tmp_path, CONFIGS[name], ("seed",))
    found = json.loads(run("inspect", tmp_path / "seed", "--as-bam", 3, *asked, "--json").out)["as_bam"]
    assert found["top_k"] == top_k
    assert f"FFN top {top_k}" in " ".join(run("inspect", tmp_path / "seed", "--as-bam", 3, *asked).out.split())


def mix(folder: Path, ffn: str, method: str = "bam") -> Any:
    return plan_file(write_recipe(folder, f"ffn: {{{ffn}}}" if ffn else "", method))


DEFAULTS: dict[str, tuple[str, str, tuple[int, bool], str]] = {
    # what the recipe says; the gates that follow; words of the plan's note
    "nothing": ("bam", "", (2, True), "2 experts per token, whose gates sum to one"),
    "what follows anyway": ("bam", "top_k: 2, gate: topk_then_softmax", (2, True), "2 experts per token, whose gates sum to one"),
    "three": ("bam", "top_k: 3", (3, True), ""),
    "a gate alone": ("bam", "gate: softmax_then_topk", (2, False), ""),
    "one": ("bam", "top_k: 1", (1, False), "top_k 1: a norm stands after the FFN and takes its gate away"),
    "one, renormalised": ("bam", "top_k: 1, gate: topk_then_softmax", (1, True), "top_k 1 with renormalised gates"),
    "a scale": ("bam", "gate_scale: 2", (2, True), "ffn.gate_scale: a norm stands after the FFN and takes it away"),
    "btx": ("btx", "", (2, True), ""),
    "btx with one": ("btx", "top_k: 1, gate: softmax_then_topk", (1, False), "top_k 1: a norm stands after the FFN"),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_gates_suit_the_norm_after_the_ffn(case: str, tmp_path: Path) -> None:
    method, ffn, gates, words = DEFAULTS[case]
    write_sources(tmp_path, BOTH)
    plan = mix(tmp_path, ffn, method)
    assert plan.recipe.gates == gates
    assert (plan.config["num_experts_per_tok"], plan.config["norm_topk_prob"]) == gates
    notes = [note for note in plan.notes if note.startswith("ffn")]
    assert any(words in note for note in notes) if words else notes == []
    write_sources(tmp_path, CONFIGS["hyperclovax_biased"])  # without these norms: the method's own
    assert [note for note in mix(tmp_path, "", "bam").notes if note.startswith("ffn")] == []
    assert mix(tmp_path, "", "bam").recipe.gates == (1, False)


def test_what_a_merge_records_is_planned_again_as_it_was(tmp_path: Path) -> None:
    """The gates that followed from the sources stand in the manifest, so that verification without a recipe finds them."""
    write_sources(tmp_path, BOTH)
    plan = mix(tmp_path, "")
    report = verify(publish(plan, None, UNPROVED))
    assert report.ok, failed(report)
    identity = next(check for check in report.checks if check.name == "identity")
    assert "the dense model exactly" in identity.detail


def test_one_gate_is_said_to_be_taken_away(tmp_path: Path) -> None:
    write_sources(tmp_path, BOTH)
    plan = mix(tmp_path, "top_k: 1")
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    identity = next(check for check in report.checks if check.name == "identity")
    assert "(the chosen gates' sum), which the norm after it takes away" in identity.detail


@pytest.mark.parametrize("role", ["norm.attn.post", "norm.ffn.post"])
def test_a_norm_after_is_shared_and_has_no_expert(role: str, tmp_path: Path) -> None:
    write_sources(tmp_path, BOTH)
    plan = plan_file(write_recipe(tmp_path, f"rules: [{{roles: [{role}], make: copy, from: law}}]"))
    made = {step.role: str(step.expression) for step in plan.steps if step.role.endswith(".post")}
    assert made[role].startswith("law:")
    assert [text.startswith("mean(") for key, text in made.items() if key != role] == [True]
    with pytest.raises(Exception, match=r"asks for one tensor per expert, but layout 'bam' stores it shared"):
        plan_file(write_recipe(tmp_path, f"rules: [{{roles: [{role}], make: expert}}]"))


SABOTAGE: dict[str, tuple[Callable[[Forger], Any], dict[str, str]]] = {
    "norms after attention and FFN swapped": (
        lambda f: f.swap("model.layers.1.post_self_attn_layernorm.weight", "model.layers.1.post_mlp_layernorm.weight"),
        {"merges": "model.layers.1.post_self_attn_layernorm.weight"},
    ),
    "declared without": (
        lambda f: f.config(post_norms=False),
        {"config": "post_norms is False, the sources and the recipe give True", "model": "post_self_attn_layernorm.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SABOTAGE)
def test_sabotage_is_found(case: str, tmp_path: Path) -> None:
    change, expected = SABOTAGE[case]
    write_sources(tmp_path, BOTH)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    change(Forger(folder))
    found = failed(verify(folder, plan))
    for check, words in expected.items():
        assert words in found[check], found


def test_a_block_that_forgets_the_norm_after_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the mixture's block norm each expert, or nothing, where its dense models norm once."""
    write_sources(tmp_path, BOTH)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    right = Block.forward

    def wrong(self: Block, *args: Any, **options: Any) -> Any:
        norm = self.post_mlp_layernorm
        self.post_mlp_layernorm = torch.nn.Identity() if hasattr(self.mlp, "router") else norm
        try:
            return right(self, *args, **options)
        finally:
            self.post_mlp_layernorm = norm

    monkeypatch.setattr(Block, "forward", wrong)
    found = failed(verify(folder, plan))
    assert all(f"layer 0, expert {j} ({name})" in found["expert isolation"] for j, name in enumerate(SOURCES))
    assert "layer 0" in found["identity"]
