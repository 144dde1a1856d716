"""Every kind of wrong value in every place of a recipe: what is said names the key, and is said in the words of who wrote the recipe."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bam_merge.errors import RecipeError
from bam_merge.recipe.load import load_recipe, parse_recipe
from bam_merge.recipe.schema import Recipe
from bam_merge.validation_words import expectation, is_worded, shown

RULES: list[dict[str, Any]] = [
    {"roles": ["norm.*"], "make": "copy", "from": "seed"},
    {"roles": ["embed"], "make": "linear", "weights": {"seed": 0.5, "code": 0.5}, "layers": "0-3"},
    {"roles": ["head"], "make": "slerp", "from": ["seed", "code"], "t": 0.5, "layers": 2},
    {"roles": ["attn.q"], "make": "task_arithmetic", "base": "seed", "weights": {"code": 1.0}, "scale": 0.5},
    {"roles": ["attn.k"], "make": "ties", "base": "seed", "density": 0.5},
    {"roles": ["attn.v"], "make": "dare_ties", "base": "seed", "density": 0.5, "weights": {"code": 1.0}},
    {"roles": ["router.attn"], "make": "normal", "std": 0.1},
    {"roles": ["router.ffn"], "make": "uniform", "bound": 0.1},
    {"roles": ["router.ffn"], "make": "orthogonal", "gain": 1.0},
    {"roles": ["router.ffn"], "make": "zeros"},
    {"roles": ["ffn.*"], "make": "expert"},
    {"roles": ["attn.o"], "make": "mean"},
]
FULL: dict[str, Any] = {
    "method": "bam",
    "sources": {"seed": "a", "code": "b"},
    "experts": ["seed", "code"],
    "attention": {"kv": "expert", "routing": "top_k", "top_k": 1},
    "ffn": {"top_k": 1, "gate": "softmax_then_topk", "gate_scale": 1.0},
    "router": {"attention": {"init": "normal", "std": 0.02}, "ffn": {"init": "uniform", "bound": 0.1}},
    "shared": {"make": "ties", "base": "seed", "density": 0.5, "weights": {"code": 1.0}, "scale": 1.0},
    "rules": RULES,
    "random_seed": 0,
    "output": {"path": "out", "layout": "bam", "dtype": "source", "max_shard_size": "5GB"},
}
"""A recipe with every section, make and key."""

WRONG: list[Any] = [
    None, True, False, 0, -1, 3, 2**63, 1e400, float("nan"), 0.5, "", "010", "0x10", "1_000", "1:30", "5", "two", [], [1], ["a", None], {},
    {"a": 1}, {"int": 3}, {"make": 3}, {"make": "mean", "mean": {}}, {"init": None}, {"init": "normal", "std": "x"}, "a\ud800", {"a\ud800": 1},
    ["a", "b", "c"], ("a",), b"a", 10**40,
]  # fmt: skip

FOREIGN = re.compile(
    r"\b(NoneType|None|True|False|tuple|dict|dictionary|bool|int|str|list\[|Input|input|instance|Extra|Field required|should|valid|validation|"
    r"parse|unable|discriminator|literal|type_error|pydantic|union|callable)\b"
)
"""Words of pydantic and of Python, none of which stands in YAML or in this project's messages about recipes."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def changed(path: tuple[Any, ...], value: Any = ..., more: Any = ...) -> Any:
    """FULL with another value at `path`, or without it, or with one more key in the mapping there."""
    document = copy.deepcopy(FULL)
    here: Any = document
    for key in path[:-1]:
        here = here[key]
    if more is not ...:
        (here[path[-1]] if path else here)[more] = 1
    elif value is ...:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return document


def wrong_recipes() -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path in places(FULL):
        if path:
            yield from ((path, changed(path, copy.deepcopy(value))) for value in WRONG)
            yield path, changed(path)
        here: Any = FULL
        for key in path:
            here = here[key]
        if isinstance(here, dict):
            yield from ((path, changed(path, more=key)) for key in ("fnn", "int", "mean", "\ud800"))


def without_values(problem: str) -> str:
    """A message without what it quotes of the recipe."""
    return re.sub(
        r"found .*?(?=( \(|, expected|: holds|: an empty))|'[^']*'|\"[^\"]*\"|^recipe: \S*: (\S* is none)?", "", problem, flags=re.DOTALL
    )


def test_the_whole_recipe_is_right() -> None:
    assert parse_recipe(copy.deepcopy(FULL)).method == "bam"


def test_no_word_of_a_library_reaches_the_user() -> None:
    """Thousands of wrong recipes: each is refused in our words or accepted, and every type of pydantic's errors met has words."""
    kinds: set[str] = set()
    refused = 0
    for _, document in wrong_recipes():
        try:
            Recipe.model_validate(document)
        except ValidationError as error:
            kinds |= {item["type"] for item in error.errors(include_url=False)}
        try:
            parse_recipe(document)
        except RecipeError as error:
            refused += 1
            for problem in error.problems:
                assert problem.startswith("recipe: ")
                assert problem.isprintable()
                assert not FOREIGN.search(without_values(problem)), problem
    of_keys = {"extra_forbidden", "missing", "union_tag_not_found", "union_tag_invalid"}
    assert {kind for kind in kinds - of_keys if not is_worded(kind)} == set()
    assert {
        "int_type", "float_type", "string_type", "dict_type", "tuple_type", "model_attributes_type", "finite_number", "greater_than",
        "greater_than_equal", "less_than", "less_than_equal", "too_short", "too_long", "string_too_short", "literal_error", *of_keys,
    } <= kinds  # fmt: skip
    assert refused > 3000


@pytest.mark.parametrize(("document", "message"), [
    ({"shared": {"make": "mean", "mean": {"a": 1}}}, "shared.mean: unknown key."),
    ({"shared": {"make": 5}}, "shared.make: 5 is none of mean, copy, linear, slerp, nuslerp, karcher, task_arithmetic, ties, dare_ties, dare_linear, breadcrumbs, della, ram, sce, model_stock."),
    ({"shared": 3}, "shared: found 3, expected a mapping."),
    ({"router": {"init": None}}, "router.init: null is none of normal, uniform, zeros, orthogonal, ridge, mean."),
    ({"router": []}, "router: found [], expected a mapping."),
    ({"rules": "x"}, "rules: found 'x', expected a list."),
    ({"rules": [{"roles": ["head"], "make": "mean", "layers": {"int": 3}}]}, 'rules[0].layers: found {"int": 3}, expected an integer or text.'),
    ({"rules": [{"roles": ["head"], "make": "slerp", "from": [], "t": 0}]}, "rules[0].from: found 0 entries, expected 2."),
    ({"rules": [{"roles": ["head"], "make": "slerp", "from": ["a"], "t": 0}]}, "rules[0].from: found 1 entry, expected 2."),
    ({"experts": [1]}, "experts[0]: found 1 (in quotes it is text), expected text."),
    ({"experts": []}, "experts: found [], expected at least 1 entry."),
    ({"sources": {"seed": None, "code": "b"}}, "sources.seed: found null (an empty value or a bare ~ is null in YAML), expected text."),
    ({"random_seed": "0x10"}, "random_seed: found '0x10' (in plain decimal digits), expected an integer."),
    ({"random_seed": "1:30"}, "random_seed: found '1:30' (in plain decimal digits), expected an integer."),
    ({"random_seed": "1_000"}, "random_seed: found '1_000' (in plain decimal digits), expected an integer."),
    ({"random_seed": 1.0}, "random_seed: found 1.0, expected an integer."),
    ({"random_seed": 2**63}, "random_seed: found 9223372036854775808, expected less than 9,223,372,036,854,775,808."),
    ({"random_seed": 10**5000}, "random_seed: found a number of thousands of digits, expected less than 9,223,372,036,854,775,808."),
    ({"ffn": {"gate_scale": True}}, "ffn.gate_scale: found true, expected a number."),
    ({"ffn": {"gate": False}}, "ffn.gate: found false (a bare yes, no, on or off is true or false in YAML: quote it), expected softmax_then_topk or topk_then_softmax or topk_then_sigmoid."),
    ({"output": {"path": ""}}, "output.path: found '', expected at least 1 character."),
])  # fmt: skip
def test_words(document: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**copy.deepcopy(FULL), **document})
    assert caught.value.problems == (f"recipe: {message}",)


def test_an_error_without_words_of_its_own_has_no_foreign_ones() -> None:
    assert not is_worded("date_from_datetime_parsing")
    assert expectation({"type": "date_from_datetime_parsing", "msg": "Input should be a valid date"}) == "another value"
    assert shown({"a": [None, True]}) == '{"a": [null, true]}'


@pytest.mark.parametrize(("text", "message"), [
    ("010", "x.yaml:4:14: 010 begins with a zero, which some readers of YAML take for base eight; write 10, or '010' if it is a name."),
    ("!!int 0x10", "x.yaml:4:14: '0x10' is no int: an int here is a plain decimal number."),
    ("0b1", "x.yaml:4:1: random_seed: found '0b1' (in plain decimal digits), expected an integer."),
    ("1:30", "x.yaml:4:1: random_seed: found '1:30' (in plain decimal digits), expected an integer."),
])  # fmt: skip
def test_a_seed_in_another_base_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"method: bam\nsources: {{a: a, b: b}}\noutput: {{path: o}}\nrandom_seed: {text}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "x.yaml")
    assert caught.value.problems == (f"{tmp_path}/{message}",)


@pytest.mark.parametrize("key", ["ffn: {gate_scale: 01.5}", "ffn: {top_k: 01}", "rules: [{roles: [attn.k], layers: 010, make: mean}]"])
def test_so_is_any_other_number(key: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"method: bam\nsources: {{a: a, b: b}}\noutput: {{path: o}}\n{key}\n")
    with pytest.raises(RecipeError, match="begins with a zero"):
        load_recipe(tmp_path / "x.yaml")
