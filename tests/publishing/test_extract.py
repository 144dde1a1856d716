"""One expert of a mixture as the dense model that it was: written again by `extract`, merged anew as a source, looked at."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, stand_in, write_recipe, write_sources
from hub_models import hub as hub  # a fixture
from hub_server import FakeHub
from safetensors.torch import load_file, save_file

import bam_merge
from bam_merge import BamMergeError, CheckpointError, MergeOptions, diff, extract, inspect, load_recipe, make_plan, merge, verify
from bam_merge.architectures.config import describe
from bam_merge.architectures.tables import load_architecture, mixture_layouts

QUICK = MergeOptions(verify=False)
KINDS = {
    "Expert-KV": ("bam", ""),
    "Shared-KV": ("bam", "attention: {kv: shared}"),
    "keys shared in one layer": ("bam", "rules: [{roles: [attn.k, attn.v, attn.k_norm], layers: 0, make: copy, from: code}]"),
    "BTX": ("btx", ""),
}
COPIES = "shared: {make: copy, from: code}\n"
"""Nothing is averaged: expert code is its source again."""

LAYOUTS = {
    "mixtral of llama": ("llama", "mixtral"),
    "mixtral of mistral": ("mistral", "mixtral"),
    "mixtral of phi3": ("phi3", "mixtral"),
    "qwen2_moe of qwen2": ("qwen2", "qwen2_moe"),
    "qwen2_moe of llama": ("llama", "qwen2_moe"),
    "qwen2_moe of tied llama": ("llama_tied", "qwen2_moe"),
    "qwen3_moe of qwen3": ("qwen3", "qwen3_moe"),
    "qwen3_moe of biased qwen3": ("qwen3_biased", "qwen3_moe"),
}


def mixture(
    folder: Path, family: str = "llama", text: str = COPIES, method: str = "bam", output: str = "{path: out}", **options: Any
) -> Path:
    write_sources(folder, CONFIGS[family], **options)
    return merge(load_recipe(write_recipe(folder, text, method, output=output)), options=QUICK)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(raw(a[n]), raw(b[n])) for n in a)


def facts(folder: Path) -> dict[str, Any]:
    config, problems = json.loads((folder / "config.json").read_text()), list[str]()
    found = describe(load_architecture(config["model_type"]), config, problems)
    assert not problems
    if not found["sliding_window"]:
        del found["layer_types"]  # no kind is unlike another
    return found


def logits(folder: Path) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(stand_in(folder), dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.arange(3, 43).view(2, 20)).logits


# ---- the model again -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_written_again(name: str, tmp_path: Path) -> None:
    """Byte for byte, with the same names, facts and logits: of a mixture of each kind in turn, whose own family's config.json is not there."""
    method, text = KINDS[list(KINDS)[list(CONFIGS).index(name) % len(KINDS)]]
    out = mixture(tmp_path, name, COPIES + text, method)
    back = extract(f"{out}#experts.code", tmp_path / "back")  # proved before it appears
    assert same(tensors(back), tensors(tmp_path / "code"))
    assert facts(back) == facts(tmp_path / "code")
    assert torch.equal(logits(back), logits(tmp_path / "code"))


@pytest.mark.parametrize("older", [False, True])
def test_config_says_what_the_seeds_said_and_no_more(older: bool, tmp_path: Path, run: Any) -> None:
    """Where the merge's record tells which keys these were: diff finds nothing."""
    scaling = {"rope_type": "linear", "factor": 4.0}
    rope = {"rope_theta": 5e3, "rope_scaling": scaling} if older else {"rope_parameters": {"rope_theta": 5e3, **scaling}}
    write_sources(tmp_path, {**CONFIGS["llama"], **rope, "head_dim": 8})
    out = merge(load_recipe(write_recipe(tmp_path, COPIES)), options=QUICK)
    back = extract(f"{out}#experts.code", tmp_path / "back")
    keys = json.loads((tmp_path / "code" / "config.json").read_text()).keys()
    assert {"rope_scaling" if older else "rope_parameters", "head_dim"} < json.loads((back / "config.json").read_text()).keys() <= keys
    assert run("diff", back, tmp_path / "code").status == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_back(name: str, tmp_path: Path) -> None:
    family, layout = LAYOUTS[name]
    out = mixture(tmp_path, family, COPIES, "btx", f"{{path: out, layout: {layout}}}")
    back = extract(f"{out}#experts.code", tmp_path / "back")
    assert same(tensors(back), tensors(tmp_path / "code"))
    assert facts(back) == facts(tmp_path / "code")
    assert torch.equal(logits(back), logits(tmp_path / "code"))
    assert verify(back, options=bam_merge.VerifyOptions("full")).ok


@pytest.mark.parametrize("layout", [table.name for table in mixture_layouts() if table.name != "bam"])
def test_a_layout_that_is_added_is_read_back(layout: str, tmp_path: Path) -> None:
    """The first families that a layout can hold are their sources again."""
    read = []
    for name in CONFIGS:
        folder = tmp_path / name
        recipe = written(folder, name, layout)
        if recipe is None:
            continue
        out = merge(recipe, options=QUICK)
        back = extract(f"{out}#experts.code", folder / "back", CONFIGS[name]["model_type"])
        assert same(tensors(back), tensors(folder / "code"))
        assert facts(back) == facts(folder / "code")
        assert diff(f"{out}#experts.code", folder / "code").equal
        read.append(name)
        if len(read) == 2:
            break
    assert read


def written(folder: Path, name: str, layout: str, dtype: str = "F32") -> Any:
    """The recipe of a merge in this layout, by either kind of gates; None where the family does not fit."""
    write_sources(folder, CONFIGS[name], dtype=dtype)
    for gate in ("topk_then_softmax", "topk_then_sigmoid"):
        text = f"{COPIES}ffn: {{top_k: 2, gate: {gate}}}"
        try:
            recipe = load_recipe(write_recipe(folder, text, "btx", output=f"{{path: out, layout: {layout}}}"))
            make_plan(recipe)
        except BamMergeError:
            continue
        return recipe
    return None


def test_what_was_averaged_is_the_mixtures(tmp_path: Path) -> None:
    """Shared-KV of averaged tensors: k, v, norms and embeddings are the mixture's, q, o and FFN the expert's."""
    out = mixture(tmp_path, text="attention: {kv: shared}")
    back, own, mixed = tensors(extract(f"{out}#experts.law", tmp_path / "back")), tensors(tmp_path / "law"), tensors(out)
    for name, tensor in back.items():
        of_expert = any(part in name for part in ("q_proj", "o_proj", "mlp"))
        assert torch.equal(tensor, own[name] if of_expert else mixed[name]), name
        assert of_expert or not torch.equal(tensor, own[name])


def test_numbers_stand_for_names(tmp_path: Path) -> None:
    out = mixture(tmp_path)
    assert same(tensors(extract(f"{out}#experts.1", tmp_path / "a")), tensors(extract(f"{out}#code", tmp_path / "b")))


def test_bfloat16_stays(tmp_path: Path) -> None:
    out = mixture(tmp_path, dtype="BF16")
    assert same(tensors(extract(f"{out}#experts.code", tmp_path / "back")), tensors(tmp_path / "code"))


def test_tokenizer_and_settings_travel(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    (tmp_path / "seed" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    out = merge(load_recipe(write_recipe(tmp_path)), options=QUICK)
    back = extract(f"{out}#experts.code", tmp_path / "back")
    assert (back / "generation_config.json").read_text() == '{"max_new_tokens": 7}'
    assert not (back / "modeling_bam.py").exists()


def test_without_a_record_the_family_is_found_or_asked_for(tmp_path: Path) -> None:
    out = mixture(tmp_path, "mistral", COPIES, "btx", "{path: out, layout: mixtral}")
    (out / "bam_merge.json").unlink()
    with pytest.raises(CheckpointError, match=r"is a model of .*mistral.* alike\. Say which: --family NAME"):
        extract(f"{out}#experts.1", tmp_path / "back")
    with pytest.raises(CheckpointError, match="'mistrall' is no dense family known here; did you mean 'mistral'"):
        extract(f"{out}#experts.1", tmp_path / "back", family="mistrall")
    with pytest.raises(CheckpointError, match="a qwen3 model has"):
        extract(f"{out}#experts.1", tmp_path / "back", family="qwen3")
    with pytest.raises(CheckpointError, match=r"no expert 'code'\. There are 0, 1, 2\."):
        extract(f"{out}#experts.code", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert same(tensors(extract(f"{out}#experts.1", tmp_path / "back", family="mistral")), tensors(tmp_path / "code"))


def test_a_layout_says_its_own_family(tmp_path: Path) -> None:
    """Without a record qwen3_moe is qwen3's."""
    out = mixture(tmp_path, "qwen3", COPIES, "btx", "{path: out, layout: qwen3_moe}")
    (out / "bam_merge.json").unlink()
    back = extract(f"{out}#experts.1", tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["model_type"] == "qwen3"
    assert same(tensors(back), tensors(tmp_path / "code"))


@pytest.mark.parametrize(("layout", "family"), [("bam", None), ("mixtral", "mistral"), ("qwen3_moe", None)])
def test_what_was_trained_and_saved_by_transformers_is_taken_out(layout: str, family: str | None, tmp_path: Path) -> None:
    """No record is there then, and expert 1 is no source again, but what is saved of it."""
    transformers = pytest.importorskip("transformers")
    name = {"bam": "qwen3", "mixtral": "mistral", "qwen3_moe": "qwen3"}[layout]
    out = mixture(tmp_path, name, "", "bam" if layout == "bam" else "btx", f"{{path: out, layout: {layout}}}")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) / 100)
    model.save_pretrained(tmp_path / "trained")
    back = extract(f"{tmp_path}/trained#experts.{'code' if layout == 'bam' else '1'}", tmp_path / "back", family)
    saved, made = tensors(tmp_path / "trained"), tensors(back)
    plain = {"block_sparse_moe": "mlp", "experts.1.": "", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for key, tensor in saved.items():
        own = key
        for word, instead in plain.items():
            own = own.replace(word, instead)
        if ".experts." not in own and own in made:
            assert torch.equal(made.pop(own), tensor), own
    assert not made
    assert not torch.equal(logits(back), logits(tmp_path / "code"))


# ---- what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("out#experts.cod", "no expert 'cod'; did you mean 'code'? There are seed, code, law."),
        ("out#experts.3", "no expert '3'. There are seed, code, law."),
        ("seed#experts.0", "a dense model (model_type 'llama'), so there is no expert '0'. Of a dense model, give the folder alone."),
        ("out", "no expert is named. Write FOLDER#experts.NAME"),
        ("nothing#experts.code", "no such folder"),
        (".out.bam-merge#experts.code", "the staging folder of"),
    ],
)
def test_wrong_addresses_say_what_there_is(address: str, said: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture(tmp_path)
    monkeypatch.chdir(tmp_path)
    result: Result = run("extract", address, "back")
    assert result.status == 2
    assert said in result.err
    assert not (tmp_path / "back").exists()


def test_a_name_of_several_experts_is_no_choice(tmp_path: Path) -> None:
    out = mixture(tmp_path, text="experts: [seed, code, law, code]\n" + COPIES)
    with pytest.raises(CheckpointError, match=r"2 experts are called 'code'\. Give the number of one: 1, 3\."):
        extract(f"{out}#experts.code", tmp_path / "back")
    assert same(tensors(extract(f"{out}#experts.3", tmp_path / "back")), tensors(tmp_path / "code"))


def test_parts_of_an_ffn_are_no_models(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed",))
    text = "experts: {count: 4, make: virtual_group, shards: 2}\nffn: {top_k: 2}"
    out = merge(load_recipe(write_recipe(tmp_path, text, "sparse_upcycling", ("seed",))), options=QUICK)
    with pytest.raises(CheckpointError, match="is a part of an FFN"):
        extract(f"{out}#experts.0", tmp_path / "back")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("model.layers.0.mlp.shared_expert.down_proj.weight", "a llama model has no place for it"),
        ("model.layers.1.self_attn.k_proj.bias", "a llama model has no place for it"),
    ],
)
def test_what_a_layout_filled_in_must_still_be_that(tensor: str, said: str, tmp_path: Path) -> None:
    """A shared expert, or biases, that were trained on are part of what the mixture computes, and no llama has them."""
    out = mixture(tmp_path, "llama", COPIES, "btx", "{path: out, layout: qwen2_moe}")
    stored = tensors(out)
    for name in stored:
        if name == tensor or ("shared_expert." in name and "shared_expert." in tensor):
            stored[name] = torch.ones_like(stored[name])
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        extract(f"{out}#experts.code", tmp_path / "back")
    assert said in str(caught.value)
    assert tensor in str(caught.value) or "shared_expert" in str(caught.value)


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_of_a_tied_mixture_is_compared(equal: bool, tmp_path: Path) -> None:
    """As that of a dense source is: transformers computes with one that differs."""
    out = mixture(tmp_path, "llama_tied")
    stored = tensors(out)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone() + (0 if equal else 1)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    if equal:
        assert same(tensors(extract(f"{out}#experts.code", tmp_path / "back")), tensors(tmp_path / "code"))
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight, which differs from model\.embed_tokens\.weight"):
            extract(f"{out}#experts.code", tmp_path / "back")


def test_incomplete_mixtures_are_refused(tmp_path: Path) -> None:
    out = mixture(tmp_path)
    stored = tensors(out)
    del stored["model.layers.1.mlp.experts.1.up_proj.weight"]
    stored["model.layers.9.extra.weight"] = torch.zeros(3)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        extract(f"{out}#experts.code", tmp_path / "back")
    assert "model.layers.9.extra.weight" in str(caught.value)
    assert "model.layers.1.mlp.experts.1.up_proj.weight" in str(caught.value)


# ---- published as a merge is ---------------------------------------------------------------------------------------------------------


def test_command_publishes_whole_or_not_at_all(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = mixture(tmp_path)
    monkeypatch.chdir(tmp_path)
    first = run("extract", "out#experts.code", "back")
    assert first.status == 0
    assert "verified:" in first.out
    assert "expert code of a mixture of layout bam, as a llama model" in first.err
    assert run("verify", "back").status == 0
    again = run("extract", "out#experts.law", "back")
    assert again.status == 2
    assert "already exists" in again.err
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "code"))
    assert run("extract", "out#experts.law", "back", "--force").status == 0
    assert run("extract", "out#experts.law", "back", "--resume").status == 0
    inside = run("extract", "out#experts.code", "out/back")
    assert inside.status == 2
    assert not (out / "back").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_same_bytes_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No absolute path, and no working directory, is in what is written."""
    mixture(tmp_path)
    monkeypatch.chdir(tmp_path)
    extract("out#experts.code", "back", options=QUICK)
    before = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    extract("../out#experts.code", "../back", options=MergeOptions(force=True, verify=False))
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == before
    assert str(tmp_path).encode() not in b"".join(before.values())


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_verify_finds_what_is_not_the_experts(name: str, tmp_path: Path) -> None:
    """Another expert's tensor, and the mixture's with one element changed."""
    out = mixture(tmp_path)
    back = extract(f"{out}#experts.code", tmp_path / "back", options=QUICK)
    assert verify(back).ok
    stored = tensors(back)
    stored[name] = tensors(tmp_path / "law")[name] if "k_proj" in name else stored[name] + torch.eye(1, len(stored[name]))[0]
    save_file(stored, back / "model.safetensors", metadata={"format": "pt"})
    assert not verify(back).ok


def test_proof_reads_the_expert_by_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extraction that takes the wrong expert everywhere is not published."""
    from bam_merge.sources import experts

    out = mixture(tmp_path)
    monkeypatch.setattr(experts._Mixture, "number", lambda self, expert: 2)
    with pytest.raises(
        BamMergeError, match=r"experts: code: attn\.q is read from .*experts\.2\.q_proj.*the expert has it in .*experts\.1\."
    ):
        extract(f"{out}#experts.code", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_mixture_that_changed_is_named(tmp_path: Path) -> None:
    out = mixture(tmp_path)
    back = extract(f"{out}#experts.code", tmp_path / "back", options=QUICK)
    stored = tensors(out)
    stored["model.norm.weight"] = stored["model.norm.weight"] + 1
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    report = verify(back)
    assert any("model.norm.weight" in check.detail or "code" in check.detail for check in report.checks if check.ok is not True)


# ---- experts as sources ----------------------------------------------------------------------------------------------------------------


def test_experts_are_sources_as_their_folders_are(tmp_path: Path) -> None:
    """A merge of experts of two mixtures has the tensors of the merge of the extracted folders; text, long form and a base of an adapter."""
    one = mixture(tmp_path / "one", text="")
    two = mixture(tmp_path / "two", "llama", "", "btx", "{path: out, layout: mixtral}")
    for folder, expert in ((one, "code"), (one, "law"), (two, "code")):
        extract(f"{folder}#experts.{expert}", tmp_path / f"{folder.parent.name}_{expert}", options=QUICK)
    pairs = {
        "addressed": ("one/out#experts.code", "one/out#experts.law", "{path: two/out, expert: 1}"),
        "extracted": ("one_code", "one_law", "two_code"),
    }
    for name, (a, b, c) in pairs.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            f"method: bam\nsources: {{seed: {a!r}, b: {b!r}, c: {c if c[0] == '{' else repr(c)}}}\noutput: {{path: {name}}}\n"
        )
        merge(load_recipe(recipe))
    assert same(tensors(tmp_path / "addressed"), tensors(tmp_path / "extracted"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in pairs]
    assert configs[0] == configs[1]
    record = json.loads((tmp_path / "addressed" / "bam_merge.json").read_text())
    assert record["recipe"]["sources"] == {
        "seed": pairs["addressed"][0],
        "b": pairs["addressed"][1],
        "c": {"path": "two/out", "expert": 1},
    }
    assert verify(tmp_path / "addressed").ok


@pytest.mark.parametrize("sources", ["b: {base: 'out#experts.code', adapter: x}", "c: 'out#experts.code', b: {base: c, adapter: x}"])
def test_an_expert_is_extracted_before_it_is_adapted(sources: str, tmp_path: Path) -> None:
    recipe = tmp_path / "adapted.yaml"
    recipe.write_text(f"method: bam\nsources: {{seed: seed, {sources}}}\noutput: {{path: again}}\n")
    with pytest.raises(BamMergeError, match=r"sources\.b\.base: an expert of a mixture .* bam-merge extract out#experts\.code FOLDER"):
        load_recipe(recipe)


def test_one_expert_twice_is_one_source_twice(tmp_path: Path) -> None:
    mixture(tmp_path)
    recipe = tmp_path / "again.yaml"
    recipe.write_text("method: bam\nsources: {a: 'out#experts.code', b: 'out#experts.code'}\noutput: {path: again}\n")
    with pytest.raises(BamMergeError, match=r"sources\.b: the same folder as sources\.a"):
        merge(load_recipe(recipe))


def test_keys_of_experts_are_for_experts(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(
        "method: bam\nsources: {a: {path: a, family: llama}, b: {path: b, expert: x, dequantise: true}, d: {path: 'd#experts.x', family: llama}}\n"
        "output: {path: c}\n"
    )
    with pytest.raises(BamMergeError) as caught:
        load_recipe(recipe)
    assert "add expert, or remove this key" in str(caught.value)
    assert "mixtures are not dequantised" in str(caught.value)
    assert "sources.d.path: found 'd#experts.x': write path: d and expert: x." in str(caught.value)


def test_a_mixture_of_the_hub_is_one_too(hub: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record, which says of which family it is, is read before its weights are there; documents name it with its commit."""
    out = mixture(tmp_path, "mistral", COPIES, "btx", "{path: out, layout: mixtral}")
    hub.add("acme/mixture", out)
    monkeypatch.setattr("bam_merge.sources.hub.headers.MOST_SMALL", 10)  # so that the record is no small file
    monkeypatch.chdir(tmp_path)
    result: Result = run("extract", "acme/mixture#experts.code", "back")
    assert result.status == 0, result.err
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "code"))
    source = json.loads((tmp_path / "back" / "bam_merge.json").read_text())["recipe"]["sources"]["code"]
    assert source["expert"] == "code"
    assert source["path"].startswith("acme/mixture@")
    assert verify(tmp_path / "back").ok


# ---- looked at -------------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_dense_model(tmp_path: Path, run: Any) -> None:
    out = mixture(tmp_path)
    found, dense = inspect(f"{out}#experts.code").document(), inspect(tmp_path / "code").document()
    for key in ("model_type", "architecture", "parameters", "bytes", "layers", "experts", "kv_cache_bytes_per_token", "flops_per_token"):
        assert found[key] == dense[key], key
    assert {record["role"] for record in found["tensors"]} == {record["role"] for record in dense["tensors"]}
    assert found["findings"] == ["expert code of a mixture of layout bam, as a llama model."]
    assert run("inspect", f"{out}#experts.cod").status == 2


def test_diff_finds_the_source_in_the_mixture(tmp_path: Path, run: Any) -> None:
    out = mixture(tmp_path, "mistral", COPIES, "btx", "{path: out, layout: mixtral}")
    assert run("diff", f"{out}#experts.code", tmp_path / "code", "--only", "ffn.*").status == 0  # by the name that the manifest has
    assert run("diff", f"{out}#experts.law", tmp_path / "code", "--only", "ffn.*").status == 1
