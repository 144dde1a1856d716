"""At the end of a merge whose routers are made of texts they are tried on what follows in these: the report, in words and as a table."""

from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from word_texts import random_ids, words_tokenizer, write_words

from bam_merge import MergeOptions, merge, verify
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe
from bam_merge.verifying.report import Report

TEXTS = "{seed: seed.txt, code: code.txt, law: law.txt}"


def scene(folder: Path, words: int = 900, tokens: int = 300) -> Path:
    """Three sources, texts of different words for each, and a recipe with ridge routers."""
    write_sources(folder, CONFIGS["llama"])
    words_tokenizer(folder / "seed")
    for index, name in enumerate(("seed", "code", "law")):
        write_words(folder / f"{name}.txt", [3 + 20 * index + token % 20 for token in random_ids(words, index)])
    return write_recipe(folder, f"router: {{init: ridge, tokens: {tokens}, texts: {TEXTS}}}")


def test_a_merge_says_what_its_routers_do(tmp_path: Path, run: Any) -> None:
    recipe = scene(tmp_path)
    result = run(recipe)
    assert result.status == 0, result.err
    assert "attention router on held-out text" in result.out and "ffn router on held-out text" in result.out
    table = result.out.partition("perplexity")[2].splitlines()
    assert table[2].split() == ["text", "for", "tokens", "own", "model", "average", "merged", "forced"]
    assert table[4].split()[:3] == ["code.txt", "code", "128"]
    assert "do the routers tell the domains apart?" in result.out and "yes: to their own expert go" in " ".join(result.out.split())
    assert "held out" not in run(recipe, "--force", "--no-verify").out, "nothing is tried where nothing is proved"


def test_what_they_are_tried_on_is_not_what_they_are_made_of(tmp_path: Path) -> None:
    reports: list[Report] = []
    plan = plan_file(scene(tmp_path))
    publish(plan, None, MergeOptions(on_report=reports.append))
    (report,) = reports
    assert report.held_out is not None and plan.calibration is not None
    assert [(text["domain"], text["held_out"]) for text in report.held_out["texts"]] == [("seed", True), ("code", True), ("law", True)]
    made_of = {name: {*text.windows} for corpus in plan.calibration.corpora.values() for name, text in corpus.texts.items()}
    assert all(len(windows) >= 2 for windows in made_of.values())
    for row in report.perplexity:
        assert set(row["perplexity"]) == {row["domain"], "average", "merged", "forced"}
    accuracy = {row["router"]: row["accuracy"] for row in report.held_out["overall"]}
    assert min(accuracy.values()) > 0.9, "texts that have no word in common"
    held = {name: str(tmp_path / f"{name}.txt") for name in ("seed", "code", "law")}
    again = verify(tmp_path / "out", plan, domains=held)
    assert again.held_out is not None
    for mine, other in zip(report.held_out["overall"], again.held_out["overall"], strict=True):
        assert mine["accuracy"] == pytest.approx(other["accuracy"], abs=0.05)


def test_a_text_that_has_no_more_is_tried_on_itself_and_that_is_said(tmp_path: Path) -> None:
    reports: list[Report] = []
    merge(load_recipe(scene(tmp_path, words=200, tokens=8192)), options=MergeOptions(on_report=reports.append))
    (report,) = reports
    assert report.held_out is not None and not any(text["held_out"] for text in report.held_out["texts"])
    said = " ".join(reading.text for reading in report.readings)
    assert "nothing is left of the texts of seed, code, law that the routers were not made of" in said
    assert "routers are made of too little text of seed (200 tokens), code (200 tokens), law (200 tokens)" in said


def test_a_merge_without_such_routers_tries_nothing(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    reports: list[Report] = []
    merge(load_recipe(write_recipe(tmp_path)), options=MergeOptions(on_report=reports.append))
    assert reports[0].held_out is None and not reports[0].perplexity and "held_out" not in reports[0].document()


def test_routers_made_anew_are_tried_too(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    scene(tmp_path)
    folder = publish(plan_file(write_recipe(tmp_path)), None, MergeOptions(verify=False))
    texts = [part for name in ("seed", "code", "law") for part in ("--texts", f"{name}={tmp_path / name}.txt")]
    result = run("calibrate", folder, *texts, "--tokens", "300")
    assert result.status == 0, result.err
    assert "routers made anew" in result.out and "ffn router on held-out text" in result.out
    assert "yes: to their own expert go" in " ".join(result.out.split())
