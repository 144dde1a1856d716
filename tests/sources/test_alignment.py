"""Vocabularies that differ a little: which row belongs to which token, what is refused and what is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from vocabularies import END, MERGES, PIECES, SETTINGS, UNION, put, source, three, tokenizer_json

from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.recipe.schema import Vocabulary as Wanted
from bam_merge.sources.tokenizers.alignment import Run, align
from bam_merge.sources.tokenizers.vocabulary import Vocabulary, base_differs

BASE = {0: "a", 1: "b"}


def having(name: str, added: dict[int, str], base: dict[int, str] = BASE) -> Vocabulary:
    return Vocabulary(name, {**base, **added}, frozenset(added))


SEED, CODE, LAW = having("seed", {2: "<x>"}), having("code", {2: "<x>", 3: "<c>"}), having("law", {2: "<l>"})
ALL = {"seed": SEED, "code": CODE, "law": LAW}


def runs(wanted: dict[str, Any], rows: dict[str, int], tokens: dict[str, Any] = ALL) -> dict[str, list[tuple[tuple[str, int], ...]]]:
    """For every source where each row of the result comes from."""
    found = align(Wanted(**wanted), tokens, rows)
    single = {}
    for name, mine in found.sources.items():
        single[name] = [tuple((of, row + i) for of, row in run.of) for run in mine.runs for i in range(run.rows)]
        assert len(single[name]) == found.rows
    return single


def test_a_token_is_given_by_those_that_have_it() -> None:
    found = runs({}, {"seed": 4, "code": 4, "law": 3})
    base = {name: [((name, 0),), ((name, 1),)] for name in ALL}
    assert found == {
        "seed": [*base["seed"], (("seed", 2),), (("code", 3),), (("law", 2),)],
        "code": [*base["code"], (("code", 2),), (("code", 3),), (("law", 2),)],
        "law": [*base["law"], (("seed", 2), ("code", 2)), (("code", 3),), (("law", 2),)],
    }


@pytest.mark.parametrize(("missing", "x_of_law", "c_of_seed"), [("mean", (("seed", 2), ("code", 2)), (("code", 3),)), ("zeros", (), ()), ("code", (("code", 2),), (("code", 3),)), ("seed", (("seed", 2),), (("code", 3),))])  # fmt: skip
def test_what_is_missing(missing: str, x_of_law: Any, c_of_seed: Any) -> None:
    """A source that stands in and lacks the token as well leaves it to those that have it."""
    found = runs({"missing": missing}, {"seed": 3, "code": 4, "law": 3})
    assert (found["law"][2], found["seed"][3]) == (x_of_law, c_of_seed)


def test_padding_is_kept_by_its_number() -> None:
    """Row 5 is padding of seed and of code, row 6 of code alone, row 7 of nobody; row 4 of seed was padding and becomes <l>."""
    found = runs({"pad_to_multiple_of": 8}, {"seed": 6, "code": 7, "law": 3})
    assert found["seed"][4:] == [(("law", 2),), (("seed", 5),), (("code", 6),), ()]
    assert found["code"][4:] == [(("law", 2),), (("code", 5),), (("code", 6),), ()]
    assert found["law"][4:] == [(("law", 2),), (("seed", 5), ("code", 5)), (("code", 6),), ()]


def test_one_sources_tokenizer() -> None:
    found = align(Wanted(source="law"), ALL, {"seed": 6, "code": 7, "law": 3})
    assert found.rows == 3 and found.ids == {"a": 0, "b": 1, "<l>": 2} and found.giver == "law" and not found.added
    assert {name: mine.lost for name, mine in found.sources.items()} == {"seed": ("<x>",), "code": ("<x>", "<c>"), "law": ()}
    assert found.sources["seed"].runs == (Run(2, (("seed", 0),)), Run(1, (("law", 2),)))
    assert any("sources.code: 2 tokens that sources.law has not left out: '<x>', '<c>'." in note for note in found.notes)


def test_a_union_never_cuts_and_a_multiple_rounds_up() -> None:
    sizes = {
        multiple: align(Wanted(pad_to_multiple_of=multiple), ALL, {"seed": 3, "code": 9, "law": 3}).rows for multiple in (None, 1, 4, 64)
    }
    assert sizes == {None: 9, 1: 9, 4: 12, 64: 64}


def test_a_token_without_a_row_is_not_given() -> None:
    """law's tokenizer names two tokens, its embeddings were never grown."""
    found = align(Wanted(), {"seed": having("seed", {}), "law": having("law", {2: "<x>", 3: "<y>"})}, {"seed": 2, "law": 3})
    assert found.ids == {"a": 0, "b": 1, "<x>": 2} and found.rows == 3
    tokens = align(Wanted(), {"seed": having("seed", {2: "<pad>"}), "law": having("law", {2: "<pad>"})}, {"seed": 2, "law": 2})
    assert tokens.rows == 2 and not tokens.moves("seed") and not tokens.moves("law")


def test_counts() -> None:
    found = align(Wanted(), ALL, {"seed": 4, "code": 4, "law": 3})
    assert (found.shared, dict(found.added), found.padding) == (2, {"<c>": "code", "<l>": "law"}, 0)
    assert {name: (mine.tokens, mine.moved, mine.made) for name, mine in found.sources.items()} == {
        "seed": (3, 0, 2),
        "code": (4, 0, 1),
        "law": (3, 1, 2),
    }


def test_sources_that_agree_need_nothing() -> None:
    found = align(Wanted(), {"seed": SEED, "code": SEED}, {"seed": 4, "code": 4})
    assert not found.moves("seed") and not found.moves("code")


def test_a_base_is_the_same_or_it_is_not() -> None:
    merges = {"merges": [["a", "b"], ["c", "d"]]}
    first = Vocabulary("seed", BASE, frozenset(), merges)
    assert base_differs(first, Vocabulary("law", BASE, frozenset(), {"scores": (1, [0.0])})) == ""
    assert (
        base_differs(Vocabulary("law", BASE, frozenset(), {"merges": [["a", "b"], ["d", "c"]]}), first)
        == "the merges are not the same: number 1 is d c here, c d there"
    )
    assert base_differs(Vocabulary("law", BASE, frozenset(), {"merges": [["a", "b"]]}), first) == "1 merges here, 2 there"
    assert base_differs(Vocabulary("law", {0: "b", 1: "a"}, frozenset()), first) == "id 0 is 'b' here, 'a' there, and 1 more id differs"
    assert base_differs(Vocabulary("law", {**BASE, 2: "c"}, frozenset()), first) == "id 2 is 'c' here, no token there"
    with pytest.raises(
        CheckpointError, match=r"sources\.law: its base vocabulary is not that of sources\.seed: id 0 is 'b' here, 'a' there"
    ) as caught:
        align(Wanted(), {"seed": SEED, "law": having("law", {}, {0: "b", 1: "a"})}, {"seed": 3, "law": 3})
    assert "Both have 2 tokens, 1 only in sources.seed ('<x>'), 2 have another id ('b' has 0 here, 1 there)." in str(caught.value)


def test_ids_far_beyond_the_rows_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"sources\.seed: '<x>' has id 1000000000, its embeddings have 3 rows"):
        align(Wanted(), {"seed": having("seed", {10**9: "<x>"}), "law": LAW}, {"seed": 3, "law": 3})


# ---- plans -----------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_shared_added_moved_and_made(tmp_path: Path, run: Any) -> None:
    result = run("plan", three(tmp_path, "{source: union, pad_to_multiple_of: 16}"))
    assert result.status == 0, result.err
    text = result.out + result.err
    assert "tokenizer    of seed and 3 tokens of others: 18 tokens, 14 in all sources; 48 rows" in text
    assert "tokens       seed: 15, 3 made" in text
    assert "tokens       code: 16, 2 moved, 2 made" in text
    assert "tokens       law: 16, 1 moved, 2 made" in text
    assert "30 rows of the embeddings without a token (padding)" in text and "8 rows that no source has are zeros" in text
    assert "mean(seed, code, law): model.embed_tokens.weight[by token]" in text
    document = json.loads(run("plan", tmp_path / "recipe.yaml", "--json").out)
    assert document["tokenizer"]["sources"]["code"] == {"tokens": 16, "moved": 2, "made": 2, "left_out": 0}
    assert document["config"]["vocab_size"] == 48
    embed = next(tensor for tensor in document["tensors"] if tensor["role"] == "embed")
    assert embed["shape"] == [48, 32] and {read["source"] for read in embed["reads"]} == {"seed", "code", "law"}


def test_without_the_key_the_message_names_it(tmp_path: Path, run: Any) -> None:
    result = run("plan", three(tmp_path, ""))
    assert result.status == 2
    assert "sources.code: vocab_size = 40, sources.seed has 32 (config.json)" in result.err
    assert "in the recipe does it, by token" in result.err
    assert (
        "both have 14 tokens, 2 only here ('<im_start>'), 1 only in sources.seed ('<r1>'); tokenizer: {source: union} in the recipe aligns them by token"
        in result.err
    )


def test_a_base_that_differs_is_refused_with_and_without_the_key(tmp_path: Path, run: Any) -> None:
    recipe = three(tmp_path)
    put(tmp_path / "law", {"tokenizer.json": tokenizer_json(merges=MERGES[::-1])})
    result = run("plan", recipe)
    assert result.status == 2 and len(result.err.splitlines()) == 1
    assert (
        "sources.law: its base vocabulary is not that of sources.seed: the merges are not the same: number 0 is c d here, a b there. Both have 13 tokens"
        in result.err
    )
    for name in ("code", "law"):
        source(tmp_path, name, ["<r0>", "<r1>"], 32, 1)
    put(tmp_path / "law", {"tokenizer.json": tokenizer_json(pieces=[*PIECES[:-2], "cd", "ab"])})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2 and "the base vocabularies differ, so that no recipe can align them" in result.err


def test_a_recipe_that_names_no_source_is_refused(tmp_path: Path, run: Any) -> None:
    for key in ("source", "missing", "chat_template"):
        result = run("plan", three(tmp_path, f"{{{key}: sed}}"))
        assert result.status == 2 and f"tokenizer.{key}: 'sed' is not among the sources; did you mean 'seed'?" in result.err
    result = run("plan", three(tmp_path, "{missing: means}"))
    assert "did you mean 'mean'?" in result.err
    result = run("plan", three(tmp_path, "{source: union, pad_to_multiple_of: 0}"))
    assert result.status == 2 and "pad_to_multiple_of" in result.err
    source(tmp_path, "zeros", [], 32, 3)
    text = "tokenizer: {missing: zeros}"
    result = run("plan", write_recipe(tmp_path, text, names=("seed", "zeros")))
    assert result.status == 2 and "zeros is a word of this key, and a source is called so too" in result.err


def test_nobody_has_a_tokenizer(tmp_path: Path, run: Any) -> None:
    source(tmp_path, "seed", None, 32, 0)
    source(tmp_path, "law", None, 40, 1)
    result = run("plan", write_recipe(tmp_path, "tokenizer: {source: union}", names=("seed", "law")))
    assert result.status == 2
    assert "tokenizer.source: no source has a tokenizer, so nothing says which row of the embeddings belongs to which token" in result.err


def test_a_source_without_a_tokenizer_is_taken_to_have_the_others(tmp_path: Path, run: Any) -> None:
    source(tmp_path, "seed", ["<r0>"], 32, 0)
    source(tmp_path, "rows", None, 40, 1)
    result = run("plan", write_recipe(tmp_path, "tokenizer: {source: union}", names=("seed", "rows")))
    assert result.status == 0 and "; 40 rows" in result.out
    assert (
        "sources.rows has no tokenizer: its rows are taken to be those of the tokens of sources.seed, which nothing here can check."
        in result.out
    )


def test_a_gap_that_the_library_would_close_is_said_or_refused(tmp_path: Path, run: Any) -> None:
    recipe = three(tmp_path)
    put(tmp_path / "law", {"tokenizer.json": tokenizer_json(["<note>"], END + 1)})
    result = run("plan", recipe)
    assert (
        f"sources.law: tokenizer.json: '<note>' has id {END + 1} in the file, the library tokenizers gives it {END}; the file is believed."
        in result.out
    )
    hole = tokenizer_json()
    hole["model"]["vocab"] = {piece: number + (number > 3) for piece, number in hole["model"]["vocab"].items()}
    added = {**hole, "added_tokens": tokenizer_json(["<x>"], END + 1)["added_tokens"]}
    for name, document in (("seed", hole), ("code", {**hole, "added_tokens": []}), ("law", hole)):
        put(tmp_path / name, {"tokenizer.json": document})
    assert run("plan", recipe).status == 0
    put(tmp_path / "law", {"tokenizer.json": added})
    result = run("plan", recipe)
    assert result.status == 2 and "sources.seed: tokenizer.json leaves ids unused below" in result.err


def test_dtypes_that_rows_cannot_share(tmp_path: Path, run: Any) -> None:
    three(tmp_path)
    source(tmp_path, "law", ["<note>"], 24, 2, dtype="BF16")
    copied = "tokenizer: {source: union}\nshared: {make: copy, from: seed}"
    result = run("plan", write_recipe(tmp_path, copied, "merge", ("seed", "law")))
    assert result.status == 2
    assert "rows of embed are taken from sources that disagree" in result.err and "Set dtype: bfloat16 (or another)." in result.err
    assert run("plan", write_recipe(tmp_path, copied, "merge", ("seed", "law"), "{path: out, dtype: bfloat16}")).status == 0


# ---- a seed without a tokenizer --------------------------------------------------------------------------------------------


def test_the_tokenizer_of_another_source_is_taken(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    put(tmp_path / "code", {"tokenizer.json": tokenizer_json(), "generation_config.json": {"temperature": 0.5}})
    put(tmp_path / "seed", {"generation_config.json": {"temperature": 0.7}, "chat_template.jinja": "seed's"})
    result = run(write_recipe(tmp_path))
    assert result.status == 0, result.err
    assert "the output takes the tokenizer of sources.code, for sources.seed, which would give it, has none." in result.err
    assert "sources.seed: chat_template.jinja not copied: the tokenizer is that of sources.code." in result.err
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "code/tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"temperature": 0.7}
    assert not (tmp_path / "out/chat_template.jinja").exists()
    assert run("verify", tmp_path / "out").status == 0


def test_a_plan_names_the_files_of_every_giver(tmp_path: Path) -> None:
    recipe = three(tmp_path, "{source: law}")
    put(
        tmp_path / "law",
        {
            "generation_config.json": {"eos_token_id": 5},
            "config.json": {**json.loads((tmp_path / "law/config.json").read_text()), "eos_token_id": 5},
        },
    )
    plan = plan_file(recipe)
    assert set(plan.files.values()) == {"law"} and plan.config["eos_token_id"] == 5 and plan.config["vocab_size"] == 24
    assert SETTINGS["eos_token"] == "</s>" and set(UNION) > {"<note>"}
