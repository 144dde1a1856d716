"""What may be said of sources, several of it at once: merged, proved quickly and fully, and what is planted then is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PEFT, PREFIX, scale_of, write_adapter
from conftest import CONFIGS, write_sources
from damage import edit_config, edit_tensors
from proofs import UNPROVED, Forger, failed
from quantised_files import quantise
from safetensors.torch import load_file, save_file
from test_wrapped import NEW, OLD, TOWER, WRAPPED, rename, wrap
from vocabularies import END, source

from bam_merge import MergeOptions
from bam_merge.errors import CheckpointError
from bam_merge.inspecting.inspection import inspect
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.verifying.options import VerifyOptions
from bam_merge.verifying.verification import verify

Q = "model.layers.1.self_attn.q_proj"
MADE = "model.layers.1.self_attn.experts.{}.q_proj.weight"
CODE = "seed: seed, code: {base: seed, adapter: a}"


def planned(folder: Path, sources: str = CODE, text: str = "", method: str = "bam", output: str = "{path: out}") -> Plan:
    (folder / "recipe.yaml").write_text(f"method: {method}\nsources: {{{sources}}}\n{text}\noutput: {output}\n")
    return plan_file(folder / "recipe.yaml")


def proved(plan: Plan) -> Path:
    """The result, which passes quickly before it is published, and fully, as it was planned and as the manifest says."""
    folder = publish(plan, None, MergeOptions())
    for level in ("quick", "full"):
        for given in (plan, None):
            report = verify(folder, given, options=VerifyOptions(level))
            assert failed(report) == {}
            assert "sources" in {check.name for check in report.checks if check.ok}
    return folder


def found(folder: Path, fault: Callable[[Forger], Any]) -> list[dict[str, str]]:
    """What fails after a fault, quickly and fully."""
    fault(Forger(folder))
    reports = [failed(verify(folder, options=VerifyOptions(level))) for level in ("quick", "full")]
    assert all(reports)
    return reports


def expected(base: Path, name: str = f"{Q}.weight", adapter: str = "a", inside: str = f"{PREFIX}{Q}") -> torch.Tensor:
    """The base's tensor and the adapter's update, in float64 and rounded as it is stored."""
    weight, factors = load_file(base / "seed/model.safetensors")[name], load_file(base / adapter / "adapter_model.safetensors")
    a, b = (factors[f"{inside}.lora_{factor}.weight"].double() for factor in "AB")
    return (weight.double() + scale_of(PEFT) * (b @ a)).float().to(weight.dtype)


def left_out(forge: Forger, expert: int = 1) -> None:
    """The base's bytes in the place of an adapter's sum."""
    forge.write(MADE.format(expert), forge.read(MADE.format(0)))


# ---- adapters on bases under other names -----------------------------------------------------------------------------------------


def renamed(file: Path, change: Callable[[str], str], more: dict[str, torch.Tensor] | None = None) -> None:
    save_file({**{PREFIX + change(name.removeprefix(PREFIX)): value for name, value in load_file(file).items()}, **(more or {})}, file)


INSIDE: dict[str, Callable[[str], str]] = {
    "of the text model alone": lambda name: name,
    "of the old wrapper": OLD,
    "of the new wrapper": NEW,
}


@pytest.mark.parametrize("names", INSIDE)
@pytest.mark.parametrize("wrapper", ["llava", "llava, saved again", "qwen2_5_vl", "smolvlm", "llava compiled, in DDP"])
def test_an_adapter_on_a_wrapped_base(wrapper: str, names: str, tmp_path: Path) -> None:
    """It may have been trained with the wrapper around, and with updates of the vision tower, which have no part in text."""
    family, model_type, key, change, more = WRAPPED[wrapper]
    write_sources(tmp_path, {**CONFIGS[family], "tie_word_embeddings": False}, ("seed",), "BF16")
    targets: Any = rf".*{'language_model.*' if names != 'of the text model alone' else ''}self_attn\.(q|v)_proj"
    tower = {f"{PREFIX}vision_tower.layers.0.self_attn.q_proj.lora_{f}.weight": torch.ones(4, 8) for f in "AB"}
    with_tower = names == "of the old wrapper" and wrapper == "llava"
    write_adapter(tmp_path / "a", tmp_path / "seed", target_modules=["q_proj", "v_proj"] if with_tower else targets)
    plain = expected(tmp_path)
    renamed(tmp_path / "a/adapter_model.safetensors", INSIDE[names], tower if with_tower else None)
    wrap(tmp_path / "seed", model_type, key, change, more)
    plan = planned(tmp_path)
    assert len([note for note in plan.notes if f"text model of model_type {model_type}" in note]) == 1  # of the base, not once more of each
    assert set(plan.unused["seed"]) == set(more)
    assert set(plan.unused.get("code", {})) == (set(tower) if with_tower else set())
    folder = proved(plan)
    assert torch.equal(load_file(folder / "model.safetensors")[MADE.format(1)], plain)
    for report in found(folder, left_out):
        assert "layer 1, expert 1 (code)" in report["expert isolation"]
        assert MADE.format(1) in report["merges"]


PREFIXED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "in DDP": lambda name: f"module.{name}",
    "layers compiled alone": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "without its head": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("name", PREFIXED)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_a_prefixed_base(name: str, tied: bool, tmp_path: Path) -> None:
    write_sources(tmp_path, {**CONFIGS["llama"], "tie_word_embeddings": tied}, ("seed",), "BF16")
    write_adapter(tmp_path / "a", tmp_path / "seed", ("q_proj", "embed_tokens") if tied else ("q_proj", "lm_head"))
    plain = expected(tmp_path)
    rename(tmp_path / "seed", PREFIXED[name])
    plan = planned(tmp_path, text="experts: [seed, code]")
    assert len([note for note in plan.notes if "read as llama's own" in note]) == 1
    folder = proved(plan)
    assert torch.equal(load_file(folder / "model.safetensors")[MADE.format(1)], plain)
    for report in found(folder, left_out):
        assert "layer 1, expert 1 (code)" in report["expert isolation"]


def test_a_base_that_is_no_source_says_what_it_is(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("base",), "BF16")
    for number, name in enumerate(("a", "b")):
        write_adapter(tmp_path / name, tmp_path / "base", seed=number)
    wrap(tmp_path / "base", "llava", "text_config", OLD, TOWER)
    plan = planned(tmp_path, "code: {base: base, adapter: a}, law: {base: ./base, adapter: b}")
    for name in ("code", "law"):
        assert any(note.startswith(f"sources.{name}: the text model of model_type llava") for note in plan.notes)
        assert set(plan.unused[f"{name}.base"]) == set(TOWER)
    proved(plan)


# ---- 8-bit floats ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["at the top", "inside"])
@pytest.mark.parametrize("style", ["blocks", "rows", "tensors"])
def test_a_wrapped_source_of_8_bit_floats(style: str, where: str, tmp_path: Path) -> None:
    """Of the tower's scales it is said that they are the tower's."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "law"), "BF16")
    meant = quantise(tmp_path / "law", style)
    scaled = "vision_tower.layers.1.self_attn.q_proj.weight"
    ending = "_scale_inv" if style == "blocks" else "_scale"
    tower = {
        **TOWER,
        scaled: torch.ones(8, 8).to(torch.float8_e4m3fn),
        scaled + ending: torch.ones(() if style == "tensors" else (1, 1) if style == "blocks" else (8, 1)),
    }
    wrap(tmp_path / "law", "llava", "text_config", NEW, {f"model.{name}": value for name, value in tower.items()})
    config = json.loads((tmp_path / "law/config.json").read_text())
    settings = config["text_config"].pop("quantization_config")
    config |= (
        {"text_config": {**config["text_config"], "quantization_config": settings}}
        if where == "inside"
        else {"quantization_config": settings}
    )
    (tmp_path / "law/config.json").write_text(json.dumps(config))
    plan = planned(tmp_path, "seed: seed, law: {path: law, dequantise: true}")
    assert set(plan.unused["law"]) == {f"model.{name}" for name in tower}
    assert sum("multiplied with their scales" in note for note in plan.notes) == 1
    assert all("of llava: the text model alone is read" in why for why in plan.unused["law"].values())
    folder = proved(plan)
    made = load_file(folder / "model.safetensors")[MADE.format(1)]
    assert torch.equal(made, meant[f"{Q}.weight"].float().bfloat16())
    for report in found(folder, lambda forge: forge.write(MADE.format(1), (forge.read(MADE.format(1)).float() * 1.01).bfloat16())):
        assert {"merges", "expert isolation"} <= report.keys()


def test_an_adapter_on_a_base_of_8_bit_floats(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "law"), "BF16")
    write_adapter(tmp_path / "a", tmp_path / "law")
    meant = quantise(tmp_path / "law", "blocks")[f"{Q}.weight"]
    plan = planned(tmp_path, "seed: seed, law: {path: law, dequantise: true}, code: {base: law, adapter: a}", "experts: [seed, code]")
    folder = proved(plan)
    factors = load_file(tmp_path / "a/adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}{Q}.lora_{factor}.weight"].double() for factor in "AB")
    made = load_file(folder / "model.safetensors")[MADE.format(1)]
    assert torch.equal(made, (meant.float().double() + scale_of(PEFT) * (b @ a)).float().bfloat16())
    for report in found(folder, left_out):
        assert "layer 1, expert 1 (code)" in report["expert isolation"]


@pytest.mark.parametrize("names", [OLD, NEW])
def test_inspect_of_a_wrapped_model_that_is_packed(names: Callable[[str], str], tmp_path: Path) -> None:
    """Its parameters are those that it stands for, and the tower's are none of them."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed",))
    plain = inspect(tmp_path / "seed").document()["parameters"]
    module = "model.layers.0.mlp.up_proj."
    packed = {"qweight": torch.ones(32, 5, dtype=torch.int32), "qzeros": torch.ones(4, 5, dtype=torch.int32), "scales": torch.ones(4, 40)}
    added = {f"{module}{name}": tensor for name, tensor in packed.items()}
    edit_tensors(tmp_path / "seed", lambda t: (t.pop(f"{module}weight"), t.update(added)))
    wrap(
        tmp_path / "seed",
        "llava",
        "text_config",
        names,
        TOWER if names is OLD else {f"model.{name}": value for name, value in TOWER.items()},
    )
    edit_config(tmp_path / "seed", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 8})
    found = inspect(tmp_path / "seed").document()
    assert found["parameters"] == plain
    assert (found["missing"], found["unknown"]) == ([], [])
    assert "AWQ, 4 bits in groups of 8" in found["findings"][0]
    with pytest.raises(CheckpointError, match="quantised weights cannot be merged"):
        planned(tmp_path, "seed: seed", "experts: [seed, seed]")


def test_a_base_of_8_bit_floats_that_is_no_source(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "law"), "BF16")
    write_adapter(tmp_path / "a", tmp_path / "law")
    quantise(tmp_path / "law", "blocks")
    with pytest.raises(CheckpointError) as caught:
        planned(tmp_path, "seed: seed, code: {base: ./law, adapter: a}")
    (problem,) = caught.value.problems
    assert "dequantise: true" in problem
    assert problem.endswith("(As a source of its own, with a name that base: then has.)")


# ---- vocabularies ------------------------------------------------------------------------------------------------------------------


def test_a_union_with_an_adapter_on_resized_embeddings(tmp_path: Path) -> None:
    """Tokens were added, the base resized, and its new embeddings trained and saved with the adapter."""
    source(tmp_path, "seed", ["<r0>"], 32, 0)
    source(tmp_path, "base", ["<r0>", "<call>", "<result>"], 40, 0)
    ends = {f"{name}.weight": torch.randn(40, 32, generator=torch.Generator().manual_seed(1)) for name in ("model.embed_tokens", "lm_head")}
    write_adapter(tmp_path / "a", tmp_path / "base", more=ends, modules_to_save=["embed_tokens", "lm_head"])
    sources = "seed: seed, base: base, code: {base: base, adapter: a}"
    plan = planned(tmp_path, sources, "experts: [seed, code]\ntokenizer: {source: union}\nshared: {make: copy, from: code}")
    folder = proved(plan)
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"][: END + 3], ends["model.embed_tokens.weight"][: END + 3])
    assert torch.equal(written["lm_head.weight"][: END + 3], ends["lm_head.weight"][: END + 3])

    def exchanged(forge: Forger) -> None:
        rows = forge.read("model.embed_tokens.weight").clone()
        rows[[END + 1, END + 2]] = rows[[END + 2, END + 1]]
        forge.write("model.embed_tokens.weight", rows)

    for report in found(folder, exchanged):
        assert "model.embed_tokens.weight" in " ".join(report.values())


def test_a_tokenizer_beside_an_adapter(tmp_path: Path) -> None:
    """As trainers save it there: the base's own is no matter, another one is said."""
    source(tmp_path, "seed", ["<r0>"], 32, 0)
    write_adapter(tmp_path / "a", tmp_path / "seed")
    own = (tmp_path / "seed/tokenizer.json").read_text()
    (tmp_path / "a/tokenizer.json").write_text(own)
    assert not any("beside the adapter" in note for note in planned(tmp_path).notes)
    (tmp_path / "a/tokenizer.json").write_text(own.replace("<r0>", "<call>"))
    (note,) = (note for note in planned(tmp_path).notes if "beside the adapter" in note)
    assert note.startswith("sources.code: tokenizer.json beside the adapter is not the base's, and not read: tokens have the base's ids.")
    (tmp_path / "seed/tokenizer.json").unlink()
    assert any("beside the adapter" in note for note in planned(tmp_path).notes)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("method", ["bam", "btx", "merge"])
def test_a_union_of_wrapped_sources_with_an_accepted_fact(method: str, dtype: str, tmp_path: Path) -> None:
    """Tokens at other ids, a text model in a wrapper, an adapter and a norm's eps of one's own, all in one recipe."""
    source(tmp_path, "seed", ["<r0>", "<r1>"], 32, 0, dtype=dtype)
    source(tmp_path, "code", ["<r0>", "<call>"], 24, 1, rms_norm_eps=1e-6, dtype=dtype)
    source(tmp_path, "law", ["<note>"], 40, 2, dtype=dtype)
    write_adapter(tmp_path / "a", tmp_path / "code", ("q_proj", "embed_tokens", "lm_head"))
    wrap(tmp_path / "code", "llava", "text_config", OLD, TOWER)
    sources = "seed: seed, law: law, base: code, code: {base: base, adapter: a}"
    shared = "experts: [seed, law, code]\n" if method != "merge" else ""
    make = "shared: {make: mean}\n" if method != "merge" else "shared: {make: linear, weights: {seed: 0.5, law: 0.25, code: 0.25}}\n"
    text = f"{shared}{make}tokenizer: {{source: union}}\naccept: {{facts: {{rms_norm_eps: seed}}}}"
    plan = planned(tmp_path, sources, text, method)
    assert len(plan.accepted) == 1 and plan.accepted[0].startswith("rms_norm_eps of seed counts for all sources")
    folder = proved(plan)
    card = (folder / "README.md").read_text()
    assert "## Accepted differences" in card and "rms_norm_eps of seed" in card
    manifest = json.loads((folder / "bam_merge.json").read_text())
    assert manifest["accepted"] == list(plan.accepted)
    assert set(manifest["unused"]["base"]) == set(TOWER)
    for report in found(folder, lambda forge: forge.config(rms_norm_eps=1e-6)):
        assert "accepted" in report


# ---- accepted facts, levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["seed", "law"])
def test_an_accepted_norm_of_a_mixture(given: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    edit_config(tmp_path / "law", rms_norm_eps=1e-3)
    plan = planned(tmp_path, "seed: seed, code: code, law: law", f"accept: {{facts: {{rms_norm_eps: {given}}}}}")
    folder = proved(plan)
    theirs = 1e-3 if given == "law" else 1e-5
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == theirs
    for level in ("quick", "full"):
        (check,) = (check for check in verify(folder, options=VerifyOptions(level)).checks if check.name == "accepted")
        assert ("law" if given == "seed" else "seed and code") in check.detail
    for report in found(folder, lambda forge: forge.config(rms_norm_eps=1e-3 if given == "seed" else 1e-5)):
        assert "accepted" in report


# ---- heads -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [("q_proj",), ("q_proj", "embed_tokens"), ("q_proj", "lm_head")])
@pytest.mark.parametrize("accept", ["stored", "tied"])
def test_an_adapter_on_a_base_whose_head_differs_from_its_embeddings(accept: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    """What is accepted of the base's head counts before the adapter: stored, an update of the head is the head's alone."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed",))
    write_adapter(tmp_path / "a", tmp_path / "seed", modules)
    edit_config(tmp_path / "seed", tie_word_embeddings=True)
    base = load_file(tmp_path / "seed/model.safetensors")
    plan = planned(tmp_path, text=f"experts: [seed, code]\naccept: {{head: {accept}}}\nshared: {{make: copy, from: code}}")
    assert len(plan.accepted) == 1 and ("counts" if accept == "stored" else "is dropped") in plan.accepted[0]
    folder = proved(plan)
    written = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in written) == (accept == "stored")
    changed = {
        name: not torch.equal(written[name], base[name]) for name in ("model.embed_tokens.weight", "lm_head.weight") if name in written
    }
    if accept == "stored":
        assert changed == {"model.embed_tokens.weight": "embed_tokens" in modules, "lm_head.weight": "lm_head" in modules}
    else:
        assert changed == {"model.embed_tokens.weight": len(modules) > 1}
    for report in found(folder, left_out):
        assert "layer 1, expert 1 (code)" in report["expert isolation"]


@pytest.mark.parametrize("modules", [("q_proj",), ("q_proj", "embed_tokens")])
def test_a_tied_adapted_source_beside_one_with_its_own_head(modules: tuple[str, ...], tmp_path: Path) -> None:
    """The embeddings, with what the adapter does to them, serve as its head."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "law"))
    tensors = load_file(tmp_path / "seed/model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "seed/model.safetensors")
    edit_config(tmp_path / "seed", tie_word_embeddings=True)
    write_adapter(tmp_path / "a", tmp_path / "seed", modules)
    text = "experts: [law, code]\naccept: {head: stored}\nshared: {make: copy, from: code}"
    plan = planned(tmp_path, "law: law, seed: seed, code: {base: seed, adapter: a}", text)
    folder = proved(plan)
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert torch.equal(written["lm_head.weight"], tensors["model.embed_tokens.weight"]) == (len(modules) == 1)
    for report in found(folder, lambda forge: forge.write("lm_head.weight", forge.read("lm_head.weight") * 1.5)):
        assert "head" in report or "copies" in report or "merges" in report


def test_unproved_results_are_the_same_bytes(tmp_path: Path) -> None:
    """Whether a merge is proved changes nothing of it."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed",), "BF16")
    write_adapter(tmp_path / "a", tmp_path / "seed")
    wrap(tmp_path / "seed", "llava", "text_config", NEW, TOWER)
    first = publish(planned(tmp_path, output="{path: one}"), None, UNPROVED)
    second = publish(planned(tmp_path, output="{path: two}"), None, MergeOptions(verify="full"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
