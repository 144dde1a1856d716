"""The routers' losses of the exported model, against the paper's formulas written as loops."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from test_exported import KINDS, exact, load
from test_model import build, ids, write_three

transformers = pytest.importorskip("transformers")


def by_hand(logits: torch.Tensor, k: int | None, counted: list[int], sigmoid: bool = False) -> tuple[float, float]:
    """(N * sum_i f_i P_i, mean of logsumexp^2) over the tokens `counted`; f_i: share of choices, or of the gates where k is None."""
    experts, rows = logits.shape[-1], [logits[x].tolist() for x in counted]
    chosen, gates, z = [0.0] * experts, [0.0] * experts, 0.0
    for row in rows:
        total = sum(math.exp(value) for value in row)
        score = [1 / (1 + math.exp(-value)) if sigmoid else math.exp(value) for value in row]
        p = [value / sum(score) for value in score]
        best = sorted(range(experts), key=lambda i: -row[i])[:k]
        for i in range(experts):
            gates[i] += p[i] / len(rows)
            chosen[i] += p[i] / len(rows) if k is None else (i in best) / k / len(rows)
        z += math.log(total) ** 2 / len(rows)
    return experts * sum(f * P for f, P in zip(chosen, gates, strict=True)), z


def totals(outputs: Any, config: Any, counted: list[int]) -> float:
    attention_k = config.num_attention_experts_per_tok if config.attention_routing == "top_k" else None
    sigmoid = config.scoring_func == "sigmoid"
    ffn = [by_hand(logits, config.num_experts_per_tok, counted, sigmoid) for logits in outputs.router_logits]
    attention = [by_hand(logits, attention_k, counted) for logits in outputs.attention_router_logits]
    total = sum(config.router_aux_loss_coef * balance + config.router_z_loss_coef * z for balance, z in ffn)
    total += sum(config.attention_router_aux_loss_coef * balance + config.router_z_loss_coef * z for balance, z in attention)
    return total / (config.num_hidden_layers if config.router_loss_reduction == "mean" else 1)


@pytest.fixture
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    method, text = KINDS[getattr(request, "param", "Expert-KV")]
    write_three(tmp_path, CONFIGS["llama"])
    return exact(load(build(tmp_path, text, method))).train()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("attention", [0.0, 0.02])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_losses_are_the_papers(model: Any, padded: bool, attention: float, reduction: str) -> None:
    model.config.attention_router_aux_loss_coef, model.config.router_loss_reduction = attention, reduction
    tokens, mask = ids(), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0 if padded else 1
    labels = tokens.masked_fill(mask == 0, -100)
    outputs = model(tokens, attention_mask=mask, labels=labels, output_router_logits=True)
    expected = totals(outputs, model.config, mask.flatten().nonzero().flatten().tolist())
    assert expected > 0.01  # the balance alone is at least 1 per layer
    coefficient = model.config.router_aux_loss_coef
    assert float(outputs.aux_loss.detach()) * coefficient == pytest.approx(expected, rel=1e-12)
    nll = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert float(outputs.loss.detach()) == pytest.approx(float(nll.detach()) + expected, rel=1e-6)
    if padded:
        assert totals(outputs, model.config, list(range(80))) != pytest.approx(expected, rel=1e-6)


def test_perfect_balance_scores_one() -> None:
    from bam_merge.exported.modeling_bam import router_losses

    logits = torch.eye(4).repeat(5, 1) * 3
    for k in (1, None):
        balance, _ = router_losses(logits, k, None)
        assert float(balance) == pytest.approx(1.0)
    collapsed, _ = router_losses(torch.tensor([[50.0, 0.0, 0.0, 0.0]]), 1, None)
    assert float(collapsed) == pytest.approx(4.0)


def test_balance_of_sigmoids_is_of_their_shares() -> None:
    """N sum_i f_i P_i, with P_i the mean over the tokens of s_i / sum of s: two tokens, three experts, two chosen."""
    from bam_merge.exported.modeling_bam import router_losses

    s_XN = torch.tensor([[0.8, 0.6, 0.2], [0.5, 0.1, 0.4]], dtype=torch.float64)
    balance, _ = router_losses(s_XN.logit(), 2, None, True)
    sent_N = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)  # experts 0 and 1, then 0 and 2
    assert float(balance) == pytest.approx(
        3 * float(sent_N @ (torch.tensor([[0.5, 0.375, 0.125], [0.5, 0.1, 0.4]], dtype=torch.float64).mean(0)))
    )
    softmax, _ = router_losses(s_XN.logit(), 2, None)
    assert float(softmax) != pytest.approx(float(balance), rel=1e-3)
    collapsed, _ = router_losses(torch.tensor([[50.0, -50.0, -50.0, -50.0]]), 1, None, True)
    assert float(collapsed) == pytest.approx(4.0)


def test_when_the_losses_are_in(model: Any) -> None:
    """With labels, unless told not to; without labels, if asked."""
    tokens = ids()
    plain = model(tokens)
    assert plain.aux_loss is plain.router_logits is plain.loss is None
    labelled, without = model(tokens, labels=tokens), model(tokens, labels=tokens, output_router_logits=False)
    assert labelled.router_logits is None
    assert without.aux_loss is None
    difference = float((labelled.loss - without.loss).detach())
    assert difference == pytest.approx(model.config.router_aux_loss_coef * float(labelled.aux_loss.detach()), rel=1e-5)
    asked = model(tokens, output_router_logits=True)
    assert float(asked.aux_loss.detach()) == pytest.approx(float(labelled.aux_loss.detach()))
    assert [tuple(logits.shape) for logits in asked.router_logits + asked.attention_router_logits] == [(80, 3)] * 4


def test_zero_balance_coefficient_leaves_the_z_loss(model: Any) -> None:
    model.config.router_aux_loss_coef = 0.0
    tokens = ids()
    outputs = model(tokens, labels=tokens, output_router_logits=True)
    expected = totals(outputs, model.config, list(range(80)))
    assert expected > 0
    assert float(outputs.aux_loss.detach()) == pytest.approx(expected)
    nll = model(tokens, labels=tokens, output_router_logits=False).loss
    assert float((outputs.loss - nll).detach()) == pytest.approx(expected, rel=1e-4)


def test_accumulated_steps_add_up_to_one_step(model: Any) -> None:
    """What the Trainer does: the loss of each part is told how many tokens the whole step predicts."""
    tokens = ids()
    labels = tokens.clone()
    labels[0, :25] = -100
    items = labels[:, 1:].ne(-100).sum()
    parts = [model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items) for i in range(2)]
    shares = [float(labels[i, 1:].ne(-100).sum() / items) for i in range(2)]
    nll = model(tokens, labels=labels, output_router_logits=False).loss
    extra = sum(s * model.config.router_aux_loss_coef * float(part.aux_loss.detach()) for s, part in zip(shares, parts, strict=True))
    assert sum(shares) == pytest.approx(1)
    assert float(sum(part.loss.detach() for part in parts)) == pytest.approx(float(nll.detach()) + extra, rel=1e-6)


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_losses_reach_the_routers_they_are_of(model: Any) -> None:
    (model.config.router_aux_loss_coef * model(ids(), output_router_logits=True).aux_loss).backward()
    routers = {name: parameter.grad for name, parameter in model.named_parameters() if "router" in name}
    assert len(routers) == (4 if model.config.num_attention_experts else 2)
    for name, gradient in routers.items():
        assert float(gradient.norm()) > 0, name


@pytest.mark.parametrize("model", ["Expert-KV", "Shared-KV, top-2"], indirect=True)
def test_attention_gates_are_given(model: Any) -> None:
    outputs = model(ids(), output_attention_gates=True)
    k = 2 if model.config.attention_routing == "top_k" else 3
    for gates in outputs.attention_gates:
        assert tuple(gates.shape) == (2, 40, 3)
        assert bool(((gates > 0).sum(-1) == k).all())
        assert float((gates.detach().sum(-1) - 1).abs().max()) < 1e-12
    assert model(ids()).attention_gates is None
