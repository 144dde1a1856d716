"""A mixture in the wrapper of its sources: loaded by transformers' class of it, towers as they were, the text model as a mixture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SOURCES, Result, write_recipe
from proofs import UNPROVED, Forger, failed
from safetensors.torch import load_file, save_file
from test_transformers_mixtures import experts_of, rotate_experts
from vocabularies import tokenizer_json

from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

transformers = pytest.importorskip("transformers")

TOWER = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16, "patch_size": 4,
}  # fmt: skip
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
LAYOUT = "{path: out, layout: qwen3_5_moe}"
ROUTED = "ffn: {top_k: 2}\nrouter: {init: normal, std: 0.5}"


@pytest.fixture(params=["qwen3_5_text", "qwen3_5_text_biased"])
def wrapped(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three models of images and text as transformers saves them, with tensors for predicting several tokens as they are published."""
    text = {key: value for key, value in CONFIGS[request.param].items() if key != "model_type"}
    tied = text.get("tie_word_embeddings", False)
    for seed, name in enumerate(SOURCES):
        torch.manual_seed(seed)
        config = transformers.Qwen3_5Config(
            text_config={**text, "initializer_range": 0.2}, vision_config=TOWER, tie_word_embeddings=tied, **TOKENS
        )
        transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file({**load_file(file), "mtp.fc.weight": torch.ones(3)}, file, {"format": "pt"})
    return tmp_path


def loaded(folder: Path, kind: str = "AutoModelForImageTextToText") -> Any:
    model, info = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        return model(input_ids=ids).logits if hasattr(model, "config") and hasattr(model, "save_pretrained") else model(ids)


def test_transformers_loads_what_is_written_and_saves_it_again(wrapped: Path) -> None:
    plan = plan_file(write_recipe(wrapped, ROUTED, "btx", output=LAYOUT))
    folder = publish(plan, None, UNPROVED)
    assert failed(verify(folder)) == {}
    model = loaded(folder)
    assert type(model).__name__ == "Qwen3_5MoeForConditionalGeneration"
    expected = logits(load_model(folder))
    assert float(expected.std()) > 0.05
    assert float((logits(model) - expected).abs().max()) < 1e-5
    assert float((logits(loaded(folder, "AutoModelForCausalLM")) - expected).abs().max()) < 1e-5
    model.save_pretrained(wrapped / "saved")
    before, after, seed = (load_file(at / "model.safetensors") for at in (folder, wrapped / "saved", wrapped / "seed"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    tower = [name for name in seed if name.startswith("model.visual.")]
    assert tower
    assert all(torch.equal(before[name], seed[name]) for name in tower)
    assert not any(name.startswith("mtp.") for name in before)
    assert any("qwen3_5_moe around the mixture, with the vision tower of seed as it is" in note for note in plan.notes)
    assert any("multi-token prediction is left out" in note for note in plan.notes)
    assert set(plan.unused["seed"]) == {"mtp.fc.weight"}


def test_equal_experts_are_the_dense_model(wrapped: Path) -> None:
    text = f"experts: [seed, seed, seed]\n{ROUTED}"
    folder = publish(plan_file(write_recipe(wrapped, text, "sparse_upcycling", ("seed",), LAYOUT)), None, UNPROVED)
    assert float((logits(loaded(folder)) - logits(loaded(wrapped / "seed"))).abs().max()) < 1e-5


def test_each_expert_is_its_dense_model(wrapped: Path) -> None:
    for expert, source in enumerate(SOURCES):
        text = f"ffn: {{top_k: 1}}\nshared: {{make: copy, from: {source}}}\nrouter: {{init: zeros}}"
        recipe = write_recipe(wrapped, text, "btx", output=LAYOUT.replace("out,", f"out{expert},"))
        mixture = loaded(publish(plan_file(recipe), None, UNPROVED))
        with torch.no_grad():
            for layer in mixture.model.language_model.layers:
                rotate_experts(experts_of(layer), expert)
        assert float((logits(mixture) - logits(loaded(wrapped / source))).abs().max()) < 1e-5


def test_a_tower_that_is_another_is_found(wrapped: Path) -> None:
    plan = plan_file(write_recipe(wrapped, ROUTED, "btx", output=LAYOUT))
    folder = publish(plan, None, UNPROVED)
    name = "model.visual.pos_embed.weight"
    Forger(folder).write(name, load_file(wrapped / "law" / "model.safetensors")[name])
    assert name in failed(verify(folder, plan))["copies"]


def test_what_inspect_and_diff_say_of_it(wrapped: Path, run: Any) -> None:
    folder = publish(plan_file(write_recipe(wrapped, ROUTED, "btx", output=LAYOUT)), None, UNPROVED)
    found = json.loads(run("inspect", folder, "--json").out)
    assert (found["model_type"], found["architecture"], found["experts"]["ffn"]) == ("qwen3_5_moe", "qwen3_5_moe", 3)
    assert found["missing"] == found["unknown"] == []
    plain = publish(plan_file(write_recipe(wrapped, ROUTED, "btx", output="{path: plain}")), None, UNPROVED)
    shared = sum(n for role, n in found["parameters"]["by_role"].items() if role.startswith("ffn.shared."))
    assert found["parameters"]["total"] - shared == json.loads(run("inspect", plain, "--json").out)["parameters"]["total"]
    same = run("diff", f"{folder}#experts.2", wrapped / "law", "--only", "ffn.gate")
    assert same.status == 0, same.out


@pytest.mark.parametrize(("method", "sections", "output", "message"), [
    ("bam", "", LAYOUT, "asks for one tensor per expert, but layout 'qwen3_5_moe' stores it shared. Use make: mean, or layout: bam."),
    ("btx", "ffn: {gate: softmax_then_topk}", LAYOUT, "qwen3_5_moe needs norm_topk_prob = true, this merge has false."),
    ("btx", "", "{path: out, layout: qwen3_5_mo}", "'qwen3_5_mo' is no layout; did you mean 'qwen3_5_moe'?"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(method: str, sections: str, output: str, message: str, wrapped: Path, run: Any) -> None:
    result: Result = run("plan", write_recipe(wrapped, sections, method, output=output))
    assert result.status == 2
    assert message in result.err


def test_a_mixture_is_no_source(wrapped: Path, run: Any) -> None:
    publish(plan_file(write_recipe(wrapped, ROUTED, "btx", output=LAYOUT)), None, UNPROVED)
    result = run("plan", write_recipe(wrapped, "", "btx", ("seed", "out"), "{path: again}"))
    assert result.status == 2
    assert "sources.out: model_type 'qwen3_5_moe' is a mixture already." in result.err


def test_a_tower_that_is_quantised_is_refused(wrapped: Path, run: Any) -> None:
    file, name = wrapped / "seed" / "model.safetensors", "model.visual.pos_embed.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    result = run("plan", write_recipe(wrapped, ROUTED, "btx", output=LAYOUT))
    assert result.status == 2
    assert f"seed:{name} is F8_E4M3, which is not computed with here. Use the full-precision model, or layout: bam" in result.err
    assert run("plan", write_recipe(wrapped, ROUTED, "btx")).status == 0


def test_another_sources_tokens_are_refused(wrapped: Path, run: Any) -> None:
    """The ids of image tokens stand in the seed's config.json."""
    for source in SOURCES:
        (wrapped / source / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    chosen = ROUTED + "\ntokenizer: {source: NAME}"
    result = run("plan", write_recipe(wrapped, chosen.replace("NAME", "law"), "btx", output=LAYOUT))
    assert result.status == 2
    assert (
        "image_token_id, video_token_id, vision_start_token_id, vision_end_token_id are of the tokens of seed; the tokenizer is law's."
        in result.err
    )
    assert run("plan", write_recipe(wrapped, chosen.replace("NAME", "union"), "btx", output=LAYOUT)).status == 0
