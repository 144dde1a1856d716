"""Which files a text is of, which tokens are read of it, and what is said of texts that are none."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bam_merge.calibrating.texts import Reading, equal_texts, find_files, read_prompts, read_text, shorter
from bam_merge.errors import CheckpointError

WORDS = Tokenizer(models.WordLevel({"?": 0} | {str(number): number for number in range(1, 1000)}, unk_token="?"))
WORDS.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]


def words(first: int, stop: int) -> str:
    return " ".join(map(str, range(first, stop)))


def put(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(text)
    return folder


def test_files_folders_globs_and_lists_name_files_once_and_in_order(tmp_path: Path) -> None:
    put(tmp_path, b="1", a="2", sub__d="3", sub__c="4", sub__deep__e="5")
    (tmp_path / "sub" / ".hidden").write_text("x")
    (tmp_path / "sub" / ".git").mkdir()
    (tmp_path / "sub" / ".git" / "config").write_text("x")

    def names(text: object) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files(text, tmp_path, "texts.law")]  # type: ignore[arg-type]

    assert names("a.txt") == ["a.txt"]
    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("sub") == names("sub/") == ["sub/c.txt", "sub/d.txt", "sub/deep/e.txt"]
    assert names(["b.txt", "*.txt", "sub/deep"]) == ["b.txt", "a.txt", "sub/deep/e.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "sub/c.txt", "sub/d.txt", "sub/deep/e.txt"]
    assert find_files(str(tmp_path / "a.txt"), Path("elsewhere"), "x") == [tmp_path / "a.txt"]


def test_a_file_whose_name_is_a_glob_is_that_file(tmp_path: Path) -> None:
    put(tmp_path, **{"a[1]": "1", "a1": "2"})
    assert find_files("a[1].txt", tmp_path, "x") == [tmp_path / "a[1].txt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lwa.txt", "texts.law: lwa.txt: no such file or folder; did you mean 'law.txt'?"),
        ("nothing/at/all.txt", "no such file or folder. Paths are relative to the recipe."),
        ("*.md", "texts.law: *.md: matches no file in "),
        ("empty", "texts.law: empty: the folder holds no file"),
        ([], "texts.law: an empty list of files"),
        ("", "texts.law: '': an empty path"),
        ("~nobody-here/x", "home folder of nobody"),
    ],
)  # fmt: skip
def test_what_names_no_file(text: object, said: str, tmp_path: Path) -> None:
    put(tmp_path, law="1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as error:
        find_files(text, tmp_path, "texts.law")  # type: ignore[arg-type]
    assert said in str(error.value)


def test_every_wrong_name_of_a_list_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        find_files(["a", "b*"], tmp_path, "texts.law")
    assert len(error.value.problems) == 2


def test_windows_of_a_fixed_length_and_no_more_tokens_than_wanted(tmp_path: Path) -> None:
    put(tmp_path, a=words(1, 100))
    text = read_text([tmp_path / "a.txt"], Reading(WORDS, 24, 15, window=10, folder=tmp_path), "x")
    assert text.windows == (tuple(range(1, 11)), tuple(range(11, 21)), tuple(range(21, 25)))
    assert text.further == (tuple(range(31, 41)), tuple(range(41, 46))), "a window is in one of them, never in both"
    assert (text.tokens, text.counted, text.wanted) == (24, 21, 24)
    assert shorter(text) is None
    (part,) = text.parts
    assert (part.name, part.nbytes) == ("a.txt", (tmp_path / "a.txt").stat().st_size)


def test_files_take_turns_and_short_ones_run_out(tmp_path: Path) -> None:
    put(tmp_path, a=words(1, 24), b=words(100, 103), c=words(200, 260))
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    text = read_text(files, Reading(WORDS, 60, window=10), "x")
    assert [window[0] for window in text.windows] == [1, 100, 200, 11, 210, 21, 220, 230]
    assert text.tokens == 60
    text = read_text(files, Reading(WORDS, 1000, window=10), "x")
    assert text.tokens == 23 + 3 + 60
    assert shorter(text) == "86 tokens in 3 files, fewer than the 1,000 wanted"


def test_a_file_that_is_not_needed_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, a=words(1, 50))
    text = read_text([tmp_path / "a.txt", tmp_path / "missing.txt"], Reading(WORDS, 10, window=10), "x")
    assert [part.name for part in text.parts] == ["a.txt"]


def test_only_the_beginning_of_a_long_file_is_read_unless_its_tokens_are_long(tmp_path: Path) -> None:
    put(tmp_path, a=words(1, 1000) * 50, b=("1" + " " * 39) * 1000)
    short, long = (read_text([tmp_path / name], Reading(WORDS, 100), "x") for name in ("a.txt", "b.txt"))
    assert short.tokens == long.tokens == 100
    assert short.parts[0].nbytes < 2000 < long.parts[0].nbytes < 10_000


def test_a_character_that_the_beginning_cuts_in_two_is_left_out(tmp_path: Path) -> None:
    for shift in range(4):
        (tmp_path / "a.txt").write_text("1 " * shift + "\N{GRINNING FACE} " * 1000, encoding="utf-8")
        assert read_text([tmp_path / "a.txt"], Reading(WORDS, 10), "x").tokens == 10


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf1 2 3")
    assert read_text([tmp_path / "a.txt"], Reading(WORDS, 10), "x").windows == ((1, 2, 3),)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "texts.law: a.txt is empty"),
        (b"  \n ", "texts.law: a.txt has no token after the first"),
        (b"1", "has no token after the first"),
        (b"1 2 \xff 3", "not UTF-8 text (byte 4)"),
        (b"1 \0 2", "holds NUL characters"),
    ],
)
def test_what_is_no_text(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read_text([tmp_path / "a.txt"], Reading(WORDS, 10), "texts.law")
    assert said in str(error.value)
    assert str(error.value).startswith("texts.law: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_text([tmp_path / "a.txt"], Reading(WORDS, 10), "x")


def test_prompts_are_texts_of_their_own() -> None:
    text = read_prompts(["1 2 3", "4 5"], Reading(WORDS, 100), "prompts.law")
    assert text.windows == ((1, 2, 3), (4, 5))
    assert [part.name for part in text.parts] == ["prompt 1", "prompt 2"]
    assert text.parts[0].nbytes == 5
    assert read_prompts(["7"], Reading(WORDS, 100), "x").windows == ((7, 7),), "a word of one token counts once"


@pytest.mark.parametrize(
    ("prompts", "said"),
    [([], "prompts.law: an empty list of prompts"), (["1 2", "3", "", " "], "prompts.law: prompt 3, 4 has no token")],
)
def test_prompts_that_say_nothing(prompts: list[str], said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_prompts(prompts, Reading(WORDS, 100), "prompts.law")
    assert said in str(error.value)


def test_equal_texts_are_told_by_their_tokens(tmp_path: Path) -> None:
    put(tmp_path, a="1 2 3", b="1  2\n3", c="1 2 4")
    texts = {name: read_text([tmp_path / f"{name}.txt"], Reading(WORDS, 10), "x") for name in "abc"}
    assert list(equal_texts(texts)) == [("a", "b")]
    assert texts["a"].digest == texts["b"].digest != texts["c"].digest
    assert texts["a"].parts[0].digest != texts["b"].parts[0].digest
