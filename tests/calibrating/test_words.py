"""What a recipe and a plan say of routers from texts: wrong keys and names, texts that do not do, defaults, and what the pass takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, GROUPED, write_recipe
from scenes import SOURCES, recipe, router, texts, write_scene, write_texts

from bam_merge.errors import BamMergeError, RecipeError
from bam_merge.planning.make import plan_file
from bam_merge.recipe.load import load_recipe, parse_recipe
from bam_merge.recipe.schema import Recipe

ALL = texts()


def problems(folder: Path, text: str, **options: Any) -> str:
    with pytest.raises(BamMergeError) as error:
        plan_file(recipe(folder, text, **options))
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("router: {init: ridge}", "router.texts: is required and missing (or prompts)"),
        ("router: {init: ridge, texts: {seed: seed.txt, code: code.txt}}", "router.texts: nothing for law. Every expert needs a text"),
        ("router: {init: ridge, prompts: {seed: [a b]}}", "router.prompts: nothing for code, law."),
        (f"router: {{init: ridge, texts: {ALL[:-1]}, lwa: law.txt}}}}", "router.texts.lwa: 'lwa' is not among the experts; did you mean 'law'?"),
        (f"router: {{init: ridge, texts: {ALL}, prompts: {{law: [a b]}}}}", "router.prompts.law: has a text too. Keep one of the two."),
        (f"router: {{init: ridge, texts: {ALL}, negative_prompts: {{law: [a b]}}}}", "router.negative_prompts: unknown key"),
        (f"router: {{init: mean, texts: {ALL}, negative_prompts: {{lwa: [a b]}}}}", "router.negative_prompts.lwa: 'lwa' is not among the experts"),
        (f"router: {{init: mean, texts: {ALL}, lambda: 1}}", "router.lambda: unknown key"),
        (f"router: {{init: ridge, texts: {ALL}, token: 8}}", "router.token: unknown key; did you mean 'tokens'?"),
        (f"router: {{init: ridge, texts: {ALL}, tokens: 1}}", "router.tokens: found 1, expected"),
        (f"router: {{init: ridge, texts: {ALL}, scale: 0}}", "router.scale: found 0, expected"),
        (f"router: {{init: ridge, texts: {ALL}, lambda: -1}}", "router.lambda: found -1, expected"),
        (f"router: {{init: ridge, texts: {ALL}, inputs: sed}}", "router.inputs: found 'sed', expected"),
        ("router: {init: ridge, texts: {seed: 3}}", "router.texts.seed: found 3 (in quotes it is text), expected text or a list."),
        (f"router: {{attention: {{init: ridge, texts: {ALL}}}, ffn: {{init: ridge}}}}", "router.ffn.texts: is required and missing"),
        (f"rules: [{{roles: [ffn.*], make: ridge, texts: {ALL}}}]", "rules[0].roles[0]: ridge initialises routers only"),
        ("rules: [{roles: [router.ffn], make: ridge, texts: {seed: x}}]", "rules[0].texts: nothing for code, law."),
        (f"router: {{init: ridge, texts: {ALL}}}\nexperts: [code, code]", "router.texts: all experts are code"),
        ("router: {init: ridge, texts: {seed: '', code: code.txt, law: law.txt}}", "router.texts.seed: found '': an empty path"),
    ],
)  # fmt: skip
def test_wrong_recipes(text: str, said: str, tmp_path: Path) -> None:
    assert said in problems(write_scene(tmp_path), text)


def test_texts_that_do_not_do_are_told_together(tmp_path: Path) -> None:
    write_scene(tmp_path)
    (tmp_path / "code.txt").write_text("")
    (tmp_path / "law.txt").write_bytes(b"ab\xff")
    found = problems(tmp_path, "router: {init: ridge, texts: {seed: sed.txt, code: code.txt, law: law.txt}}").splitlines()
    assert len(found) == 3
    for line, part in zip(
        found,
        (
            "router.texts.seed: sed.txt: no such file or folder; did you mean 'seed.txt'?",
            "router.texts.code: code.txt is empty",
            "router.texts.law: ",
        ),
        strict=True,
    ):
        assert part in line and "recipe.yaml" in line


def test_texts_that_do_not_do_are_told_with_all_else(tmp_path: Path) -> None:
    """Whatever else is wrong, of recipe or sources; each once; and of a text every file that is read in any case."""
    write_scene(tmp_path)
    (tmp_path / "texts").mkdir()
    for name, data in {"a": b"ab\xff", "b": b"a\0b", "c": b"abc" * 900}.items():
        (tmp_path / "texts" / name).write_bytes(data)
    (tmp_path / "texts" / "empty").write_text("")
    asked = "router: {init: ridge, tokens: 800, texts: {seed: sed.txt, code: 'texts/[a-c]', law: texts/empty}}"
    wanted = [
        "router.texts.seed: sed.txt: no such file or folder", "/texts/a: not UTF-8 text (byte 2)", "/texts/b: holds NUL characters",
        "router.texts.law: texts/empty is empty",
    ]  # fmt: skip
    for more, said in (("", []), ("\nrules: [{roles: [ffn.*], layers: 7, make: expert}]", ["rules[0].layers: layer 7", "rules[0]: ffn.*"])):
        found = problems(tmp_path, asked + more).splitlines()
        assert len(found) == len(wanted) + len(said) and all(any(part in line for line in found) for part in (*wanted, *said)), found
    (tmp_path / "code" / "config.json").write_text("{")
    found = problems(tmp_path, asked).splitlines()
    assert "sources.code" in found[0] and len(found) == 1 + len(wanted), found
    few = problems(tmp_path, "router: {init: ridge, tokens: 2, texts: {seed: seed.txt, code: 'texts/[ca]', law: law.txt}}")
    assert "texts/a" in few, "the first file that is read"
    few = problems(tmp_path, "router: {init: ridge, tokens: 2, texts: {seed: seed.txt, code: [texts/c, texts/a], law: law.txt}}")
    assert "sources.code" in few and "texts/a" not in few, "a file that need not be read"


def test_all_texts_the_same(tmp_path: Path) -> None:
    write_scene(tmp_path)
    text = "router: {init: ridge, texts: {seed: law.txt, code: law.txt, law: law.txt}}"
    assert "router.texts: all texts are the same, so no router follows from them." in problems(tmp_path, text)


def test_a_tokenizer_that_is_not_there_or_another_models(tmp_path: Path) -> None:
    write_scene(tmp_path, {"model_type": "llama", **BASE, **GROUPED, "vocab_size": 8})
    assert "router.texts.seed: tokenizer.json gives the token 1" in problems(tmp_path, router())
    for name in SOURCES:
        (tmp_path / name / "tokenizer.json").unlink()
    assert "no tokenizer.json, so a text cannot be read" in problems(tmp_path, router())


def test_short_and_equal_texts_are_warned_of(tmp_path: Path) -> None:
    write_scene(tmp_path)
    plan = plan_file(recipe(tmp_path, "router: {init: ridge, texts: {seed: law.txt, code: code.txt, law: law.txt}}"))
    notes = "\n".join(plan.notes)
    assert "router.texts: seed and law have the same tokens, so their experts get equal rows" in notes
    assert "router.texts.code: " in notes and "tokens in 1 file, fewer than the 8,192 wanted (router.tokens)" in notes


def test_the_plan_says_what_the_pass_takes(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = recipe(write_scene(tmp_path))
    text = run("plan", path).out
    assert "model.layers.{0-1}.mlp.router.weight" in text and "ridge(seed, code, law; tokens=300, scale=6, lambda=0.1)" in text
    assert "routers      from " in text and " tokens of text: " in text and "Tflop, about " in text
    said = json.loads(run("plan", path, "--json").out)["calibration"]
    assert said.keys() == {"tokens", "flops", "seconds", "texts"} and said["flops"] > 0
    assert said["texts"]["router.ffn"]["texts"]["law"]["read"][0]["name"] == "law.txt"
    more = json.loads(run("plan", recipe(tmp_path, router(inputs="mixture")), "--json").out)["calibration"]
    assert more["flops"] > said["flops"]


@pytest.mark.parametrize("content", ["abcd", "  "])
def test_the_fingerprint_has_the_texts(content: str, tmp_path: Path) -> None:
    path = recipe(write_scene(tmp_path))
    before = plan_file(path)
    assert plan_file(path).fingerprint == before.fingerprint
    text = tmp_path / "law.txt"
    text.write_text(content + text.read_text())
    assert plan_file(path).fingerprint != before.fingerprint


GATES = {
    "": (2, True), "ffn: {top_k: 1}": (1, False), "ffn: {top_k: 3}": (3, True), "ffn: {gate: softmax_then_topk}": (1, False),
    "ffn: {gate: topk_then_softmax}": (2, True), "ffn: {top_k: 2, gate: softmax_then_topk}": (2, False), "ffn: {gate_scale: 2.0}": (2, True),
}  # fmt: skip


@pytest.mark.parametrize("ffn", GATES)
def test_gates_by_default(ffn: str, tmp_path: Path) -> None:
    read = load_recipe(recipe(tmp_path, f"{router()}\n{ffn}"))
    assert read.gates == GATES[ffn]
    scale = 180 if GATES[ffn] == (1, False) else 6
    document = read.resolved()
    assert (document["router"]["attention"]["scale"], document["router"]["ffn"]["scale"]) == (6, scale)
    again = parse_recipe(document, tmp_path)
    assert again.resolved() == document and again.gates == read.gates


def test_a_rule_for_the_ffn_router_decides_the_gates_too(tmp_path: Path) -> None:
    rule = f"rules: [{{roles: [router.ffn], make: ridge, texts: {ALL}}}]"
    assert load_recipe(recipe(tmp_path, rule)).gates == (2, True)
    assert load_recipe(recipe(tmp_path, f"{router()}\nrules: [{{roles: ['router.*'], make: normal}}]")).gates == (1, False)


def test_the_plan_says_the_gates_and_the_scale(tmp_path: Path) -> None:
    write_scene(tmp_path)
    (note,) = (note for note in plan_file(recipe(tmp_path)).notes if note.startswith("ffn: "))
    assert "routers from texts, so top_k 2, gate topk_then_softmax" in note
    plan = plan_file(recipe(tmp_path, f"{router()}\nffn: {{top_k: 1, gate: softmax_then_topk}}"))
    assert any("scale 180 for the FFN" in note for note in plan.notes)
    made = {step.role: step.expression for step in plan.steps if step.role.startswith("router")}
    assert "scale=180" in made["router.ffn"] and "scale=6," in made["router.attn"]
    assert not any("scale 180" in note for note in plan_file(recipe(tmp_path, f"{router(scale=3)}\nffn: {{top_k: 1}}")).notes)


def test_documents_have_no_absolute_path(tmp_path: Path) -> None:
    text = f"router: {{init: ridge, texts: {{seed: {tmp_path}/seed.txt, code: ['{tmp_path}/*.txt', code.txt], law: ./law.txt}}}}"
    document = load_recipe(recipe(tmp_path, text)).resolved()
    assert document["router"]["ffn"]["texts"] == {"seed": "seed.txt", "code": ["*.txt", "code.txt"], "law": "law.txt"}


def test_prompts(tmp_path: Path) -> None:
    write_scene(tmp_path)
    text = "router: {init: ridge, prompts: {seed: [abcd efgh, gh ab], code: [aabb aabb], law: [gggh]}}"
    plan = plan_file(recipe(tmp_path, text))
    assert plan.calibration is not None
    corpus = plan.calibration.corpora["router.ffn"]
    assert len(corpus.texts["seed"].windows) == 2 and not any("fewer than" in note for note in plan.notes)
    assert "router.prompts.law: prompt 1 has no token" in problems(tmp_path, text.replace("gggh", "'!'"))


def test_sources_that_nothing_computes_with(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    write_scene(tmp_path)
    for name in SOURCES:
        file = tmp_path / name / "model.safetensors"
        tensors = {key: value.to(torch.float8_e4m3fn) if "mlp" in key else value for key, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    text = problems(tmp_path, router())
    assert "F8_E4M3" in text and "computes with" in text


def test_every_make_from_texts_is_offered() -> None:
    assert {"ridge", "mean"} <= {
        item["properties"]["init"]["const"]
        for item in Recipe.model_json_schema(by_alias=True)["$defs"].values()
        if "init" in item.get("properties", {})
    }
    with pytest.raises(RecipeError, match="covers routers, which no source has"):
        parse_recipe(
            {
                "method": "bam",
                "sources": {"a": "a", "b": "b"},
                "rules": [{"roles": ["router.ffn"], "make": "mean"}],
                "output": {"path": "o"},
            }
        )


def test_the_windows_are_no_longer_than_the_model_has_positions_for(tmp_path: Path) -> None:
    plan = plan_file(recipe(write_scene(tmp_path, {"model_type": "llama", **BASE, **GROUPED, "max_position_embeddings": 20})))
    assert plan.calibration is not None
    assert {len(ids) for ids in plan.calibration.corpora["router.ffn"].texts["law"].windows} == {20}


def test_btx_reads_the_texts_of_its_one_router(tmp_path: Path) -> None:
    write_scene(tmp_path)
    text = f"router: {{attention: {{init: ridge, texts: {{seed: gone.txt, code: gone.txt, law: gone.txt}}}}, ffn: {{init: ridge, texts: {ALL}}}}}"
    plan = plan_file(write_recipe(tmp_path, text, method="btx"))
    assert plan.calibration is not None and plan.calibration.corpora.keys() == {"router.ffn"}


def test_longer_texts_are_read_in_turns(tmp_path: Path) -> None:
    write_scene(tmp_path)
    (tmp_path / "more").mkdir()
    write_texts(tmp_path / "more", ("code", "law", "math"), 2000)
    plan = plan_file(recipe(tmp_path, "router: {init: ridge, tokens: 400, texts: {seed: more/, code: code.txt, law: law.txt}}"))
    assert plan.calibration is not None
    text = plan.calibration.corpora["router.attention"].texts["seed"]
    assert [part.name for part in text.parts] == ["more/code.txt", "more/law.txt", "more/math.txt"] and text.tokens == 400
