"""Tokenizers of the sources: every form against every other, equal ones by any library's version, and what a plan says of the rest."""

import base64
import json
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.showing.plan import plan_text
from bam_merge.sources.tokenizers.forms import byte_letters, read_form, same_token, written
from bam_merge.sources.tokenizers.sentencepiece import read_sentencepieces

TOKENS = ["<s>", "a", "b", "Ġab", "Ġ"]
SWAPPED = ["<s>", "b", "a", "Ġab", "Ġ"]
REMEDY = "The embeddings would be averaged over different words; align the tokenizers first."


def as_bytes(token: str) -> bytes:
    """The bytes that byte-level letters stand for."""
    return bytes(byte_letters().index(letter) for letter in token)


# ---- writers of each form -------------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def spm(pieces: list[Any], algorithm: int = 2, more: bytes = b"") -> bytes:
    """A serialised sentencepiece ModelProto; a piece is its text, or (text, score, type)."""
    parts = []
    for index, item in enumerate(pieces):
        text, score, kind = item if isinstance(item, tuple) else (item, float(-index), 1)
        parts.append(message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)))
    return b"".join(parts) + message(2, b"\x18" + varint(algorithm)) + more


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def whole(vocab: Any, merges: Any = (), added: Any = (), kind: str = "BPE", **more: Any) -> dict[str, Any]:
    """A tokenizer.json; `added` as (id, text)."""
    tokens = [{"id": number, "content": text, "special": True} for number, text in added]
    return {"model": {"type": kind, "vocab": vocab, "merges": list(merges)}, "added_tokens": tokens, **more}


def tekken(tokens: list[str], **config: Any) -> dict[str, Any]:
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(as_bytes(token)).decode(), "token_str": None} for i, token in enumerate(tokens[1:])
    ]
    special = [{"rank": 0, "token_str": tokens[0], "is_control": True}]
    return {"config": {"default_num_special_tokens": 1, **config}, "vocab": vocab, "special_tokens": special}


def ranks(tokens: list[str]) -> str:
    return "".join(f"{base64.b64encode(as_bytes(token)).decode()} {index}\n" for index, token in enumerate(tokens))


FORMS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "tokenizer.json": lambda tokens: {"tokenizer.json": whole(numbered(tokens))},
    "tokenizer.json of scores": lambda tokens: {"tokenizer.json": whole([[token, float(-i)] for i, token in enumerate(tokens)], kind="Unigram")},
    "tokenizer.model": lambda tokens: {"tokenizer.model": spm(list(tokens), 1)},
    "tokenizer.model of ranks": lambda tokens: {"tokenizer.model": ranks(tokens)},
    "tiktoken.model": lambda tokens: {"tiktoken.model": ranks(tokens)},
    "tekken.json": lambda tokens: {"tekken.json": tekken(tokens)},
    "vocab.json": lambda tokens: {"vocab.json": numbered(tokens)},
    "vocab.txt": lambda tokens: {"vocab.txt": "\n".join(tokens) + "\n"},
    "added_tokens.json": lambda tokens: {"vocab.json": numbered(tokens[:1]), "added_tokens.json": dict(zip(tokens[1:], range(1, 9), strict=False))},
    "tokenizer_config.json": lambda tokens: {
        "vocab.json": numbered(tokens[:1]),
        "tokenizer_config.json": {"added_tokens_decoder": {str(i): {"content": token} for i, token in enumerate(tokens)}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three llama sources; a test puts tokenizers beside them and the next finds none."""
    folder = tmp_path_factory.mktemp("models")
    write_sources(folder, CONFIGS["llama"])
    write_recipe(folder)
    return folder


def planned(models: Path, *files: dict[str, Any]) -> Plan | list[str]:
    """The plan of seed, code, law with these files beside their weights, or the problems; without a table of what they are."""
    kept = set(models.rglob("*"))
    try:
        for name, content in zip(("seed", "code", "law"), files, strict=False):
            write(models / name, content)
        return plan_file(models / "recipe.yaml")
    except BamMergeError as error:
        return [problem.replace(str(models), "HOME") for problem in error.problems]
    finally:
        for path in set(models.rglob("*")) - kept:
            path.unlink()


def notes(models: Path, *files: dict[str, Any]) -> list[str]:
    plan = planned(models, *files)
    assert isinstance(plan, Plan), plan
    return list(plan.notes)


def problems(models: Path, *files: dict[str, Any]) -> list[str]:
    found = planned(models, *files)
    assert isinstance(found, list), f"accepted, with the notes {found.notes}"
    return found


# ---- every form with every other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "theirs"), list(product(FORMS, FORMS)))
def test_contradictions_are_found_in_every_pair_of_forms(mine: str, theirs: str, models: Path) -> None:
    """Two tokens have changed places. The seed has no tokenizer: that it is first must not hide the others' contradiction."""
    found = problems(models, {}, FORMS[mine](TOKENS), FORMS[theirs](SWAPPED))
    assert len(found) == 1
    assert found[0].startswith("sources.law: ") and "sources.code" in found[0] and found[0].endswith(REMEDY)
    assert "'a'" in found[0] or "'b'" in found[0]
    assert " id 1 " in found[0] or " id 2 " in found[0]


@pytest.mark.parametrize(("mine", "theirs"), list(product(FORMS, FORMS)))
def test_the_same_tokenizer_in_two_forms_is_accepted(mine: str, theirs: str, models: Path) -> None:
    plan = planned(models, FORMS[mine](TOKENS), FORMS[theirs](TOKENS), FORMS[mine](TOKENS))
    assert isinstance(plan, Plan), plan
    assert not [note for note in plan.notes if "names" in note or "differs" in note]


def test_the_third_is_compared_with_the_second(models: Path) -> None:
    """seed's file knows nothing of the ids that the others disagree about."""
    short = {"vocab.json": numbered(TOKENS[:1])}
    one, other = (dict(tokens) for tokens in ({"x": 7}, {"y": 7}))
    files = [short, {**short, "added_tokens.json": one}, {**short, "added_tokens.json": other}]
    numbers = (
        "both have 1 token, 1 only here ('y'), 1 only in sources.code ('x'); tokenizer: {source: union} in the recipe aligns them by token"
    )
    assert problems(models, *files) == [
        "sources.law: added_tokens.json differs from sources.code: id 7 is 'y' in added_tokens.json, 'x' in added_tokens.json "
        f"({numbers}). {REMEDY}"
    ]


DIFFER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "merges of one file": ({"tokenizer.json": whole(numbered(TOKENS), ["a b", "b a"])}, {"tokenizer.json": whole(numbered(TOKENS), ["b a", "a b"])}, "tokenizer.json differs from sources.seed: the merges are not the same"),
    "merges of two files": ({"tokenizer.json": whole(numbered(TOKENS), ["a b"])}, {"vocab.json": numbered(TOKENS), "merges.txt": "#version: 0.2\nb a\n"}, "merges.txt differs from tokenizer.json of sources.seed: the merges are not the same"),
    "merges.txt": ({"vocab.json": numbered(TOKENS), "merges.txt": "a b\n"}, {"vocab.json": numbered(TOKENS), "merges.txt": "b a\n"}, "merges.txt differs from sources.seed: the merges are not the same"),
    "scores": ({"tokenizer.model": spm(TOKENS)}, {"tokenizer.model": spm([(token, -7.0, 1) for token in TOKENS])}, "tokenizer.model differs from sources.seed: the scores are not the same"),
    "the algorithm of scores": ({"tokenizer.model": spm(TOKENS, 1)}, {"tokenizer.model": spm(TOKENS, 2)}, "the scores are not the same"),
    "scores of unigrams": ({"tokenizer.json": whole([["a", -1.0]], kind="Unigram")}, {"tokenizer.json": whole([["a", -2.0]], kind="Unigram")}, "the scores are not the same"),
    "one token more": ({"vocab.json": numbered(TOKENS)}, {"vocab.json": numbered([*TOKENS, "z"])}, "vocab.json differs from sources.seed: token 'z' has id 5 here, none there"),
    "one token less": ({"tokenizer.model": spm(TOKENS)}, {"tokenizer.model": spm(TOKENS[:-1])}, "tokenizer.model differs from sources.seed: 4 tokens here, 5 there"),
    "another added token": ({"tokenizer.json": whole({"a": 0}, added=[(1, "<x>")])}, {"tokenizer.json": whole({"a": 0}, added=[(1, "<y>")])}, "token '<y>' has id 1 here, none there"),
    "an added token elsewhere": ({"vocab.json": {"a": 0}, "added_tokens.json": {"<x>": 1}}, {"vocab.json": {"a": 0}, "added_tokens.json": {"<x>": 2}}, "token '<x>' has id 2 in added_tokens.json, 1 in added_tokens.json"),
    "added tokens of two files": ({"tokenizer.json": whole({"a": 0}, added=[(1, "<x>")])}, {"vocab.json": {"a": 0}, "added_tokens.json": {"<y>": 1}}, "added_tokens.json differs from tokenizer.json of sources.seed: id 1 is '<y>' in added_tokens.json, '<x>' in tokenizer.json"),
    "added tokens of no tokenizer": ({"added_tokens.json": {"<x>": 1}}, {"tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "<y>"}}}}, "tokenizer_config.json differs from added_tokens.json of sources.seed: id 1 is '<y>' in tokenizer_config.json, '<x>' in added_tokens.json"),
    "what nobody can read": ({"tokenizer.model": b"words"}, {"tokenizer.model": b"other words"}, "tokenizer.model differs from sources.seed: not the same bytes"),
    "an id that is a list": ({"tokenizer.json": whole({"a": 0})}, {"tokenizer.json": whole({"a": [0]})}, "token 'a' has id [0] here, 0 there"),
    "an id that is a list, in another form": ({"vocab.json": {"a": 0}}, {"tokenizer.json": whole({"a": [0]})}, "token 'a' has id [0] in tokenizer.json, 0 in vocab.json"),
    "names that would move the cursor": ({"vocab.json": {"a": 0}}, {"vocab.json": {"\x1b[31m": 0}}, "token '\\x1b[31m' has id 0 here, none there"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFER)
def test_what_differs_is_named(name: str, models: Path) -> None:
    mine, theirs, words = DIFFER[name]
    found = problems(models, mine, theirs, mine)
    assert len(found) == 1 and found[0].startswith("sources.code: ") and words in found[0] and found[0].endswith(f". {REMEDY}")


SPACE = {"type": "Metaspace", "replacement": "▁"}
EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "merges as texts and as pairs": (whole({"a": 0}, ["a b"]), whole({"a": 0}, [["a", "b"]])),
    "added tokens in another order": (whole({"a": 0}, added=[(1, "x"), (2, "y")]), whole({"a": 0}, added=[(2, "y"), (1, "x")])),
    "added tokens that the vocabulary has too": (whole({"a": 0, "x": 1}, added=[(1, "x")]), whole({"a": 0, "x": 1})),
    "the vocabulary in another order": (whole({"a": 0, "b": 1}), whole({"b": 1, "a": 0})),
    "padding and truncation": (whole({"a": 0}, padding={"strategy": "BatchLongest"}, truncation={"max_length": 7}), whole({"a": 0})),
    "null and absent": (whole({"a": 0}, normalizer=None, pre_tokenizer=None), whole({"a": 0})),
    "what follows the lookup": (whole({"a": 0}, post_processor={"type": "TemplateProcessing"}, decoder={"type": "Fuse"}), whole({"a": 0})),
    "metaspace of two versions": (whole({"a": 0}, pre_tokenizer={**SPACE, "add_prefix_space": True, "str_rep": "▁"}), whole({"a": 0}, pre_tokenizer={**SPACE, "prepend_scheme": "always", "split": True})),
    "byte level of two versions": (whole({"a": 0}, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}), whole({"a": 0}, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True})),
    "a sequence of one": (whole({"a": 0}, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}), whole({"a": 0}, normalizer={"type": "NFC"})),
    "a sequence of none": (whole({"a": 0}, normalizer={"type": "Sequence", "normalizers": []}), whole({"a": 0})),
    "scores of double and single precision": (whole([["a", -1.1]], kind="Unigram"), whole([["a", struct.unpack("<f", struct.pack("<f", -1.1))[0]]], kind="Unigram")),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_one_tokenizer_saved_by_two_versions_is_one(name: str, models: Path) -> None:
    mine, theirs = EQUAL[name]
    assert notes(models, {"tokenizer.json": mine}, {"tokenizer.json": theirs}, {"tokenizer.json": mine}) == []


def test_settings_beside_the_tokens_do_not_matter(models: Path) -> None:
    files = [{"vocab.json": {"a": 0}, "tokenizer_config.json": {"model_max_length": length, "bos_token": "a"}} for length in (1, 2, 3)]
    assert notes(models, *files) == []


# ---- two forms in one folder -----------------------------------------------------------------------------------------------


def test_forms_that_contradict_each_other_in_one_folder(models: Path) -> None:
    stale = {"tokenizer.json": whole(numbered(TOKENS)), "vocab.json": numbered(SWAPPED)}
    assert problems(models, {}, stale) == [
        "sources.code: tokenizer.json and vocab.json contradict each other: token 'a' has id 1 in tokenizer.json, 2 in vocab.json. "
        "Remove the one that is out of date."
    ]
    merges = {"tokenizer.json": whole(numbered(TOKENS), ["a b"]), "merges.txt": "b a\n"}
    assert "tokenizer.json and merges.txt contradict each other: the merges are not the same" in problems(models, merges)[0]
    both = {"tokenizer.json": whole({"a": 0}, added=[(1, "<x>")]), "added_tokens.json": {"<y>": 1}}
    assert "id 1 is '<x>' in tokenizer.json, '<y>' in added_tokens.json" in problems(models, both)[0]


def test_a_piece_that_was_renamed_by_an_added_token_is_a_note(models: Path) -> None:
    """As InternLM2 and others do with the unused pieces of their sentencepiece model."""
    renamed = {"tokenizer.json": whole({"a": 0}, added=[(1, "<|im_start|>")]), "tokenizer.model": spm(["a", "[UNUSED_TOKEN_146]"])}
    assert notes(models, renamed, renamed, renamed) == [
        f"sources.{name}: tokenizer.json and tokenizer.model contradict each other: id 1 is '<|im_start|>' in tokenizer.json, "
        "'[UNUSED_TOKEN_146]' in tokenizer.model; it is taken as renamed, by tokenizer.json."
        for name in ("seed", "code", "law")
    ]


# ---- what a plan says ------------------------------------------------------------------------------------------------------


def test_a_seed_without_a_tokenizer_is_said(models: Path) -> None:
    some = {"tokenizer.json": whole(numbered(TOKENS), ["a b"])}
    assert notes(models, {}, some, some) == [
        "sources.seed has no tokenizer: taken to have that of sources.code, sources.law, which nothing here can check.",
        "the output takes the tokenizer of sources.code, for sources.seed, which would give it, has none.",
    ]
    assert notes(models, some, {"merges.txt": "a b\n"}) == [
        "sources.code, sources.law have no tokenizer: taken to have that of sources.seed, which nothing here can check."
    ]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (({}, {}), "none: no source has one, so their ids could not be compared"),
        (({}, FORMS["tekken.json"](TOKENS)), "of code"),
        ((FORMS["tekken.json"](TOKENS),), "of seed"),
    ],
)
def test_a_plan_shows_whose_tokenizer_the_output_gets(files: tuple[dict[str, Any], ...], line: str, models: Path) -> None:
    kept = set(models.rglob("*"))
    for name, content in zip(("seed", "code"), files, strict=False):
        write(models / name, content)
    try:
        assert f"\ntokenizer    {line}\n" in plan_text(plan_file(models / "recipe.yaml"), models / "out", 1) + "\n"
    finally:
        for path in set(models.rglob("*")) - kept:
            path.unlink()


def test_a_merge_takes_the_tokenizer_that_is_there(llamas: Path, run: Any) -> None:
    write(llamas / "law", {"tokenizer.json": whole(numbered(TOKENS))})
    result = run(write_recipe(llamas))
    assert result.status == 0 and "bam-merge: the output takes the tokenizer of sources.law, for sources.seed" in result.err
    assert (llamas / "out/tokenizer.json").read_bytes() == (llamas / "law/tokenizer.json").read_bytes()


def test_what_cannot_be_compared_is_said(models: Path) -> None:
    garbage = {"tokenizer.model": b"another vocabulary"}
    known = {"tokenizer.json": whole(numbered(TOKENS), ["a b"])}
    found = notes(models, known, garbage, known)
    assert any("sources.code: tokenizer.model cannot be read (as a sentencepiece model: " in note for note in found)
    assert any("sources.seed names 5 token ids that no file of sources.code names (the first: 0, '<s>'): not compared." in n for n in found)
    longer = notes(models, {"tokenizer.model": spm(TOKENS)}, {"tokenizer.json": whole(numbered(TOKENS), added=[(5, "<x>")])})
    assert "sources.code names 1 token ids that no file of sources.seed names (the first: 5, '<x>'): not compared." in longer
    assert any("the order in which pieces are joined is not compared (merges in one, scores in the other)" in note for note in longer)


def test_text_that_is_split_otherwise_is_a_note(models: Path) -> None:
    lower = {"tokenizer.json": whole({"a": 0}, normalizer={"type": "Lowercase"})}
    assert notes(models, {"tokenizer.json": whole({"a": 0})}, lower, lower) == [
        "sources.code and sources.seed: tokenizer.json splits text otherwise before its tokens are looked up; the output takes the seed's files."
    ]


def test_tekken_of_two_versions(models: Path) -> None:
    """One counts the special tokens without naming them; both list more of the vocabulary than the model has."""
    newer = tekken([*TOKENS, "zz", "zzz"], default_vocab_size=5)
    older = {**tekken([*TOKENS, "yy"], default_vocab_size=5), "special_tokens": None}
    assert notes(models, {"tekken.json": newer}, {"tekken.json": older}, {"tekken.json": newer}) == [
        "sources.seed names 1 token ids that no file of sources.code names (the first: 0, '<s>'): not compared."
    ]


@pytest.mark.parametrize(("file", "content"), [
    ("tokenizer.json", whole(numbered(TOKENS), ["a b"], added=[(64, "<pad>")])),
    ("tokenizer.json", whole({**numbered(TOKENS), "<pad>": 64}, ["a b"])),
    ("vocab.json", {**numbered(TOKENS), "<pad>": 64}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"64": {"content": "<pad>"}}}),
    ("added_tokens.json", {"<pad>": 64}),
])  # fmt: skip
def test_a_token_without_a_row_is_said(file: str, content: dict[str, Any], models: Path) -> None:
    """A padding token that was added to the tokenizer of every source, and to the embeddings of none."""
    files = {"tokenizer.json": whole(numbered(TOKENS), ["a b"]), file: content}
    assert notes(models, files, files, files) == [
        "sources.seed: the embeddings have 64 rows, none for the token '<pad>' of id 64: no program can read a text with it. "
        "Remove it from the tokenizer, or resize the embeddings."
    ]


def test_the_last_row_is_one_and_an_id_below_the_first_is_none(models: Path) -> None:
    good = {"tokenizer.json": whole({**numbered(TOKENS), "last": 63})}
    assert notes(models, good, good, good) == []
    bad = {"tokenizer.json": whole({**numbered(TOKENS), "last": 10**20, "x": -1})}
    [note] = notes(models, bad, bad, bad)
    assert "the embeddings have 64 rows, none for the token 'x' of id -1 nor for 1 more: " in note


# ---- reading the forms -----------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, Any, str]] = {
    "an id that is none": ("vocab.json", {"a": "0"}, "the id of 'a' is '0', no natural number"),
    "a negative id": ("added_tokens.json", {"a": -1}, "the id of 'a' is -1"),
    "true for an id": ("vocab.json", {"a": True}, "the id of 'a' is True"),
    "a token twice": ("vocab.json", '{"a": 0, "\\u0061": 1}', "the key 'a' stands twice"),
    "not an object": ("added_tokens.json", [], "not a JSON object"),
    "NaN": ("tekken.json", '{"vocab": [], "config": NaN}', "NaN is not a JSON number"),
    "no base64": ("tekken.json", {"vocab": [{"rank": 0, "token_bytes": "*"}]}, "not a tokenizer file"),
    "tokens that are texts": ("tekken.json", {"vocab": ["a"]}, "not a tokenizer file (something in it is not of the kind that belongs there)"),
    "a numbered token without text": ("tokenizer_config.json", {"added_tokens_decoder": {"0": {}}}, "not a tokenizer file (no 'content' where one belongs)"),
    "a number that is none": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: 'x' is no id"),
    "a number of many digits": ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "is no id"),
    "merges in latin-1": ("merges.txt", b"\xe9 a\n", "not UTF-8 text (byte 0)"),
    "words in latin-1": ("vocab.txt", b"a\n\xe9\n", "not UTF-8 text (byte 2)"),
    "a byte order mark": ("tokenizer.json", b"\xef\xbb\xbf{}", "not valid JSON"),
    "a git-lfs pointer for a model": ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "this is a git-lfs pointer, not the file itself: run `git lfs pull`."),
    "a git-lfs pointer for a JSON": ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "this is a git-lfs pointer"),
    "a page for a model": ("tokenizer.model", b"<!DOCTYPE html>", "this is an HTML or XML page"),
    "depth": ("tokenizer.json", "[" * 5000 + "]" * 5000, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_tokenizer_is_refused(name: str, models: Path) -> None:
    file, content, words = BROKEN[name]
    for source, files in (("seed", [{file: content}]), ("code", [{}, {file: content}])):
        found = problems(models, *files)
        assert len(found) == 1 and found[0].startswith(f"sources.{source}: HOME/{source}/{file}: ") and words in found[0]


def test_sentencepieces_are_read_as_they_were_written() -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("<0x0A>", 0.0, 6), ("▁the", -1.5, 1), ("é\n", -2.25, 4)]
    model = read_sentencepieces(spm(list(pieces), 2, message(3, b"\x0a\x01x") + message(200, b"extension")))
    assert (list(model.pieces), model.algorithm, model.normalizer) == (pieces, 2, b"\x0a\x01x")
    assert read_sentencepieces(message(1, message(1, b"a"))).pieces == (("a", 0.0, 1),)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no pieces"),
        (message(2, b"\x18\x02"), "no pieces"),
        (message(1, b""), "piece 0 has no text"),
        (message(1, message(1, b"\xff")), "piece 0 is not UTF-8 text"),
        (message(1, message(1, b"a") + b"\x15" + struct.pack("<f", float("nan"))), "piece 0 has no score that is a number"),
        (message(1, message(1, b"a") + message(9, b"")), "piece 0 has the unknown field 9"),
        (message(7, b""), "field 7 is none of a sentencepiece model"),
        (b"\x08\x01", "field 1 is no message"),
        (b"\x0a\xff\xff\xff\xff\x0f", "cut short"),
        (b"\x0a" + b"\xff" * 12, "is no protobuf"),
        (b"\x0b", "is no protobuf"),
        (b"\x02\x00", "is no protobuf"),
    ],
)
def test_what_is_no_sentencepiece_model(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_sentencepieces(data)


def test_a_sentencepiece_model_cut_anywhere_is_refused_or_shorter() -> None:
    """A cut between two messages leaves a shorter model, any other is noticed; never another exception."""
    data = spm(TOKENS)
    shorter = 0
    for length in range(len(data)):
        try:
            shorter += read_sentencepieces(data[:length]).pieces != read_sentencepieces(data).pieces
        except ValueError:
            continue
    assert shorter == len(TOKENS) - 1


def test_bytes_in_letters() -> None:
    """The space is Ġ, the line feed Ċ; every byte has its own letter (GPT-2's encoder.py)."""
    assert (written(b" the"), written(b"\n"), written("é".encode())) == ("Ġthe", "Ċ", "Ã©")
    assert len(set(byte_letters())) == 256
    assert same_token("<0x0A>", "Ċ") and same_token("\n", "<0x0A>") and same_token("  ", "ĠĠ")
    assert not same_token("a", "b") and not same_token("<0x0A>", "<0x0B>") and not same_token("<0xZZ>", "<0xYY>")


def test_a_token_may_hold_any_separator_but_a_line_feed() -> None:
    data = "a\u2028\r\nb\x85\n\n".encode()
    assert read_form("vocab.txt", data, "").ids == {"a\u2028": 0, "b\x85": 1, "": 2}
    assert read_form("merges.txt", "#version: 0.2\n# version\na\u2028 b\n".encode(), "").order == (
        "merges",
        [["#", "version"], ["a\u2028", "b"]],
    )
