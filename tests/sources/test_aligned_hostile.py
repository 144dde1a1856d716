"""Tokenizer files that anybody may have written: aligned and proved, or refused in words."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from proofs import UNPROVED, failed
from vocabularies import END, SETTINGS, put, source, three

from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

WORDS = ["content", "id", "model", "vocab", "merges", "added_tokens", "added_tokens_decoder", str(END), "chat_template", "template", "name"]
VALUES = [None, True, 0, -1, 10**20, 1.5, END, "", "a", "<r0>", "<note>", "\u2028", "<0xZZ>", "<0x0A>", "Ġ", "▁", "é"]


def junk(stream: random.Random, depth: int = 0) -> Any:
    if depth > 2 or stream.random() < 0.5:
        return stream.choice(VALUES)
    if stream.random() < 0.4:
        return [junk(stream, depth + 1) for _ in range(stream.randrange(3))]
    return {stream.choice(WORDS): junk(stream, depth + 1) for _ in range(stream.randrange(3))}


def changed(document: Any, stream: random.Random) -> Any:
    """The document with junk somewhere in it."""
    box = document
    while True:
        key = stream.choice(list(box) if isinstance(box, dict) else range(len(box)))
        if isinstance(box[key], dict | list) and box[key] and stream.random() < 0.75:
            box = box[key]
            continue
        box[key] = junk(stream)
        return document


@pytest.mark.parametrize("draw", range(16))
def test_junk_is_refused_or_merged_and_proved(draw: int, tmp_path: Path) -> None:
    stream = random.Random(draw)
    recipe = three(
        tmp_path, stream.choice(["{source: union}", "{source: union, chat_template: code}", "{source: code, missing: law}"]), method="merge"
    )
    tokens = dict(zip(["<r0>", "<im_start>", "<im_end>"], range(END, END + 3), strict=True))
    decoder = {str(number): {"content": token, "special": True} for token, number in tokens.items()}
    settings = {**SETTINGS, "added_tokens_decoder": decoder, "chat_template": "<im_start>", "additional_special_tokens": ["<im_start>"]}
    lists = {"additional_special_tokens": ["<im_start>", {"content": "<im_end>"}]}
    put(tmp_path / "code", {"tokenizer_config.json": settings, "special_tokens_map.json": lists, "added_tokens.json": tokens})
    put(
        tmp_path / "seed",
        {"generation_config.json": {"eos_token_id": [1, END], "bad_words_ids": [[1]]}, "special_tokens_map.json": {"bos_token": "<s>"}},
    )
    for _ in range(2):
        path = stream.choice([path for path in sorted(tmp_path.glob("*/*.json")) if path.name != "config.json"])
        path.write_text(json.dumps(changed(json.loads(path.read_text()), stream)))
    try:
        plan = plan_file(recipe)
    except BamMergeError as error:
        assert all(problem.strip() for problem in error.problems)
    else:
        report = verify(publish(plan, None, UNPROVED), plan)
        assert report.ok, failed(report)


def test_added_tokens_may_be_null(tmp_path: Path) -> None:
    recipe = three(tmp_path)
    document = json.loads((tmp_path / "seed/tokenizer.json").read_text())
    put(tmp_path / "seed", {"tokenizer.json": {**document, "added_tokens": None}})
    folder = publish(plan_file(recipe), None, UNPROVED)
    assert {item["id"] for item in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]} == set(range(END, END + 5))


@pytest.mark.parametrize("name", ["renamed", "added", "rows"])
def test_a_token_renamed_one_added_and_rows_added(name: str, tmp_path: Path, run: Any) -> None:
    """Fine-tunes as people have them: each refused without the key, and merged with it."""

    def tokenizer(*added: str) -> dict[str, Any]:
        tokens = [{"id": number, "content": token} for number, token in enumerate(added, 2)]
        return {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": tokens}

    files = {"renamed": tokenizer("<s>", "<im_start>"), "added": tokenizer("<s>", "<reserved>", "<tool_call>"), "rows": None}
    source(tmp_path, "base", None, 64, 0, files={"tokenizer.json": tokenizer("<s>", "<reserved>")})
    source(tmp_path, name, None, 66 if name == "rows" else 64, 1, files={"tokenizer.json": files[name]} if files[name] else {})
    text = f"method: bam\nsources: {{base: base, {name}: {name}}}\noutput: {{path: out}}\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refused = run("plan", recipe)
    assert refused.status == 2 and "tokenizer: {source: union}" in refused.err
    recipe.write_text(text + "tokenizer: {source: union}\n")
    assert run(recipe).status == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    found = {item["content"]: item["id"] for item in json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]}
    expected = {"renamed": {"<im_start>": 4}, "added": {"<tool_call>": 4}, "rows": {}}[name]
    assert found == {"<s>": 2, "<reserved>": 3, **expected} and config["vocab_size"] == (66 if name == "rows" else 64)
