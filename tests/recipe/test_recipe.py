"""Recipes: what is accepted, and the message of everything that is not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import said

from bam_merge import expressions
from bam_merge.errors import RecipeError
from bam_merge.recipe.load import load_recipe, parse_recipe
from bam_merge.recipe.rules import covers, parse_layers, parse_size
from bam_merge.recipe.schema import schema

GOOD = """\
method: bam
sources: {seed: a, code: b, law: c}
output: {path: out}
"""


def problems(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [problem.removeprefix(str(tmp_path) + "/") for problem in caught.value.problems]


BAD = {  # the recipe, and all that is said of it
    "typo in a key": (GOOD + "fnn: {top_k: 1}", "HOME/x.yaml:4:1: fnn: unknown key; did you mean 'ffn'?"),
    "typo in a nested key": (GOOD + "ffn: {topk: 1}", "HOME/x.yaml:4:7: ffn.topk: unknown key; did you mean 'top_k'?"),
    "typo in a method": (GOOD.replace("bam", "btxx"), "HOME/x.yaml:1:1: method: found 'btxx', expected bam or btx or sparse_upcycling or merge; did you mean 'btx'?"),
    "typo in a make": (GOOD + "shared: {make: slrp}", "HOME/x.yaml:4:10: shared.make: 'slrp' is none of mean, copy, linear, slerp, nuslerp, karcher, task_arithmetic, ties, dare_ties, dare_linear, breadcrumbs, della, ram, sce, model_stock; did you mean 'slerp'?"),
    "typo in an init": (GOOD + "router: {init: nrmal}", "HOME/x.yaml:4:10: router.init: 'nrmal' is none of normal, uniform, zeros, orthogonal, ridge, mean; did you mean 'normal'?"),
    "typo in a router key": (GOOD + "router: {init: normal, sdt: 1}", "HOME/x.yaml:4:24: router.sdt: unknown key; did you mean 'std'?"),
    "typo in one router": (GOOD + "router: {fnn: {init: zeros}}", "HOME/x.yaml:4:10: router.fnn: unknown key; did you mean 'ffn'?"),
    "typo in a rule key": (GOOD + "rules: [{roles: [head], make: copy, form: seed}]", "HOME/x.yaml:4:9: rules[0].from: is required and missing.\nHOME/x.yaml:4:37: rules[0].form: unknown key; did you mean 'from'?"),
    "duplicate key": (GOOD + "method: btx", "HOME/x.yaml:4:1: the key 'method' stands twice."),
    "missing section": ("method: bam\nsources: {a: b, c: d}", "HOME/x.yaml:1:1: output: is required and missing."),
    "missing make": (GOOD + "rules: [{roles: [head]}]", "HOME/x.yaml:4:9: rules[0].make: is required and missing."),
    "wrong type": (GOOD + "ffn: {top_k: two}", "HOME/x.yaml:4:7: ffn.top_k: found 'two', expected an integer."),
    "string for a number": (GOOD + 'router: {init: normal, std: "0.02"}', "HOME/x.yaml:4:24: router.std: found '0.02' (a number stands without quotes), expected a number."),
    "bare no": ("method: bam\nsources: {seed: no, b: b}\noutput: {path: o}", "HOME/x.yaml:2:11: sources.seed: found false (a bare yes, no, on or off is true or false in YAML: quote it), expected text."),
    "not a mapping": ("- a", "HOME/x.yaml: a recipe is a mapping with method, sources and output; found a list."),
    "empty": ("", "HOME/x.yaml: a recipe is a mapping with method, sources and output; found nothing."),
    "unknown expert": (GOOD + "experts: [seed, cod]", "HOME/x.yaml:4:17: experts[1]: 'cod' is not among the sources; did you mean 'code'?\nHOME/x.yaml:2:20: sources.code: never used: neither an expert nor named by a rule. Remove it, or add it to experts.\nHOME/x.yaml:2:29: sources.law: never used: neither an expert nor named by a rule. Remove it, or add it to experts."),
    "one expert": (GOOD.replace(", code: b, law: c", ""), "HOME/x.yaml: experts: a mixture needs at least two experts, found 1. For several experts from one model: experts: [seed, seed, seed, seed]."),
    "one source to merge": ("method: merge\nsources: {a: b}\noutput: {path: o}", "HOME/x.yaml: experts: a merge needs at least two different sources."),
    "top_k too large": (GOOD + "ffn: {top_k: 4}", "HOME/x.yaml:4:7: ffn.top_k: 4 experts per token of only 3. Use at most 3."),
    "attention top_k too large": (GOOD + "attention: {routing: top_k, top_k: 4}", "HOME/x.yaml:4:29: attention.top_k: 4 attention experts per token of only 3. Use at most 3."),
    "attention top_k missing": (GOOD + "attention: {routing: top_k}", "HOME/x.yaml: attention.top_k: is required with routing: top_k."),
    "attention top_k with soft": (GOOD + "attention: {top_k: 2}", "HOME/x.yaml:4:13: attention.top_k: soft routing uses all experts. Remove top_k, or use routing: top_k."),
    "attention in btx": (GOOD.replace("bam", "btx") + "attention: {kv: shared}", "HOME/x.yaml:4:1: attention: method btx has no attention experts. Remove this key, or use method: bam."),
    "routers in merge": (GOOD.replace("bam", "merge") + "router: {init: zeros}", "HOME/x.yaml:4:1: router: method merge gives a dense model, which has no experts and no routers. Remove this key."),
    "several to upcycle": (GOOD.replace("bam", "sparse_upcycling"), "HOME/x.yaml: experts: sparse_upcycling copies one dense model, found seed, code, law. Use btx or bam for several."),
    "unused source": (GOOD + "experts: [seed, code]", "HOME/x.yaml:2:29: sources.law: never used: neither an expert nor named by a rule. Remove it, or add it to experts."),
    "unknown role": (GOOD + "rules: [{roles: [atn.q], make: mean}]", "HOME/x.yaml:4:18: rules[0].roles[0]: 'atn.q' is no role; did you mean 'attn.q'? Roles: embed, head, head.bias, norm.attn, norm.attn.bias, norm.ffn, norm.ffn.bias, norm.final, norm.final.bias, norm.attn.post, norm.attn.post.bias, norm.ffn.post, norm.ffn.post.bias, attn.q, attn.q.bias, attn.k, attn.k.bias, attn.v, attn.v.bias, attn.o, attn.o.bias, attn.q_norm, attn.q_norm.bias, attn.k_norm, attn.k_norm.bias, attn.gate, attn.gate.bias, linear.q, linear.k, linear.v, linear.z, linear.b, linear.a, linear.q_conv, linear.k_conv, linear.v_conv, linear.dt_bias, linear.A_log, linear.norm, linear.o, ffn.gate, ffn.gate.bias, ffn.up, ffn.up.bias, ffn.down, ffn.down.bias, layer.scale, router.attn, router.ffn."),
    "no role at all": (GOOD + "rules: [{roles: ['['], make: mean}]", "HOME/x.yaml:4:18: rules[0].roles[0]: '[' is no role. Roles: embed, head, head.bias, norm.attn, norm.attn.bias, norm.ffn, norm.ffn.bias, norm.final, norm.final.bias, norm.attn.post, norm.attn.post.bias, norm.ffn.post, norm.ffn.post.bias, attn.q, attn.q.bias, attn.k, attn.k.bias, attn.v, attn.v.bias, attn.o, attn.o.bias, attn.q_norm, attn.q_norm.bias, attn.k_norm, attn.k_norm.bias, attn.gate, attn.gate.bias, linear.q, linear.k, linear.v, linear.z, linear.b, linear.a, linear.q_conv, linear.k_conv, linear.v_conv, linear.dt_bias, linear.A_log, linear.norm, linear.o, ffn.gate, ffn.gate.bias, ffn.up, ffn.up.bias, ffn.down, ffn.down.bias, layer.scale, router.attn, router.ffn."),
    "source not given": (GOOD + "rules: [{roles: [head], make: copy, from: mth}]", "HOME/x.yaml:4:9: rules[0]: names the source 'mth', which is not among the sources"),
    "base not given": (GOOD + "shared: {make: ties, base: sed, density: 0.5}", "HOME/x.yaml:4:1: shared: names the source 'sed', which is not among the sources; did you mean 'seed'?"),
    "weights": (GOOD + "shared: {make: linear, weights: {seed: 1, code: 1}}", "HOME/x.yaml:4:24: shared.weights: sum to 2, expected 1, or the tensor's scale would change. (task_arithmetic scales differences.)"),
    "weight of the base": (GOOD + "shared: {make: ties, base: seed, density: 1, weights: {seed: 1}}", "HOME/x.yaml:4:46: shared.weights: seed is the base; its difference from itself is zero. Remove it."),
    "density of zero": (GOOD + "shared: {make: ties, base: seed, density: 0}", "HOME/x.yaml:4:34: shared.density: found 0, expected more than 0."),
    "t beyond one": (GOOD + "shared: {make: slerp, from: [seed, code], t: 1.5}", "HOME/x.yaml:4:43: shared.t: found 1.5, expected at most 1."),
    "slerp of one": (GOOD + "shared: {make: slerp, from: [seed, seed], t: 0.5}", "HOME/x.yaml:4:23: shared.from: slerp needs two different sources."),
    "slerp of three": (GOOD + "shared: {make: slerp, from: [seed, code, law], t: 0.5}", "HOME/x.yaml:4:23: shared.from: found [\"seed\", \"code\", \"law\"], expected at most 2 entries."),
    "layers": (GOOD + 'rules: [{roles: [attn.k], layers: "3-1", make: mean}]', "HOME/x.yaml:4:27: rules[0].layers: '3-1' is an empty layer range."),
    "layers of words": (GOOD + "rules: [{roles: [attn.k], layers: first, make: mean}]", "HOME/x.yaml:4:27: rules[0].layers: 'first' is no layer range; write 3, \"0-3\", \"0,4-7\" or \"20-\"."),
    "router rule on weights": (GOOD + "rules: [{roles: ['*'], make: zeros}]", "HOME/x.yaml:4:18: rules[0].roles[0]: zeros initialises routers only, '*' covers other tensors."),
    "weight rule on routers": (GOOD + "rules: [{roles: [router.ffn], make: mean}]", "HOME/x.yaml:4:18: rules[0].roles[0]: 'router.ffn' covers routers, which no source has. Give them a rule of their own."),
    "expert rule in merge": (GOOD.replace("bam", "merge") + "rules: [{roles: [ffn.*], make: expert}]", "HOME/x.yaml:4:26: rules[0].make: method merge gives a dense model, which has no experts."),
    "expert for all": (GOOD + "shared: {make: expert}", "HOME/x.yaml:4:10: shared.make: 'expert' is none of mean, copy, linear, slerp, nuslerp, karcher, task_arithmetic, ties, dare_ties, dare_linear, breadcrumbs, della, ram, sce, model_stock."),
    "shard size": (GOOD.replace("out}", "out, max_shard_size: 5XB}"), "HOME/x.yaml:3:21: output.max_shard_size: '5XB' is no size; write for example 5GB, 500MB or 2GiB."),
    "shard size of nothing": (GOOD.replace("out}", "out, max_shard_size: 0}"), "HOME/x.yaml:3:21: output.max_shard_size: 0 is no size of a file."),
    "source name": (GOOD.replace("law:", '"la:w":'), "HOME/x.yaml:2:29: sources.la:w: a source's name is letters, digits, '_', '-' and '.'; rename it."),
    "syntax": (GOOD + "ffn: {top_k: 1", "HOME/x.yaml:4:15: expected ',' or '}', but got '<stream end>'."),
    "infinite weight": (GOOD + "shared: {make: linear, weights: {seed: .inf, code: 1}}", "HOME/x.yaml:4:34: shared.weights.seed: found inf, expected a finite number."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe(name: str, tmp_path: Path, run: Any) -> None:
    text, message = BAD[name]
    (tmp_path / "x.yaml").write_text(text)
    for command in (("plan", tmp_path / "x.yaml"), (tmp_path / "x.yaml",)):
        assert said(run, tmp_path, *command) == message.split("\n")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = GOOD + "fnn: 1\nrandom_seed: -1\nrouter: {init: x}\nrules: [{roles: [head], make: y}]"
    assert len(problems(tmp_path, text)) == 4


@pytest.mark.parametrize("text", ["", "\0", "a: [", "é: è", "\x1b[31m: 1"])
def test_messages_are_safe_to_print(text: str, tmp_path: Path) -> None:
    assert all(problem.isprintable() for problem in problems(tmp_path, text))


def test_missing_and_undecodable_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file or directory\."):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(tmp_path / "x.yaml")


def test_numbers_like_1e_2_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + "router: {attention: {init: normal, std: 1e-2}, ffn: {init: uniform, bound: 1e-3}}")
    recipe = load_recipe(path)
    assert recipe.router_init("router.attn") == expressions.Normal(0.01)
    assert recipe.router_init("router.ffn") == expressions.Uniform(0.001)


@pytest.mark.parametrize(("method", "expected"), [("bam", (1, False)), ("btx", (2, True))])
def test_gating_defaults_by_method(method: str, expected: tuple[int, bool]) -> None:
    document = {"method": method, "sources": {"a": "x", "b": "y"}, "output": {"path": "o"}}
    assert parse_recipe(document).gates == expected
    sigmoid = parse_recipe({**document, "ffn": {"gate": "topk_then_sigmoid"}})
    assert sigmoid.gates == (2, True) and sigmoid.sigmoid  # one sigmoid over itself would be the constant 1
    assert sigmoid.resolved()["ffn"] == {"top_k": 2, "gate": "topk_then_sigmoid", "gate_scale": 1.0}
    assert parse_recipe(sigmoid.resolved()).gates == (2, True)


def test_seed_is_the_source_of_that_name_or_the_first_expert() -> None:
    document = {"method": "btx", "sources": {"a": "x", "seed": "y"}, "output": {"path": "o"}}
    assert parse_recipe(document).seed_name == "seed"
    assert parse_recipe({**document, "sources": {"a": "x", "b": "y"}, "experts": ["b", "a"]}).seed_name == "b"


def test_resolved_recipe_is_a_recipe_with_the_same_meaning(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + "rules: [{roles: [head], make: slerp, from: [seed, law], t: 0.5}]\nrouter: {init: zeros}")
    resolved = load_recipe(path).resolved()
    again = parse_recipe(resolved, tmp_path)
    assert again.resolved() == resolved
    assert resolved["router"] == {"attention": {"init": "zeros"}, "ffn": {"init": "zeros"}}


def test_resolved_recipe_holds_no_absolute_path(tmp_path: Path) -> None:
    text = f"method: btx\nsources: {{a: {tmp_path}/a, b: {tmp_path}/b}}\noutput: {{path: {tmp_path}/o}}"
    (tmp_path / "x.yaml").write_text(text)
    resolved = load_recipe(tmp_path / "x.yaml").resolved()
    assert resolved["sources"] == {"a": "a", "b": "b"}
    assert resolved["output"]["path"] == "o"


@pytest.mark.parametrize(("text", "layers"), [(None, [0, 1, 2, 3]), (2, [2]), ("0-2", [0, 1, 2]), ("0,2-3", [0, 2, 3]), ("2-", [2, 3])])
def test_layer_ranges(text: int | str | None, layers: list[int]) -> None:
    assert sorted(parse_layers(text, 4)) == layers


@pytest.mark.parametrize("text", ["\u0663", "0-\u0663", "0x1", "1_0", "+1", "1:2"])
def test_layers_are_decimal(text: str) -> None:
    with pytest.raises(ValueError, match="is no layer range"):
        parse_layers(text, 4)


def test_layer_beyond_the_model() -> None:
    with pytest.raises(ValueError, match="layer 4 does not exist; the model's layers are 0 to 3"):
        parse_layers("2-4", 4)


def test_role_patterns_cover_biases() -> None:
    assert covers("attn.k", "attn.k.bias")
    assert covers("attn.*", "attn.q_norm")
    assert not covers("attn.k", "attn.k_norm")
    assert not covers("attn.k.bias", "attn.k")


@pytest.mark.parametrize(("text", "size"), [(10, 10), ("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200kb", 200_000)])
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


def test_schema_accepts_the_recipes_and_refuses_a_typo() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(schema())
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        checker.validate(yaml.safe_load(path.read_text()))
    assert not checker.is_valid({**yaml.safe_load(GOOD), "fnn": {}})
    assert not checker.is_valid({**yaml.safe_load(GOOD), "rules": [{"roles": ["head"], "make": "copy", "form": "seed"}]})


def test_schema_command_prints_json() -> None:
    done = subprocess.run([sys.executable, "-m", "bam_merge", "schema"], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["title"] == "bam-merge recipe"
    assert set(document["required"]) == {"method", "sources", "output"}


def test_the_long_form_of_a_source_says_the_same() -> None:
    """And a document has the short one where that says it all."""
    document = {"method": "merge", "sources": {"a": {"path": "x"}, "b": "./y/../z"}, "output": {"path": "out"}}
    recipe = parse_recipe(document)
    assert [recipe.source(name).path for name in recipe.sources] == ["x", "./y/../z"]
    assert recipe.resolved()["sources"] == {"a": "x", "b": "z"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"pth": "x"}, "recipe: sources.a.pth: unknown key; did you mean 'path'?"),
        ({}, "recipe: sources.a.path: is required and missing."),
        ({"path": ""}, "recipe: sources.a: found '': an empty path; write . for the folder itself."),
        (3, "recipe: sources.a: found 3 (in quotes it is text), expected text."),
    ],
)
def test_a_wrong_source_is_named(source: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"method": "merge", "sources": {"a": source, "b": "y"}, "output": {"path": "out"}})
    assert message in caught.value.problems
