"""Capped scores and logits: what they compute, by which attention implementations, and that a wrong cap is found."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from proofs import UNPROVED, Forger, failed
from test_exported import KINDS, exact, load
from test_model import build, distance, filled, ids, with_config, write_three

from bam_merge.errors import CheckpointError
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model
from bam_merge.model.model import Heads, capped
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.sources import dense
from bam_merge.verifying.verification import verify

transformers = pytest.importorskip("transformers")
CAPPED = CONFIGS["gemma2"]


def test_a_cap_by_hand() -> None:
    x = torch.tensor([-1e9, -3.0, 0.0, 1e-4, 3.0, 1e9], dtype=torch.float64)
    assert capped(x, None) is x
    assert capped(x, 2.0).tolist() == pytest.approx([-2.0, 2 * -0.905148253644866, 0.0, 1e-4, 2 * 0.905148253644866, 2.0])


@torch.no_grad()
def test_scores_are_scaled_then_capped_then_masked() -> None:
    """softmax(c tanh(s q k^T / c)) over what is seen: two tokens, one head, numbers by hand."""
    config = replace(
        model_config(CONFIGS["llama"]), hidden_size=2, head_dim=2, num_attention_heads_per_expert=1, num_key_value_heads_per_expert=1,
        attention_softcap=1.5, attention_scale=3.0,
    )  # fmt: skip
    heads = Heads(config).double()
    for parameter in heads.parameters():
        parameter.copy_(torch.eye(2))
    x_BTD = torch.tensor([[[1.0, 0.0], [0.5, 2.0]]], dtype=torch.float64)
    k_BTKC, v_BTKC = heads.keys_values(x_BTD, None)
    seen_BTS = torch.tensor([[[True, False], [True, True]]])
    y_BTD = heads.attend(x_BTD, (None, torch.arange(2)[None]), k_BTKC, v_BTKC, seen_BTS)
    scores = torch.tensor([0.5, 4.25], dtype=torch.float64) * 3.0
    weights = (1.5 * (scores / 1.5).tanh()).softmax(-1)
    assert distance(y_BTD[0, 0], x_BTD[0, 0]) < 1e-12
    assert distance(y_BTD[0, 1], weights @ x_BTD[0]) < 1e-12


@torch.no_grad()
def test_caps_bite() -> None:
    model = filled(CAPPED, 3)
    logits = model(ids())
    assert float(logits.abs().max()) <= CAPPED["final_logit_softcapping"]
    assert distance(with_config(model, attention_softcap=None)(ids()), logits) > 1e-3
    uncapped = with_config(model, logit_softcap=None)(ids())
    assert distance(capped(uncapped, 5.0), logits) < 1e-5
    assert float(uncapped.abs().max()) > 5.0


# ---- the exported model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capped")
    write_three(folder, CAPPED)
    return build(folder, KINDS["Expert-KV"][1])


@torch.no_grad()
def test_eager_is_the_default_and_the_fused_attention_refuses(mixture: Path) -> None:
    model = load(mixture)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match='attention_softcap is not computed by "sdpa"'):
        load(mixture, attn_implementation="sdpa")
    with pytest.raises(ValueError, match='attention_softcap is not computed by "sdpa"'):
        model.set_attn_implementation("sdpa")


@pytest.mark.families
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention compiles its kernels")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@torch.no_grad()
def test_flex_attention_caps(mixture: Path) -> None:
    flexible = load(mixture, attn_implementation="flex_attention")
    assert distance(flexible(ids()).logits, load_model(mixture)(ids())) < 1e-5


def test_without_a_cap_of_scores_the_fused_attention_is_kept(tmp_path: Path) -> None:
    write_three(tmp_path, CONFIGS["gemma3_text"])
    assert load(build(tmp_path, "")).config._attn_implementation == "sdpa"


@torch.no_grad()
def test_cached_decoding_and_generation(mixture: Path) -> None:
    """Over more tokens than the window has."""
    model, tokens = exact(load(mixture)), ids(24)
    expected = load_model(mixture, torch.float64)(tokens)
    step = model(tokens[:, :13], use_cache=True)
    logits = [step.logits]
    for t in range(13, 24):
        step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    assert distance(torch.cat(logits, 1), expected) < 1e-12
    text = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(text, load_model(mixture, torch.float64).generate(tokens, 12))


def test_training_reaches_everything(mixture: Path) -> None:
    model = load(mixture)
    model.train()
    model(ids(), labels=ids()).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    routers = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if "router" in name}
    assert min(routers.values()) > 1e-5


# ---- what is found and said ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "checks"), [
    ({"attention_softcap": None}, {"config": "attention_softcap", "source configs": "score softcap", "expert isolation": "layer 0, expert 0 (seed)"}),
    ({"attention_softcap": 2.5}, {"source configs": "score softcap is 2.0, the result has 2.5", "expert isolation": "layer 1, expert 2 (law)"}),
    ({"logit_softcap": 6.0}, {"config": "logit_softcap", "source configs": "logit softcap is 5.0, the result has 6.0", "head": "seed"}),
])  # fmt: skip
def test_a_wrong_cap_is_found(wrong: dict[str, Any], checks: dict[str, str], tmp_path: Path) -> None:
    write_sources(tmp_path, CAPPED)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    Forger(folder).config(**wrong)
    found = failed(verify(folder, plan))
    for check, words in checks.items():
        assert words in found[check], found


@pytest.mark.parametrize(("fact", "wrong", "check"), [
    ("attention_softcap", None, "source configs"), ("logit_softcap", None, "source configs"), ("attention_scale", None, "expert isolation"),
    ("post_norms", False, "source configs"),
])  # fmt: skip
def test_a_fact_that_the_plan_misread_is_found(fact: str, wrong: Any, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path, CAPPED)
    right = dense.describe
    monkeypatch.setattr(dense, "describe", lambda *args: {**right(*args), fact: wrong})
    plan = plan_file(write_recipe(tmp_path))
    found = failed(verify(publish(plan, None, UNPROVED), plan))
    assert check in found or (fact == "post_norms" and "present" in found["model"])


@pytest.mark.parametrize(("keys", "message"), [
    ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be above 0, and less than 1e30, or null for no cap, found 0.0."),
    ({"final_logit_softcapping": -30}, "final_logit_softcapping must be above 0, and less than 1e30, or null for no cap, found -30."),
    ({"final_logit_softcapping": "30"}, "final_logit_softcapping must be a number, found '30'."),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be above 0, and less than 1e30, found 0."),
    ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar is null, which is no value of it"),
    ({"hidden_act": "relu", "hidden_activation": "gelu"}, "hidden_act = 'relu' and hidden_activation = 'gelu' are two spellings of the activation"),
    ({"hidden_act": "relu"}, "hidden_act = 'relu' is another spelling of the activation, which transformers takes from hidden_activation for gemma2; that is left out, and means 'gelu_pytorch_tanh'."),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not known here, only false"),
    ({"sliding_window": None}, "sliding_window is no number, and layers of gemma2 slide unless layer_types says otherwise."),
    ({"sliding_window_pattern": 6}, "sliding_window_pattern = 6, which transformers ignores for gemma2: its pattern is 2."),
    ({"sliding_window_size": 4}, "sliding_window_size = 4 and sliding_window = 8 are two spellings of the sliding window, and differ"),
])  # fmt: skip
def test_what_is_wrong_is_said(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CAPPED)
    path = tmp_path / "law" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert any(problem.startswith("sources.law: config.json: ") and message in problem for problem in error.value.problems), error.value


@pytest.mark.parametrize(("keys", "named"), [
    ({"attn_logit_softcapping": 3.0}, "attn_logit_softcapping = 3.0, sources.seed has 2.0"), ({"final_logit_softcapping": None}, "final_logit_softcapping = null, sources.seed has 5.0"),
    ({"query_pre_attn_scalar": 24}, "query_pre_attn_scalar = 24, sources.seed has 20"), ({"hidden_activation": "gelu"}, "hidden_act"),
])  # fmt: skip
def test_sources_that_differ_are_refused(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CAPPED)
    path = tmp_path / "law" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    found = [problem for problem in error.value.problems if problem.startswith("sources.law")]
    assert any(named in problem for problem in found), found
    assert len(found) == 1, found


def test_inspect_shows_caps(tmp_path: Path, run: Callable[..., Result]) -> None:
    write_sources(tmp_path, CAPPED, ("seed",))
    text = " ".join(run("inspect", tmp_path / "seed").out.split())
    for words in ("scores capped at 2", "logits capped at 5", "scores x 0.2236", "norms of 1 + w", "window 8"):
        assert words in text, text
    facts = json.loads(run("inspect", tmp_path / "seed", "--json").out)["facts"]
    assert (facts["attention_softcap"], facts["logit_softcap"], facts["hidden_act"]) == (2.0, 5.0, "gelu_pytorch_tanh")
