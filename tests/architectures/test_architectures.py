"""Every family's table against transformers' own model of that family, and against itself."""

from pathlib import Path

import pytest
from conftest import CONFIGS, STAND_INS, write_sources

from bam_merge import expressions
from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import Cell, applies, family_tensors, rows_of, shape_of
from bam_merge.architectures.tables import (
    Architecture,
    dense_families,
    find_by_model_type,
    load_architecture,
    mixture_layouts,
)
from bam_merge.architectures.vocabulary import ROLES
from bam_merge.checkpoints.pieces import numel
from bam_merge.sources.dense import read_dense


def state_dict_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers' own class saves them."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(config["model_type"], **settings))
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


KNOWN = [name for name, config in CONFIGS.items() if config["model_type"] not in STAND_INS]


@pytest.mark.parametrize("name", KNOWN)
def test_table_is_the_state_dict_of_transformers(name: str) -> None:
    config = CONFIGS[name]
    family = find_by_model_type(config["model_type"])
    assert family is not None
    problems: list[str] = []
    facts = describe(family, config, problems)
    assert problems == []
    ours = [dict(family_tensors(family, facts, spelling)) for spelling in (0, 1)]
    assert state_dict_shapes(config) in ours


def test_every_family_and_variant_has_a_config_here() -> None:
    assert {family.name for family in dense_families()} == {config["model_type"] for config in CONFIGS.values()}


@pytest.mark.parametrize("family", [*dense_families(), *mixture_layouts()], ids=lambda a: a.name)
def test_table_is_sound(family: Architecture) -> None:
    """Every role is known, every name unique, every fused row's parts add up to its rows."""
    roles = [role for row in family.rows for role in row.roles]
    filled = {role for row in family.rows if row.make for role in row.roles}
    others = {role for role in roles if role.startswith("ffn.shared.") or role == "router.ffn.bias"}
    assert set(roles) - others - filled <= set(ROLES)
    names = [name for row in family.rows for name in row.names]
    assert len(names) == len(set(names))
    keys = [(role, row.per_expert, row.when) for row in family.rows for role in row.roles]
    assert len(keys) == len(set(keys))
    for row in family.rows:
        assert (len(row.roles) > 1) == bool(row.parts)
        assert len(row.parts) in (0, len(row.roles))
        for H, K, D in ((4, 2, 3), (4, 4, 3), (6, 1, 8)):
            facts = {
                "vocab_size": 64,
                "hidden_size": 20,
                "intermediate_size": 28,
                "num_attention_heads": H,
                "num_key_value_heads": K,
                "head_dim": D,
                "shared_expert_intermediate_size": 8,
                "linear_num_key_heads": K,
                "linear_num_value_heads": H,
                "linear_key_head_dim": D + 2,
                "linear_value_head_dim": D,
                "linear_conv_kernel_dim": 5,
            }
            assert not row.parts or not row.shape or rows_of(row, facts) == shape_of(row, facts)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_one_tensor_of_a_role(name: str) -> None:
    """Rows that name one role exclude each other, whatever a model is."""
    family = load_architecture(CONFIGS[name]["model_type"])
    facts = describe(family, CONFIGS[name], [])
    roles = [role for row in family.rows if applies(Cell(row), facts) for role in row.roles]
    assert len(roles) == len(set(roles))


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_covers_every_tensor_once(name: str, tmp_path: Path) -> None:
    """Slices of fused tensors tile them: together the roles have exactly the elements of the file."""
    write_sources(tmp_path, CONFIGS[name], ("seed",))
    model = read_dense("seed", tmp_path / "seed")
    assert sum(map(numel, model.tensors.values())) == sum(entry.numel for entry in model.checkpoint.tensors.values())
    assert {read.tensor for expr in model.tensors.values() for read in expressions.reads(expr)} == set(model.checkpoint.tensors)
    assert not model.dropped
    assert not model.unknown_keys


@pytest.mark.parametrize(("older", "newer"), [
    ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
     {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}),
])  # fmt: skip
def test_old_and_new_spellings_of_rope_are_one(older: dict, newer: dict) -> None:
    llama = load_architecture("llama")
    described = [describe(llama, {**CONFIGS["llama"], **spelling}, []) for spelling in (older, newer)]
    assert described[0] == described[1]


def test_neox_rope_keys() -> None:
    neox = load_architecture("gpt_neox")
    old = describe(neox, {**CONFIGS["gpt_neox"], "rotary_pct": 0.5, "rotary_emb_base": 20000}, [])
    new = describe(
        neox, {**CONFIGS["gpt_neox"], "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}}, []
    )
    assert old == new
    assert describe(neox, CONFIGS["gpt_neox"], [])["rope_parameters"]["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize("name", KNOWN)
def test_facts_agree_with_transformers_config(name: str) -> None:
    """Defaults of keys that a file leaves out are transformers' defaults."""
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    theirs = transformers.AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    family = find_by_model_type(config["model_type"])
    assert family is not None
    facts = describe(family, config, [])
    whole = describe(family, theirs.to_dict(), [])
    assert facts == whole
    theirs.allow_global_per_layer_attribute_access = True  # of Gemma 4, whose layers have others
    for key in (
        "hidden_act",
        "tie_word_embeddings",
        "num_key_value_heads",
        "rms_norm_eps",
        "layer_norm_eps",
        "logit_scale",
        "sliding_window",
    ):
        if getattr(theirs, key, None) is not None:
            assert facts[key] == getattr(theirs, key)
