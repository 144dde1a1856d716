"""Layout gemma4: what stands beside its experts is proved to do nothing, and its second norm to change next to nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from proofs import UNPROVED, Forger, failed

from bam_merge import calibrate, load_recipe, merge
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.verifying.verification import verify

OUTPUT = "{path: out, layout: gemma4}"
FFN = "ffn: {top_k: 2, gate: topk_then_softmax}"
LAYER = "model.layers.1."


def mixture(folder: Path, family: str = "gemma4_text", size: float = 0.2) -> Path:
    for seed, source in enumerate(SOURCES):
        write_checkpoint(folder / source, CONFIGS[family], random_values(seed, size))
    return merge(load_recipe(write_recipe(folder, FFN, "btx", output=OUTPUT)), options=UNPROVED)


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4_text_keys", "gemma4_unified_text"])
def test_a_mixture_of_ffns_that_give_enough_is_proved(family: str, tmp_path: Path) -> None:
    report = verify(mixture(tmp_path, family))
    assert report.ok, failed(report)
    (check,) = (check for check in report.checks if check.name == "normed twice")
    assert "norms what experts give once more" in check.detail


def test_ffns_beside_the_epsilon_of_a_norm_are_found(tmp_path: Path) -> None:
    """The norm of a norm divides by sqrt(ms / (ms + eps) + eps): where the mean square of what FFNs give is near eps, not by one."""
    assert list(failed(verify(mixture(tmp_path, size=0.05)))) == ["normed twice"]


def dense_branch(forge: Forger) -> None:
    for part in ("gate", "up", "down"):
        name = f"{LAYER}mlp.{part}_proj.weight"
        forge.write(name, forge.read(name) + torch.eye(*forge.read(name).shape))


def one_more(name: str) -> Callable[[Forger], Any]:
    return lambda forge: forge.write(name, forge.read(name) + torch.arange(forge.read(name).numel()))


SABOTAGE: dict[str, tuple[Callable[[Forger], Any], dict[str, str]]] = {
    "a dense branch": (dense_branch, {"routers": "mlp.gate_proj", "expert isolation": "layer 1", "identity": "layer 1"}),
    "the norm before experts": (one_more(f"{LAYER}pre_feedforward_layernorm_2.weight"), {"merges": "pre_feedforward_layernorm_2"}),
    "the norm after experts": (one_more(f"{LAYER}post_feedforward_layernorm_2.weight"), {"routers": "post_feedforward_layernorm_2", "expert isolation": "layer 1"}),
    "the norm after the dense branch": (one_more(f"{LAYER}post_feedforward_layernorm_1.weight"), {"routers": "post_feedforward_layernorm_1"}),
    "factors of gates": (one_more(f"{LAYER}router.per_expert_scale"), {"routers": "per_expert_scale"}),
    "what the router sees": (one_more(f"{LAYER}router.scale"), {"routers": "router.scale"}),
    "the number of a layer": (lambda f: f.write(f"{LAYER}layer_scalar", f.read(f"{LAYER}layer_scalar") * 2), {"merges": "layer_scalar"}),
}  # fmt: skip
"""What is done; the checks that must fail, each with a word that its detail must hold."""


@pytest.mark.parametrize("what", SABOTAGE)
def test_what_stands_beside_experts_is_checked(what: str, tmp_path: Path) -> None:
    out = mixture(tmp_path)
    change, expected = SABOTAGE[what]
    change(Forger(out))
    found = failed(verify(out))
    for check, word in expected.items():
        assert word in found[check], found


def test_routers_of_texts_are_refused_with_the_reason(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gemma4_text"])
    texts = "{seed: seed.txt, code: code.txt, law: law.txt}"
    with pytest.raises(BamMergeError, match="see the residual before the FFN's norm"):
        plan_file(write_recipe(tmp_path, f"{FFN}\nrouter: {{init: mean, texts: {texts}, tokens: 300}}", "btx", output=OUTPUT))
    with pytest.raises(BamMergeError, match="see the residual before the FFN's norm"):
        calibrate(mixture(tmp_path), dict.fromkeys(SOURCES, "a.txt"), options=UNPROVED)


@pytest.mark.parametrize("text", ["ffn: {top_k: 2, gate: softmax_then_topk}", "ffn: {top_k: 2, gate_scale: 2}"])
def test_what_it_has_no_word_for_is_refused(text: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gemma4_text"])
    with pytest.raises(BamMergeError, match="gemma4"):
        plan_file(write_recipe(tmp_path, text, "btx", output=OUTPUT))
