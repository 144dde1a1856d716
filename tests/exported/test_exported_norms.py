"""Norms of queries and keys in the fused call: each of one expert's heads alone, however the heads of all experts stand."""

from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from test_model import build, distance, ids, load_model, write_three

from bam_merge.exported.configuration_bam import BamConfig
from bam_merge.exported.modeling_bam import BamHeadLayerNorm


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(("shape", "bias"), [("head", True), ("head", False), ("heads", True), ("all heads", True), ("all heads", False)])
def test_a_fused_norm_is_the_experts_norms(kind: str, shape: str, bias: bool) -> None:
    """Three experts of 2 k/v heads with 2 query heads each: expert by expert by torch's own functions, and all in one."""
    N, K, G, C = 3, 2, 2, 8
    sizes = {"num_attention_heads": N * K * G, "num_key_value_heads": N * K, "head_dim": C, "num_attention_experts": N, "num_experts": N}
    config = BamConfig(hidden_size=32, norm_type=kind, qk_norm=True, qk_norm_shape=shape, qk_norm_bias=bias, **sizes)
    fused = BamHeadLayerNorm(config, N, N * K * G, G, C).double()
    draw = torch.Generator().manual_seed(0)
    for parameter in fused.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 5, N * K * G, C, generator=draw, dtype=torch.float64)
    got = fused(x).unflatten(-2, (K, N, G))
    for expert in range(N):
        own = x.unflatten(-2, (K, N, G))[..., expert, :, :].flatten(-3, -2)  # [B, T, K * G heads, C]
        vectors = own.flatten(-2) if shape == "all heads" else own
        centred = vectors - vectors.mean(-1, keepdim=True) if kind == "layer_norm" else vectors
        eps = config.layer_norm_eps if kind == "layer_norm" else config.rms_norm_eps
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        parts = [p.unflatten(0, (K, N, G))[:, expert].flatten(0, 1) if shape == "heads" else p[expert] for p in fused.parameters()]
        expected = normed * parts[0] + (parts[1] if bias else 0.0)
        assert distance(got[..., expert, :, :].flatten(-3, -2), expected.view(own.shape)) < 1e-12


@pytest.mark.parametrize("name", ["olmo2", "phi_qk_norm"])
def test_attention_that_no_process_can_have_a_part_of_stays_whole(name: str, tmp_path: Path) -> None:
    write_three(tmp_path, CONFIGS[name])
    folder = build(tmp_path, "")
    plan = BamConfig.from_pretrained(folder).tensor_parallel_plan()
    assert not [module for module in plan if "self_attn" in module]
    assert bool([module for module in plan if "mlp.experts" in module]) == (name == "olmo2")  # phi's FFN has biases


@torch.no_grad()
def test_a_norm_of_all_heads_is_of_one_expert(tmp_path: Path) -> None:
    """Another expert's larger queries change nothing of what this one's are divided by."""
    write_three(tmp_path, CONFIGS["olmo2"])
    model, tokens = load_model(build(tmp_path, "")), ids()
    before = model(tokens, force_expert=0)
    for name, parameter in model.named_parameters():
        if "self_attn.experts.1." in name and "q_proj" in name:
            parameter.mul_(100.0)
    assert torch.equal(model(tokens, force_expert=0), before)
    assert distance(model(tokens, force_expert=1), before) > 0.01
