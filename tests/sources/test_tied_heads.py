"""Heads beside tied embeddings: equal ones are dropped aloud, others refused; tied and untied sources mix where heads equal embeddings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED, failed
from safetensors.torch import load_file, save_file

from bam_merge.demo.synthetic import branched_values, random_values, write_checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import load_model, open_model
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.sources import tied_heads
from bam_merge.verifying.verification import verify

IDS = torch.arange(3, 27).view(2, 12)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def store(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change the tensors of a folder's one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_head(head: torch.Tensor | None = None, embed: torch.Tensor | None = None) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Store a head, by default a copy of the embeddings."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if embed is not None:
            tensors[EMBED] = embed
        tensors[HEAD] = tensors[EMBED].clone() if head is None else head

    return change


def tied(folder: Path, *, copies: tuple[str, ...] = ("seed", "code", "law"), config: str = "llama_tied", **options: Any) -> Path:
    """Three tied sources, of which `copies` store the head as well."""
    write_sources(folder, CONFIGS[config], **options)
    for name in copies:
        store(folder / name, with_head())
    return folder


# ---- one source -------------------------------------------------------------------------------------------------------------


def test_equal_heads_are_dropped_aloud(tmp_path: Path) -> None:
    recipe = write_recipe(tied(tmp_path, copies=("code", "law")))
    plan = plan_file(recipe)
    assert {step.name for step in plan.steps if step.role == "head"} == set()
    assert plan.config["tie_word_embeddings"] is True
    assert plan.unused["law"] == plan.unused["code"] == {HEAD: "the head is tied to the embeddings, and this copy equals them"}
    assert plan.unused["seed"] == {}


@pytest.mark.parametrize("place", [0, 1, 1023, 2047])
def test_one_other_bit_anywhere_is_refused_with_both_ways_out(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 128 elements here, so that the first, another and the last piece are looked at."""
    monkeypatch.setattr(tied_heads, "PIECE", 128)
    tied(tmp_path)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD].view(-1).view(torch.int32)[place] ^= 1

    store(tmp_path / "law", flip)
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert error.value.problems == (
        f"sources.law: config.json has tie_word_embeddings=true, but the file holds lm_head.weight, which differs from {EMBED} "
        f"(first in element {place:,}). transformers computes with the stored head, other programs with the embeddings. Set "
        "tie_word_embeddings to false in config.json, so that the stored head counts; or remove lm_head.weight, so that the embeddings count. "
        "Or say it in the recipe: accept: {head: stored}, or accept: {head: tied}.",
    )


def test_either_way_out_mends_it(tmp_path: Path) -> None:
    tied(tmp_path)
    for name in ("seed", "code", "law"):
        store(tmp_path / name, with_head(torch.randn(64, 32)))
    recipe = write_recipe(tmp_path)
    with pytest.raises(CheckpointError) as error:
        plan_file(recipe)
    assert len(error.value.problems) == 3
    for name in ("seed", "code", "law"):
        edit(tmp_path / name, tie_word_embeddings=False)
    assert HEAD in {step.name for step in plan_file(recipe).steps}
    for name in ("seed", "code", "law"):
        store(edit(tmp_path / name, tie_word_embeddings=True), lambda tensors: tensors.pop(HEAD))
    assert HEAD not in {step.name for step in plan_file(recipe).steps}


def test_the_head_question_is_reported_with_all_others(tmp_path: Path) -> None:
    tied(tmp_path)
    store(tmp_path / "law", with_head(torch.zeros(64, 32)))
    edit(tmp_path / "code", rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path, "rules: [{roles: [attn.q_norm], make: mean}]"))
    text = str(error.value)
    assert all(words in text for words in ("lm_head.weight, which differs", "sources.code: rms_norm_eps", "attn.q_norm matches no tensor"))


def test_bytes_count_not_values(tmp_path: Path) -> None:
    """NaN equals itself, and zero is not minus zero: of one dtype the bytes are compared."""
    tied(tmp_path)
    embed = torch.randn(64, 32)
    embed[3, 4], embed[5, 6] = float("nan"), 0.0
    store(tmp_path / "law", with_head(embed.clone(), embed))
    assert HEAD in plan_file(write_recipe(tmp_path)).unused["law"]
    other = embed.clone()
    other[5, 6] = -0.0
    store(tmp_path / "law", with_head(other))
    with pytest.raises(CheckpointError, match="first in element 166"):
        plan_file(write_recipe(tmp_path))


@pytest.mark.parametrize(("embed", "head"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float16),
    (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float64), (torch.float64, torch.float16),
])  # fmt: skip
def test_of_two_dtypes_the_exact_values_are_compared(embed: torch.dtype, head: torch.dtype, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama_tied"], ("seed",))
    values = (torch.arange(2048).view(64, 32) % 251 - 125).double() / 64  # all of them exact in eight bits
    store(tmp_path / "seed", with_head(values.to(head), values.to(embed)))
    recipe = write_recipe(tmp_path, "experts: [seed, seed]", "sparse_upcycling", ("seed",))
    assert HEAD in plan_file(recipe).unused["seed"]
    assert not open_model(tmp_path / "seed").config.num_experts
    off = values.clone()
    off[63, 31] += 2**-7
    store(tmp_path / "seed", with_head(off.to(head), values.to(embed)))
    with pytest.raises(CheckpointError, match="first in element 2,047"):
        plan_file(recipe)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored and differs"):
        open_model(tmp_path / "seed")


@pytest.mark.parametrize("head", [torch.zeros(65, 32), torch.zeros(64, 32, dtype=torch.int8)])
def test_other_shapes_and_dtypes_differ(head: torch.Tensor, tmp_path: Path) -> None:
    tied(tmp_path)
    store(tmp_path / "code", with_head(head))
    with pytest.raises(CheckpointError, match=r"sources\.code: .* differs from"):
        plan_file(write_recipe(tmp_path))
    with pytest.raises(CheckpointError, match="differs from the embeddings"):
        open_model(tmp_path / "code")


@pytest.mark.parametrize(("family", "embed", "name"), [
    ("gpt_neox", "gpt_neox.embed_in.weight", "embed_out.weight"), ("gpt_neox", "gpt_neox.embed_in.weight", "lm_head.weight"),
    ("cohere", EMBED, HEAD), ("qwen3", EMBED, HEAD), ("phi3", EMBED, HEAD),
])  # fmt: skip
def test_every_family(family: str, embed: str, name: str, tmp_path: Path) -> None:
    """Cohere ties where config.json says nothing."""
    config = CONFIGS[family] if family == "cohere" else {**CONFIGS[family], "tie_word_embeddings": True}
    write_sources(tmp_path, config, ("seed",))
    recipe = write_recipe(tmp_path, "experts: [seed, seed]", "sparse_upcycling", ("seed",))
    store(tmp_path / "seed", lambda tensors: tensors.update({name: tensors[embed].clone()}))
    assert set(plan_file(recipe).unused["seed"]) == {name}
    store(tmp_path / "seed", lambda tensors: tensors.update({name: tensors[embed] + 1}))
    with pytest.raises(CheckpointError, match=f"holds {name}, which differs from {embed}"):
        plan_file(recipe)
    with pytest.raises(CheckpointError, match=f"{name} is stored and differs"):
        load_model(tmp_path / "seed")


def test_nothing_is_read_where_there_is_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*args: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(tied_heads, "read_runs", unwanted)
    write_sources(tmp_path, CONFIGS["llama"])
    for name in ("seed", "code", "law"):
        store(tmp_path / name, with_head())
    assert HEAD in {step.name for step in plan_file(write_recipe(tmp_path)).steps}
    shutil.rmtree(tmp_path / "seed")
    tied(tmp_path, copies=())
    assert plan_file(write_recipe(tmp_path)).config["tie_word_embeddings"] is True


# ---- tied beside untied -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untied", [("seed",), ("law",), ("seed", "code")])
@pytest.mark.parametrize(("method", "layout"), [("bam", "bam"), ("btx", "mixtral"), ("merge", "llama")])
def test_a_head_that_equals_the_embeddings_beside_tied_sources(method: str, layout: str, untied: tuple[str, ...], tmp_path: Path) -> None:
    """The output is tied, says so, and computes with the embeddings."""
    tied(tmp_path, copies=untied)
    for name in untied:
        edit(tmp_path / name, tie_word_embeddings=False)
    plan = plan_file(write_recipe(tmp_path, method=method, output=f"{{path: out, layout: {layout}}}"))
    assert plan.config["tie_word_embeddings"] is True
    assert all("the head equals the embeddings, and sources." in plan.unused[name][HEAD] for name in untied)
    folder = publish(plan, None, UNPROVED)
    assert HEAD not in load_file(folder / "model.safetensors")
    assert failed(verify(folder, plan)) == {}
    if method == "merge":
        state = [load_model(tmp_path / name).state_dict() for name in ("seed", "code", "law")]
        assert torch.equal(load_model(folder).state_dict()[EMBED], sum(one[EMBED] for one in state) / 3)
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            assert float((theirs(input_ids=IDS).logits - load_model(folder)(IDS)).abs().max()) < 1e-5


def test_a_config_that_leaves_the_tie_out(tmp_path: Path) -> None:
    """llama's default is untied: the output must say that it is tied, although the seed's file has no such key."""
    tied(tmp_path, copies=("seed",))
    config = json.loads((tmp_path / "seed" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "seed" / "config.json").write_text(json.dumps(config))
    plan = plan_file(write_recipe(tmp_path, method="merge"))
    assert plan.config["tie_word_embeddings"] is True


def test_a_head_that_differs_beside_tied_sources_is_refused(tmp_path: Path) -> None:
    tied(tmp_path, copies=())
    edit(store(tmp_path / "law", with_head(torch.zeros(64, 32))), tie_word_embeddings=False)
    with pytest.raises(
        CheckpointError, match=r"sources\.law: tie_word_embeddings = false, sources\.seed has true .* untie the others first"
    ):
        plan_file(write_recipe(tmp_path))


# ---- the index, and reading a folder ----------------------------------------------------------------------------------------


def list_head(folder: Path, name: str = HEAD) -> None:
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    names = [*load_file(folder / shard), name]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))


def test_an_index_may_list_a_tied_head(tmp_path: Path) -> None:
    tied(tmp_path, copies=())
    list_head(tmp_path / "law")
    plan = plan_file(write_recipe(tmp_path))
    assert any("law: model.safetensors.index.json lists lm_head.weight, which no shard holds" in note for note in plan.notes)
    assert torch.equal(load_model(tmp_path / "law")(IDS), load_model(tmp_path / "law")(IDS))


@pytest.mark.parametrize(("config", "name"), [("llama", HEAD), ("llama_tied", "model.norm.bias"), ("gpt_neox", "embed_out.weight")])
def test_an_index_may_list_nothing_else_that_is_not_there(config: str, name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIGS[config], random_values(1))
    store(folder, lambda tensors: tensors.pop(name, None))
    list_head(folder, name)
    with pytest.raises(CheckpointError, match=f"lists {name}, which no shard holds"):
        open_model(folder)


def test_loading_takes_a_copy_and_refuses_another_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIGS["llama_tied"], random_values(1))
    expected = load_model(folder)(IDS)
    assert torch.equal(load_model(store(folder, with_head()))(IDS), expected)
    with pytest.raises(CheckpointError, match=r"Set it to false, so that the stored head counts; or remove lm_head\.weight"):
        load_model(store(folder, with_head(torch.zeros(64, 32))))


@pytest.mark.parametrize("layout", ["bam", "mixtral"])
def test_a_mixture_with_another_head(layout: str, tmp_path: Path) -> None:
    plan = plan_file(write_recipe(tied(tmp_path), method="btx", output=f"{{path: out, layout: {layout}}}"))
    folder = publish(plan, None, UNPROVED)
    expected = load_model(folder)(IDS)
    assert torch.equal(load_model(store(folder, with_head()))(IDS), expected)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored and differs from the embeddings"):
        load_model(store(folder, with_head(torch.zeros(64, 32))))


# ---- verification does not share the plan's reading -----------------------------------------------------------------------------


def merged(tmp_path: Path, method: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Plan]:
    """A merge whose plan takes every stored head for a copy of the embeddings."""
    monkeypatch.setattr(tied_heads, "difference", lambda *args: "")
    plan = plan_file(write_recipe(tmp_path, method=method, output=f"{{path: out, layout: {layout}}}"))
    return publish(plan, None, UNPROVED), plan


@pytest.mark.parametrize(("method", "layout"), [("bam", "bam"), ("btx", "mixtral"), ("merge", "llama")])
def test_verification_finds_a_tied_head_that_was_dropped_wrongly(
    method: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied(tmp_path)
    store(tmp_path / "law", with_head(torch.randn(64, 32)))
    folder, plan = merged(tmp_path, method, layout, monkeypatch)
    assert "law: lm_head.weight is stored and differs from the embeddings" in failed(verify(folder, plan))["model"]


@pytest.mark.parametrize(("method", "layout"), [("bam", "bam"), ("btx", "mixtral"), ("merge", "llama")])
def test_verification_finds_an_untied_head_that_was_dropped_wrongly(
    method: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied(tmp_path, copies=())
    write_checkpoint(tmp_path / "law", {**CONFIGS["llama_tied"], "tie_word_embeddings": False}, branched_values(7, 2))
    folder, plan = merged(tmp_path, method, layout, monkeypatch)
    assert "law: its head is not its embeddings, the result's is" in failed(verify(folder, plan))["head"]
