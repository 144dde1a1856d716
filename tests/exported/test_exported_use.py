"""The exported model as it is used: caches, generate, padding, attention and expert implementations, compile, offload, training."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from test_exported import KINDS, MIXED, assert_same_tensors, exact, load
from test_model import VARIANTS, build, distance, ids, write_three

from bam_merge import load_model

transformers = pytest.importorskip("transformers")

CASES = {
    "Expert-KV": ("llama", "ffn: {top_k: 2}"),
    "Shared-KV, tied": ("llama_tied", "attention: {kv: shared}"),
    "sliding window, mixed layers": ("mistral", MIXED),
    "hybrid": ("qwen3_5_text", ""),
    "hybrid, linear attention shared, top-2": ("qwen3_5_text_biased", "attention: {routing: top_k, top_k: 2, linear: mean}"),
    "parallel, biases, top-2": ("gpt_neox", KINDS["Expert-KV, top-2"][1]),
}
"""A few unlike models: (family, sections of the recipe)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, merged once."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            path, (family, text) = tmp_path_factory.mktemp("case"), CASES[case]
            write_three(path, VARIANTS[family])
            made[case] = build(path, text)
        return made[case]

    return folder


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> Path:
    return folders(request.param)


CHUNKS = ((0, 13), (13, 14), (14, 30), (30, 40))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_text_in_chunks_computes_what_it_does_whole(cache: str, folder: Path) -> None:
    model, tokens = load(folder), ids()
    past = (
        transformers.DynamicCache(config=model.config) if cache == "dynamic" else transformers.StaticCache(model.config, max_cache_len=48)
    )
    parts = [model(tokens[:, start:stop], past_key_values=past, use_cache=True).logits for start, stop in CHUNKS]
    assert distance(torch.cat(parts, 1), model(tokens).logits) < 1e-5


@pytest.mark.parametrize("case", ["Expert-KV", "Shared-KV, tied"])
def test_cache_holds_n_times_what_a_dense_models_does_or_as_much(case: str, folders: Callable[[str], Path]) -> None:
    past = load(folders(case))(ids(), use_cache=True).past_key_values
    assert [layer.keys.shape for layer in past.layers] == [(2, 6 if case == "Expert-KV" else 2, 40, 8)] * 2


def test_greedy_continuations_are_the_reference_models(folder: Path) -> None:
    model, tokens = load(folder), ids(20)
    expected = load_model(folder).generate(tokens, 12)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **settings), expected)
    assert torch.equal(model.generate(tokens, use_cache=False, **settings), expected)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=7, **settings), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", disable_compile=True, **settings), expected)


def test_sampling_and_beams_generate(folder: Path) -> None:
    model, tokens = load(folder), ids(20)
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6}
    torch.manual_seed(0)
    sampled = model.generate(tokens, do_sample=True, **settings)
    torch.manual_seed(0)
    assert torch.equal(model.generate(tokens, do_sample=True, **settings), sampled)
    greedy, beams = (model.generate(tokens, do_sample=False, num_beams=n, **settings) for n in (1, 4))

    def likelihood(text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scores = model(text).logits[:, 19:-1].log_softmax(-1)
        return scores.gather(-1, text[:, 20:, None]).sum((1, 2))

    assert bool((likelihood(beams) >= likelihood(greedy) - 1e-4).all())


def test_left_padding_changes_nothing(folder: Path) -> None:
    model, tokens = load(folder), ids(20)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    padded = model.generate(tokens * mask, attention_mask=mask, **settings)
    assert torch.equal(padded[:1, 6:], model.generate(tokens[:1, 6:], **settings))
    assert torch.equal(padded, load_model(folder).generate(tokens * mask, 8, attention_mask_BT=mask))


@torch.no_grad()
def assert_attention_agrees(implementation: str, folder: Path) -> None:
    model, tokens, mask = load(folder), ids(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    other = load(folder, attn_implementation=implementation)
    seen = mask.bool()
    assert distance(other(tokens, attention_mask=mask).logits[seen], model(tokens, attention_mask=mask).logits[seen]) < 1e-5


def test_eager_attention_agrees_with_sdpa(folder: Path) -> None:
    assert_attention_agrees("eager", folder)


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention compiles its kernels")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_flex_attention_agrees_with_sdpa(folders: Callable[[str], Path]) -> None:
    assert_attention_agrees("flex_attention", folders("sliding window, mixed layers"))


@torch.no_grad()
def test_expert_implementations_agree(folder: Path) -> None:
    model, tokens = load(folder), ids()
    expected = exact(load(folder))(tokens).logits
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert distance(model(tokens).logits.double(), expected) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_near_as_the_reference_models(tmp_path: Path) -> None:
    """With every expert chosen no rounding can choose another."""
    write_three(tmp_path, VARIANTS["llama"])
    folder = build(tmp_path, "ffn: {top_k: 3}")
    expected = load_model(folder)(ids())
    ours, reference = (
        distance(model(ids()).float(), expected)
        for model in (lambda x: load(folder, dtype=torch.bfloat16)(x).logits, load_model(folder, torch.bfloat16))
    )
    assert ours < 1.5 * reference < 0.3


def test_attentions_and_hidden_states_are_given(folder: Path) -> None:
    model = load(folder, attn_implementation="eager")
    outputs = model(ids(), output_attentions=True, output_hidden_states=True)
    heads, attending = model.config.num_attention_heads, 2 - model.config.layer_types.count("linear_attention")
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, heads, 40, 40)] * attending
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 40, 32)] * 3
    assert distance(outputs.attentions[0].sum(-1), torch.ones(2, heads, 40)) < 1e-5


def test_compiles_as_one_graph(folder: Path) -> None:
    tokens, model = ids(), load(folder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert distance(compiled(tokens).logits, model(tokens).logits) < 1e-5


def test_disk_offload_computes_and_saves_the_same(folders: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder, tokens = folders("parallel, biases, top-2"), ids()
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = load(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(folder)(tokens).logits)


# ---- training ------------------------------------------------------------------------------------------------------------------


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, folder: Path) -> None:
    """Neither kind loses what the auxiliary losses give the routers."""
    tokens, model = ids(), load(folder)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got, expected = gradients(model, tokens), gradients(load(folder), tokens)
    assert got.keys() == expected.keys()
    assert max(distance(got[name], expected[name]) for name in got) < 1e-6


def test_gradients_are_the_reference_models(folder: Path) -> None:
    """Of the NLL, in float64; also through top-k attention gates. Routers have one."""
    tokens, reference = ids(), load_model(folder, torch.float64)
    logits = reference(tokens)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    model = exact(load(folder)).train()
    torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    names = [
        name
        for name, _ in reference.named_parameters()
        if any(word in name for word in ("router", "norm", "embed")) and "experts" not in name
    ]
    got, expected = dict(model.named_parameters()), dict(reference.named_parameters())
    for name in names:
        assert expected[name].grad is not None
        assert float(expected[name].grad.norm()) > 0, name
        assert distance(got[name].grad, expected[name].grad) < 1e-10, name


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="the backward pass of earlier experts does not compile")
def test_compiled_training_step_has_the_same_gradients(folders: Callable[[str], Path]) -> None:
    tokens, model = ids(), load(folders("Expert-KV")).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens).loss.backward()
    expected = gradients(load(folders("Expert-KV")), tokens)
    assert max(distance(parameter.grad, expected[name]) for name, parameter in model.named_parameters()) < 1e-6


def test_saved_after_training_is_what_was_trained(folders: Callable[[str], Path], tmp_path: Path) -> None:
    model, tokens = load(folders("Expert-KV")), ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        gradients(model, tokens)
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        assert distance(load_model(tmp_path / "trained")(tokens), expected) < 1e-5
        assert distance(load_model(folders("Expert-KV"))(tokens), expected) > 0.01
    load(tmp_path / "trained").save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "trained", tmp_path / "again")
