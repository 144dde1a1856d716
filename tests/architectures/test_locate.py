"""The walk that merges, the reference model and `inspect` share: its records, and that transformers' own models say the same.

A merge and the model that proves it read one table by one walk, so that a table that is wrong is wrong for both. Here the two are held
against models that transformers builds, saves and runs; and every confusion of two roles that shapes allow is planted, and must show.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, CONFIGS, GROUPED, STAND_INS, stand_in, write_recipe
from safetensors import safe_open

from bam_merge import load_recipe, merge
from bam_merge.architectures.anatomy import open_anatomy
from bam_merge.architectures.config import facts_of
from bam_merge.architectures.locate import (
    Cell,
    Met,
    applies,
    cells,
    cut,
    gathered,
    in_order,
    locate,
    piece_shape,
    read_name,
    rows_of,
    spellings,
)
from bam_merge.architectures.tables import Architecture, Row, architectures, at_layer, find_by_model_type, load_architecture, read_table
from bam_merge.architectures.vocabulary import ROLES
from bam_merge.checkpoints.pieces import Read, Slice, leaf_runs, numel
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import open_model

MOE = {**BASE, **GROUPED, "num_experts_per_tok": 2, "tie_word_embeddings": False}
SIGMOID = {"n_routed_experts": 3, "moe_intermediate_size": 24, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**MOE, "model_type": "mixtral", "num_local_experts": 3},
    "qwen2_moe": {**MOE, "model_type": "qwen2_moe", "num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**MOE, "model_type": "qwen3_moe", "num_experts": 3, "moe_intermediate_size": 24, "head_dim": 12, "attention_bias": True},
    "solar_open": {**MOE, **SIGMOID, "model_type": "solar_open", "head_dim": 8, "attention_bias": True},
    "glm4_moe": {**MOE, **SIGMOID, "model_type": "glm4_moe", "first_k_dense_replace": 0, "use_qk_norm": True, "attention_bias": True},
    "dots1": {**MOE, **SIGMOID, "model_type": "dots1", "attention_bias": True, "norm_topk_prob": True},
    "flex_olmo": {**MOE, "model_type": "flex_olmo", "num_experts": 3, "norm_topk_prob": True, "pad_token_id": None, "attention_bias": True},
    "cohere2_moe": {
        **MOE, "model_type": "cohere2_moe", "num_experts": 3, "head_dim": 8, "logit_scale": 0.5, "sliding_window": 8, "num_shared_experts": 1,
        "layer_types": ["sliding_attention", "full_attention"], "attention_bias": True,
    },
    "hunyuan_v1_moe": {**MOE, "model_type": "hunyuan_v1_moe", "num_experts": 3, "moe_topk": 2, "head_dim": 8, "attention_bias": True},
}  # fmt: skip
ALL = {**CONFIGS, **MIXTURES}

TOY = """
name = "toy"
kind = "dense"
model_types = ["toy"]
class = "Toy"
traits = { norm_type = "rms_norm", attention_bias = "config:biased" }

[tensors]
rows = [
    { role = "embed", name = "wte.weight", shape = ["V", "d"] },
    { roles = ["attn.q", "attn.k", "attn.v"], name = "h.{layer}.qkv.weight", shape = ["H*D+2*K*D", "d"], groups = "K", parts = ["D", "D", "D"] },
    { role = "attn.q.bias", name = "h.{layer}.q.bias", shape = ["H*D"], when = "attention_bias" },
    { role = "ffn.up", name = ["h.{layer}.mlp.0.weight", "h.{layer}.up.weight"], shape = ["f", "d"] },
    { role = "ffn.down", name = "h.{layer}.mlp.2.weight", shape = ["d", "f"] },
    { role = "head", name = "head.weight", shape = ["V", "d"], when = "untied" },
]
dropped = ["h.{layer}.mask", "positions"]
"""
SIZES = {"vocab_size": 9, "hidden_size": 6, "intermediate_size": 5, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 3}
FACTS = {**SIZES, "num_hidden_layers": 2, "attention_bias": False, "untied": True}


@pytest.fixture
def toy() -> Architecture:
    return read_table(TOY, "toy.toml")


# ---- the records ---------------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_held_against_the_table(toy: Architecture) -> None:
    """Missing, doubled, in vain, a buffer, of a layer too many, of no row: each is said once, in the order of table and files."""
    stored = (
        "h.2.mask", "h.1.up.weight", "h.1.mlp.0.weight", "h.0.q.bias", "wte.weight", "h.0.mask", "positions", "h.0.qkv.weight",
        "h.0.mlp.2.weight", "h.1.mlp.2.weight", "h.01.up.weight", "h.2.mlp.2.weight", "scratch", "h.1.qkv.weight",
    )  # fmt: skip
    found = locate(stored, cells(toy, 2), lambda cell: applies(cell, FACTS))
    embed, qkv, bias, up, down, head = toy.rows
    mask, positions = (Row((), (name,)) for name in toy.dropped)
    assert found.met == (
        Met(Cell(embed), ("wte.weight",), True),
        Met(Cell(qkv, 0), ("h.0.qkv.weight",), True),
        Met(Cell(qkv, 1), ("h.1.qkv.weight",), True),
        Met(Cell(bias, 0), ("h.0.q.bias",), False),
        Met(Cell(up, 1), ("h.1.mlp.0.weight", "h.1.up.weight"), True),
        Met(Cell(down, 0), ("h.0.mlp.2.weight",), True),
        Met(Cell(down, 1), ("h.1.mlp.2.weight",), True),
        Met(Cell(mask, 0), ("h.0.mask",), False),
        Met(Cell(positions), ("positions",), False),
    )
    assert found.missing == (Cell(up, 0), Cell(head))
    assert found.extra == ("h.2.mask", "h.01.up.weight", "h.2.mlp.2.weight", "scratch")


def test_a_fused_tensor_is_cut_where_its_rows_are_the_tables(toy: Architecture) -> None:
    qkv = toy.rows[1]
    read = Read("x", "h.0.qkv.weight", "F32", (18, 6))
    assert rows_of(qkv, FACTS) == 18
    pieces = cut(qkv, read, FACTS)
    assert pieces == {f"attn.{part}": Slice(read, 2, start, 3, (6, 6)) for part, start in (("q", 0), ("k", 3), ("v", 6))}
    taken = [(first + i) // 6 for leaf in pieces.values() for first, count in leaf_runs(leaf, 0, 36) for i in range(0, count, 6)]
    assert taken == [0, 1, 2, 9, 10, 11, 3, 4, 5, 12, 13, 14, 6, 7, 8, 15, 16, 17]
    for shape in ((), (0, 6), (17, 6), (36, 6)):
        assert cut(qkv, replace(read, shape=shape), FACTS) is None
    assert cut(replace(qkv, parts=()), read, FACTS) is None  # as the table of a mixture that is only looked at may leave it
    assert cut(toy.rows[0], read, FACTS) == {"embed": read}


@pytest.mark.parametrize("name", [*(table.name for table in architectures()), "toy"])
def test_a_name_is_read_as_it_is_written(name: str, toy: Architecture) -> None:
    """Forwards and backwards a table says the same, numbers of its own in a name too."""
    table = toy if name == "toy" else load_architecture(name)
    known = spellings(table)
    there = [*cells(table, 12, 11), *cells(replace(table, rows=table.others, dropped=()), 12, 11)]
    assert len(there) > 12 * len(table.rows) / 2
    for cell in there:
        assert [read_name(spelled.replace("{head}", "10"), known) for spelled in cell.names] == [cell] * len(cell.names)
    ordered = {cell for cell in there if cell.row in table.rows and not cell.row.per_expert}
    assert {cell for cell in in_order(table, 12) if not cell.row.per_expert} == ordered


@pytest.mark.parametrize("name", ["h.1.mlp.1.weight", "h.01.mlp.0.weight", "h.1.mlp.0", "h.#.mlp.0.weight", "h.{layer}.mask", "h..mask", "h.1234567890.mask", ""])  # fmt: skip
def test_other_names_are_of_no_row(name: str, toy: Architecture) -> None:
    assert read_name(name, spellings(toy)) is None


# ---- against transformers ------------------------------------------------------------------------------------------------------


def build(config: dict[str, Any], folder: Path) -> Any:
    """A model of transformers' own making with random weights, norms and biases too, saved to `folder` as it saves them."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    if config["model_type"] in STAND_INS:
        own = stand_in(write_checkpoint(folder, config, random_values(3, 0.3)))
        return transformers.AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    torch.manual_seed(0)
    settings = {key: value for key, value in config.items() if key != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(config["model_type"], **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        found = model(torch.arange(5, 29).view(2, 12))
    return getattr(found, "logits", found).double()


@pytest.mark.parametrize("name", ALL)
def test_what_transformers_saves_is_located_whole(name: str, tmp_path: Path) -> None:
    """Names, shapes and the number of elements are those of transformers' own files and parameters: nothing missing, over or twice."""
    config, model = ALL[name], build(ALL[name], tmp_path)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    table = load_architecture(config["model_type"])
    problems: list[str] = []
    facts = facts_of(table, open_model(tmp_path).checkpoint.config, problems)
    assert not problems
    known = gathered({name: name for name in shapes}, table, facts["num_hidden_layers"], lambda layer: at_layer(facts, layer))
    found = locate(known.names, cells(table, facts["num_hidden_layers"], 3), lambda cell: applies(cell, facts))
    assert (found.missing, found.extra, known.lacking) == ((), (), ())
    assert all(item.wanted and len(item.names) == 1 for item in found.met)
    if table.kind == "dense":
        met = [(item.cell, known.names[item.names[0]]) for item in found.met]
        pieces = {
            name: piece_shape(cell.row, at_layer(facts, cell.layer)) for cell, first in met for name in known.parts.get(first, (first,))
        }
        assert pieces == shapes
    leaves = open_model(tmp_path).leaves
    stored_buffers = [value for key, value in model.named_buffers() if key in model.state_dict()]  # numbers of layers, biases of a choice
    assert sum(map(numel, leaves.values())) == sum(parameter.numel() for parameter in (*model.parameters(), *stored_buffers))


def confusions(name: str, folder: Path) -> Iterator[tuple[str, Architecture]]:
    """The table of a model with two of its roles exchanged, for every two whose parameters have one shape.

    A role that no recipe names (the shared expert's) is a word only: its parameter is called as its row is.
    """
    table = load_architecture(ALL[name]["model_type"])
    stands = open_anatomy(folder).leaves.items()
    shapes = {role: (layer, expert, leaf.shape) for (role, layer, expert), leaf in stands if layer in (None, 0, 1) and expert in (None, 1)}
    near = {role: leaf.shape for (role, layer, expert), leaf in open_anatomy(folder).leaves.items() if layer == 0}
    for a, b in combinations(sorted(set(ROLES) & shapes.keys(), key=ROLES.index), 2):
        if shapes[a] == shapes[b] and near.get(a) == near.get(b):
            other = {a: b, b: a}
            rows = tuple(replace(row, roles=tuple(other.get(role, role) for role in row.roles)) for row in table.rows)
            yield f"{a} and {b}", replace(table, rows=rows)


ONE_SUM = {
    *((name, "attn.o.bias and ffn.down.bias") for name in ("gpt_neox", "phi", "phi_tied", "phi_qk_norm", "falcon_grouped")),
    *((name, "attn.q_norm and attn.k_norm") for name in ("hunyuan_v1_dense", "hunyuan_v1_dense_biased", "hunyuan_v1_moe")),
}
"""A parallel block adds both biases to one sum, and norms after the rotation scale one product: no logits tell them apart, only their names."""


@pytest.mark.parametrize("name", ALL)
def test_transformers_tells_every_two_roles_apart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference model is transformers' model; with any two roles exchanged in the table that it shares with merges, it is not."""
    theirs = logits(build(ALL[name], tmp_path))
    size = float(theirs.abs().max())
    assert float((logits(open_model(tmp_path).model()) - theirs).abs().max()) < 1e-5 * size
    planted = 0
    for words, table in confusions(name, tmp_path):
        monkeypatch.setattr("bam_merge.model.loading.find_by_model_type", lambda model_type, config, table=table: table)
        try:
            confused = open_model(tmp_path)
        except CheckpointError:  # a role of all layers and one of some: what is there tells
            assert "layer_types" in ALL[name]
            continue
        apart = float((logits(confused.model()) - theirs).abs().max())
        assert apart < 1e-5 * size if (name, words) in ONE_SUM else apart > 1e-3 * size, words
        planted += 1
    assert planted >= 3


FUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # the model, one of the roles of the fused row, what its table says instead, and how that is found
    "gate and up": ("phi3", "ffn.gate", {"roles": ("ffn.up", "ffn.gate")}, "logits"),
    "q and k": ("phi3", "attn.q", {"roles": ("attn.k", "attn.q", "attn.v")}, "holds attn.k as [32, 32], config.json implies [16, 32]"),
    "sizes of q and k": ("phi3", "attn.q", {"parts": ("K*D", "H*D", "K*D")}, "holds attn.q as [16, 32], config.json implies [32, 32]"),
    "a part too few": ("phi3", "attn.q", {"parts": ("H*D", "K*D", "D")}, "is [64, 32], config.json implies [56, 32]"),
    "q, k, v of all heads, not head by head": ("gpt_neox", "attn.q", {"groups": "1", "parts": ("H*D", "H*D", "H*D")}, "logits"),
    "q, k, v of all heads, not group by group": ("falcon_grouped", "attn.q", {"groups": "1", "parts": ("H*D", "K*D", "K*D")}, "logits"),
    "k and v of a group": ("falcon_grouped", "attn.q", {"roles": ("attn.q", "attn.v", "attn.k")}, "logits"),
    "gate and up of a fused FFN": ("granitemoehybrid", "ffn.gate", {"roles": ("ffn.up", "ffn.gate")}, "logits"),
    "blocks of gate and up": ("phi3", "ffn.gate", {"groups": "f", "parts": ("1", "1")}, "logits"),
}  # fmt: skip


@pytest.mark.parametrize("case", FUSED)
def test_a_fused_row_that_is_cut_wrongly_is_found(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference model's own shapes, which are no table's, or by what transformers computes."""
    name, role, change, how = FUSED[case]
    theirs = logits(build(CONFIGS[name], tmp_path))
    table = load_architecture(CONFIGS[name]["model_type"])
    wrong = replace(table, rows=tuple(replace(row, **change) if role in row.roles else row for row in table.rows))
    assert wrong != table
    monkeypatch.setattr("bam_merge.model.loading.find_by_model_type", lambda model_type, config: wrong)
    if how == "logits":
        assert float((logits(open_model(tmp_path).model()) - theirs).abs().max()) > 1e-2 * float(theirs.abs().max())
    else:
        with pytest.raises(CheckpointError) as error:
            open_model(tmp_path)
        assert how in str(error.value)


def test_a_table_whose_parts_do_not_add_up_stops_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the tests of a new table be left out: no tensor is cut at a guess."""
    from bam_merge.sources.dense import read_dense

    write_checkpoint(tmp_path, CONFIGS["phi3"], random_values(1))
    table = load_architecture("phi3")
    wrong = replace(table, rows=tuple(replace(row, parts=("f", "d")) if "ffn.up" in row.roles else row for row in table.rows))
    monkeypatch.setattr("bam_merge.sources.dense.find_by_model_type", lambda model_type: wrong)
    with pytest.raises(AssertionError, match=r"phi3: the parts of .*gate_up_proj\.weight are not the rows of its shape"):
        read_dense("x", tmp_path)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_merge_by_a_wrong_table_is_not_what_transformers_computes(wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of phi3 exchanged for the merge and for the model that proves it: the mixture in transformers is another function."""
    transformers = pytest.importorskip("transformers")
    theirs = logits(build(CONFIGS["phi3"], tmp_path / "seed"))
    table = load_architecture("phi3")
    if wrong:
        table = replace(table, rows=tuple(replace(r, roles=r.roles[::-1]) if "ffn.up" in r.roles else r for r in table.rows))
    for module in ("bam_merge.sources.dense", "bam_merge.model.loading"):
        monkeypatch.setattr(
            f"{module}.find_by_model_type", lambda name, *config: table if name == "phi3" else find_by_model_type(name, *config)
        )
    text = "experts: [seed, seed]\nffn: {top_k: 2}"
    out = merge(load_recipe(write_recipe(tmp_path, text, "sparse_upcycling", ("seed",), "{path: out, layout: mixtral}")))
    apart = float((logits(transformers.AutoModelForCausalLM.from_pretrained(out).eval()) - theirs).abs().max())
    size = float(theirs.abs().max())
    assert apart > 1e-3 * size if wrong else apart < 1e-5 * size
