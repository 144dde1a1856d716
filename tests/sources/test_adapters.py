"""Sources that are a base with LoRA adapters: what they give, what a plan says of them, what is refused. (PEFT itself: tests/ecosystem.)"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PEFT, PREFIX, scale_of, shapes_of, write_adapter
from conftest import CONFIGS, write_sources
from runs import Stop, folder_bytes, options, stop_after
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions
from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish

CODE = "seed: seed, code: {base: seed, adapter: a/code}"
Q = "model.layers.1.self_attn.q_proj"


def recipe(folder: Path, sources: str = CODE, text: str = "", method: str = "bam", output: str = "{path: out}") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"method: {method}\nsources: {{{sources}}}\n{text}\noutput: {output}\n")
    return path


def planned(folder: Path, sources: str = CODE, text: str = "", method: str = "bam", output: str = "{path: out}") -> Plan:
    return plan_file(recipe(folder, sources, text, method, output))


def expressions_of(plan: Plan) -> dict[str, str]:
    return {step.name: step.expression for step in plan.steps}


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """A folder with a llama called seed."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed",), "BF16")
    return tmp_path


def refusal(folder: Path, sources: str = CODE, **more: str) -> str:
    with pytest.raises(BamMergeError) as caught:
        planned(folder, sources, **more)
    return "\n".join(caught.value.problems)


# ---- what they give ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_an_expert_of_an_adapter(seed: Path, rslora: bool) -> None:
    """Every element is the base's and the update's in float64, rounded to float32 and from there to what the base is stored in."""
    write_adapter(seed / "a/code", seed / "seed", use_rslora=rslora)
    plan = planned(seed)
    made = expressions_of(plan)
    assert made["model.layers.1.self_attn.experts.1.q_proj.weight"] == f"seed:{Q}.weight + lora(code)"
    assert made["model.layers.1.self_attn.experts.1.k_proj.weight"] == "seed:model.layers.1.self_attn.k_proj.weight"
    assert made["model.norm.weight"] == "seed:model.norm.weight"  # the mean of what both have from the base
    step = next(step for step in plan.steps if step.expression.endswith(f"{Q}.weight + lora(code)"))
    assert [(read["source"], read["tensor"]) for read in step.reads] == [
        ("seed", f"{Q}.weight"), ("code", f"{PREFIX}{Q}.lora_A.weight"), ("code", f"{PREFIX}{Q}.lora_B.weight"),
    ]  # fmt: skip
    written = load_file(publish(plan, None, MergeOptions()) / "model.safetensors")  # verified before it appears
    base, adapter = load_file(seed / "seed/model.safetensors"), load_file(seed / "a/code/adapter_model.safetensors")
    a, b = (adapter[f"{PREFIX}{Q}.lora_{factor}.weight"].double() for factor in "AB")
    expected = (base[f"{Q}.weight"].double() + scale_of({**PEFT, "use_rslora": rslora}) * (b @ a)).float().bfloat16()
    assert torch.equal(written["model.layers.1.self_attn.experts.1.q_proj.weight"], expected)


def test_dora_divides_by_the_lengths_of_rows(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed", use_dora=True)
    written = load_file(publish(planned(seed), None, MergeOptions()) / "model.safetensors")
    base, adapter = load_file(seed / "seed/model.safetensors"), load_file(seed / "a/code/adapter_model.safetensors")
    a, b = (adapter[f"{PREFIX}{Q}.lora_{factor}.weight"].double() for factor in "AB")
    sum_RC = base[f"{Q}.weight"].double() + scale_of(PEFT) * (b @ a)
    m_R = adapter[f"{PREFIX}{Q}.lora_magnitude_vector"].double()
    expected = (sum_RC * (m_R / sum_RC.norm(dim=1))[:, None]).float().bfloat16()
    assert torch.equal(written["model.layers.1.self_attn.experts.1.q_proj.weight"], expected)


SOURCES = {
    "several experts on one base": "seed: seed, code: {base: seed, adapter: a/code}, law: {base: seed, adapter: a/law}",
    "a base that is no expert": "seed: seed, code: {base: seed, adapter: a/code}, law: {base: seed, adapter: a/law}",
    "a base that is no source": "code: {base: seed, adapter: a/code}, law: {base: ./seed, adapter: a/law}",
    "several adapters on a source": f"{CODE}, law: {{base: seed, adapter: [{{path: a/code, weight: 0.7}}, {{path: a/law, weight: -0.5}}]}}",
    "an adapter on an adapted source": f"{CODE}, law: {{base: code, adapter: a/law}}",
    "the second first": "law: {base: code, adapter: a/law}, code: {base: seed, adapter: a/code}, seed: seed",
}
FAMILIES = {
    "llama": (("q_proj", "down_proj"), {}), "llama_biased": (("k_proj", "up_proj"), {"lora_bias": True}),
    "llama_tied": (("q_proj", "embed_tokens"), {}), "phi3": (("qkv_proj", "gate_up_proj"), {"use_dora": True}),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), {}), "cohere": (("o_proj",), {"use_rslora": True}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sources", SOURCES)
def test_every_way_to_name_them(tmp_path: Path, sources: str, family: str) -> None:
    """In fused tensors and tied embeddings too; each result is verified before it appears, and again from its manifest alone."""
    from bam_merge.verifying.verification import verify

    modules, config = FAMILIES[family]
    write_sources(tmp_path, CONFIGS[family], ("seed",), "BF16")
    for number, name in enumerate(("code", "law")):
        update = {**config, "use_dora": False} if "several adapters" in sources else config
        write_adapter(tmp_path / "a" / name, tmp_path / "seed", modules, number, torch.float16, **update)
    text = "experts: [code, law]" if sources == "a base that is no expert" else ""
    if "several adapters" in sources and config.get("lora_bias"):
        pytest.skip("biases cannot be added; refused below")
    plan = planned(tmp_path, SOURCES[sources], text)
    out = publish(plan, None, MergeOptions())
    report = verify(out)
    assert report.ok, report.failures
    checks = {check.name: check for check in report.checks}
    assert checks["sources"].ok, checks["sources"].detail
    assert checks["expert isolation"].ok
    assert 0 < (checks["merges"].value or 0) <= 1
    manifest = json.loads((out / "bam_merge.json").read_text())
    assert manifest["sources"].keys() == plan.checkpoints.keys()
    assert all(record["files"] for record in manifest["sources"].values())


@pytest.mark.parametrize("make", ["mean", "ties", "dare_ties", "task_arithmetic"])
@pytest.mark.parametrize("dtype", ["source", "float32", "float16"])
def test_merges_of_adapted_sources(seed: Path, make: str, dtype: str) -> None:
    """The sum is not rounded before it is merged."""
    for number, name in enumerate(("code", "law")):
        write_adapter(seed / "a" / name, seed / "seed", seed=number)
    base = "" if make == "mean" else ", base: seed" + (", density: 0.5" if "ties" in make else "")
    plan = planned(
        seed, f"{CODE}, law: {{base: seed, adapter: a/law}}", f"shared: {{make: {make}{base}}}", "merge", f"{{path: out, dtype: {dtype}}}"
    )
    written = load_file(publish(plan, None, MergeOptions()) / "model.safetensors")
    if make == "mean" and dtype == "float32":
        stored = load_file(seed / "seed/model.safetensors")[f"{Q}.weight"].double()
        updated = [stored.float()]
        for name in ("code", "law"):
            adapter = load_file(seed / "a" / name / "adapter_model.safetensors")
            a, b = (adapter[f"{PREFIX}{Q}.lora_{factor}.weight"].double() for factor in "AB")
            updated.append((stored + scale_of(PEFT) * (b @ a)).float())
        assert torch.equal(written[f"{Q}.weight"], ((updated[0] + updated[1]) + updated[2]) / 3)


def test_what_was_trained_whole(tmp_path: Path) -> None:
    """A head and norms of the adapter's own, in its own dtype, and tokens' rows: rounded once to what the base is stored in."""
    write_sources(tmp_path, CONFIGS["llama_tied"], ("seed",), "BF16")
    draw = torch.Generator().manual_seed(3)
    more = {
        "lm_head.weight": torch.randn(64, 32, generator=draw),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 32, generator=draw),
        **{f"model.layers.{layer}.input_layernorm.weight": torch.randn(32, generator=draw).bfloat16() for layer in (0, 1)},
    }
    saved = {"modules_to_save": ["lm_head", "input_layernorm"], "trainable_token_indices": [9, 4]}
    write_adapter(tmp_path / "a/code", tmp_path / "seed", more=more, **saved)
    plan = planned(tmp_path, "code: {base: seed, adapter: a/code}", "shared: {make: copy, from: code}", "merge")
    made = expressions_of(plan)
    assert made["lm_head.weight"] == f"saved(code:{PREFIX}lm_head.weight)"
    assert made["model.layers.0.input_layernorm.weight"] == f"code:{PREFIX}model.layers.0.input_layernorm.weight"
    assert made["model.embed_tokens.weight"] == "code.base:model.embed_tokens.weight + tokens(code)"
    assert plan.config["tie_word_embeddings"] is False
    out = publish(plan, None, MergeOptions())
    written, stored = load_file(out / "model.safetensors"), load_file(tmp_path / "seed/model.safetensors")
    assert torch.equal(written["lm_head.weight"], more["lm_head.weight"].bfloat16())
    expected = stored["model.embed_tokens.weight"].clone()
    expected[[9, 4]] = more["model.embed_tokens.token_adapter.trainable_tokens_delta"].bfloat16()
    assert torch.equal(written["model.embed_tokens.weight"], expected)


@pytest.mark.parametrize(
    ("prefix", "noted"),
    [("base_model.model.", False), ("", True), ("base_model.model._orig_mod.", False), ("module.base_model.model.", False), ("base_model.", True)],
)  # fmt: skip
def test_names_with_and_without_prefixes(seed: Path, prefix: str, noted: bool) -> None:
    """One prefix explains every tensor, or they are of nothing known."""
    write_adapter(seed / "a/code", seed / "seed", prefix=prefix)
    plan = planned(seed)
    assert any("tensors are named" in note for note in plan.notes) == noted
    assert publish(plan, None, MergeOptions()).exists()


@pytest.mark.parametrize("inside", ["model.language_model.", "language_model.model."])
def test_names_of_a_text_model_inside_another(seed: Path, inside: str) -> None:
    """Trained on a model of images: patterns are for the names that the modules had there."""
    targets = r".*language_model\..*layers\.\d\.self_attn\.(q|v)_proj"
    write_adapter(seed / "a/code", seed / "seed", target_modules=targets)
    file = seed / "a/code/adapter_model.safetensors"
    save_file(
        {name.replace("base_model.model.model.", f"base_model.model.{inside}", 1): value for name, value in load_file(file).items()}, file
    )
    plan = planned(seed)
    assert expressions_of(plan)["model.layers.0.self_attn.experts.1.q_proj.weight"].endswith("+ lora(code)")
    assert publish(plan, None, MergeOptions()).exists()


def test_names_of_a_model_without_a_head(seed: Path) -> None:
    """Trained on transformers' AutoModel, whose modules begin with `layers`."""
    write_adapter(seed / "a/code", seed / "seed")
    file = seed / "a/code/adapter_model.safetensors"
    save_file({name.replace("model.model.", "model."): value for name, value in load_file(file).items()}, file)
    plan = planned(seed)
    assert "sources.code: tensors are named base_model.NAME, where PEFT writes base_model.model.NAME: taken for these." in plan.notes
    assert publish(plan, None, MergeOptions()).exists()


def test_what_a_plan_notes(seed: Path) -> None:
    write_adapter(
        seed / "a/code", seed / "seed", base_model_name_or_path="unsloth/Llama-3.2-1B-bnb-4bit", fan_in_fan_out=True, lora_dropout=0.1
    )
    notes = "\n".join(planned(seed).notes)
    assert "sources.code: adapter_config.json names the base unsloth/Llama-3.2-1B-bnb-4bit, here it is seed" in notes
    assert "sources.code: trained on a quantised base" in notes
    assert "sources.code: fan_in_fan_out is ignored" in notes
    write_adapter(seed / "a/code", seed / "seed", base_model_name_or_path="org/seed")
    assert planned(seed).notes == ()


def test_an_update_of_tied_embeddings_reaches_both(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama_tied"], ("seed",))
    write_adapter(tmp_path / "a/code", tmp_path / "seed", ("embed_tokens",))
    plan = planned(tmp_path, CODE, "shared: {make: copy, from: code}\nexperts: [seed, code]", "merge")
    assert expressions_of(plan)["model.embed_tokens.weight"] == "seed:model.embed_tokens.weight + lora(code)"
    assert "lm_head.weight" not in expressions_of(plan)
    assert any("head and embeddings are tied, so the update reaches both" in note for note in plan.notes)


def test_memory_and_bytes_of_a_plan(seed: Path) -> None:
    """A plan counts the factors that a worker keeps, and what is read of the adapters."""
    plain = planned(seed, "seed: seed", "experts: [seed, seed]")
    write_adapter(seed / "a/code", seed / "seed", r=16)
    plan = planned(seed)
    size = (seed / "a/code/adapter_model.safetensors").stat().st_size
    assert 0 < plan.bytes_read - plain.bytes_read <= size
    assert plan.peak_memory(2) > plain.peak_memory(2)


def test_the_card_says_what_an_adapter_is_on(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed")
    write_adapter(seed / "a/law", seed / "seed", seed=1)
    sources = f"{CODE}, law: {{base: ./seed, adapter: [{{path: a/code, weight: 0.5}}, {{path: a/law}}]}}"
    card = (publish(planned(seed, sources), None, MergeOptions()) / "README.md").read_text()
    assert "| sources | seed (seed), code (seed + adapter a/code), law (seed + adapter 0.5 x a/code + adapter a/law) |" in card


# ---- what is refused -------------------------------------------------------------------------------------------------------

CONFIG_PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "IA3"}, 'peft_type is \'IA3\', and only LORA (LoRA, rsLoRA, DoRA) is merged here. Merge it into its base with PEFT'),
    "no type": ({"peft_type": None}, "peft_type is null, and only LORA"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which changed the base's weights before training"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changed"),
    "corda": ({"init_lora_weights": "corda", "corda_config": {}}, "init_lora_weights is 'corda', which changed"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changed"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', which changed"),
    "an unknown start": ({"init_lora_weights": "magic"}, "init_lora_weights: found 'magic', expected true, false, 'gaussian'"),
    "megatron": ({"megatron_config": {"x": 1}}, "megatron_config is set: it is of a model that Megatron split"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is set: it updates parameters that are no modules' weights"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set: an activated LoRA applies to some tokens only"),
    "qalora": ({"use_qalora": True}, "use_qalora is set"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set: its updates are block-diagonal"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config is set: it routes between adapters"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config is set: KaSA cuts"),
    "sampled": ({"monteclora_config": {"num_samples": 8}}, "monteclora_config is set"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
    "an unknown key": ({"use_dorra": True}, "use_dorra = true: a key that PEFT 0.21 does not know; did you mean 'use_dora'?"),
    "rank zero": ({"r": 0}, "r: found 0, expected a whole number above 0"),
    "a rank that is no number": ({"r": True}, "r: found true, expected a whole number above 0"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha: found '16', expected a number"),
    "bias": ({"bias": "some"}, "bias: found 'some', expected none, all or lora_only"),
    "no targets": ({"target_modules": None}, "target_modules is null: write the names"),
    "a broken expression": ({"target_modules": "(q_proj"}, "target_modules: found '(q_proj', expected a list of names, or a regular expression"),
    "a broken pattern": ({"rank_pattern": {"(": 2}}, 'rank_pattern: found {"(": 2}, expected an object of regular expressions and ranks'),
    "both": ({"use_dora": True, "lora_bias": True}, "use_dora beside lora_bias"),
    "layers of an expression": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform beside a target_modules that is"),
    "a pattern without layers": ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
    "another rank": ({"r": 8}, f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight is [4, 32], expected [8, 32] (rank, columns of the weight)"),
    "fewer targets": ({"target_modules": ["q_proj"]}, f"{PREFIX}model.layers.0.self_attn.v_proj.lora_A.weight"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj: 2 module(s) that target_modules names, and no tensors"),
    "other layers": ({"layers_to_transform": [0]}, "tensor(s) of what adapter_config.json does not name"),
    "excluded": ({"exclude_modules": ["v_proj"]}, "tensor(s) of what adapter_config.json does not name"),
    "no module": ({"target_modules": ["c_attn"]}, "target_modules names no module of llama. Is it an adapter on this base?"),
    "dora without lengths": ({"use_dora": True}, "use_dora is set, and lora_magnitude_vector is missing"),
    "a bias that is not there": ({"lora_bias": True}, "lora_bias is set, and lora_B.bias is missing"),
    "saved and missing": ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing, which modules_to_save says was saved"),
    "tokens and missing": ({"trainable_token_indices": [1]}, "model.embed_tokens: trainable_token_indices names 1 tokens, and their rows are missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_PROBLEMS)
def test_refused_by_name(seed: Path, case: str) -> None:
    changes, words = CONFIG_PROBLEMS[case]
    write_adapter(seed / "a/code", seed / "seed")
    (seed / "a/code/adapter_config.json").write_text(json.dumps({**PEFT, **changes}))
    found = refusal(seed)
    assert words in found
    assert found.startswith(f"sources.code: {seed}/a/code: ")


@pytest.mark.parametrize(
    "changes",
    [{"velora_config": {"num_groups": 2}}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "eva", "eva_config": {"rho": 2}},
     {"revision": "main"}, {"megatron_core": "x"}, {"loftq_config": {"loftq_bits": 4}}, {"future_key": None}, {"future_key": []},
     {"ensure_weight_tying": True}, {"trainable_token_indices": {"embed_tokens": []}}, {"trainable_token_indices": []}],
    ids=str,
)  # fmt: skip
def test_keys_that_change_nothing(seed: Path, changes: dict[str, Any]) -> None:
    write_adapter(seed / "a/code", seed / "seed")
    before = expressions_of(planned(seed))
    (seed / "a/code/adapter_config.json").write_text(json.dumps({**PEFT, **changes}))
    assert expressions_of(planned(seed)) == before


def test_an_old_configuration(seed: Path) -> None:
    """Of a PEFT that knew fewer keys: what is left out is at PEFT's defaults."""
    write_adapter(seed / "a/code", seed / "seed", r=8, lora_alpha=8)
    old = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "seed", "merge_weights": False}
    new = publish(planned(seed), None, MergeOptions())
    (seed / "a/code/adapter_config.json").write_text(json.dumps(old))
    other = publish(planned(seed, output="{path: other}"), None, MergeOptions())
    assert (other / "model.safetensors").read_bytes() == (new / "model.safetensors").read_bytes()


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


FIRST = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
FILE_PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor of nothing": (_tensors(lambda t: t.update({f"{PREFIX}model.layers.0.self_attn.r_proj.lora_A.weight": torch.zeros(4, 32)})), "1 tensor(s) that are of no module of llama"),
    "a layer too many": (_tensors(lambda t: t.update({f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)})), "1 tensor(s) that are of no module"),
    "half an update": (_tensors(lambda t: t.pop(FIRST)), "model.layers.0.self_attn.q_proj: 1 module(s) that target_modules names, and no tensors of an update"),
    "twice": (_tensors(lambda t: t.update({FIRST.replace("lora_A", "lora_A.default"): t[FIRST].clone()})), "1 tensor(s) that are of no module"),
    "turned": (_tensors(lambda t: t.update({FIRST: t[FIRST].T.contiguous()})), "lora_A.weight is [32, 4], expected [4, 32]"),
    "integers": (_tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.int8)})), "lora_A.weight is I8, and updates are computed from"),
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "only adapter_model.bin present, no adapter_model.safetensors. Pickled weights are never loaded"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing. Is the download complete?"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json, so this is not the folder of an adapter"),
    "damaged": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: "),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "gone": (lambda f: shutil.rmtree(f), "no such folder"),
    "a model": (lambda f: (shutil.rmtree(f), shutil.copytree(f.parent.parent / "seed", f)), "It has a config.json: a model of its own is written as a plain source"),
    "a folder of adapters": (lambda f: (f.rename(f.with_name("x")), f.mkdir(), f.with_name("x").rename(f / "one")), "There are adapters inside: one. Name one of these."),
}  # fmt: skip


@pytest.mark.parametrize("case", FILE_PROBLEMS)
def test_files_that_are_refused(seed: Path, case: str) -> None:
    damage, words = FILE_PROBLEMS[case]
    damage(write_adapter(seed / "a/code", seed / "seed"))
    found = refusal(seed)
    assert words in found
    assert "sources.code: " in found


def test_tokens_that_were_added(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed", modules_to_save=["embed_tokens"], more={"model.embed_tokens.weight": torch.zeros(66, 32)})
    found = refusal(seed)
    assert "embed_tokens.weight is [66, 32], expected [64, 32] (as the base's). If tokens were added before the training" in found


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({"use_dora": True}, {}, "changed by DoRA's lengths, which cannot be added"),
        ({"modules_to_save": ["lm_head"]}, {"lm_head.weight": torch.zeros(64, 32)}, "lm_head.weight is changed by a tensor that was trained whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_up(seed: Path, config: dict[str, Any], more: dict[str, torch.Tensor], words: str) -> None:
    write_adapter(seed / "a/one", seed / "seed")
    write_adapter(seed / "a/two", seed / "seed", more=more, **config)
    sources = "seed: seed, code: {base: seed, adapter: [{path: a/one}, {path: a/two}]}"
    assert words in refusal(seed, sources)
    weighted = "seed: seed, code: {base: seed, adapter: [{path: a/two, weight: 0.5}]}"
    assert "weight 0.5: " in refusal(seed, weighted)


def test_a_base_that_cannot_be_added_to(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed",))
    write_adapter(tmp_path / "a/code", tmp_path / "seed")
    file = tmp_path / "seed/model.safetensors"
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in load_file(file).items()}, file)
    assert "of the base is F8_E4M3, which nothing is added to. Take the 16-bit original." in refusal(tmp_path)


def test_dora_of_embeddings(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed", ("embed_tokens",), use_dora=True)
    assert "use_dora of model.embed_tokens: DoRA of embeddings divides by the lengths of whole columns" in refusal(seed)


def test_a_bias_that_has_nowhere_to_go(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed", lora_bias=True)
    assert "lora_bias is set, and the base has no bias there" in refusal(seed)


def test_ties_that_peft_adds_twice(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama_tied"], ("seed",))
    write_adapter(tmp_path / "a/code", tmp_path / "seed", ("embed_tokens",), ensure_weight_tying=True)
    assert "ensure_weight_tying with tied embeddings that are trained: PEFT adds such an update to them twice" in refusal(tmp_path)


def test_a_head_of_its_own_beside_tied_sources(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama_tied"], ("seed",))
    write_adapter(tmp_path / "a/code", tmp_path / "seed", modules_to_save=["lm_head"], more={"lm_head.weight": torch.zeros(64, 32)})
    assert "tie_word_embeddings" in refusal(tmp_path)


def test_bases_that_lead_nowhere(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed")
    assert "no such folder" in refusal(seed, "code: {base: sead, adapter: a/code}, seed: seed")
    assert "did you mean 'seed'" in refusal(seed, "code: {base: sead, adapter: a/code}, seed: seed")
    round_in_a_circle = refusal(seed, "code: {base: law, adapter: a/code}, law: {base: code, adapter: a/code}")
    assert "sources.code.base: leads back to itself: code > law > code" in round_in_a_circle
    assert "sources.code.base: the base of sources.code is called so in plans" in refusal(
        seed, "code: {base: x, adapter: a/code}, code.base: seed"
    )
    assert "sources.code.adapter: an empty list" in refusal(seed, "code: {base: seed, adapter: []}, seed: seed")


def test_the_same_twice(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed")
    assert "sources.law: the same base and adapters as sources.code. Name it once" in refusal(
        seed, f"{CODE}, law: {{base: seed, adapter: a/code}}"
    )


def test_the_problems_of_all_come_together(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed", use_qalora=True, use_bdlora={"nblocks": 2})
    found = refusal(seed, f"{CODE}, law: {{base: nowhere, adapter: a/law}}")
    for words in ("use_qalora is set", "use_bdlora is set", "nowhere: no such folder", "a/law: no such folder"):
        assert words in found


def test_every_tensor_of_the_base_has_a_name(tmp_path: Path) -> None:
    """Whatever module of whatever family an adapter names is found: every weight, trained whole, is taken."""
    for family, config in CONFIGS.items():
        folder = tmp_path / family
        write_sources(folder, config, ("seed",))
        more = {name: torch.zeros(shape) for name, shape in shapes_of(folder / "seed").items()}
        bare = {
            name for name in more if name.endswith(("A_log", "dt_bias", "layer_scalar")) or "layernorm.norms." in name
        }  # refused, below
        more = {name: value for name, value in more.items() if name not in bare}
        if "lm_head.weight" not in more:  # the bias of a tied head is no adapter's: it is refused
            more.pop("lm_head.bias", None)
        names = sorted({name.rpartition(".")[0] for name in more})
        write_adapter(folder / "a/code", folder / "seed", (), more=more, modules_to_save=names)
        plan = planned(folder, "code: {base: seed, adapter: a/code}", "shared: {make: copy, from: code}", "merge")
        others = {step.name for step in plan.steps if not step.expression.startswith(f"code:{PREFIX}")}
        heads = {"lm_head.weight", "lm_head.bias"} - more.keys()
        assert others <= heads | bare, family


@pytest.mark.parametrize(("base", "parameter", "saved"), [
    ("qwen3_5_text", "model.layers.1.linear_attn.A_log", "linear_attn"),
    ("stablelm_qk_norm", "model.layers.1.self_attn.q_layernorm.norms.1.weight", "q_layernorm"),
])  # fmt: skip
def test_a_parameter_of_no_module_is_refused(base: str, parameter: str, saved: str, tmp_path: Path, run: Any) -> None:
    """PEFT can train such a module whole; what is neither weight nor bias of it, and a norm of one head, is not read, and said."""
    write_sources(tmp_path, CONFIGS[base], ("seed",))
    write_adapter(tmp_path / "a/code", tmp_path / "seed", (), more={parameter: torch.zeros(4)}, modules_to_save=[saved])
    write_recipe_of(tmp_path)
    result = run("plan", tmp_path / "recipe.yaml")
    assert result.status == 2
    assert f"{parameter}: 1 tensor(s) that are of no module of {base.removesuffix('_qk_norm')}. Nothing is dropped silently" in result.err


def write_recipe_of(folder: Path) -> None:
    sources = "{seed: seed, code: {base: seed, adapter: a/code}}"
    (folder / "recipe.yaml").write_text(f"method: merge\nsources: {sources}\noutput: {{path: out}}\n")


# ---- runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(0, 35, 6))
def test_resumed_after_any_number_of_tensors(seed: Path, steps: int) -> None:
    """The same bytes, the manifest's among them, as of one run; and of any number of workers."""
    write_adapter(seed / "a/code", seed / "seed")
    write_adapter(seed / "a/law", seed / "seed", use_dora=True)
    plan = planned(seed, f"{CODE}, law: {{base: seed, adapter: a/law}}", "shared: {make: ties, base: seed, density: 0.5}", "btx")
    whole = folder_bytes(publish(plan, seed / "whole", MergeOptions(workers=3, verify=False)))
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(workers=1, progress=stop_after(steps), verify=False))
    assert folder_bytes(publish(plan, None, MergeOptions(workers=2, resume=True, verify=False))) == whole


def test_an_adapter_that_changes_while_it_is_merged(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed")
    plan = planned(seed)
    write_adapter(seed / "a/code", seed / "seed", seed=9)
    with pytest.raises(BamMergeError, match=r"sources\.code: .*adapter_model\.safetensors changed while it was being merged"):
        publish(plan, None, MergeOptions(verify=False))
    assert not (seed / "out").exists()


def test_an_unfinished_run_of_another_adapter_is_not_resumed(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed")
    with pytest.raises(Stop):
        publish(planned(seed), None, MergeOptions(workers=1, progress=stop_after(9), verify=False))
    write_adapter(seed / "a/code", seed / "seed", lora_alpha=60)
    settings, said = options(resume=True)
    publish(planned(seed), None, settings)
    assert said == ["the unfinished run was of another recipe, version or set of sources: starting from the beginning."]


def test_an_output_inside_an_adapter_is_refused(seed: Path) -> None:
    write_adapter(seed / "a/code", seed / "seed")
    with pytest.raises(BamMergeError, match=r"is inside sources\.code"):
        publish(planned(seed, output="{path: a/code/out}"), None, MergeOptions(verify=False))
