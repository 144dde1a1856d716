"""What a recipe accepts of sources that differ: named keys, named facts, heads; shown everywhere, proved under what was accepted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from damage import edit_config
from proofs import UNPROVED, Forger, failed
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions
from bam_merge.demo.synthetic import branched_values, write_checkpoint
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.accepting import ACCEPTABLE, NEVER
from bam_merge.verifying.verification import verify

IDS = torch.arange(3, 27).view(2, 12)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


def details(folder: Path, plan: Any = None) -> dict[str, str]:
    return {check.name: check.detail for check in verify(folder, plan).checks}


# ---- keys that no table knows --------------------------------------------------------------------------------------------------


def test_a_named_key_that_differs(llamas: Path, run: Any) -> None:
    edit_config(llamas / "law", my_key=1, my_other=[2])
    edit_config(llamas / "code", my_key=3)
    recipe = write_recipe(llamas, "accept: {config: [my_key]}")
    result = run("plan", recipe)
    assert result.status == 2
    assert result.err.splitlines() == [
        "error: sources.law: config.json has my_other = [2], sources.seed has none; llama's table does not know this key, so it may matter. "
        "Make them agree, or accept it: accept: {config: [my_other]}."
    ]
    recipe = write_recipe(llamas, "accept: {config: [my_key, my_other]}")
    result = run("plan", recipe)
    assert result.status == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("accepted ")]
    assert [line.split(": ")[0] for line in lines] == ["accepted     config key my_key differs", "accepted     config key my_other differs"]
    assert "seed has none, code has 3, law has 1" in lines[0]
    plan = plan_file(recipe)
    assert {"my_key", "my_other"}.isdisjoint(plan.config)
    folder = publish(plan, None, MergeOptions())
    manifest = json.loads((folder / "bam_merge.json").read_text())
    assert manifest["recipe"]["accept"] == {"config": ["my_key", "my_other"]}
    assert manifest["accepted"] == list(plan.accepted)
    card = (folder / "README.md").read_text()
    assert "## Accepted differences" in card
    assert "config key my_key differs: seed has none, code has 3, law has 1." in card
    assert failed(verify(folder)) == {}


@pytest.mark.parametrize(("keys", "accepted", "note"), [
    ({"use_mrope": False}, "use_mrope", "accept.config: use_mrope need not be accepted: it changes nothing at these values."),
    ({"hidden_act": "silu"}, "initializer_range", "accept.config: initializer_range need not be accepted: llama's table knows it, and it is compared."),
])  # fmt: skip
def test_what_need_not_be_accepted_is_a_note(keys: dict[str, Any], accepted: str, note: str, llamas: Path, run: Any) -> None:
    edit_config(llamas / "law", **keys)
    plan = json.loads(run("plan", write_recipe(llamas, f"accept: {{config: [{accepted}]}}"), "--json").out)
    assert plan["notes"] == [note]
    assert plan["accepted"] == []


def test_a_key_in_which_no_source_differs_is_a_note(llamas: Path) -> None:
    for name in ("seed", "code", "law"):
        edit_config(llamas / name, my_key=1)
    plan = plan_file(write_recipe(llamas, "accept: {config: [my_key]}"))
    assert "accept.config: my_key need not be accepted: no source differs in it." in plan.notes
    assert any("my_key not known to llama's table" in note for note in plan.notes)


@pytest.mark.parametrize(("accept", "message"), [
    ("{config: [my_kee]}", "accept.config[0]: no source's config.json has my_kee; did you mean 'my_key'?"),
    ("{config: [zzz, my_key]}", "accept.config[0]: no source's config.json has zzz. Correct or remove it."),
    ("{config: [rms_norm_eps]}", "accept.config[0]: rms_norm_eps is a known fact; write accept: {facts: {rms_norm_eps: SOURCE}}, whose value counts."),
    ("{config: [rope_theta]}", "accept.config[0]: rope_theta is a known fact; write accept: {facts: {rope_parameters: SOURCE}}, whose value counts."),
    ("{config: [num_attention_heads]}", "accept.config[0]: num_attention_heads is never accepted: it is a size: tensors of two sizes"),
    ("{config: [my_key, my_key]}", "accept.config[1]: my_key stands twice. Remove one."),
    ("{config: []}", "accept.config: found [], expected at least 1 entry."),
    ("{facts: {rms_norm_eps: sed}}", "accept.facts.rms_norm_eps: 'sed' is not among the sources; did you mean 'seed'?"),
    ("{facts: {rms_norm_esp: seed}}", "accept.facts.rms_norm_esp: is no fact that can be accepted; did you mean 'rms_norm_eps'? Known: rms_norm_eps, "),
    ("{facts: {rope_theta: seed}}", "accept.facts.rope_theta: is a part of rope_parameters, which counts as one whole. Write rope_parameters."),
    ("{facts: {layer_types: seed}}", "accept.facts.layer_types: is a part of sliding_window"),
    ("{facts: {hidden_size: seed}}", "accept.facts.hidden_size: is never accepted: it is a size"),
    ("{facts: {vocab_size: seed}}", "accept.facts.vocab_size: is never accepted: rows of the embeddings are tokens"),
    ("{facts: {head_dim: seed}}", "accept.facts.head_dim: is never accepted: it is a size"),
    ("{facts: {hidden_act: seed}}", "accept.facts.hidden_act: is never accepted: weights that were trained with one activation"),
    ("{facts: {tie_word_embeddings: seed}}", "accept.facts.tie_word_embeddings: is never accepted: whether a head is the embeddings"),
    ("{facts: {rms_norm_eps: 1}}", "accept.facts.rms_norm_eps: found 1 (in quotes it is text), expected text."),
    ("{head: untied}", "accept.head: found 'untied', expected stored or tied; did you mean 'tied'?"),
    ("{heads: tied}", "accept.heads: unknown key; did you mean 'head'?"),
    ("[use_mrope]", "accept: found [\"use_mrope\"], expected a mapping."),
])  # fmt: skip
def test_what_is_wrong_in_it_is_said(accept: str, message: str, llamas: Path, run: Any) -> None:
    edit_config(llamas / "law", my_key=1)
    result = run("plan", write_recipe(llamas, f"accept: {accept}"))
    assert result.status == 2
    assert any(message in line for line in result.err.splitlines()), result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("key", ["is_causal", "per_layer_config"])
def test_what_transformers_reads_is_never_accepted(key: str, llamas: Path, run: Any) -> None:
    edit_config(llamas / "law", **{key: {"0": {"rms_norm_eps": 0.5}} if key == "per_layer_config" else False})
    result = run("plan", write_recipe(llamas, f"accept: {{config: [{key}]}}"))
    assert result.status == 2
    assert f"config.json: {key} = " in result.err


# ---- facts ---------------------------------------------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "eps": ("llama", "rms_norm_eps", {"rms_norm_eps": 1e-2}, {"rms_norm_eps": 1e-3}),
    "eps of a layer norm": ("gpt_neox", "layer_norm_eps", {}, {"layer_norm_eps": 1e-2}),
    "eps left out": ("cohere", "layer_norm_eps", {"layer_norm_eps": 1e-2}, {}),
    "logit scale": ("cohere", "logit_scale", {"logit_scale": 0.5}, {}),
    "base": ("llama", "rope_parameters", {"rope_theta": 10000.0}, {"rope_theta": 500.0}),
    "base in the other spelling": ("llama", "rope_parameters", {"rope_theta": 10000.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "base of gpt_neox": ("gpt_neox", "rope_parameters", {"rotary_emb_base": 10000, "rotary_pct": 0.5}, {"rotary_emb_base": 500, "rotary_pct": 0.5}),
    "scaling": ("qwen3", "rope_parameters", {}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512}),
    "a window": ("mistral", "sliding_window", {"sliding_window": 4}, {"sliding_window": None}),
    "which layers slide": ("qwen2", "sliding_window", WINDOW, {}),
}  # fmt: skip


@pytest.mark.parametrize("decides", ["seed", "law"])
@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("method", ["bam", "merge"])
def test_a_fact_of_one_source_counts_for_all(name: str, method: str, decides: str, tmp_path: Path) -> None:
    """The result computes what the dense models compute at the accepted value: its config says it, and verification holds it."""
    family, fact, here, there = DIFFERENT[name]
    plain = {**CONFIGS[family], "num_hidden_layers": 2}
    write_sources(tmp_path, {**plain, **here}, ("seed", "code"))
    write_checkpoint(tmp_path / "law", {**plain, **there}, branched_values(7, 2))
    with pytest.raises(CheckpointError, match=f"accept: {{facts: {{{fact}: seed}}}}"):
        plan_file(write_recipe(tmp_path, method=method))
    recipe = write_recipe(tmp_path, f"accept: {{facts: {{{fact}: {decides}}}}}", method)
    plan = plan_file(recipe)
    assert len(plan.accepted) == 1
    others = ["law"] if decides == "seed" else ["seed", "code"]
    assert plan.accepted[0].startswith(f"{fact} of {decides} counts for all sources (")
    assert all(f"{other}: " in plan.accepted[0] for other in others)
    folder = publish(plan, None, MergeOptions())
    found = details(folder)
    assert f"compared with {fact} of {decides}, as accepted" in found["accepted"]
    assert failed(verify(folder)) == {}
    # the same merge of sources that agree, at the accepted value
    for source in ("seed", "code", "law"):
        edit_config(tmp_path / source, **dict.fromkeys(ACCEPTABLE[fact].keys, ...))
        edit_config(
            tmp_path / source,
            **{key: value for key, value in {**plain, **(here if decides == "seed" else there)}.items() if key in ACCEPTABLE[fact].keys},
        )
    agreed = publish(plan_file(write_recipe(tmp_path, method=method, output="{path: agreed}")), None, UNPROVED)
    assert json.loads((folder / "config.json").read_text()) == json.loads((agreed / "config.json").read_text())
    ids = torch.arange(60)[None] % 64
    assert torch.equal(load_model(folder)(ids), load_model(agreed)(ids))


def test_the_accepted_config_is_what_transformers_reads(tmp_path: Path) -> None:
    """A dense merge of Mistrals, one without a window: the output has it spelled as the source that decides."""
    transformers = pytest.importorskip("transformers")
    write_sources(tmp_path, {**CONFIGS["mistral"], "sliding_window": 4}, ("seed",))
    write_checkpoint(tmp_path / "law", {**CONFIGS["mistral"], "sliding_window": None}, branched_values(7, 2))
    recipe = write_recipe(tmp_path, "accept: {facts: {sliding_window: law}}", "merge", ("seed", "law"))
    folder = publish(plan_file(recipe), None, MergeOptions())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.sliding_window is None
    with torch.no_grad():
        assert float((model(IDS).logits - load_model(folder)(IDS)).abs().max()) < 1e-5


def test_what_is_not_accepted_is_still_refused(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "code"))
    write_checkpoint(tmp_path / "law", {**CONFIGS["llama"], "rms_norm_eps": 1e-3, "rope_theta": 500.0}, branched_values(7, 2))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path, "accept: {facts: {rms_norm_eps: seed}}"))
    assert len(error.value.problems) == 1
    assert "rotary embedding differs" in error.value.problems[0]


def test_the_share_of_a_head_that_turns_is_never_accepted(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gpt_neox"], ("seed", "code"))
    write_checkpoint(tmp_path / "law", {**CONFIGS["gpt_neox"], "rotary_pct": 0.5}, branched_values(7, 2))
    with pytest.raises(
        CheckpointError,
        match=r"accept\.facts\.rope_parameters: the share of a head that turns differs \(seed 0\.25, code 0\.25, law 0\.5\)",
    ):
        plan_file(write_recipe(tmp_path, "accept: {facts: {rope_parameters: seed}}"))


@pytest.mark.parametrize(
    ("fact", "why"),
    [("rms_norm_eps", "no source differs in it"), ("logit_scale", "no source differs in it"), ("layer_norm_eps", "llama has no such fact")],
)
def test_a_fact_that_need_not_be_accepted_is_a_note(fact: str, why: str, llamas: Path) -> None:
    plan = plan_file(write_recipe(llamas, f"accept: {{facts: {{{fact}: law}}}}"))
    assert f"accept.facts: {fact} need not be accepted: {why}." in plan.notes
    assert plan.accepted == ()


def test_acceptable_and_never_are_two_things() -> None:
    said = {key for fact, what in ACCEPTABLE.items() for key in (fact, *what.keys, *what.parts)}
    assert said.isdisjoint(NEVER)
    assert {"num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size"} <= NEVER.keys()


def test_a_recipe_without_it_records_nothing(llamas: Path) -> None:
    folder = publish(plan_file(write_recipe(llamas)), None, UNPROVED)
    manifest = json.loads((folder / "bam_merge.json").read_text())
    assert "accept" not in manifest["recipe"]
    assert "accepted" not in manifest
    assert "Accepted" not in (folder / "README.md").read_text()


# ---- verification under what was accepted ---------------------------------------------------------------------------------------


def merged(tmp_path: Path, **other: Any) -> Path:
    write_sources(tmp_path, {**CONFIGS["llama"], "rms_norm_eps": 1e-2}, ("seed", "code"))
    write_checkpoint(tmp_path / "law", {**CONFIGS["llama"], "rms_norm_eps": 0.5, **other}, branched_values(7, 2))
    return publish(plan_file(write_recipe(tmp_path, "accept: {facts: {rms_norm_eps: seed}}")), None, MergeOptions())


def test_another_value_than_the_accepted_one_is_found(tmp_path: Path) -> None:
    """As if planning had taken the value of the wrong source, for the config and its own record alike."""
    folder = merged(tmp_path)
    Forger(folder).config(rms_norm_eps=0.5)
    wrong = failed(verify(folder))
    assert "norm is not that of seed, whose rms_norm_eps the recipe accepts" in wrong["accepted"]
    assert "seed: norm is" in wrong["source configs"]
    assert "expert isolation" in wrong


def test_a_fault_in_another_fact_is_found_beside_it(tmp_path: Path) -> None:
    folder = merged(tmp_path)
    Forger(folder).config(rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0})
    wrong = failed(verify(folder))
    assert "rotary frequencies" in wrong["source configs"]
    assert "accepted" not in wrong


def test_warnings_that_are_left_out_are_found(tmp_path: Path) -> None:
    folder = merged(tmp_path)
    Forger(folder).record(lambda manifest: manifest.pop("accepted"))
    assert "accepted is null" in failed(verify(folder))["provenance"]
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("## Accepted differences", "## Nothing"))
    assert "card" in failed(verify(folder))


# ---- heads ---------------------------------------------------------------------------------------------------------------------


def heads(tmp_path: Path, own: tuple[str, ...] = ("law",), untied: tuple[str, ...] = (), config: str = "llama_tied") -> Path:
    """Three tied models; `own` store another head all the same, those in `untied` say so."""
    write_sources(tmp_path, CONFIGS[config])
    for index, name in enumerate(own):
        tensors = load_file(tmp_path / name / "model.safetensors")
        embed = next(key for key in tensors if "embed" in key)
        head = HEAD if config != "gpt_neox" else "embed_out.weight"
        tensors[head] = torch.randn(tensors[embed].shape, generator=torch.Generator().manual_seed(index)) * 0.05
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    for name in untied:
        edit_config(tmp_path / name, tie_word_embeddings=False)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "untied"),
    [(("law",), ()), (("seed", "law"), ()), (("seed", "code", "law"), ()), (("law",), ("law",)), (("code", "law"), ("code",))],
)
@pytest.mark.parametrize(("method", "layout"), [("bam", "bam"), ("btx", "mixtral"), ("merge", "llama")])
def test_stored_heads_count(method: str, layout: str, own: tuple[str, ...], untied: tuple[str, ...], tmp_path: Path) -> None:
    """The result is untied; of those that have no head of their own, the embeddings serve."""
    recipe = write_recipe(heads(tmp_path, own, untied), "accept: {head: stored}", method, output=f"{{path: out, layout: {layout}}}")
    plan = plan_file(recipe)
    assert plan.config["tie_word_embeddings"] is False
    (step,) = (step for step in plan.steps if step.role == "head")
    expected = {name: HEAD if name in own else EMBED for name in ("seed", "code", "law")}
    assert {read["source"]: read["tensor"] for read in step.reads} == expected
    assert len(plan.accepted) == len([name for name in own if name not in untied]) + 3 - len(own)
    for name in ("seed", "code", "law"):
        if name not in own:
            assert any(f"the embeddings of {name} serve as its head" in warning for warning in plan.accepted)
    folder = publish(plan, None, MergeOptions())
    stored = load_file(folder / "model.safetensors")[HEAD]
    sources = [load_file(tmp_path / name / "model.safetensors")[tensor] for name, tensor in expected.items()]
    assert float((stored - sum(sources) / 3).abs().max()) < 1e-7
    assert failed(verify(folder)) == {}
    if layout != "bam":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            assert float((theirs(IDS).logits - load_model(folder)(IDS)).abs().max()) < 1e-5


@pytest.mark.parametrize("config", ["llama_tied", "gpt_neox"])
@pytest.mark.parametrize("own", [("law",), ("seed", "code", "law")])
def test_tied_drops_them(config: str, own: tuple[str, ...], tmp_path: Path) -> None:
    heads(tmp_path, own, config=config)
    if config == "gpt_neox":
        for name in ("seed", "code", "law"):
            edit_config(tmp_path / name, tie_word_embeddings=True)
            tensors = load_file(tmp_path / name / "model.safetensors")
            if name not in own:
                del tensors["embed_out.weight"]
                save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(tmp_path, "accept: {head: tied}")
    plan = plan_file(recipe)
    assert plan.config["tie_word_embeddings"] is True
    assert len(plan.accepted) == len(own)
    assert all("is dropped, since config.json ties it" in warning for warning in plan.accepted)
    assert all(
        set(plan.unused[name].values()) == {"it differs from the embeddings that config.json ties it to, and the recipe accepts head: tied"}
        for name in own
    )
    folder = publish(plan, None, MergeOptions())
    assert failed(verify(folder)) == {}
    assert not any("head" in name or "embed_out" in name for name in load_file(folder / "model.safetensors"))


def test_tied_is_no_answer_for_one_that_is_untied(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Tied and untied models cannot be mixed"):
        plan_file(write_recipe(heads(tmp_path, untied=("law",)), "accept: {head: tied}"))


@pytest.mark.parametrize("head", ["stored", "tied"])
def test_heads_that_need_not_be_accepted_are_a_note(head: str, tmp_path: Path) -> None:
    plan = plan_file(write_recipe(heads(tmp_path, ()), f"accept: {{head: {head}}}"))
    assert f"accept.head: {head} need not be accepted: no head differs from embeddings that it is tied to." in plan.notes
    assert plan.config["tie_word_embeddings"] is True


def test_a_head_of_another_shape_is_not_accepted(tmp_path: Path) -> None:
    heads(tmp_path)
    tensors = load_file(tmp_path / "law" / "model.safetensors")
    save_file({**tensors, HEAD: torch.zeros(65, 32)}, tmp_path / "law" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BamMergeError, match=r"sources\.law: .* differs from"):
        plan_file(write_recipe(tmp_path, "accept: {head: stored}"))


def test_verification_reads_the_accepted_head_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that lost the head it was to take does not pass."""
    from bam_merge.sources import tied_heads

    heads(tmp_path, ("seed", "code", "law"))
    monkeypatch.setattr(tied_heads, "difference", lambda *args: "")
    plan = plan_file(write_recipe(tmp_path, "accept: {head: stored}"))
    assert plan.config["tie_word_embeddings"] is True
    wrong = failed(verify(publish(plan, None, UNPROVED), plan))
    assert "its head is not its embeddings, the result's is" in wrong["head"]


def test_verification_knows_what_tied_dropped(tmp_path: Path) -> None:
    """And a result that took the dropped head does not pass."""
    heads(tmp_path, ("seed", "code", "law"))
    stored = publish(plan_file(write_recipe(tmp_path, "accept: {head: stored}")), None, UNPROVED)
    plan = plan_file(write_recipe(tmp_path, "accept: {head: tied}"))
    wrong = failed(verify(stored, plan))
    assert "its head is its embeddings, the result has a head of its own" in wrong["head"]
