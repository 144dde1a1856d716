"""Keys of config.json that mean one fact: what transformers takes, that both readings here take the same, and that two values are refused."""

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, STAND_INS, write_recipe, write_sources
from proofs import UNPROVED, failed

from bam_merge.architectures import config
from bam_merge.architectures.anatomy import open_anatomy
from bam_merge.architectures.config import describe, mixture_values
from bam_merge.architectures.spellings import ORIGINAL, Spelling, conflicts, spellings_of
from bam_merge.architectures.tables import architecture_names, find_by_model_type, load_architecture
from bam_merge.architectures.window_spellings import BY_LAYER, BY_TYPES
from bam_merge.errors import CheckpointError
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.sources import dense
from bam_merge.verifying.config import meaning
from bam_merge.verifying.verification import verify

BASE = {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 64, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDES, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
TYPES = {kind: load_architecture(kind) for kind in architecture_names()}
KINDS = tuple(kind for kind, table in TYPES.items() if kind not in ("bam", *STAND_INS) and kind in table.model_types)  # one of each class
EXPERTS = {kind: key for kind in KINDS for key, value in load_architecture(kind).config.items() if value == "$num_experts"}
SLIDING = {kind: load_architecture(kind).quirks.windows for kind in KINDS}


OWN: dict[str, dict[str, Any]] = {
    **{kind: {"full_attention_interval": 2} for kind in ("qwen3_5_text", "qwen3_5_moe")}, "gemma4_text": {"hidden_size_per_layer_input": 0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4, "ffn_hidden_size": 40},
    "granitemoehybrid": {
        "num_local_experts": 0, "layer_types": [FULL, FULL], "shared_intermediate_size": 40, "position_embedding_type": "rope", "mamba_n_heads": 8,
    },
    "dots1": {"n_shared_experts": 1, "layer_types": [FULL, FULL]},
    "cohere2_moe": {"layer_types": [FULL, FULL]}, "mellum": {"layer_types": [FULL, FULL]},
}  # fmt: skip
"""What these model types have under keys of their own, and need."""


NEEDED_IN_ROPE = {"cohere2_moe": {"rope_theta": 10000.0}}
"""What rope_parameters must have, for the class fills in nothing."""


def base(kind: str) -> dict[str, Any]:
    """A small configuration of any model type, with every key that our reading needs."""
    mixture = {EXPERTS[kind]: 4, "num_experts_per_tok": 2} if kind in EXPERTS else {}
    table = load_architecture(kind)
    head = (
        {"head_dim": 8} if "head_dim" in table.defaults or kind in ("qwen3_moe", "ministral", "hunyuan_v1_dense", "hunyuan_v1_moe") else {}
    )
    grows = {"llama_4_scaling_beta": 0.1, ORIGINAL: 32} if table.quirks.query_growth else {}
    one: dict[str, Any] = {"rope_type": "default", **grows}
    sets = {FULL: {**one, "rope_theta": 1e4}, SLIDES: {**one, "rope_theta": 1e4}}
    rope = {"rope_parameters": sets if table.quirks.rotary_by_kind else one} if table.quirks.rope_needed else {}
    heads = {"num_key_value_heads": 4} if kind != "gpt_neox" else {}
    found = {"model_type": table.model_types[0], **BASE, **mixture, **head, **heads, **rope, **OWN.get(kind, {})}
    own = [word for word in table.quirks.taken_from if word not in table.neutral]
    return {key: value for key, value in found.items() if key not in own}


def theirs(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    if config["model_type"] == "bam":
        from bam_merge.exported.configuration_bam import BamConfig

        return BamConfig(**settings)
    return transformers.AutoConfig.for_model(config["model_type"], **settings)


def their_model(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(theirs(config))


# ---- the table, line by line --------------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[Any, ...]] = {
    "rope.rope_type": ("linear", "dynamic"), "rope.rope_theta": (3e5, 7e3), "rope.partial_rotary_factor": (0.5, 0.75, 0.25), "dtype": ("float16", "bfloat16"),
    f"rope.{ORIGINAL}": (32, 64), "hidden_act": ("relu", "gelu_new", "gelu_fast"), "num_experts": (6, 5, 3), "hidden_size": (64, 96), "num_hidden_layers": (3, 5),
    "num_attention_heads": (8, 16), "num_key_value_heads": (2, 1), "head_dim": (16, 4), "sliding_window": (8, 16),
    "intermediate_size": (48, 96),
}  # fmt: skip
"""Values that a fact may have, by one of its keys: two, and a third where one can be a family's default."""


def lines() -> Iterator[Any]:
    """(fact, model type, two of its keys): every pair, and every key with itself as the only one."""
    for kind in (*KINDS, "bam"):
        for spelling in spellings_of(load_architecture(kind)):
            quirks = load_architecture(kind).quirks
            two_facts = {"rope_theta"} if quirks.rotary_by_kind and not quirks.sliding_base else set()  # of one set, and not of the other
            two_facts |= (
                {"rope.rope_theta", ORIGINAL} if quirks.rotary_by_kind and quirks.rope_needed else set()
            )  # which its sets must have
            two_facts |= {*quirks.only} & {"partial_rotary_factor"}  # which is refused beside the sets
            for first, second in itertools.combinations_with_replacement((*spelling.read, *spelling.ignored), 2):
                if kind == "cohere2_moe" and first == second == ORIGINAL:  # which its class refuses where the other is not there
                    continue
                if not (kind == "phi3" and "rope.rope_type" in spelling.read) and not two_facts & {
                    first,
                    second,
                }:  # Phi3Config takes longrope only
                    yield pytest.param(spelling, kind, first, second, id=f"{kind}-{first}-{second}")


def values_of(spelling: Spelling) -> tuple[Any, Any]:
    values = next(VALUES[key] for key in (*spelling.read, *spelling.ignored) if key in VALUES)
    first, second, *_ = (value for value in values if value != spelling.default)
    return first, second


def spelled(spelling: Spelling, kind: str, **keys: Any) -> dict[str, Any]:
    """A configuration that says only `keys` of the fact; "rope.KEY" goes into rope_parameters."""
    config = {key: value for key, value in base(kind).items() if key not in (*spelling.read, *spelling.ignored)}
    if spelling.kind:  # transformers looks at the set of no other kind
        config["layer_types"] = [FULL, SLIDES]
    rope: dict[str, Any] = {}
    if "num_attention_heads" in spelling.read:
        config["hidden_size"] = 1920 * 71 * 13  # which the classes' own counts of heads divide
    if "num_hidden_layers" in spelling.read:
        config.pop("layer_types", None)  # which has one for each
    if spelling.only:
        rope = dict(LONGROPE if kind == "phi3" else YARN)
    elif "rope.rope_type" in spelling.read:
        rope = {"factor": 2.0}
    for key, value in keys.items():
        inside = key.removeprefix("rope.")
        (config if inside == key else rope)[inside] = value
    if rope:
        rope = rope if "type" in rope else {"rope_type": "default", **rope}
        rope |= NEEDED_IN_ROPE.get(kind, {}) if "rope_theta" not in rope and config.get("rope_theta") is None else {}
        sets = base(kind).get("rope_parameters", {}) if spelling.kind else {}  # of a class that needs both, whole
        whole = {key: value for key, value in sets.get(spelling.kind, {}).items() if key != "rope_type" or "type" not in rope}
        config["rope_parameters"] = {**sets, spelling.kind: {**whole, **rope}} if spelling.kind else rope
    return config


def their_value(spelling: Spelling, kind: str, config: dict[str, Any]) -> Any:
    """What transformers takes for the fact, from its configuration, or from a model where the configuration leaves it open."""
    found = theirs(config)
    rope = found.rope_parameters[spelling.kind] if spelling.kind else found.rope_parameters
    match spelling.fact:
        case "the type of the rotary scaling":
            return rope["rope_type"]
        case "the rotary base":
            return rope["rope_theta"]
        case "the context before the rotary scaling":
            return rope[ORIGINAL]
        case "the share of a head that turns" if kind == "bam":
            return rope.get("partial_rotary_factor", 1.0)
        case "the share of a head that turns":
            frequencies = f"rotary_emb.{spelling.kind}_inv_freq" if spelling.kind else "rotary_emb.inv_freq"
            pairs = next(value.shape[0] for name, value in their_model(config).named_buffers() if name.endswith(frequencies))
            return 2 * pairs / 8
        case "the dtype":
            return None if found.dtype is None else str(found.dtype).removeprefix("torch.")
        case "the activation":
            return getattr(found, spelling.read[0])
        case "the number of experts":
            return getattr(found, EXPERTS[kind])
        case "the number of key and value heads" | "the size of a head":
            model = their_model(config)
            if kind != "gpt_neox":
                layer = model.base_model.layers[0] if hasattr(model.base_model, "layers") else model.base_model.h[0]
                if not hasattr(layer, "self_attn"):
                    return layer.self_attention.num_kv_heads if "heads" in spelling.fact else layer.self_attention.head_dim
                return layer.self_attn.q_proj.out_features // found.num_attention_heads
            attention = model.gpt_neox.layers[0].attention
            assert attention.query_key_value.out_features == 3 * found.hidden_size  # as many key heads as query heads
            return found.num_attention_heads if "heads" in spelling.fact else attention.head_size
        case _:
            return getattr(found, spelling.read[0])


@pytest.mark.parametrize(("spelling", "kind", "first", "second"), list(lines()))
def test_the_table_says_what_transformers_does(spelling: Spelling, kind: str, first: str, second: str) -> None:
    """Of two keys with two values the one that `read` names first counts; an ignored one changes nothing; a lone one of `read` counts.

    And where the two differ the file is refused, each key and value named; where they are equal it is not.
    """
    a, b = values_of(spelling)
    keys = {first: a} if first == second else {first: a, second: b}
    config = spelled(spelling, kind, **keys)
    counts = [key for key in spelling.read if key in keys]
    if not counts and spelling.read and spelling.default is None and spelling.read[0] in BASE:
        expected = getattr(theirs(spelled(spelling, kind)), spelling.read[0])
    elif not counts:
        expected = their_value(spelling, kind, spelled(spelling, kind))
        if spelling.default is not None and not str(spelling.default).startswith("$"):
            assert expected == spelling.default
    else:
        expected = keys[counts[0]]
    assert their_value(spelling, kind, config) == expected
    named = [key.replace("rope.", f"rope_parameters.{spelling.kind}." if spelling.kind else "rope_parameters.") for key in keys]
    problems = conflicts(load_architecture(kind), config)
    if len(keys) == 2 and counts:
        assert len(problems) == 1
        assert all(f"{name} = {value!r}" in problems[0] for name, value in zip(named, keys.values(), strict=True))
    elif not counts and spelling.default is not None:
        assert len(problems) == len(keys)
        assert all(f"{name} = {value!r}" in problem for name, value, problem in zip(named, keys.values(), problems, strict=True))
    else:
        assert problems == []
    equal = dict.fromkeys(keys, expected)
    assert conflicts(load_architecture(kind), spelled(spelling, kind, **equal)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_alias_of_transformers_is_missing(kind: str) -> None:
    """Every other name that a configuration class gives one of its keys stands in the table."""
    table = load_architecture(kind)
    groups = [{*spelling.read, *spelling.ignored} for spelling in spellings_of(table)]
    groups += [{alias, key} for alias, key in table.quirks.renamed.items()]
    for alias, key in type(theirs(base(kind))).attribute_map.items():
        assert any({alias, key} <= group for group in groups), (alias, key)


BOTH_SETS = [kind for kind in KINDS if load_architecture(kind).quirks.rotary_by_kind and load_architecture(kind).quirks.rope_needed]
OLDER_KEPT = [kind for kind in KINDS if "rope_scaling" in load_architecture(kind).quirks.only and kind not in BOTH_SETS]
"""Whose classes pass over rope_scaling: a file that has it is refused."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not load_architecture(kind).quirks.rotary_by_kind and kind not in OLDER_KEPT])
def test_of_two_dictionaries_transformers_takes_all_of_rope_scaling(kind: str) -> None:
    scaling = dict(LONGROPE if kind == "phi3" else YARN)
    config = {**base(kind), "rope_scaling": scaling, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}
    taken = theirs(config).rope_parameters
    assert (taken["rope_type"], taken["rope_theta"]) == (scaling["rope_type"], theirs(base(kind)).rope_parameters["rope_theta"])
    (problem,) = conflicts(load_architecture(kind), config)
    for words in ("rope_scaling and rope_parameters are two spellings", "300000.0", f"rope_type {scaling['rope_type']!r} and 'default'"):
        assert words in problem
    same = {**base(kind), "rope_scaling": scaling, "rope_parameters": {**scaling, "rope_theta": taken["rope_theta"]}}
    assert conflicts(load_architecture(kind), same) == []
    assert conflicts(load_architecture(kind), {**config, "rope_scaling": None}) == []
    assert conflicts(load_architecture(kind), {**config, "rope_scaling": {}}) == []


def test_a_base_that_only_the_ignored_dictionary_has_is_a_conflict() -> None:
    """rope_scaling leaves rope_theta out, and its place is the key beside it, not inside rope_parameters."""
    linear = {"rope_type": "linear", "factor": 2.0}
    config = {**CONFIGS["llama"], "rope_scaling": linear, "rope_parameters": {**linear, "rope_theta": 5e5}}
    assert theirs(config).rope_parameters["rope_theta"] == 1e4
    (problem,) = conflicts(load_architecture("llama"), config)
    assert "rope_theta 10000.0 and 500000.0" in problem
    assert conflicts(load_architecture("llama"), {**config, "rope_theta": 500000}) == []


ROPES: dict[str, tuple[Any, ...]] = {
    "rope_scaling": ("", None, {"type": "linear", "factor": 2.0}, {**YARN, ORIGINAL: 32}, dict(YARN)),
    "rope_parameters": ("", {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 2.0}, {**YARN, "rope_theta": 1e4}),
    "rope_theta": ("", 1e4, 500000), "rotary_emb_base": ("", 5e5), "partial_rotary_factor": ("", 0.5), "rotary_pct": ("", 0.5, 0.25),
    ORIGINAL: ("", 32, 128),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "cohere", "gpt_neox", "mixtral"])
def test_every_combination_of_rotary_keys_is_refused_or_read_as_transformers_does(kind: str) -> None:
    """2,160 combinations: where nothing is refused, both readings give transformers' type, base, share, factor and context."""
    table, read = load_architecture(kind), 0
    for values in itertools.product(*ROPES.values()):
        config = base(kind) | {key: value for key, value in zip(ROPES, values, strict=True) if value != ""}
        if conflicts(table, config):
            continue
        read += 1
        expected = theirs(config).rope_parameters
        facts = (describe if table.kind == "dense" else mixture_values)(table, config, [])["rope_parameters"]
        for found in (facts, model_config(config).rope_parameters):
            for key in ("rope_type", "rope_theta", "factor", ORIGINAL):
                assert found.get(key) == expected.get(key), (key, config)
            assert found["partial_rotary_factor"] == expected.get("partial_rotary_factor", 1.0), config
    assert read >= 20


BASES: dict[str, tuple[Any, ...]] = {
    "rope_theta": ("", 1e4, 500000), "full_attention": ("", {"rope_type": "default", "rope_theta": 1e4}, {**YARN, ORIGINAL: 32}, {"rope_type": "default"}),
    "sliding_attention": ("", {"rope_type": "default", "rope_theta": 7e3}, {"rope_type": "default"}),
    "rope_scaling": ("", None, {"rope_type": "linear", "factor": 2.0}), "layer_types": ("", [FULL, SLIDES], [FULL, FULL], [SLIDES, SLIDES]),
}  # fmt: skip


def test_two_sets_whose_bases_have_one_key_are_refused_or_read_as_transformers_does() -> None:
    """olmo3: 288 combinations. rope_theta beside the sets is that of the layers without a window; the others' is 500,000 then."""
    table, read = load_architecture("olmo3"), 0
    for values in itertools.product(*BASES.values()):
        given = {key: value for key, value in zip(BASES, values, strict=True) if value != ""}
        sets = {key: given.pop(key) for key in (FULL, SLIDES) if key in given}
        config = {**base("olmo3"), "sliding_window": 8, **given, **({"rope_parameters": sets} if sets else {})}
        problems: list[str] = []
        facts = describe(table, config, problems)
        if problems or conflicts(table, config):
            continue
        read += 1
        found, mine = theirs(config), model_config(config)
        for layer, kind in enumerate(found.layer_types):
            expected = found.rope_parameters[kind]
            said = (
                facts["rope_parameters"] if kind == FULL or facts["sliding_rope_parameters"] is None else facts["sliding_rope_parameters"]
            )
            for rope in (said, mine.rope_of(layer)):
                for key in ("rope_type", "rope_theta", "factor", ORIGINAL):
                    assert rope.get(key) == expected.get(key), (key, config)
    assert read >= 40


# ---- sliding windows -------------------------------------------------------------------------------------------------------------

FULL, SLIDES = "full_attention", "sliding_attention"
OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": ("", False, True), "sliding_window": ("", None, 8), "max_window_layers": ("", 0, 1, 2),
    "layer_types": ("", [FULL, FULL], [FULL, SLIDES], [SLIDES, FULL], [SLIDES, SLIDES]),
}  # fmt: skip


def their_windows(config: dict[str, Any]) -> list[int | None] | None:
    """The window of each layer, as the modeling code of each type asks its configuration for it; None where that would fail."""
    found = theirs(config)
    match SLIDING[find_by_model_type(config["model_type"]).name]:
        case "none":
            return [None, None]
        case "all" | "all if used":
            return [found.sliding_window] * 2
        case _:
            windows = [found.sliding_window if kind == SLIDES else None for kind in found.layer_types]
            return None if SLIDES in found.layer_types and not found.sliding_window else windows


@pytest.mark.parametrize("kind", SLIDING)
def test_every_combination_of_window_keys_is_refused_or_read_as_transformers_does(kind: str) -> None:
    """180 combinations: where nothing is refused, both readings give every layer transformers' window."""
    table, read = load_architecture(kind), 0
    for values in itertools.product(*OPTIONS.values()):
        config = base(kind) | {key: value for key, value in zip(OPTIONS, values, strict=True) if value != ""}
        if conflicts(table, config):
            continue
        problems: list[str] = []
        facts = (describe if table.kind == "dense" else mixture_values)(table, config, problems)
        if problems:  # of a mixture that leaves layer_types open, or of a family that has no windows at all
            assert kind == "qwen2_moe" or table.quirks.only or table.quirks.kinds
            continue
        if (
            kind in ("cwm", "gemma4_text", "gemma4_unified_text") and config.get("sliding_window", 8) is None
        ):  # which transformers does not take there, whatever layer_types says
            continue
        read += 1
        expected, reference = their_windows(config), meaning(model_config(config))["windows"]
        assert expected == [facts["sliding_window"] if t == SLIDES else None for t in facts["layer_types"]] == list(reference), config
    assert read >= 20


@pytest.mark.parametrize(("kind", "keys", "far"), [
    ("mistral", {"sliding_window": 4}, False), ("mistral", {"sliding_window": None}, True), ("phi3", {"sliding_window": 4}, False),
    ("llama", {"sliding_window": 4}, True), ("mistral", {"sliding_window": 4, "use_sliding_window": False}, False),
    ("mistral", {"sliding_window": 4, "layer_types": [FULL, FULL]}, False), ("mistral", {"sliding_window": 4, "max_window_layers": 1}, False),
    ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True}, False), ("qwen3_moe", {"sliding_window": 4}, True),
    ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True, "layer_types": [FULL, FULL]}, False),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}, False),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0, "layer_types": [FULL, SLIDES]}, True),
])  # fmt: skip
def test_what_transformers_does_with_windows(kind: str, keys: dict[str, Any], far: bool) -> None:
    assert sees_far({**base(kind), **keys}) == far


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not load_architecture(kind).quirks.linear])  # whose class knows no windows
def test_the_word_for_windows_is_what_transformers_does(kind: str) -> None:
    """Four forwards tell the words apart: a window, one that is used, and one that layer_types gives to no layer or to all."""
    window = {"sliding_window": 4}
    used = {**window, "use_sliding_window": True, "max_window_layers": 0}
    ways = (window, used, {**used, "layer_types": [FULL, FULL]}, {**used, "layer_types": [SLIDES, SLIDES]})
    words = {
        (True, True, True, True): ("none", "all but each last, never the last"), (False, False, False, False): ("all",), (True, False, False, False): ("all if used",),
        (True, False, True, False): ("by layer",), (True, True, True, False): ("every other layer", "all but each first", "where nothing turns", "stated"),
        (False, False, True, False): ("by layer or all", "all but each last"),
    }  # fmt: skip
    if load_architecture(kind).defaults.get("sliding_window_pattern") == 2:  # of the two layers one slides
        words = {(True, True, True, False): ("all but each last",)}
    if load_architecture(kind).quirks.only.get("use_sliding_window") is False:
        ways = tuple({key: value for key, value in way.items() if key != "use_sliding_window"} for way in ways)
    assert SLIDING[kind] in words[tuple(sees_far({**base(kind), **keys}) for keys in ways)]


PATTERNS = [
    {}, {"sliding_window_pattern": 3}, {"sliding_window_pattern": 1}, {"no_rope_layer_interval": 3}, {"no_rope_layers": [0, 1, 1, 0, 1, 0, 0, 1, 1]},
    {"no_rope_layer_interval": 1}, {"layer_types": [SLIDES, FULL, FULL] * 3}, {"use_sliding_window": True}, {"use_sliding_window": True, "no_rope_layers": [1] * 9},
]  # fmt: skip


@pytest.mark.parametrize("keys", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind, word in SLIDING.items() if word in BY_TYPES])
def test_which_layers_slide_and_rotate_is_what_transformers_says(kind: str, keys: dict[str, Any]) -> None:
    """By its own lists, where nothing is refused: of nine layers, with every way of saying which."""
    config, table = {**base(kind), "num_hidden_layers": 9, "sliding_window": 8, **keys}, load_architecture(kind)
    if conflicts(table, config):
        assert keys != {}
        return
    found, facts, problems = theirs(config), model_config(config), list[str]()
    described = describe(table, config, problems)
    assert problems == []
    used = getattr(found, "use_sliding_window", True)
    windows = [8 if kind == SLIDES and used else None for kind in found.layer_types]
    turning = {"all": [1] * 9, "where windows are": windows, "where windows are, or all": windows}.get(
        table.quirks.turning
    ) or found.no_rope_layers
    expected = [layer for layer in range(9) if turning[layer]]
    for said in (vars(facts), described):
        assert [said["sliding_window"] if t == SLIDES else None for t in said["layer_types"]] == windows
        assert (list(range(9)) if said["rope_layers"] is None else said["rope_layers"]) == expected


def sees_far(config: dict[str, Any]) -> bool:
    """By a forward: whether the last of twelve tokens sees the first through two layers, which it does where not both slide."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(theirs(config)).eval()
    ids = torch.arange(3, 15)[None]
    other = ids.clone()
    other[0, 0] = 40
    quirks = find_by_model_type(config["model_type"]).quirks
    if quirks.needed and quirks.windows != "stated" and SLIDES in config.get("layer_types", ()):
        with pytest.raises(KeyError):  # a class that has no such layers at all
            model(input_ids=ids)
        return True
    with torch.no_grad():
        moved = float((model(input_ids=ids).logits - model(input_ids=other).logits)[0, -1].abs().max())
    return moved > 1e-6


# ---- whole files -----------------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "dots.llm1": {"model_type": "dots1", "n_routed_experts": 128, "n_shared_experts": 2, "num_hidden_layers": 62, "max_window_layers": 62, "sliding_window": None, "use_sliding_window": False, "rope_theta": 10000000, "rope_scaling": None, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc"},
    "GLM-4.5-Air": {"model_type": "glm4_moe", "n_routed_experts": 128, "n_shared_experts": 1, "num_hidden_layers": 46, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rope_theta": 1000000, "rope_scaling": None, "use_qk_norm": False, "attention_bias": True},
    "Qwen2.5-7B": {"model_type": "qwen2", "hidden_size": 3584, "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0, "sliding_window": 131072, "torch_dtype": "bfloat16", "use_mrope": False, "use_sliding_window": False},
    "Qwen3-8B": {"model_type": "qwen3", "head_dim": 128, "hidden_size": 4096, "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False, "torch_dtype": "bfloat16"},
    "Qwen3-30B-A3B": {"model_type": "qwen3_moe", "max_window_layers": 48, "num_experts": 128, "num_hidden_layers": 48, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False},
    "Llama-3.1-8B": {"model_type": "llama", "num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "torch_dtype": "bfloat16"},
    "Phi-3.5-mini": {"model_type": "phi3", "max_position_embeddings": 131072, "num_hidden_layers": 32, "original_max_position_embeddings": 4096, "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"}, "rope_theta": 10000.0, "sliding_window": 262144, "torch_dtype": "bfloat16"},
    "Pythia, by transformers 4.40": {"model_type": "gpt_neox", "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_scaling": None},
    "Mistral-7B-v0.1": {"model_type": "mistral", "num_hidden_layers": 32, "sliding_window": 4096, "rope_theta": 10000.0},
    "Command R": {"model_type": "cohere", "num_hidden_layers": 40, "model_max_length": 131072, "max_position_embeddings": 8192, "rope_theta": 8000000.0, "rope_scaling": None},
    "Mixtral-8x7B": {"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8, "rope_theta": 1000000.0, "sliding_window": None},
}  # fmt: skip
"""What published files say of the facts in the table: none of them contradicts itself."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_do_not_contradict_themselves(name: str) -> None:
    assert conflicts(load_architecture(PUBLISHED[name]["model_type"]), PUBLISHED[name]) == []


def test_windows_that_no_key_gives_to_layers_are_asked_for() -> None:
    """Published files of dots1 have no layer_types, and no window."""
    table, plain, sizes = load_architecture("dots1"), base("dots1"), {"num_experts_per_tok": 2}
    del plain["layer_types"]
    for keys, said in (
        ({"sliding_window": None}, ""),
        ({}, "sliding_window is 4096: which layers slide"),
        ({"sliding_window": 8}, "is 8: which"),
    ):
        problems: list[str] = []
        facts = mixture_values(table, plain | sizes | keys, problems)
        assert said in "".join(problems) and bool(problems) == bool(said)
        if not said:
            assert facts["sliding"] == "none" and facts["layer_types"] == [FULL, FULL]
            assert model_config(plain | sizes | keys).sliding_window is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_does_not_contradict_itself(kind: str) -> None:
    """With scaling and windows too; and read back it is the same to both readings."""
    table = load_architecture(kind)
    window = {"sliding_window": 16} if SLIDING[kind] != "none" else {}
    grows = {"llama_4_scaling_beta": 0.1} if table.quirks.query_growth else {}
    use = {"use_sliding_window": True} if SLIDING[kind] in (*BY_LAYER, "all if used") else {}
    scaling = {"rope_scaling": LONGROPE if kind == "phi3" else {**YARN, ORIGINAL: 32, **grows}}
    if table.quirks.rope_sets:  # whose class reads one spelling only
        scaling = {
            "rope_parameters": {FULL: {**YARN, ORIGINAL: 32, "rope_theta": 1e4}, SLIDES: {"rope_type": "default", "rope_theta": 1e4}}
        }
    if kind in OLDER_KEPT:
        assert theirs(base(kind) | scaling).rope_parameters["rope_type"] == "default"
        problems: list[str] = []
        assert not mixture_values(table, base(kind) | scaling, problems)["hidden_act"] or problems
        scaling = {"rope_parameters": {**scaling["rope_scaling"], "rope_theta": 1e4}}
    if kind in BOTH_SETS:
        scaling = {"rope_parameters": {**base(kind)["rope_parameters"], FULL: {**scaling["rope_scaling"], "rope_theta": 1e4}}}
    for more in ({}, window | use, scaling):
        config = {key: value for key, value in base(kind).items() if key != "rope_parameters" or "rope_scaling" not in more} | more
        saved = json.loads(theirs(config).to_json_string(use_diff=False))
        assert conflicts(table, saved) == []
        if kind != "qwen2_moe" or not use:
            assert meaning(model_config(saved)) == meaning(
                model_config(config | ({"rope_scaling": more.get("rope_scaling")} if "rope_scaling" in more else {}))
            )


@pytest.mark.parametrize("keys", [
    {"rotary_pct": 1.0, "rotary_emb_base": 10000}, {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    {"layer_types": [FULL, FULL]}, {"num_heads": 4, "n_layer": 2, "d_model": 32}, {"torch_dtype": "torch.float32"},
])  # fmt: skip
def test_another_spelling_of_the_same_in_one_source_is_no_difference(keys: dict[str, Any], tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    edit(tmp_path / "law", **keys)
    plan = plan_file(write_recipe(tmp_path))
    edit(tmp_path / "law", d_model=33)
    with pytest.raises(CheckpointError, match="d_model = 33"):
        plan_file(write_recipe(tmp_path))
    assert not set(keys) & set(plan.config) - {"layer_types"}


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_every_command_says_so(tmp_path: Path, run: Any) -> None:
    """plan and loading refuse, all together; inspect describes what transformers takes, and names the contradiction."""
    write_sources(tmp_path, CONFIGS["qwen3"])
    edit(tmp_path / "law", rope_scaling={**YARN, ORIGINAL: 32}, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    edit(tmp_path / "code", torch_dtype="float16", rope_theta=10000)
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert "sources.law: config.json: rope_scaling and rope_parameters are two spellings of the rotary embedding" in result.err
    assert "sources.code: config.json: torch_dtype = 'float16' and dtype = 'float32' are two spellings" in result.err
    with pytest.raises(CheckpointError, match="rope_scaling and rope_parameters are two spellings"):
        load_model(tmp_path / "law")
    anatomy = open_anatomy(tmp_path / "law")
    assert anatomy.facts["rope_parameters"]["rope_type"] == "yarn"
    assert any("rope_scaling and rope_parameters" in finding for finding in anatomy.findings)


@pytest.mark.parametrize(("layout", "keys", "message"), [
    ("mixtral", {"num_experts": 2}, "num_local_experts = 3 and num_experts = 2 are two spellings of the number of experts"),
    ("mixtral", {"rope_theta": 7.0}, "rope_theta = 7.0 and rope_parameters.rope_theta = 10000.0 are two spellings of the rotary base"),
    ("mixtral", {"sliding_window": 8, "layer_types": [FULL, SLIDES]}, "layer_types says that layers 1 slide"),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters"),
    ("bam", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters"),
    ("bam", {"rope_theta": 7.0}, "rope_theta = 7.0 and rope_parameters.rope_theta = 10000.0"),
])  # fmt: skip
def test_mixtures(layout: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    plan = plan_file(write_recipe(tmp_path, method="btx", output=f"{{path: out, layout: {layout}}}"))
    folder = publish(plan, None, UNPROVED)
    load_model(folder)
    edit(folder, **keys)
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        load_model(folder)
    assert any(message in finding for finding in open_anatomy(folder).findings)


def test_mixtral_under_the_other_key(tmp_path: Path) -> None:
    """transformers reads num_experts too, where it is the only one."""
    write_sources(tmp_path, CONFIGS["llama"])
    folder = publish(plan_file(write_recipe(tmp_path, method="btx", output="{path: out, layout: mixtral}")), None, UNPROVED)
    expected = load_model(folder).config
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).config == expected
    assert theirs(config).num_local_experts == 3


# ---- two readings --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_both_readings_agree(name: str) -> None:
    table = load_architecture(CONFIGS[name]["model_type"])
    config, facts = model_config(CONFIGS[name]), describe(table, CONFIGS[name], [])
    facts |= {f"{key}_per_expert": facts[key] for key in ("num_attention_heads", "num_key_value_heads")}
    for key in ("rope_parameters", "parallel_block", "qk_norm", "qk_norm_shape", "qk_norm_bias", "qk_norm_after_rotary", "rope_layers", "post_norms", "attention_bias", "attention_out_bias", "mlp_bias", "norm_type", "norm_bias", "gated_ffn", "rope_interleaved", "sliding_window", "layer_types", "hidden_act", "head_dim", "logit_scale", "num_key_value_heads_per_expert", "num_attention_heads_per_expert", "tie_word_embeddings"):  # fmt: skip
        assert getattr(config, key) == facts[key], key


MISREADINGS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str]] = {
    # family, what its config.json says, the function of dense.py that reads it wrongly, what it gives instead, what verify names
    "a forgotten scaling": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "_rope", {"rope_type": "default"}, "rotary frequencies"),
    "another base": ("mistral", {"rope_theta": 5e5}, "_rope", {"rope_theta": 1e4}, "rotary frequencies"),
    "another share": ("gpt_neox", {"rotary_pct": 0.5}, "_rope", {"partial_rotary_factor": 0.25}, "rotary frequencies"),
    "another context": ("phi3", {"rope_scaling": LONGROPE, ORIGINAL: 64}, "_rope", {ORIGINAL: 8}, "rotary factor"),
    "a forgotten window": ("mistral", {"sliding_window": 4}, "_sliding", {"sliding_window": None}, "windows"),
    "a window in the wrong layer": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "_sliding", {"layer_types": [SLIDES, FULL]}, "windows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISREADINGS)
def test_verification_finds_a_configuration_that_the_plan_misread(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model that a merge is compared with does not come from the plan's reading."""
    family, keys, function, wrong, named = MISREADINGS[name]
    write_sources(tmp_path, {**CONFIGS[family], **keys})
    right = getattr(config, function)
    monkeypatch.setattr(config, function, lambda *args: {**right(*args), **wrong})
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    found = failed(verify(folder, plan))
    assert f"seed: {named}" in found["source configs"]
    assert "layer 0" in found["expert isolation"] or name == "a window in the wrong layer"
    monkeypatch.undo()
    assert "source configs" in failed(verify(folder, plan))


@pytest.mark.parametrize("also", [False, True])
def test_verification_finds_the_wrong_one_of_two_spellings(also: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the plan overlook that a file contradicts itself, and take what transformers does not: even where loading overlooks it too."""
    write_sources(tmp_path, CONFIGS["qwen3"])
    for name in ("seed", "code", "law"):
        edit(tmp_path / name, rope_scaling={**YARN, ORIGINAL: 32}, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    right = config._rope
    monkeypatch.setattr(dense, "conflicts", lambda *args: [])
    monkeypatch.setattr(config, "_rope", lambda family, config, problems: right(family, {**config, "rope_scaling": None}, problems))
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    if not also:
        assert "rope_scaling and rope_parameters are two spellings" in failed(verify(folder, plan))["model"]
        return
    monkeypatch.setattr("bam_merge.model.config.conflicts", lambda *args: [])
    found = failed(verify(folder, plan))
    assert "seed: rotary frequencies" in found["source configs"]
    assert "layer 0, expert 0 (seed)" in found["expert isolation"]


@pytest.mark.parametrize(("family", "keys", "fact", "wrong", "check"), [
    ("cohere", {"logit_scale": 0.5}, "logit_scale", 0.25, "head"),
    ("llama", {"rms_norm_eps": 1e-2}, "rms_norm_eps", 1e-6, "head"),
    ("llama", {"hidden_act": "relu"}, "hidden_act", "silu", "source configs"),
    ("gpt_neox", {"use_parallel_residual": False}, "parallel_block", True, "source configs"),
    ("granite", {}, "attention_scale", None, "source configs"), ("granite", {}, "embedding_scale", None, "source configs"),
    ("granite", {}, "residual_scale", 1.0, "source configs"), ("granite", {}, "logit_scale", 4.0, "head"),
    ("gemma", {}, "norm_offset", 0, "source configs"), ("gemma", {}, "norm_offset", 0, "head"),
    ("gemma", {}, "embedding_scale_in_dtype", False, "source configs"),
    ("smollm3", {}, "rope_layers", [1], "source configs"), ("smollm3", {}, "rope_layers", None, "expert isolation"),
    ("cohere2", {}, "rope_layers", None, "expert isolation"), ("granite", {}, "residual_scale", 1.0, "expert isolation"),
    ("olmo", {}, "norm_weights", True, "model"), ("olmo_clipped", {}, "attention_clip", None, "source configs"), ("olmo_clipped", {}, "attention_clip", None, "expert isolation"),
    ("olmo2", {}, "qk_norm_shape", "head", "model"), ("phi_qk_norm", {}, "qk_norm_bias", False, "model"), ("exaone4", {}, "rope_layers", None, "expert isolation"),
    ("glm4", {}, "rms_norm_eps", 1e-2, "expert isolation"), ("olmo2", {}, "qk_norm_after_rotary", True, "expert isolation"),
    ("falcon_grouped", {}, "parallel_norms", 1, "model"),
    ("granitemoehybrid", {}, "rope_layers", [], "expert isolation"), ("granitemoehybrid_nope", {}, "rope_layers", None, "source configs"),
    ("glm", {}, "rms_norm_eps", 1e-2, "head"), ("glm", {}, "rope_interleaved", False, "source configs"),
    ("hunyuan_v1_dense", {}, "qk_norm_after_rotary", False, "source configs"), ("ministral3", {}, "query_growth", 0.1, "source configs"),
    ("ministral3", {}, "query_growth", None, "source configs"), ("starcoder2", {}, "layer_norm_eps", 1e-2, "head"),
])  # fmt: skip
def test_verification_finds_a_fact_that_the_plan_misread(
    family: str, keys: dict[str, Any], fact: str, wrong: Any, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(tmp_path, {**CONFIGS[family], **keys})
    right = config.describe
    monkeypatch.setattr(dense, "describe", lambda *args: {**right(*args), fact: wrong})
    plan = plan_file(write_recipe(tmp_path))
    assert check in failed(verify(publish(plan, None, UNPROVED), plan))


def test_swish_is_silu(tmp_path: Path) -> None:
    """Two names of one activation, in one file and in two sources."""
    write_sources(tmp_path, CONFIGS["llama"])
    edit(tmp_path / "law", hidden_act="swish", hidden_activation="silu")
    assert plan_file(write_recipe(tmp_path)).config["hidden_act"] == "silu"
    assert meaning(load_model(tmp_path / "law").config) == meaning(load_model(tmp_path / "code").config)
