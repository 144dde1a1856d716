"""Which experts get a token, and with which gates: part of the reference model, and as plain."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bam_merge.model.activations import wide

SIGMOIDS = ("sigmoid", "topk_then_sigmoid")
"""Gates that are made of sigmoids, open and renormalised."""


def route(router: nn.Module, x_BTD: Tensor, k: int, how: str, force_expert: int | None, choice_bias_N: Tensor | None = None) -> Tensor:
    """Gates [B, T, N] of the experts, in float32 or wider, zero outside T, the k largest of p = softmax(W x) or s = sigmoid(W x):

    softmax_then_topk   p_i                            BAM's FFN, and with k = N the soft routing of its attention
    topk_then_softmax   softmax over T of (W x)_i      BTX and Mixtral: the gates sum to one
    renormalised        p_i / detach(sum over T of p)  top-k attention: they sum to one, and the router has a gradient at k = 1
    sigmoid             s_i                            each expert is judged by itself
    topk_then_sigmoid   s_i / (1e-20 + sum over T)     DeepSeek-V3 (arXiv 2412.19437, equation 13): they sum to one

    `choice_bias_N` is added to p or s where T is chosen, and to no gate (arXiv 2408.15664: experts are balanced by it).
    The paper's ablation of top-k attention (Table 6) leaves its gates open. The last row is how MoA normalises them (arXiv
    2210.05144, section 3): at k = N it is the paper's soft routing, and N equal attention experts stay the dense attention.
    `force_expert` gives gate 1 to that expert and 0 to the others.
    """
    logits_BTN = wide(router(x_BTD))
    if force_expert is not None:
        return one_hot(torch.tensor(force_expert), logits_BTN.shape[-1]).to(logits_BTN).expand_as(logits_BTN)
    p_BTN = logits_BTN.sigmoid() if how in SIGMOIDS else logits_BTN.softmax(-1)
    judged_BTN = p_BTN if choice_bias_N is None else p_BTN + choice_bias_N
    chosen_BTN = torch.zeros_like(p_BTN, dtype=torch.bool).scatter(-1, judged_BTN.topk(k).indices, True)
    if how == "topk_then_softmax":
        return logits_BTN.masked_fill(~chosen_BTN, -torch.inf).softmax(-1)
    kept_BTN = p_BTN * chosen_BTN
    if how == "topk_then_sigmoid":
        return kept_BTN / (kept_BTN.sum(-1, keepdim=True) + 1e-20)
    return kept_BTN / kept_BTN.sum(-1, keepdim=True).detach() if how == "renormalised" else kept_BTN
