"""The reference model: against transformers' own classes, against loops written by hand, and against the paper's identities."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, stand_in, write_recipe
from torch.nn.functional import silu

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.demo.synthetic import random_values, stored_apart, write_checkpoint
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model
from bam_merge.model.model import BlockOutput, Model, route
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.positions import Cache

TOLERANCE = 1e-5
SOURCES = ("seed", "code", "law")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 6.0, 9.0]}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def variant(name: str, rope: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {**CONFIGS[name], **({"rope_parameters": {"rope_theta": 1e4, **rope}} if rope else {}), **keys}


VARIANTS: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "linear": variant("llama", {"rope_type": "linear", "factor": 4.0}),
    "dynamic, within its limit": variant("llama", DYNAMIC),
    "dynamic, beyond its limit": variant("llama", DYNAMIC, max_position_embeddings=16),
    "yarn": variant("qwen3", YARN),
    "yarn with every key": variant("llama", {
        **YARN, "rope_theta": 100.0, "original_max_position_embeddings": 64, "beta_fast": 4, "beta_slow": 1, "truncate": False, "mscale": 0.8, "mscale_all_dim": 0.5,
    }),
    "yarn with a wide ramp": variant("llama", {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 64, "beta_fast": 4}),
    "yarn by default": variant("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False}, max_position_embeddings=16384),
    "yarn with a given factor": variant("llama", {**YARN, "attention_factor": 1.3}),
    "llama3": variant("llama", LLAMA3),
    "llama3, interleaved": variant("cohere", LLAMA3),
    "linear, partial": variant("gpt_neox", {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
    "longrope, short": variant("phi3", LONGROPE, original_max_position_embeddings=64),
    "longrope, just not long": variant("phi3", LONGROPE, original_max_position_embeddings=40),
    "longrope, long": variant("phi3", LONGROPE, original_max_position_embeddings=16),
    "old spelling": variant("llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}),
    "sliding phi3": variant("phi3", sliding_window=8),
    "sliding upper layer": variant("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "sliding by layer_types": variant("qwen3", use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "gelu_pytorch_tanh": variant("llama", hidden_act="gelu_pytorch_tanh"),
    "gelu_new": variant("gpt_neox", hidden_act="gelu_new"),
    "relu": variant("llama", hidden_act="relu"),
}  # fmt: skip
"""What transformers runs itself. hidden_size 32 and 4 heads: 8 channels, so 4 rotary pairs."""


def ids(length: int = 40, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(0))


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(stand_in(folder), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


def write_dense(folder: Path, config: dict[str, Any], seed: int = 3) -> Path:
    """Weights large enough for logits that differ (cohere scales them down)."""
    return write_checkpoint(
        folder, {**config, **({"logit_scale": 0.5} if "cohere" in config["model_type"] else {})}, random_values(seed, 0.2)
    )


def write_three(folder: Path, config: dict[str, Any]) -> None:
    """Three sources that have nothing in common but their shapes."""
    for seed, name in enumerate(SOURCES):
        write_dense(folder / name, config, seed)


def build(folder: Path, text: str, method: str = "bam", names: tuple[str, ...] = SOURCES, layout: str = "bam") -> Path:
    """Merge the sources in `folder`, with routers that choose."""
    sections = f"{text}\nrouter: {{init: normal, std: 0.5}}"
    return merge(
        load_recipe(write_recipe(folder, sections, method, names, f"{{path: {layout}, layout: {layout}}}")),
        options=MergeOptions(verify=False),
    )


@torch.no_grad()
def stepwise(model: Model, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prompt in one pass and of the rest one by one."""
    cache = Cache()
    pieces = [model(tokens[:, :prompt], cache)]
    return torch.cat(pieces + [model(tokens[:, t : t + 1], cache) for t in range(prompt, tokens.shape[1])], 1)


def with_config(model: Model, **changes: Any) -> Model:
    """The same weights under another configuration."""
    changed = Model(replace(model.config, **changes))
    changed.load_state_dict(model.state_dict())
    return changed


# ---- dense models, against transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_models_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    """In one pass, and by cached decoding, where the two differ for dynamic scaling that outgrows its limit."""
    folder, tokens, prompt = write_dense(tmp_path, VARIANTS[name]), ids(), 30
    other, model = theirs(folder), load_model(folder)
    with torch.no_grad():
        step = other(input_ids=tokens[:, :prompt], use_cache=True)
        steps = [step.logits]
        for t in range(prompt, tokens.shape[1]):
            step = other(input_ids=tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            steps.append(step.logits)
        expected, got = other(input_ids=tokens).logits, model(tokens)
    assert float(expected.std()) > 0.1
    assert distance(got, expected) < TOLERANCE
    assert distance(stepwise(model, tokens, prompt), torch.cat(steps, 1)) < TOLERANCE
    assert (distance(torch.cat(steps, 1), expected) < TOLERANCE) == (name != "dynamic, beyond its limit")


OLDER: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, n_embed": ("falcon", {"hidden_size": None, "n_embed": 32}), "exaone, num_hidden_layers": ("exaone", {"num_layers": None, "num_hidden_layers": 2}),
    "granitemoehybrid, layers_block_type": ("granitemoehybrid", {"layer_types": None, "layers_block_type": ["attention"] * 2}),
    "exaone4, LG": ("exaone4", {"sliding_window_pattern": "LG", "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip
"""Keys that a dense merge takes over as its seed spells them."""


@pytest.mark.parametrize("name", [*CONFIGS, *OLDER])
@torch.no_grad()
def test_a_dense_merge_is_a_model_of_transformers(name: str, tmp_path: Path) -> None:
    """Its config.json and names are the family's own: its class loads them whole, and computes what the reference model does."""
    family, keys = OLDER.get(name, (name, {}))
    write_three(tmp_path, {key: value for key, value in {**CONFIGS[family], **keys}.items() if value is not None or key not in keys})
    recipe = write_recipe(tmp_path, "shared: {make: linear, weights: {seed: 0.8, code: 0.1, law: 0.1}}", "merge")
    folder = merge(load_recipe(recipe), options=MergeOptions(verify=False))
    expected = theirs(folder)(input_ids=ids()).logits
    assert float(expected.std()) > 0.05
    assert distance(load_model(folder)(ids()), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "sliding phi3", "sliding upper layer", "sliding by layer_types"])
def test_the_window_bites(name: str, tmp_path: Path) -> None:
    folder = write_dense(tmp_path, VARIANTS[name])
    model, tokens = load_model(folder), ids()
    unbounded = with_config(model, sliding_window=None)
    window = model.config.sliding_window
    with torch.no_grad():
        far, near = model(tokens), unbounded(tokens)
    assert window is not None
    assert distance(far[:, :window], near[:, :window]) == 0
    assert distance(far[:, window:], near[:, window:]) > 0.01


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    folder, tokens = write_dense(tmp_path, CONFIGS["qwen3"]), ids(9)
    expected = theirs(folder).generate(input_ids=tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(load_model(folder).generate(tokens, 12), expected)


@torch.no_grad()
def test_other_dtypes_run(tmp_path: Path) -> None:
    folder, tokens = write_dense(tmp_path, CONFIGS["cohere_qk_norm"]), ids()
    exact = load_model(folder, torch.float64)(tokens)
    assert exact.dtype == torch.float64
    assert distance(load_model(folder)(tokens), exact) < TOLERANCE
    half = load_model(folder, torch.bfloat16)(tokens)
    assert half.dtype == torch.bfloat16
    assert distance(half, exact) < 0.1


# ---- public mixtures, against transformers ---------------------------------------------------------------------------------

MIXTURES = {
    "llama in mixtral": ("llama", "mixtral", "{top_k: 2}"),
    "llama tied in mixtral, top 1": ("llama_tied", "mixtral", "{top_k: 1}"),
    "mistral in mixtral": ("mistral", "mixtral", "{top_k: 2}"),
    "phi3 in mixtral": ("phi3", "mixtral", "{top_k: 3}"),
    "qwen2 in qwen2_moe": ("qwen2", "qwen2_moe", "{top_k: 2}"),
    "qwen2 in qwen2_moe, BAM's gates": ("qwen2", "qwen2_moe", "{top_k: 1, gate: softmax_then_topk}"),
    "llama in qwen2_moe": ("llama", "qwen2_moe", "{top_k: 2}"),
    "sliding in qwen2_moe": ("sliding upper layer", "qwen2_moe", "{top_k: 2}"),
    "qwen3 in qwen3_moe": ("qwen3", "qwen3_moe", "{top_k: 2}"),
    "qwen3 in qwen3_moe, BAM's gates": ("qwen3", "qwen3_moe", "{top_k: 2, gate: softmax_then_topk}"),
    "qwen3 biased in qwen3_moe": ("qwen3_biased", "qwen3_moe", "{top_k: 2}"),
    "yarn in mixtral": ("yarn with a given factor", "mixtral", "{top_k: 2}"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_public_mixtures_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    family, layout, ffn = MIXTURES[name]
    write_three(tmp_path, VARIANTS[family])
    folder = build(tmp_path, f"ffn: {ffn}", "btx", layout=layout)
    other, model, tokens = theirs(folder), load_model(folder), ids()
    assert other.config.model_type == layout
    with torch.no_grad():
        expected = other(input_ids=tokens).logits
    assert float(expected.std()) > 0.1
    assert distance(model(tokens), expected) < TOLERANCE
    assert distance(stepwise(model, tokens, 24), expected) < TOLERANCE


@torch.no_grad()
def test_a_shared_expert_that_is_not_zero(tmp_path: Path) -> None:
    """Of real Qwen2-MoE checkpoints, whose dense width also differs from the experts'."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, vocab_size=64, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    expected = theirs(tmp_path)(input_ids=ids()).logits
    model = load_model(tmp_path)
    assert model.config.shared_expert_intermediate_size == 20
    assert float(expected.std()) > 0.1
    assert distance(model(ids()), expected) < TOLERANCE


# ---- the method: what a merge preserves (the paper's step 0) ---------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "expert kv": {},
    "shared kv": {"attention_kv": "shared"},
    "shared kv in layer 0": {"shared_kv_layers": [0]},
    "top 2": {"attention_routing": "top_k", "num_attention_experts_per_tok": 2},
    "top 1, shared kv": {"attention_kv": "shared", "attention_routing": "top_k", "num_attention_experts_per_tok": 1},
    "one attention": {"num_attention_experts": 0},
}
"""Ways to mix attention."""


def filled(config: dict[str, Any], seed: int) -> Model:
    """A dense model; models of different seeds have nothing in common but their shapes."""
    model = Model(model_config({**config, "logit_scale": 0.5}))
    values = stored_apart(random_values(seed, 0.2), model.config.norm_offset)
    model.load_state_dict({name: torch.from_numpy(values(name, tuple(old.shape))) for name, old in model.state_dict().items()})
    return model


def mixed(dense: list[Model], shared: int = 0, **changes: Any) -> Model:
    """The mixture of three dense models, put together by hand: expert j from model j, what is shared from model `shared`."""
    settings = {
        "num_experts": 3,
        "num_attention_experts": 3,
        "attention_kv": "expert",
        "attention_routing": "soft",
        "attention_linear": "expert",
        **changes,
    }
    model, state, draw = Model(replace(dense[0].config, **settings)), {}, torch.Generator().manual_seed(5)
    for name, old in model.state_dict().items():
        expert = re.search(r"experts\.(\d)\.", name)
        source = dense[int(expert[1])] if expert else dense[shared]
        router = "router" in name
        state[name] = 0.5 * torch.randn(old.shape, generator=draw) if router else source.state_dict()[re.sub(r"experts\.\d\.", "", name)]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_equal_experts_are_the_dense_model(family: str, kind: str) -> None:
    """Attention gates sum to one; so do the renormalised gates of the FFN."""
    dense = filled(CONFIGS[family], 3)
    mixture, record = mixed([dense] * 3, num_experts_per_tok=2, norm_topk_prob=True, **KINDS[kind]), list[BlockOutput]()
    assert distance(mixture(ids(), record=record), dense(ids())) < TOLERANCE
    for output in record:
        for gates_BTN in output[1 if mixture.config.num_attention_experts else 2 :]:
            assert distance(gates_BTN.sum(-1), torch.ones(2, 40)) < 1e-6
            assert float(gates_BTN.std()) > 0.1  # a router that chooses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_forced_expert_is_its_dense_model(family: str, kind: str) -> None:
    """With every shared tensor from model j, expert j alone is model j, whatever gate_scale."""
    dense = [filled(CONFIGS[family], seed) for seed in range(3)]
    for j in range(3):
        record: list[BlockOutput] = []
        got = mixed(dense, j, gate_scale=2.0, **KINDS[kind])(ids(), force_expert=j, record=record)
        assert distance(got, dense[j](ids())) < TOLERANCE
        assert distance(got, dense[j - 1](ids())) > 0.1
        one_hot_BTN = torch.eye(3)[j].expand(2, 40, 3)
        assert all(torch.equal(gates, one_hot_BTN) for output in record for gates in output[1:] if gates is not None)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("family", ["llama_biased", "cohere", "gpt_neox"])
@torch.no_grad()
def test_gates_of_bam_scale_the_ffn(family: str, scale: float) -> None:
    """N equal experts, not renormalised, k = 1: p_max * FFN(x), times gate_scale; and the attention stays the dense one."""
    dense = filled(CONFIGS[family], 3)
    block, plain = mixed([dense] * 3, gate_scale=scale).model.layers[0], dense.model.layers[0]
    x_BTD, positions_BT = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1)), torch.arange(12).expand(2, -1)
    y_BTD, gates_BTN = block.mlp(x_BTD, None)
    p_max_BT = torch.softmax(x_BTD @ block.mlp.router.weight.T, -1).amax(-1)
    assert torch.equal((gates_BTN > 0).sum(-1), torch.ones(2, 12))
    assert distance(gates_BTN.amax(-1), p_max_BT) < 1e-6
    assert distance(y_BTD, scale * p_max_BT[..., None] * plain.mlp(x_BTD)) < TOLERANCE
    assert distance(*(layer.self_attn(x_BTD, positions_BT, Cache(), None)[0] for layer in (block, plain))) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_pass_or_many_padded_or_not(kind: str) -> None:
    """Cached decoding equals one pass, and a sequence does not know what it is batched with."""
    model, tokens = mixed([filled(VARIANTS["sliding upper layer"], seed) for seed in range(3)], **KINDS[kind]), ids(30)
    assert distance(stepwise(model, tokens, 10), model(tokens)) < TOLERANCE

    model = with_config(model, rope_parameters=DYNAMIC, max_position_embeddings=16)  # frequencies that depend on the length
    whole, short = model(tokens), tokens[1:, :18]
    padded = torch.cat((tokens[:1], torch.cat((torch.zeros(1, 12, dtype=torch.long), short), 1)))
    mask_BT = (torch.arange(30) >= torch.tensor([[0], [12]])).long()
    logits = model(padded, attention_mask_BT=mask_BT)
    assert logits.isfinite().all()
    assert distance(logits[:1], whole[:1]) < TOLERANCE
    assert distance(logits[1:, 12:], model(short)) < TOLERANCE
    assert torch.equal(model.generate(padded, 9, attention_mask_BT=mask_BT)[1:, 12:], model.generate(short, 9))


@torch.no_grad()
def test_top_k_of_all_attention_experts_is_soft_routing() -> None:
    soft = mixed([filled(CONFIGS["llama"], seed) for seed in range(3)])
    assert distance(with_config(soft, attention_routing="top_k", num_attention_experts_per_tok=3)(ids()), soft(ids())) < TOLERANCE


# ---- against loops written by hand -----------------------------------------------------------------------------------------


def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary embedding of one head in complex numbers: channel i with i + C/2, theta 10000."""
    half = len(vector) // 2
    z = torch.complex(vector[:half], vector[half:]) * torch.polar(
        torch.ones(half).double(), position * 10000.0 ** (-torch.arange(half).double() / half)
    )
    return torch.cat((z.real, z.imag))


@pytest.mark.parametrize(
    ("changes", "chosen"), [({}, 3), ({"attention_kv": "shared"}, 3), (KINDS["top 2"], 2), (KINDS["top 1, shared kv"], 1)]
)
@torch.no_grad()
def test_attention_is_the_papers_loop(changes: dict[str, Any], chosen: int) -> None:
    """y = sum_j g_j(x) MHA_j(x), one number after another: 4 query heads, 2 key heads, 8 channels; g sums to one over the chosen."""
    attention = mixed([filled(CONFIGS["llama"], seed) for seed in range(3)], **changes).double().model.layers[0].self_attn
    x_TD = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    W, expected = attention.state_dict(), torch.zeros(7, 32, dtype=torch.float64)
    for t in range(7):
        p = torch.softmax(W["router.weight"] @ x_TD[t], 0)
        for j in p.topk(chosen).indices.tolist():
            own = f"experts.{j}."
            k_of, v_of = (W[("" if attention.shares_kv else own) + f"{part}_proj.weight"] for part in "kv")
            heads = []
            for h in range(4):
                query, key = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
                q = turned((W[own + "q_proj.weight"] @ x_TD[t])[query], t)
                scores = torch.stack([q @ turned((k_of @ x_TD[s])[key], s) / 8**0.5 for s in range(t + 1)])
                heads.append(sum(w * (v_of @ x_TD[s])[key] for s, w in enumerate(torch.softmax(scores, 0))))
            expected[t] += p[j] / p.topk(chosen).values.sum() * (W[own + "o_proj.weight"] @ torch.cat(heads))
    got, _ = attention(x_TD[None], torch.arange(7)[None], Cache(), None)
    assert distance(got[0], expected) < 1e-12


@pytest.mark.parametrize("renormalised", [False, True])
@torch.no_grad()
def test_ffn_is_the_papers_loop(renormalised: bool) -> None:
    """y = sum over the 2 likeliest experts of p_i FFN_i(x), or of p_i over their sum (BTX)."""
    dense = [filled(CONFIGS["llama"], seed) for seed in range(3)]
    mlp = mixed(dense, num_experts_per_tok=2, norm_topk_prob=renormalised).double().model.layers[0].mlp
    x_TD, W = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), mlp.state_dict()
    expected = torch.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        p = torch.softmax(W["router.weight"] @ x, 0)
        for i in p.topk(2).indices.tolist():
            gate, up, down = (W[f"experts.{i}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            expected[t] += p[i] / (p.topk(2).values.sum() if renormalised else 1) * (down @ (silu(gate @ x) * (up @ x)))
    assert distance(mlp(x_TD[None], None)[0][0], expected) < 1e-12


def test_gates_by_hand() -> None:
    """p = (1/2, 1/3, 1/6)."""
    router = torch.nn.Linear(1, 3, bias=False)
    router.weight = torch.nn.Parameter(torch.tensor([[3.0], [2.0], [1.0]]).log())
    x_BTD = torch.ones(1, 1, 1)

    def gates(k: int, how: str, force: int | None = None) -> list[float]:
        return route(router, x_BTD, k, how, force).flatten().tolist()

    assert gates(1, "softmax_then_topk") == pytest.approx([1 / 2, 0, 0])
    assert gates(2, "softmax_then_topk") == pytest.approx([1 / 2, 1 / 3, 0])
    assert gates(3, "softmax_then_topk") == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    for how in ("topk_then_softmax", "renormalised"):
        assert gates(1, how) == pytest.approx([1, 0, 0])
        assert gates(2, how) == pytest.approx([3 / 5, 2 / 5, 0])
        assert gates(3, how) == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert gates(1, "softmax_then_topk", force=2) == [0, 0, 1]
    s = 3 / 4, 2 / 3, 1 / 2  # sigmoid(log x) = x / (1 + x)
    assert gates(2, "sigmoid") == pytest.approx([*s[:2], 0])
    assert gates(1, "topk_then_sigmoid") == pytest.approx([1, 0, 0])
    assert gates(2, "topk_then_sigmoid") == pytest.approx([9 / 17, 8 / 17, 0])
    assert gates(3, "topk_then_sigmoid") == pytest.approx([of / sum(s) for of in s])
    low = torch.tensor([0.0, 0.0, 0.2])  # the last is chosen before the second, and has its own gate
    for how, expected in (
        ("topk_then_sigmoid", [3 / 5, 0, 2 / 5]),
        ("sigmoid", [3 / 4, 0, 1 / 2]),
        ("topk_then_softmax", [3 / 4, 0, 1 / 4]),
    ):
        assert route(router, x_BTD, 2, how, None, low).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("how", "learns"), [
    ("softmax_then_topk", True), ("topk_then_softmax", False), ("renormalised", True), ("topk_then_sigmoid", False), ("sigmoid", True),
])  # fmt: skip
def test_whether_a_top_1_router_has_a_gradient(how: str, learns: bool) -> None:
    router = torch.nn.Linear(4, 3, bias=False)
    route(router, torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)), 1, how, None).sum().backward()
    assert bool(router.weight.grad.any()) == learns


# ---- sizes, and text ---------------------------------------------------------------------------------------------------------

PAPER = {
    "vocab_size": 256_000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 128, "norm_type": "layer_norm",
    "num_attention_heads_per_expert": 8, "num_key_value_heads_per_expert": 8, "parallel_block": True, "parallel_norms": 1,
}  # fmt: skip
"""The 590M architecture (Table 8)."""


@pytest.mark.parametrize(("mixture", "total"), [
    ({}, 587_209_728),
    ({"num_experts": 4}, 700_480_512),
    ({"num_experts": 4, "num_attention_experts": 4, "attention_kv": "expert"}, 776_002_560),
    ({"num_experts": 4, "num_attention_experts": 4, "attention_kv": "shared"}, 738_253_824),
])  # fmt: skip
def test_parameter_totals_of_the_paper(mixture: dict[str, Any], total: int) -> None:
    """Table 9."""
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict({**PAPER, **mixture}))
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_sampling_is_seeded() -> None:
    model, before = mixed([filled(CONFIGS["llama"], seed) for seed in range(3)]), torch.get_rng_state()
    first, again, other = (model.generate(ids(5), 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :5], ids(5))
    assert first.shape == (2, 25)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.generate(ids(5), 20, temperature=1e-6), model.generate(ids(5), 20))
