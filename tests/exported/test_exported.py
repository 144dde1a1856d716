"""The model code that travels with a bam checkpoint: it computes what the reference model does, and saves what it loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from safetensors.torch import load_file
from test_model import VARIANTS, build, distance, ids, write_three

from bam_merge import MergeOptions, load_model, load_recipe, merge, verify
from bam_merge.publishing.companions import model_code

transformers = pytest.importorskip("transformers")

MIXED = "rules: [{roles: [attn.k, attn.v, attn.k_norm], layers: 0, make: mean}]"
KINDS = {
    "Expert-KV": ("bam", ""),
    "Expert-KV, top-2": ("bam", "attention: {routing: top_k, top_k: 2}\nffn: {top_k: 2, gate_scale: 1.5}"),
    "Shared-KV": ("bam", "attention: {kv: shared}"),
    "Shared-KV, top-2": ("bam", "attention: {kv: shared, routing: top_k, top_k: 2}\nffn: {top_k: 3, gate: topk_then_softmax}"),
    "keys shared in one layer": ("bam", MIXED),
    "BTX": ("btx", ""),
    "sigmoids": ("bam", "ffn: {gate: topk_then_sigmoid, gate_scale: 1.5}"),
}
"""Every kind of mixture: method and sections of the recipe."""


def load(folder: Path, kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """The model by the code in its folder, in eval mode: no key missing, unexpected or of another shape."""
    model, info = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def exact(model: Any) -> Any:
    """The same in float64, which the default implementation of experts does not know."""
    model.set_experts_implementation("eager")
    return model.double()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as bytes."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {f"{name} {t.dtype} {list(t.shape)}": t.contiguous().flatten().view(torch.uint8) for name, t in tensors.items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = stored(a), stored(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@torch.no_grad()
def assert_equals_reference(folder: Path, tokens: torch.Tensor) -> None:
    model = load(folder)
    expected = load_model(folder)(tokens)
    assert float(expected.std()) > 0.1  # a function worth comparing
    assert distance(model(tokens).logits, expected) < 1e-5
    assert distance(exact(model)(tokens).logits, load_model(folder, torch.float64)(tokens)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_and_kind_computes_what_the_reference_model_does(name: str, kind: str, tmp_path: Path) -> None:
    method, text = KINDS[kind]
    write_three(tmp_path, CONFIGS[name])
    assert_equals_reference(build(tmp_path, text, method), ids())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama_biased", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3"])
def test_the_other_kind_of_block_computes_what_the_reference_model_does(name: str, kind: str, tmp_path: Path) -> None:
    """Sequential families in parallel, and the other way round; cohere, with its one norm, can only be parallel."""
    method, text = KINDS[kind]
    write_three(tmp_path, CONFIGS[name])
    folder = build(tmp_path, text, method)
    before, path = load_model(folder)(ids()), folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "parallel_block": not config["parallel_block"], "parallel_norms": 2}))
    assert_equals_reference(folder, ids())
    assert distance(load_model(folder)(ids()), before) > 0.01


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in CONFIGS])
def test_every_variant_computes_what_the_reference_model_does(name: str, tmp_path: Path) -> None:
    write_three(tmp_path, VARIANTS[name])
    assert_equals_reference(build(tmp_path, MIXED), ids())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere_qk_norm", "qwen3_biased", "olmo2", "phi_qk_norm", "falcon_grouped"])
def test_saving_gives_the_same_tensors_back(name: str, kind: str, tmp_path: Path) -> None:
    """Byte for byte, one per expert; and the saved folder is a bam checkpoint, for the reference model and with its code."""
    method, text = KINDS[kind]
    write_three(tmp_path, CONFIGS[name])
    folder = build(tmp_path, text, method)
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "saved")(ids()), load_model(folder)(ids()))
        assert torch.equal(load(tmp_path / "saved")(ids()).logits, model(ids()).logits)


def test_bfloat16_is_loaded_and_saved_as_stored(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["qwen3"], dtype="BF16")
    folder = merge(load_recipe(write_recipe(tmp_path)), options=MergeOptions(verify=False))
    model = load(folder)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")


def test_a_model_made_from_its_configuration_saves_a_checkpoint(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["cohere_qk_norm"])
    made = load(merge(load_recipe(write_recipe(tmp_path, MIXED)), options=MergeOptions(verify=False)))
    fresh = type(made)(made.config).eval()
    fresh.save_pretrained(tmp_path / "fresh")
    with torch.no_grad():
        assert distance(load_model(tmp_path / "fresh")(ids()), fresh(ids()).logits) < 1e-5
    assert float(fresh.model.layers[0].self_attn.router.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_more_than_ten_experts_keep_their_order(tmp_path: Path) -> None:
    """Experts are sorted as numbers, not as text."""
    write_three(tmp_path, CONFIGS["llama"])
    experts = ["seed", "code", "law"] * 4
    folder = build(tmp_path, f"experts: [{', '.join(experts)}]\nffn: {{top_k: 2}}")
    assert_equals_reference(folder, ids())


def test_base_model_loads_by_automodel(tmp_path: Path) -> None:
    write_three(tmp_path, CONFIGS["llama_tied"])
    folder = build(tmp_path, "")
    with torch.no_grad():
        hidden = load(folder, "AutoModel")(ids()).last_hidden_state
        assert torch.equal(hidden, load(folder).model(ids()).last_hidden_state)


# ---- the folder that is written ------------------------------------------------------------------------------------------------


def test_code_is_written_as_it_is_and_only_for_layout_bam(llamas: Path) -> None:
    folder = merge(load_recipe(write_recipe(llamas)), options=MergeOptions(verify=False))
    config = json.loads((folder / "config.json").read_text())
    code = model_code(config)
    assert set(code) == {"configuration_bam.py", "modeling_bam.py"}
    assert all((folder / name).read_bytes() == data for name, data in code.items())
    public = merge(
        load_recipe(write_recipe(llamas, method="btx", output="{path: public, layout: mixtral}")), options=MergeOptions(verify=False)
    )
    assert not list(public.glob("*.py"))


@pytest.mark.parametrize("change", ["altered", "added", "removed"])
def test_verify_names_code_that_is_not_as_written(change: str, llamas: Path) -> None:
    folder = merge(load_recipe(write_recipe(llamas)), options=MergeOptions(verify=False))
    assert verify(folder).ok
    path = folder / ("extra_module.py" if change == "added" else "modeling_bam.py")
    if change == "removed":
        path.unlink()
    else:
        path.write_text("raise SystemExit")
    failures = {check.name: check.detail for check in verify(folder).failures}
    assert set(failures) == ({"files"} if change == "added" else {"files", "code"})
    assert path.name in failures["files"]


def test_reference_model_runs_no_code_of_the_folder(llamas: Path) -> None:
    folder = merge(load_recipe(write_recipe(llamas)), options=MergeOptions(verify=False))
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('run')")
    assert load_model(folder)(ids()).shape == (2, 40, 64)


def test_card_says_how_to_load_and_train(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    done: Result = run("merge", write_recipe(tmp_path), "--no-verify")
    assert done.status == 0, done.err
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("trust_remote_code=True", "bam_merge.load_model", "transformers 5.", "router_aux_loss_coef", "seed", "code", "law"):
        assert part in card


# ---- the configuration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "problem"), [
    ({"norm_type": "rmsnorm"}, "norm_type"),
    ({"num_experts_per_tok": 9}, "9 experts per token of 3"),
    ({"num_attention_heads": 7}, "num_attention_heads = 7"),
    ({"head_dim": "8"}, "head_dim"),
])  # fmt: skip
def test_configuration_refuses_what_cannot_be(changes: dict[str, Any], problem: str, llamas: Path) -> None:
    folder = merge(load_recipe(write_recipe(llamas)), options=MergeOptions(verify=False))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(Exception, match=problem):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_totals_that_caches_read_stand_beside_the_sizes_of_one_expert(llamas: Path) -> None:
    config = load(merge(load_recipe(write_recipe(llamas)), options=MergeOptions(verify=False))).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (12, 6)
    assert (config.num_attention_heads_per_expert, config.num_key_value_heads_per_expert, config.head_dim) == (4, 2, 8)
