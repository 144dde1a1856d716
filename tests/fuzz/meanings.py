"""Files that say one thing in two ways: what contradicts itself or another source is refused, and the rest is read as its readers do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutations import inputs, text_of
from planting import clear
from properties import Property, two_sources
from test_spellings import KINDS as FAMILIES
from test_spellings import base, their_windows, theirs
from test_tokenizers import FORMS, write

from bam_merge.architectures.config import describe, mixture_values
from bam_merge.architectures.spellings import conflicts
from bam_merge.architectures.tables import load_architecture
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.model.config import model_config
from bam_merge.planning.make import make_plan
from bam_merge.recipe.load import load_recipe

# ---- tokenizers ------------------------------------------------------------------------------------------------------------

words = st.text("abcdefgh", min_size=1, max_size=3)
vocabularies = st.lists(st.tuples(st.booleans(), words).map(lambda item: "Ġ" * item[0] + item[1]), min_size=2, max_size=7, unique=True)
edits = st.tuples(st.sampled_from(("nothing", "swap", "replace", "rotate", "drop", "add")), st.integers(0, 9), st.integers(0, 9), words)


def edited(tokens: list[str], edit: tuple[str, int, int, str]) -> list[str]:
    """The tokens in another order, or with one that is new."""
    kind, a, b, word = edit
    tokens = list(tokens)
    a, b = a % len(tokens), b % len(tokens)
    match kind:
        case "swap":
            tokens[a], tokens[b] = tokens[b], tokens[a]
        case "replace":
            tokens[a] = f"{word}z"
        case "rotate":
            tokens = tokens[a:] + tokens[:a]
        case "drop":
            tokens = tokens[:-1]
        case "add":
            tokens = [*tokens, f"{word}y"]
    return tokens


def contradict(mine: list[str], theirs: list[str]) -> bool:
    """Whether an id means two tokens, or a token has two ids."""
    places = {token: index for index, token in enumerate(mine)}
    return any(a != b for a, b in zip(mine, theirs, strict=False)) or any(places.get(t, i) != i for i, t in enumerate(theirs))


def tokenizers(home: Path) -> Property:
    """Two sources with a tokenizer each, in any two forms: contradicting ones are refused, equal ones accepted."""
    recipe = load_recipe(two_sources(home))

    def check(data: tuple[str, str, list[str], tuple[str, int, int, str]]) -> None:
        mine, other, tokens, edit = data
        first, second = ["<s>", *tokens], ["<s>", *edited(tokens, edit)]
        written = {"seed": FORMS[mine](first), "code": FORMS[other](second)}
        try:
            for source, files in written.items():
                write(home / source, files)
            try:
                make_plan(recipe)
            except BamMergeError:
                assert first != second, f"{mine} and {other} of one tokenizer are refused"
                raise
            assert not contradict(first, second), f"{first} as {mine} and {second} as {other} pass"
        finally:
            for source, files in written.items():
                for name in files:
                    clear(home / source / name)

    strategy = st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(list(FORMS)), vocabularies, edits)
    return Property("tokenizers in two forms", ("tokenizer.json", "tekken.json", ["a", "Ġb"], ("nothing", 0, 0, "a")), strategy, check)


GOOD_TOKENIZERS: dict[str, Any] = {
    "tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}, "added_tokens": [{"id": 3, "content": "d"}]},
    "vocab.json": {"a": 0, "b": 1, "c": 2, "d": 3},
    "added_tokens.json": {"c": 2, "d": 3},
}  # fmt: skip


def edited_tokenizers(home: Path) -> Property:
    """A good tokenizer and an edited one, or its other form: where both name tokens plainly and pass, no id means two of them."""
    recipe = load_recipe(two_sources(home))

    def check(data: tuple[str, str, bytes]) -> None:
        mine, other, content = data
        files = {"seed": {mine: json.dumps(GOOD_TOKENIZERS[mine]).encode()}, "code": {other: content}}
        try:
            for source, written in files.items():
                write(home / source, written)
            make_plan(recipe)
            first = plain_ids(mine, json.loads(files["seed"][mine]))
            second = plain_ids(other, json.loads(content))
            for number in first.keys() & second.keys():
                assert first[number] & second[number], f"id {number} is {first[number]} in {mine} and {second[number]} in {other}"
        finally:
            clear(home / "seed" / mine)
            clear(home / "code" / other)

    def edits_of(name: str) -> st.SearchStrategy[bytes]:
        return inputs(GOOD_TOKENIZERS[name], lambda document: text_of(document).encode("utf-8", "surrogatepass"))

    mine = st.sampled_from(list(GOOD_TOKENIZERS))
    strategy = st.one_of(*(st.tuples(mine, st.just(name), edits_of(name)) for name in GOOD_TOKENIZERS))
    good = ("vocab.json", "tokenizer.json", json.dumps(GOOD_TOKENIZERS["tokenizer.json"]).encode())
    return Property("edited tokenizers", good, strategy, check)


def plain_ids(name: str, document: Any) -> dict[int, set[str]]:
    """id -> tokens, as the file says them, without any other reading of it than JSON's."""
    pairs: list[tuple[Any, Any]] = []
    if name == "tokenizer.json":
        model = document.get("model") if isinstance(document, dict) else None
        vocab = model.get("vocab") if isinstance(model, dict) else None
        pairs += vocab.items() if isinstance(vocab, dict) else []
        added = document.get("added_tokens") if isinstance(document, dict) else None
        for item in added if isinstance(added, list) else []:
            if isinstance(item, dict):
                number = item.get("id")
                pairs = [pair for pair in pairs if pair[1] != number]  # which is renamed by it
                pairs.append((item.get("content"), number))
    elif isinstance(document, dict):
        pairs += document.items()
    found: dict[int, set[str]] = {}
    for token, number in pairs:
        if type(number) is int and isinstance(token, str):
            found.setdefault(number, set()).add(token)
    return found


# ---- configurations with two spellings -------------------------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"
ROPES: tuple[Any, ...] = (
    None, {}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 2.0}, {"type": "linear", "rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, {"rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
)  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "rope_scaling": ROPES, "rope_parameters": ROPES, "rope_theta": (1e4, 10000, 5e5, None), "rotary_emb_base": (1e4, 5e5, 10000),
    "partial_rotary_factor": (0.5, 1.0, 1, 0.25), "rotary_pct": (0.5, 0.25, 1.0), "original_max_position_embeddings": (32, 128, 4096, None),
    "dtype": ("float32", "bfloat16", "torch.float32"), "torch_dtype": ("float32", "bfloat16", None), "hidden_act": ("silu", "swish", "gelu"),
    "hidden_activation": ("silu", "gelu"), "activation_function": ("silu", "gelu_new"), "num_experts": (4, 6), "num_local_experts": (4, 6),
    "n_routed_experts": (4, 8), "n_embd": (32, 64), "d_model": (32, 64), "n_layer": (2, 3), "num_layers": (2, 3), "n_head": (4, 2),
    "num_heads": (4, 8), "num_key_value_heads": (4, 2, 1, None), "head_dim": (8, 16, None), "use_sliding_window": (False, True, None),
    "sliding_window": (None, 8), "max_window_layers": (0, 1, 2, 28), "tie_word_embeddings": (True, False),
    "layer_types": ([FULL, FULL], [FULL, SLIDING], [SLIDING, SLIDING], None), "max_position_embeddings": (128, 64),
}  # fmt: skip
"""Every key that a fact may stand under, and values for it, some of which say the same."""


GROUPS = (
    ("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct"), ("dtype", "torch_dtype"), ("hidden_size", "n_embd", "d_model"),
    ("hidden_act", "hidden_activation", "activation_function"), ("num_hidden_layers", "n_layer", "num_layers"),
    ("num_attention_heads", "n_head", "num_heads"), ("num_experts", "num_local_experts", "n_routed_experts"),
)  # fmt: skip
"""Keys that mean one fact, to transformers, to older versions of it or to other programs."""


def differing(config: dict[str, Any]) -> list[str]:
    """Keys that mean one fact and have two values here, `config` being one of `base` with more keys."""
    ropes = [config[key] for key in ("rope_scaling", "rope_parameters") if isinstance(config.get(key), dict) and config[key]]
    found = []
    for keys in GROUPS if "num_experts_per_tok" in config else GROUPS[:-1]:
        stated = {key: plain(config[key]) for key in keys if config.get(key) is not None}
        for rope in ropes:
            stated |= {f"{index} {key}": rope[key] for index, key in enumerate(keys) if rope.get(key) is not None}
        found += [] if len(set(stated.values())) < 2 else list(stated)
    kinds = {str(rope.get("rope_type") or rope.get("type") or "default") for rope in ropes}
    return found + (["rope_scaling", "rope_parameters"] if len(kinds) > 1 else [])


def plain(value: Any) -> Any:
    return {"swish": "silu"}.get(value, value.removeprefix("torch.")) if isinstance(value, str) else value


def spelled_twice(home: Path) -> Property:
    """A configuration with up to six more keys: refused, or no fact has two values and both readings here are transformers' own.

    Where there are just two keys of one fact with two values, the refusal names both values, and a key that is wrong.
    """

    import transformers

    transformers.logging.set_verbosity_error()  # it warns of what is tried here

    def check(data: tuple[str, dict[str, Any]]) -> None:
        family, keys = data
        config = json.loads(json.dumps({**base(family), **keys}))
        table, problems = load_architecture(family), list[str]()
        facts = (describe if table.kind == "dense" else mixture_values)(table, config, problems)
        problems += conflicts(table, config)
        differ = differing(config)
        if problems:
            if len(keys) == 2 and set(keys) <= set(differ):
                said = " ".join(problems)
                assert any(key in said for key in keys), f"refused without naming a key of {list(keys)}: {problems}"
                named = [repr(value) in said or repr(plain(value)) in said for value in keys.values()]
                assert all(named), f"refused without naming {list(keys.values())}: {problems}"
            raise CheckpointError(*dict.fromkeys(problems))
        assert not differ, f"{differ} differ, and pass"
        found = model_config(config)
        try:
            expected = dict(meant(config))
        except Exception:  # of any kind: it validates in many ways
            return  # transformers makes no model of it
        for key, value in expected.items():
            assert facts_of(facts, key) == value, f"{key} is {facts_of(facts, key)!r}, transformers takes {value!r}"
            assert facts_of(vars(found), key) == value, f"the reference model's {key} is {facts_of(vars(found), key)!r}, not {value!r}"

    one = st.one_of(*(st.tuples(st.just(key), st.sampled_from(values)) for key, values in CHOICES.items()))
    pairs = [(a, b) for keys in GROUPS for a in keys for b in keys if a < b and a in CHOICES and b in CHOICES]
    two = st.one_of(*(st.fixed_dictionaries({key: st.sampled_from(CHOICES[key]) for key in pair}) for pair in pairs))
    more = st.one_of(st.lists(one, min_size=1, max_size=6).map(dict), two)
    return Property("configurations with two spellings", ("llama", {}), st.tuples(st.sampled_from(FAMILIES), more), check)


STRETCHED = ("yarn", "longrope", "llama3")
"""Types of rotary scaling in whose formulas the original context stands."""


def meant(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What transformers' configuration class takes, by our word for it."""
    found = theirs(config)
    rope = found.rope_parameters
    keys = ("rope_type", "rope_theta", "factor", *(["original_max_position_embeddings"] if rope["rope_type"] in STRETCHED else []))
    yield from ((f"rope.{key}", rope.get(key)) for key in keys)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):
        yield key, getattr(found, key)
    heads = found.num_attention_heads
    yield "heads", heads
    if config["model_type"] != "gpt_neox":
        yield "kv heads", found.num_key_value_heads or heads
        yield "head_dim", getattr(found, "head_dim", None) or found.hidden_size // heads
    yield "hidden_act", {"swish": "silu"}.get(found.hidden_act, found.hidden_act)
    windows = their_windows(config)
    if windows is not None:
        yield "windows", windows


def facts_of(facts: Any, key: str) -> Any:
    """The same word in the plan's facts, or in the reference model's configuration."""
    if key.startswith("rope."):
        return facts["rope_parameters"].get(key.removeprefix("rope."))
    match key:
        case "heads" | "kv heads":
            name = "num_attention_heads" if key == "heads" else "num_key_value_heads"
            return facts.get(f"{name}_per_expert") or facts[name]
        case "windows":
            types = facts.get("layer_types") or [FULL] * facts["num_hidden_layers"]
            return [facts.get("sliding_window") if kind == SLIDING else None for kind in types]
        case "hidden_act":
            return {"swish": "silu"}.get(facts[key], facts[key])
        case _:
            return facts[key]
