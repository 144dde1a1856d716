"""Text models in wrappers, and names with a prefix: planned, merged, proved, inspected and compared as what they are; nothing guessed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from damage import edit_config
from proofs import UNPROVED, failed
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions
from bam_merge.architectures import naming
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

IDS = torch.arange(3, 27).view(2, 12)


def rename(folder: Path, change: Callable[[str], str], more: dict[str, torch.Tensor] | None = None) -> None:
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **(more or {})}, folder / "model.safetensors", {"format": "pt"})


def inserted(word: str) -> Callable[[str], str]:
    """A program that wraps every layer, or all of the model."""
    return lambda name: name.replace(".self_attn.", f".{word}.self_attn.").replace(".attention.", f".{word}.attention.")


PREFIXES: dict[str, tuple[Callable[[str], str], str | None]] = {
    "torch.compile": (lambda name: f"_orig_mod.{name}", "names with _orig_mod in them (torch.compile): read as {}'s own"),
    "DDP": (lambda name: f"module.{name}", "prefix module. before every name (DataParallel, DDP or DeepSpeed): read as {}'s own"),
    "PEFT": (lambda name: f"base_model.model.{name}", "prefix base_model.model. before every name (PEFT): read as {}'s own"),
    "DDP of a compiled one": (lambda name: f"module._orig_mod.{name}", "names with _orig_mod in them (torch.compile) and prefix module. before every name (DataParallel, DDP or DeepSpeed): read as {}'s own"),
    "a compiled one with DDP": (lambda name: f"_orig_mod.module.{name}", "_orig_mod"),
    "PEFT in DDP": (lambda name: f"module.base_model.model.{name}", "prefix module.base_model.model. before every name (DataParallel, DDP or DeepSpeed and PEFT): read as {}'s own"),
    "FSDP": (lambda name: "_fsdp_wrapped_module." + inserted("_fsdp_wrapped_module")(name), "names with _fsdp_wrapped_module in them (FSDP): read as {}'s own"),
    "FSDP and checkpointing in layers": (lambda name: inserted("_fsdp_wrapped_module._checkpoint_wrapped_module")(name), "names with _fsdp_wrapped_module in them (FSDP) and names with _checkpoint_wrapped_module in them (activation checkpointing): read as {}'s own"),
    "layers compiled alone": (inserted("_orig_mod"), "names with _orig_mod in them (torch.compile): read as {}'s own"),
    "a trainer's": (lambda name: f"policy.actor.{name}", "prefix policy.actor. before every name: read as {}'s own"),
    "Lightning": (lambda name: f"model.{name}", "prefix model. before every name: read as {}'s own"),
    "no first word": (lambda name: name.partition(".")[2] if name.startswith(("model.", "gpt_neox.")) else name, "names without the prefix {}. (a model saved without its head): read as"),
    "no first word, in DDP": (lambda name: "module." + (name.partition(".")[2] if name.startswith(("model.", "gpt_neox.")) else name), "prefix module. before every name"),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("config", ["llama", "llama_tied", "gpt_neox", "qwen3"])
def test_a_prefix_that_explains_every_tensor(config: str, name: str, tmp_path: Path) -> None:
    """The merge is byte for byte that of the plain folders, and the plan says what was read under what name."""
    change, note = PREFIXES[name]
    write_sources(tmp_path, CONFIGS[config])
    expected = publish(plan_file(write_recipe(tmp_path, output="{path: expected}")), None, UNPROVED)
    logits = load_model(tmp_path / "law")(IDS)
    before = set(load_file(tmp_path / "law" / "model.safetensors"))
    for source in ("law", "seed"):
        rename(tmp_path / source, change)
    assert torch.equal(load_model(tmp_path / "law")(IDS), logits)
    plan = plan_file(write_recipe(tmp_path))
    family = plan.models["seed"].family.name
    base = "gpt_neox" if family == "gpt_neox" else "model"
    for source in ("seed", "law"):
        (said,) = (text for text in plan.notes if text.startswith(f"sources.{source}: "))
        assert (note or "").format(base if "without the prefix" in (note or "") else family) in said
    assert not any(text.startswith("sources.code: ") for text in plan.notes)
    assert {read["tensor"] for step in plan.steps for read in step.reads if read["source"] == "law"} == set(map(change, before))
    folder = publish(plan, None, MergeOptions())
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (folder / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    assert failed(verify(folder)) == {}


@pytest.mark.parametrize("name", PREFIXES)
def test_inspect_and_diff_understand_them(name: str, llamas: Path, run: Any) -> None:
    plain = json.loads(run("inspect", llamas / "law", "--json").out)
    shutil.copytree(llamas / "law", llamas / "other")
    rename(llamas / "other", PREFIXES[name][0])
    found = json.loads(run("inspect", llamas / "other", "--json").out)
    assert found["parameters"] == plain["parameters"]
    assert found["missing"] == found["unknown"] == []
    assert len(found["findings"]) == 1
    result = run("diff", llamas / "law", llamas / "other", "--json")
    assert json.loads(result.out)["changed"] == []
    assert result.status == 0
    alone = json.loads(run("inspect", llamas / "other" / "model.safetensors", "--json").out)  # without a config.json
    assert alone["parameters"]["total"] == plain["parameters"]["total"]
    assert alone["unknown"] == []


@pytest.mark.parametrize(("method", "layout"), [("bam", "bam"), ("btx", "mixtral")])
def test_a_mixture_with_a_prefix(method: str, layout: str, llamas: Path, run: Any) -> None:
    """As a trainer saves it again: loaded, and inspected, as what it is."""
    folder = publish(plan_file(write_recipe(llamas, method=method, output=f"{{path: out, layout: {layout}}}")), None, UNPROVED)
    expected, plain = load_model(folder)(IDS), json.loads(run("inspect", folder, "--json").out)
    rename(folder, lambda name: f"module._orig_mod.{name}")
    assert torch.equal(load_model(folder)(IDS), expected)
    found = json.loads(run("inspect", folder, "--json").out)
    assert (found["parameters"], found["experts"], found["unknown"]) == (plain["parameters"], plain["experts"], [])


def test_two_prefixes_are_refused(llamas: Path, run: Any) -> None:
    """A file with two models, or one twice."""
    law = llamas / "law"
    tensors = load_file(law / "model.safetensors")
    rename(law, lambda name: f"student.{name}", {f"teacher.{name}": tensor.clone() for name, tensor in tensors.items()})
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert result.err.splitlines() == [
        "error: sources.law: 21 tensors of a llama model have names that begin with student.model., and 21 have names that begin with "
        "teacher.model.: two prefixes, which are two models or one that was saved twice. Nothing is guessed: keep one."
    ]
    with pytest.raises(CheckpointError, match=r"more than one prefix that would do: student\.model\., teacher\.model\."):
        load_model(law)
    assert "two prefixes" in run("inspect", law).out


def test_a_prefix_beside_plain_names_is_refused(llamas: Path, run: Any) -> None:
    law = llamas / "law"
    tensors = load_file(law / "model.safetensors")
    rename(law, lambda name: name, {f"module.{name}": tensor.clone() for name, tensor in tensors.items()})
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert "two prefixes" in result.err
    with pytest.raises(CheckpointError, match="does not imply"):
        load_model(law)


def test_one_name_too_many_is_not_explained(llamas: Path, run: Any) -> None:
    """A value head beside the model: every tensor but two has the prefix."""
    law = llamas / "law"
    rename(
        law, lambda name: f"pretrained_model.{name}", {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}
    )
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert "v_head.summary.bias, v_head.summary.weight: 2 tensor(s) that llama with 2 layers does not have." in result.err
    with pytest.raises(CheckpointError, match="v_head"):
        load_model(law)


def test_an_adapter_that_was_not_merged_is_named(llamas: Path, run: Any) -> None:
    law, change = llamas / "law", lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer.")
    rename(law, change, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 32)})
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert "of an adapter that was saved beside the weights it changes. Merge it into them first (PEFT: merge_and_unload)" in result.err


def test_two_names_of_one_tensor(llamas: Path, run: Any) -> None:
    law = llamas / "law"
    rename(law, lambda name: name, {"model.layers.0._orig_mod.self_attn.q_proj.weight": torch.zeros(32, 32)})
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert "are two names of one tensor. Keep one." in result.err


# ---- wrappers ------------------------------------------------------------------------------------------------------------------

TOWER = {
    "vision_tower.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
    "vision_tower.embeddings.weight": torch.ones(3),
    "multi_modal_projector.linear.weight": torch.ones(32, 8),
}
OLD: Callable[[str], str] = lambda name: f"language_model.{name}"  # noqa: E731
NEW: Callable[[str], str] = lambda name: name.replace("model.", "model.language_model.", 1)  # noqa: E731

WRAPPED: dict[str, tuple[str, str, str, Callable[[str], str], dict[str, torch.Tensor]]] = {
    "llava": ("llama", "llava", "text_config", OLD, TOWER),
    "llava, saved again": ("llama", "llava", "text_config", NEW, {f"model.{name}": tensor for name, tensor in TOWER.items()}),
    "mistral3": ("mistral", "mistral3", "text_config", OLD, TOWER),
    "internvl": ("qwen2", "internvl", "text_config", OLD, TOWER),
    "internvl with a Qwen3": ("qwen3", "internvl", "text_config", OLD, TOWER),
    "InternVL as published": ("qwen2", "internvl_chat", "llm_config", OLD, {"vision_model.embeddings.weight": torch.ones(3), "mlp1.0.weight": torch.ones(3)}),
    "qwen2_5_vl": ("qwen2", "qwen2_5_vl", "", lambda name: name, {"visual.blocks.0.attn.qkv.weight": torch.ones(3)}),
    "qwen2_vl, saved again": ("qwen2", "qwen2_vl", "text_config", NEW, {"model.visual.blocks.0.attn.qkv.weight": torch.ones(3)}),
    "qwen3_vl": ("qwen3", "qwen3_vl", "text_config", NEW, {"model.visual.blocks.0.attn.qkv.weight": torch.ones(3)}),
    "qwen3_5": ("qwen3_5_text", "qwen3_5", "text_config", NEW, {"model.visual.blocks.0.attn.qkv.weight": torch.ones(3), "mtp.fc.weight": torch.ones(3)}),
    "smolvlm": ("llama", "smolvlm", "text_config", lambda name: name.replace("model.", "model.text_model.", 1), {"model.vision_model.x": torch.ones(3), "model.connector.y": torch.ones(3)}),
    "llava compiled, in DDP": ("llama", "llava", "text_config", lambda name: f"module._orig_mod.language_model.{name}", {f"module._orig_mod.{name}": tensor for name, tensor in TOWER.items()}),
}  # fmt: skip
MROPE = {"qwen2_5_vl": "qwen2_5_vl_text", "qwen2_vl": "qwen2_vl_text", "qwen3_vl": "qwen3_vl_text"}


def wrap(
    folder: Path,
    model_type: str,
    key: str,
    change: Callable[[str], str],
    more: dict[str, torch.Tensor],
    outside: dict[str, Any] | None = None,
) -> None:
    """A plain folder as the text model of a wrapper; what it has besides is `more`, and `outside` in its config.json."""
    rename(folder, change, more)
    path = folder / "config.json"
    inner = json.loads(path.read_text())
    dtype, tied = inner.pop("dtype"), inner.pop("tie_word_embeddings", None)
    inner.pop("architectures")
    if model_type in MROPE:
        inner["model_type"] = MROPE[model_type]
        inner["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
        inner |= {
            "rms_norm_eps": inner.get("rms_norm_eps", 1e-6),
            "rope_theta": 10000.0,
            "num_key_value_heads": inner["num_key_value_heads"],
            "head_dim": inner.get("head_dim", 8),
        }
    if model_type == "qwen3_5":  # as published
        inner["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    outer = {
        "model_type": model_type,
        "architectures": ["X"],
        "dtype": dtype,
        "vision_config": {"hidden_size": 8},
        **({} if tied is None else {"tie_word_embeddings": tied}),
        **(outside or {}),
    }
    path.write_text(json.dumps({**outer, key: inner} if key else {**inner, **outer}))


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrappers_text_model_is_merged_as_its_family(name: str, tmp_path: Path, run: Any) -> None:
    """Beside a plain branch, as the seed and as a branch: the same tensors and config.json as of the plain folders."""
    family, model_type, key, change, more = WRAPPED[name]
    write_sources(tmp_path, {**CONFIGS[family], "tie_word_embeddings": False})
    expected = publish(plan_file(write_recipe(tmp_path, output="{path: expected}")), None, UNPROVED)
    logits = load_model(tmp_path / "law")(IDS)
    for source in ("seed", "law"):
        wrap(tmp_path / source, model_type, key, change, more)
    assert torch.equal(load_model(tmp_path / "law")(IDS), logits)
    plan = plan_file(write_recipe(tmp_path))
    assert set(plan.unused["law"]) == set(more)
    assert all(f"of {model_type}: the text model alone is read" in reason for reason in plan.unused["law"].values())
    assert any(note.startswith(f"sources.law: the text model of model_type {model_type}, without its ") for note in plan.notes)
    lines = [line for line in run("plan", tmp_path / "recipe.yaml").out.splitlines() if line.startswith("not read     law: ")]
    assert len(lines) == len(set(plan.unused["law"].values()))
    assert all(" bytes (" in line or " kB (" in line for line in lines)
    folder = publish(plan, None, MergeOptions())
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    found, wanted = (json.loads((at / "config.json").read_text()) for at in (folder, expected))
    assert {k: v for k, v in found.items() if k != "head_dim"} == {k: v for k, v in wanted.items() if k != "head_dim"}
    assert failed(verify(folder)) == {}
    inspected = json.loads(run("inspect", tmp_path / "law", "--json").out)
    assert inspected["model_type"] == model_type
    assert inspected["architecture"] == family
    assert inspected["parameters"]["total"] == json.loads(run("inspect", tmp_path / "code", "--json").out)["parameters"]["total"]
    assert any(f"the text model of model_type {model_type}" in finding for finding in inspected["findings"])
    difference = run("diff", tmp_path / "law", tmp_path / "code", "--json")
    assert difference.status == 1
    assert len(json.loads(difference.out)["changed"]) == len(plan.models["code"].tensors)


def test_a_dense_result_is_a_plain_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_sources(tmp_path, CONFIGS["qwen2"], ("seed", "law"))
    for source in ("seed", "law"):
        wrap(tmp_path / source, *WRAPPED["qwen2_5_vl"][1:])
    folder = publish(plan_file(write_recipe(tmp_path, method="merge", names=("seed", "law"))), None, MergeOptions())
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert "vision_config" not in config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert float((theirs(IDS).logits - load_model(folder)(IDS)).abs().max()) < 1e-5


@pytest.mark.parametrize(("outside", "inside", "stored", "tied"), [
    ({}, {}, True, False), ({}, {}, False, True), ({"tie_word_embeddings": True}, {}, False, True), ({"tie_word_embeddings": False}, {}, True, False),
    ({}, {"tie_word_embeddings": True}, False, True), ({}, {"tie_word_embeddings": False}, True, False),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True, False), ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, False, True),
])  # fmt: skip
def test_ties_are_read_from_the_file_where_config_does_not_say(
    outside: dict[str, Any], inside: dict[str, Any], stored: bool, tied: bool, tmp_path: Path
) -> None:
    """Mistral Small's outer class ties by default, its text model's does not, and the file holds a head."""
    write_sources(tmp_path, {**CONFIGS["mistral"], "tie_word_embeddings": not stored}, ("seed", "law"))
    for source in ("seed", "law"):
        edit_config(tmp_path / source, tie_word_embeddings=...)
        wrap(tmp_path / source, "mistral3", "text_config", OLD, TOWER, outside)
        path = tmp_path / source / "config.json"
        config = json.loads(path.read_text())
        config["text_config"] |= inside
        path.write_text(json.dumps(config))
    plan = plan_file(write_recipe(tmp_path, names=("seed", "law")))
    assert plan.config["tie_word_embeddings"] is tied
    assert failed(verify(publish(plan, None, MergeOptions()))) == {}


def test_a_head_that_is_said_and_missing(tmp_path: Path) -> None:
    write_sources(tmp_path, {**CONFIGS["mistral"], "tie_word_embeddings": True}, ("seed", "law"))
    for source in ("seed", "law"):
        wrap(tmp_path / source, "mistral3", "text_config", OLD, TOWER, {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight missing"):
        plan_file(write_recipe(tmp_path, names=("seed", "law")))


@pytest.mark.parametrize(("config", "message"), [
    ({"model_type": "gemma4", "text_config": {"model_type": "gemma3n_text"}}, "model_type \'gemma4\' wraps a text model of model_type 'gemma3n_text', which is in no table here. Text models that can be taken out of a wrapper: llama, mistral, qwen2,"),
    ({"model_type": "gemma3"}, "text_config must be an object with the text model's configuration, found null."),
    ({"model_type": "mistral3", "text_config": {"model_type": "apertus"}}, "model_type 'mistral3' wraps a text model of model_type 'apertus', which is in no table here."),
    ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_next"}}, "model_type 'qwen3_5' wraps a text model of model_type 'qwen3_next'"),
    ({"model_type": "internvl", "text_config": {"model_type": "qwen3_moe"}}, "model_type 'internvl' wraps a text model of model_type 'qwen3_moe', which is a mixture."),
    ({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}}, "model_type 'internvl_chat' wraps a text model of model_type 'internlm2'"),
    ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, "model_type 'mllama' wraps a text model of model_type 'mllama_text_model'"),
    ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "model_type 'llama4' wraps a text model (text_config: model_type 'llama4_text'), and is no wrapper known here. Known: aya_vision, audioflamingo3"),
    ({"model_type": "llava", "text_config": [1]}, "text_config must be an object with the text model's configuration, found [1]."),
    ({"model_type": "llava", "text_config": {"model_type": 7}}, "model_type \'llava\' wraps a text model of model_type 7, which is in no table here."),
])  # fmt: skip
def test_what_has_no_table_is_refused_by_both_names(config: dict[str, Any], message: str, llamas: Path, run: Any) -> None:
    (llamas / "law" / "config.json").write_text(json.dumps(config))
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert message.split(" Known: ")[0] in result.err
    assert "Traceback" not in result.err
    with pytest.raises(CheckpointError):
        load_model(llamas / "law")
    assert run("inspect", llamas / "law").status == 0
    assert message.split(" Known: ")[0].split(", which")[0] in json.dumps(
        json.loads(run("inspect", llamas / "law", "--json").out)["findings"]
    ).replace('\\"', '"')


def test_both_spellings_at_once_are_refused(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    plain = load_file(tmp_path / "law" / "model.safetensors")
    wrap(tmp_path / "law", "llava", "text_config", OLD, {**TOWER, **{NEW(name): tensor.clone() for name, tensor in plain.items()}})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert (
        "have names that begin with language_model.model., and" in result.err
        or "have names that begin with model.language_model., and" in result.err
    )
    with pytest.raises(CheckpointError, match="more than one prefix"):
        load_model(tmp_path / "law")


def test_a_tensor_that_no_table_of_the_wrapper_knows_is_refused(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    wrap(tmp_path / "law", "llava", "text_config", OLD, {**TOWER, "audio_tower.weight": torch.ones(3)})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert "audio_tower.weight: 1 tensor(s) that llama with 2 layers does not have" in result.err
    with pytest.raises(CheckpointError, match=r"audio_tower\.weight"):
        load_model(tmp_path / "law")


def test_old_and_new_keys_that_differ_are_refused(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["qwen2"])
    wrap(tmp_path / "law", "qwen2_vl", "text_config", NEW, {"model.visual.x": torch.ones(1)}, {"rope_theta": 5.0, "hidden_size": 32})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert (
        "config.json: rope_theta (the rotary embedding) = 5.0, and text_config has 10000.0: two spellings that differ. transformers takes text_config's."
        in result.err
    )


@pytest.mark.parametrize("outside", [
    {"hidden_size": 32, "sliding_window": 32768, "use_cache": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
    {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]}, "initializer_range": 0.5},
])  # fmt: skip
def test_old_and_new_keys_that_mean_the_same(outside: dict[str, Any], tmp_path: Path) -> None:
    """A file as some versions of transformers saved it, with the text model's keys at the top too: a window that nothing uses, null inside."""
    write_sources(tmp_path, CONFIGS["qwen2"], ("seed", "law"))
    wrap(tmp_path / "law", "qwen2_vl", "text_config", NEW, {"model.visual.x": torch.ones(1)}, outside)
    path = tmp_path / "law" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= {"sliding_window": None, "use_sliding_window": False, "image_token_id": None, "vision_token_id": 3}
    path.write_text(json.dumps(config))
    assert plan_file(write_recipe(tmp_path, names=("seed", "law"))).accepted == ()


def test_vocab_size_and_dtype_may_stand_outside(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "law"))
    wrap(tmp_path / "law", "llava", "text_config", OLD, TOWER)
    path = tmp_path / "law" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": config["text_config"].pop("vocab_size")}))
    assert plan_file(write_recipe(tmp_path, names=("seed", "law"))).config["vocab_size"] == 64
    load_model(tmp_path / "law")


def test_an_index_may_list_a_wrappers_tied_head(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama_tied"], ("seed", "law"))
    wrap(tmp_path / "law", "llava", "text_config", OLD, TOWER)
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / "law" / "model.safetensors").rename(tmp_path / "law" / shard)
    names = [*load_file(tmp_path / "law" / shard), "language_model.lm_head.weight"]
    (tmp_path / "law" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    plan = plan_file(write_recipe(tmp_path, names=("seed", "law")))
    assert any("lists language_model.lm_head.weight, which no shard holds" in note for note in plan.notes)


def test_an_index_may_list_a_tied_head_with_a_prefix(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama_tied"], ("seed", "law"))
    shard = "model-00001-of-00001.safetensors"
    rename(tmp_path / "law", lambda name: f"module.{name}")
    (tmp_path / "law" / "model.safetensors").rename(tmp_path / "law" / shard)
    for extra, fine in (("module.lm_head.weight", True), ("module.model.norm.bias", False)):
        names = [*load_file(tmp_path / "law" / shard), extra]
        (tmp_path / "law" / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)})
        )
        if fine:
            assert plan_file(write_recipe(tmp_path, names=("seed", "law"))).config["tie_word_embeddings"] is True
        else:
            with pytest.raises(CheckpointError, match=r"lists module\.model\.norm\.bias, which no shard holds"):
                plan_file(write_recipe(tmp_path, names=("seed", "law")))


def test_a_quantised_text_model_is_refused(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    wrap(tmp_path / "law", "llava", "text_config", OLD, TOWER, {"quantization_config": {"quant_method": "fp8"}})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert "quantised weights cannot be merged" in result.err


# ---- verification reads them itself -----------------------------------------------------------------------------------------------


def test_a_plan_that_took_the_tower_for_the_text_model_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if planning had read one layer under another one's name: the reference model finds prefixes on its own."""
    write_sources(tmp_path, CONFIGS["llama"])
    wrap(tmp_path / "law", "llava", "text_config", OLD, TOWER)
    real = naming.find_naming

    def wrong(*args: Any) -> naming.Naming:
        found = real(*args)
        names = dict(found.names)
        a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
        names[a], names[b] = names[b], names[a]
        return naming.Naming(names, found.beside, found.others, found.note, found.problem)

    monkeypatch.setattr("bam_merge.sources.dense.find_naming", wrong)
    plan = plan_file(write_recipe(tmp_path))
    found = failed(verify(publish(plan, None, UNPROVED), plan))
    assert "layer 0, expert 2 (law)" in found["expert isolation"]


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_plan_that_took_the_outer_key_does_not_pass(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    for source in ("seed", "code", "law"):
        wrap(tmp_path / source, "llava", "text_config", OLD, TOWER)
    from bam_merge.architectures import wrappers

    real = wrappers.unwrap

    def wrong(config: Any) -> Any:
        found = real(config)
        return wrappers.Unwrapped({**found.config, key: 0.5}, found.wrapper, found.ties, found.contradicts, found.problems)

    monkeypatch.setattr("bam_merge.sources.dense.unwrap", wrong)
    plan = plan_file(write_recipe(tmp_path))
    assert "source configs" in failed(verify(publish(plan, None, UNPROVED), plan))
