"""In which engines a result can be served: what a plan says, and `output.serves`, by which a wrong pairing is an error before it is made."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from vocabularies import put, tokenizer_json

from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.planning.serving import gates

RAW, RENORMALISED = "ffn: {gate: softmax_then_topk}", "ffn: {gate: topk_then_softmax}"


def planned(folder: Path, layout: str, family: str, text: str, method: str = "btx", serves: str = "", **keys: Any) -> Plan:
    write_sources(folder, {**CONFIGS[family], **keys})
    asked = f", serves: [{serves}]" if serves else ""
    return plan_file(write_recipe(folder, text, method, output=f"{{path: out, layout: {layout}{asked}}}"))


def refused(*args: Any, **options: Any) -> list[str]:
    with pytest.raises(BamMergeError) as error:
        planned(*args, **options)
    return list(error.value.problems)


# ---- what a plan says


@pytest.mark.parametrize(("layout", "family", "text", "vllm", "gguf"), [
    ("mixtral", "llama", RENORMALISED, "tried", "tried"),
    ("mixtral", "mistral", RENORMALISED, "tried", "not"),
    ("granitemoe", "granite", RENORMALISED, "tried", "tried"),
    ("ernie4_5_moe", "llama", RENORMALISED, "tried", "expected"),
    ("cohere2_moe", "cohere2", RENORMALISED, "not", "tried"),
    ("dots1", "qwen3", "ffn: {gate: topk_then_sigmoid}", "tried", "not"),
    ("qwen3_moe", "qwen3", RENORMALISED, "tried", "tried"),
    ("qwen3_moe", "qwen3", RAW, "tried", "not"),
    ("qwen2_moe", "qwen2", RAW, "tried", "tried"),
    ("qwen2_moe", "qwen2", RENORMALISED, "tried", "not"),
    ("llama", "llama", "", "as its sources", "as its sources"),
])  # fmt: skip
def test_a_plan_says_how_each_engine_is_known(layout: str, family: str, text: str, vllm: str, gguf: str, tmp_path: Path) -> None:
    method = "btx" if text else "merge"
    plan = planned(tmp_path, layout, family, text, method)
    found = {item.word: item for item in plan.serves}
    assert list(found) == ["transformers", "vllm", "gguf"]
    assert (found["vllm"].how, found["gguf"].how) == (vllm, gguf)
    for item in plan.serves:
        assert item.serves == (item.how != "not") == (not item.reasons)
    document = plan.document()["serves"]
    assert document["gguf"] == {
        "engine": "llama.cpp", "serves": gguf != "not", "how": gguf, "about": found["gguf"].about, "reasons": list(found["gguf"].reasons)
    }  # fmt: skip


def test_the_reasons_are_those_of_the_notes(tmp_path: Path) -> None:
    plan = planned(tmp_path, "qwen3_moe", "qwen3", RAW)
    assert [note.removeprefix("output.layout: qwen3_moe: ") for note in plan.notes] == list(plan.serves[2].reasons)


def test_the_text_of_a_plan_says_it_once(tmp_path: Path, run: Any) -> None:
    planned(tmp_path, "qwen3_moe", "qwen3", RAW)
    out = run("plan", tmp_path / "recipe.yaml").out
    assert "serves in    transformers, vLLM (tried)\n" in out
    assert "not in       llama.cpp (GGUF): norm_topk_prob is False: llama.cpp always renormalises gates" in out
    assert out.count("llama.cpp always renormalises gates") == 1
    document = json.loads(run("plan", tmp_path / "recipe.yaml", "--json").out)
    assert document["serves"]["gguf"]["serves"] is False and document["serves"]["vllm"]["serves"] is True


# ---- output.serves


@pytest.mark.parametrize(("layout", "family", "text", "serves"), [
    ("mixtral", "llama", RENORMALISED, "transformers, vllm, gguf"),
    ("qwen3_moe", "qwen3", RAW, "vllm"),
    ("qwen2_moe", "qwen2", RAW, "gguf, gguf"),
    ("bam", "llama", RENORMALISED, "transformers"),
])  # fmt: skip
def test_what_an_engine_computes_is_no_problem(layout: str, family: str, text: str, serves: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, layout, family, text, serves=serves)
    assert plan.recipe.resolved()["output"]["serves"] == serves.split(", ")


def test_a_gguf_file_needs_a_tokenizer(tmp_path: Path) -> None:
    said = "output.serves: gguf: no source has a tokenizer, and a GGUF file holds one"
    assert [note.startswith(said) for note in planned(tmp_path, "mixtral", "llama", RENORMALISED, serves="gguf").notes] == [True]
    put(tmp_path / "seed", {"tokenizer.json": tokenizer_json()})
    notes = plan_file(tmp_path / "recipe.yaml").notes
    assert notes and not [note for note in notes if "output.serves" in note]


def test_without_the_key_nothing_is_recorded(tmp_path: Path) -> None:
    assert "serves" not in planned(tmp_path, "mixtral", "llama", RENORMALISED).recipe.resolved()["output"]


@pytest.mark.parametrize(("layout", "family", "text", "instead"), [
    ("qwen3_moe", "qwen3", RAW, "qwen3_moe with ffn.gate: topk_then_softmax"),
    ("qwen2_moe", "qwen2", RENORMALISED, "qwen2_moe with ffn.gate: softmax_then_topk"),
    ("qwen2_moe", "llama", RENORMALISED, "mixtral with ffn.gate: topk_then_softmax, qwen2_moe with ffn.gate: softmax_then_topk"),
])  # fmt: skip
def test_a_wrong_pairing_names_what_would_do(layout: str, family: str, text: str, instead: str, tmp_path: Path) -> None:
    [problem] = refused(tmp_path, layout, family, text, serves="gguf")
    assert "output.serves: gguf: llama.cpp does not compute this merge as transformers does: norm_topk_prob is " in problem
    assert "llama.cpp would compute layout: " in problem and all(f"layout: {words}" in problem for words in instead.split(", "))


def test_what_is_named_is_what_then_has_no_problem(tmp_path: Path) -> None:
    """Every layout and gate that a message names plans without one; every other pair has one."""
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        write_sources(tmp_path / family, CONFIGS[family])

        def problems(layout: str, gate: str, serves: str, folder: Path = tmp_path / family) -> tuple[str, ...]:
            output = f"{{path: out, layout: {layout}, serves: [{serves}]}}"
            try:
                plan_file(write_recipe(folder, f"ffn: {{gate: {gate}, top_k: 2}}", "btx", output=output))
            except BamMergeError as error:
                return error.problems
            return ()

        for serves in ("gguf", "vllm", "vllm, gguf"):
            all_of_them = {
                (layout, gate): problems(layout, gate, serves)
                for layout in ("bam", "mixtral", "qwen2_moe", "qwen3_moe")
                for gate in gates()
            }
            fit = {pair for pair, found in all_of_them.items() if not found}
            for layout, gate in all_of_them.keys() - fit:
                told = " ".join(text for text in all_of_them[layout, gate] if "output.serves" in text)
                words = told.partition("The nearest")[0]
                named = {pair for pair in all_of_them if re.search(f"layout: {pair[0]} with ffn.gate: {pair[1]}\\b", words)}
                assert told and (named == fit or not fit), (family, serves, layout, gate, told)


def test_bam_is_told_which_method_would_do(tmp_path: Path) -> None:
    [problem] = refused(tmp_path, "bam", "qwen3", RENORMALISED, method="bam", serves="gguf")
    assert "gguf: llama.cpp does not compute this merge as transformers does: does not convert: it knows no such architecture" in problem
    assert "method: btx (no layout there has experts of attention), layout: qwen3_moe with ffn.gate: topk_then_softmax" in problem


def test_sources_that_no_layout_serves(tmp_path: Path) -> None:
    [problem] = refused(tmp_path, "mixtral", "mistral", RENORMALISED, serves="gguf, vllm")
    assert (
        "No layout and gate would do. The nearest is layout: mixtral with ffn.gate: topk_then_softmax: sliding is all: llama.cpp" in problem
    )
    assert "leave llama.cpp out of output.serves" in problem


def test_a_gate_scale_is_what_keeps_it(tmp_path: Path) -> None:
    [problem] = refused(tmp_path, "bam", "llama", "ffn: {gate: topk_then_softmax, gate_scale: 4}", serves="gguf")
    assert "needs gate_scale = 1.0, this merge has 4.0" in problem


def test_a_layout_that_does_not_fit_and_what_would(tmp_path: Path) -> None:
    first, second = refused(tmp_path, "qwen3_moe", "llama", RENORMALISED, serves="vllm")
    assert "layout: mixtral with ffn.gate: topk_then_softmax, or " in second and "layout: qwen3_moe" not in second
    assert "qwen3_moe needs qk_norm = true" in first
    assert "output.serves: vllm: vLLM would compute layout: " in second


def test_other_problems_are_told_with_it(tmp_path: Path) -> None:
    text = f"{RENORMALISED}\nrules: [{{roles: [norm.*], make: mean}}, {{roles: [norm.attn], make: mean}}]"
    first, second = refused(tmp_path, "qwen2_moe", "llama", text, serves="gguf")
    assert "rules[1]" in first and "output.serves: gguf" in second
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("serves", "said"), [
    ("vlm", "output.serves[0]: found 'vlm', expected transformers or vllm or gguf; did you mean 'vllm'?"),
    ("' '", "output.serves[0]: found ' '"),
])  # fmt: skip
def test_a_word_that_is_none(serves: str, said: str, tmp_path: Path) -> None:
    assert said in " ".join(refused(tmp_path, "mixtral", "llama", RENORMALISED, serves=serves))
