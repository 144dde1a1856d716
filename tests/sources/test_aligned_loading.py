"""What transformers loads from an aligned result: each source's own tokens, by the result's ids."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from proofs import UNPROVED
from vocabularies import END, MERGES, PIECES, SETTINGS, put, source, three, tokenizer_json, weights

from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.schema import Vocabulary as Wanted
from bam_merge.sources.tokenizers.alignment import align
from bam_merge.sources.tokenizers.vocabulary import Vocabulary
from bam_merge.verifying.tokens import NOBODY, Tokens, donors, own_rows

WORDS = ["ab", "a b", "cd", "<s>", " h", "ef"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """AutoTokenizer, offline."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda folder: transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def same_tokens(load: Any, folder: Path, names: tuple[str, ...] = ("seed", "code", "law")) -> None:
    """Texts of each source's own tokens: the result's tokenizer cuts them as the source's does, and the rows are those of the ids."""
    result = load(folder)
    for name in names:
        theirs = load(folder.parent / name)
        for draw in range(20):
            stream = random.Random(f"{name} {draw}")
            text = "".join(stream.choice([*WORDS, *theirs.get_added_vocab()]) for _ in range(8))
            own, ours = theirs(text)["input_ids"], result(text)["input_ids"]
            assert theirs.convert_ids_to_tokens(own) == result.convert_ids_to_tokens(ours), (name, text)
            assert [result.convert_tokens_to_ids(token) for token in theirs.convert_ids_to_tokens(own)] == ours
            assert theirs.decode(own) == result.decode(ours)


@pytest.mark.parametrize("padding", ["", ", pad_to_multiple_of: 64"])
def test_a_union(padding: str, tmp_path: Path, load: Any) -> None:
    folder = publish(plan_file(three(tmp_path, f"{{source: union{padding}}}")), None, UNPROVED)
    same_tokens(load, folder)
    embed = {name: weights(tmp_path / name)["model.embed_tokens.weight"] for name in ("seed", "code", "law", "out")}
    result = load(folder)
    assert len(embed["out"]) >= len(result)
    for name in ("code", "law"):
        theirs = load(tmp_path / name)
        for token in ("<im_start>", "<im_end>") if name == "code" else ("<note>",):
            row = embed["out"][result.convert_tokens_to_ids(token)]
            assert (row - embed[name][theirs.convert_tokens_to_ids(token)]).abs().max() < 1e-7


def test_a_sources_tokenizer(tmp_path: Path, load: Any) -> None:
    folder = publish(plan_file(three(tmp_path, "{source: law}")), None, UNPROVED)
    same_tokens(load, folder, ("law",))


def test_a_chat_template(tmp_path: Path, load: Any) -> None:
    recipe = three(tmp_path, "{source: union, chat_template: code}")
    put(tmp_path / "seed", {"chat_template.jinja": "no"})
    put(tmp_path / "code", {"chat_template.jinja": "{% for m in messages %}<im_start>{{ m.content }}<im_end>{% endfor %}"})
    result = load(publish(plan_file(recipe), None, UNPROVED))
    ids = result.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=True)["input_ids"]
    assert result.convert_ids_to_tokens(ids) == ["<im_start>", "ab", "<im_end>"] and ids[0] == END + 2


@pytest.mark.parametrize("how", ["added_tokens.json", "tokenizer_config.json", "both", "none of the seed's"])
def test_vocabularies_in_pieces(how: str, tmp_path: Path, load: Any) -> None:
    recipe = three(tmp_path)
    for name, added in (("seed", [] if how == "none of the seed's" else ["<r0>"]), ("code", ["<c>", "<d>"]), ("law", ["<r0>"])):
        (tmp_path / name / "tokenizer.json").unlink()
        numbered = dict(zip(added, range(END, END + 9), strict=False))
        decoder = {str(n): {"content": token, "special": True, "normalized": False} for token, n in numbered.items()}
        settings = {**SETTINGS, "tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
        put(tmp_path / name, {"vocab.json": {piece: i for i, piece in enumerate(PIECES)}, "merges.txt": merges})
        if how in ("added_tokens.json", "both"):
            put(tmp_path / name, {"added_tokens.json": numbered})
        put(
            tmp_path / name,
            {"tokenizer_config.json": settings if how == "added_tokens.json" else {**settings, "added_tokens_decoder": decoder}},
        )
    same_tokens(load, publish(plan_file(recipe), None, UNPROVED))


def test_unigrams(tmp_path: Path, load: Any) -> None:
    """A vocabulary of scores, in which some added tokens are pieces too."""
    recipe = three(tmp_path)
    for name in ("seed", "code", "law"):
        document = json.loads((tmp_path / name / "tokenizer.json").read_text())
        pieces = [[piece, -float(number)] for number, piece in enumerate(PIECES)]
        document["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
        document["added_tokens"] = [
            *(token | {"id": i, "content": PIECES[i]} for i, token in enumerate(document["added_tokens"][:2])),
            *document["added_tokens"],
        ]
        put(tmp_path / name, {"tokenizer.json": document})
    same_tokens(load, publish(plan_file(recipe), None, UNPROVED))


def test_a_token_of_the_files_beside_comes_between(tmp_path: Path, load: Any) -> None:
    """The seed's tokenizer.json lacks a token that its settings have: without it the library would number all after it otherwise."""
    recipe = three(tmp_path)
    put(tmp_path / "seed", {"tokenizer.json": tokenizer_json(["<r0>"])})
    decoder = {str(END + i): {"content": token, "special": True, "normalized": False} for i, token in enumerate(["<r0>", "<r1>"])}
    put(tmp_path / "seed", {"tokenizer_config.json": {**SETTINGS, "added_tokens_decoder": decoder}})
    folder = publish(plan_file(recipe), None, UNPROVED)
    same_tokens(load, folder)
    assert [item["content"] for item in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]][:2] == ["<r0>", "<r1>"]


# ---- two implementations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", range(60))
def test_planning_and_verification_agree(draw: int) -> None:
    """Any vocabularies of one base: what a plan aligns is what verification's own arrays say, made apart."""
    stream = random.Random(draw)
    base = {number: f"b{number}" for number in range(stream.randrange(1, 6))}
    names = ["seed", "code", "law", "math"][: stream.randrange(2, 5)]
    vocabularies: dict[str, Vocabulary | None] = {}
    rows = {}
    for name in names:
        added = stream.sample([f"<{letter}>" for letter in "pqrstu"], stream.randrange(0, 5))
        texts = {**base, **dict(enumerate(added, len(base)))}
        vocabularies[name] = None if stream.random() < 0.15 else Vocabulary(name, texts, frozenset(range(len(base), len(texts))))
        rows[name] = max(1, len(texts) + stream.randrange(-1, 6))
    if not any(vocabularies.values()):
        return
    missing = stream.choice(["mean", "zeros", *names])
    chosen = [name for name in names if vocabularies[name] is not None]
    wanted = Wanted(source=stream.choice(["union", *chosen]), missing=missing, pad_to_multiple_of=stream.choice([None, 1, 8]))
    found = align(wanted, vocabularies, rows)
    result = Tokens({number: token for token, number in found.ids.items()}, frozenset())
    giver = vocabularies[found.giver]
    assert giver is not None
    tokens = {name: Tokens((mine or giver).names, (mine or giver).added) for name, mine in vocabularies.items()}
    own = {name: own_rows(result, tokens[name], rows[name], found.rows) for name in names}
    for name in names:
        gives = donors(own, name, missing)
        row = 0
        for run in found.sources[name].runs:
            for index in range(run.rows):
                expected = {other: int(own[other][row]) for other in names if gives[other][row]}
                if own[name][row] != NOBODY:
                    expected = {name: int(own[name][row])}
                assert {other: first + index for other, first in run.of} == expected, (name, row)
                row += 1
        assert row == found.rows


def test_a_source_that_nobody_merges_gives_its_tokenizer(tmp_path: Path, load: Any) -> None:
    """It is used, though neither an expert nor named by a rule."""
    three(tmp_path)
    source(tmp_path, "more", ["<r0>", "<r1>", "<note>", "<im_start>", "<im_end>"], 40, 4)
    text = "method: merge\nsources: {seed: seed, code: code, more: more}\nexperts: [seed, code]\ntokenizer: {source: more}\noutput: {path: out}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    same_tokens(load, publish(plan_file(tmp_path / "recipe.yaml"), None, UNPROVED), ("seed", "code", "more"))
