"""benchmarks/routers.py: draws of text, what is kept, the bars, and the whole of it on tiny models."""

import json
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, write_sources
from word_texts import random_ids, words_tokenizer, write_words

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import router_texts
import routers

from bam_merge.verifying import heldout


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """Checkpoints as make example leaves them, with a vocabulary of words; and the general texts, which are made otherwise."""
    monkeypatch.setattr(heldout, "TOKENS", heldout.TOKENS)  # which the benchmark sets
    checkpoints = tmp_path / "checkpoints"
    write_sources(checkpoints, CONFIGS["llama"], routers.BASE)
    for name in routers.BASE:
        words_tokenizer(checkpoints / name)
    for index, name in enumerate(("general", "code", "law", "math")):
        for part, count in (("text", 4000), ("heldout", 300)):
            folder = (tmp_path / "work" / "texts" if name == "general" else checkpoints) / part
            folder.mkdir(parents=True, exist_ok=True)
            lines = [f"w{3 + 15 * index + token % 15}\n" for token in random_ids(count, index)]
            (folder / f"{name}.txt").write_text("".join(lines))
    return tmp_path


def call(monkeypatch, folder, *arguments):
    """Run the command; its exit status."""
    given = ["--checkpoints", folder / "checkpoints", "--work", folder / "work", "--heldout", "256", *arguments]
    monkeypatch.setattr("sys.argv", ["routers.py", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        routers.main()
    return ended.value.code


def test_the_table_and_the_bars(scene, monkeypatch, capsys):
    status = call(monkeypatch, scene, "--only", "table", "--tokens", "64,8192", "--draws", "2", "--further", "--json", scene / "found.json")
    shown = capsys.readouterr().out
    kept = [line.rpartition(": ")[2] for line in shown.splitlines() if line.startswith("bar: ")]
    assert len(kept) == 8 and status == int("BROKEN" in kept)
    table = {row[0]: row[1:] for row in json.loads((scene / "found.json").read_text())["table"]}
    assert [name for name in table if "ridge" in name] == [
        "Expert-KV, ridge, 64 tokens", "Expert-KV, ridge, 8,192 tokens", "BTX, ridge, 64 tokens", "BTX, ridge, 8,192 tokens",
        "Expert-KV, the paper's gates, ridge, 8,192 tokens", "Expert-KV, norms and embeddings on the seed, ridge, 8,192 tokens",
    ]  # fmt: skip
    assert all("±" in cell for cell in table["BTX, ridge, 64 tokens"][:4]) and table["BTX, ridge, 64 tokens"][4] == ""
    right = [float(cell.split()[0]) for cell in table["Expert-KV, ridge, 8,192 tokens"][4:]]
    assert min(right) > 80 > 50 > float(table["Expert-KV, random routers"][5].split()[0]), "texts that have no word in common"
    made = sorted((scene / "work" / "measured").iterdir())
    plain = scene / "plain.json"
    assert call(monkeypatch, scene, "--only", "table", "--tokens", "64,8192", "--draws", "2", "--json", plain) == status
    assert sorted((scene / "work" / "measured").iterdir()) == made, "what was measured is kept"
    assert [row[0] for row in json.loads(plain.read_text())["table"]] == list(table)[:-2], "without the further ones"


def test_a_case_says_what_the_report_says(scene, monkeypatch, capsys):
    assert call(monkeypatch, scene, "--only", "an expert twice,a useless expert,texts of 200 bytes") == 0
    shown = capsys.readouterr().out
    twice, useless, little = (
        shown.partition(f"### {name}")[2].partition("###")[0] for name in ("an expert twice", "a useless expert", "texts of 200 bytes")
    )
    assert "experts 1 (code) and 4 (code) have the same row in every router" in twice
    assert "| noise " in useless
    assert "routers are made of too little text of seed (" in little


def test_draws_are_other_parts_of_a_text(tmp_path):
    (tmp_path / "text").mkdir()
    write_words(tmp_path / "text" / "law.txt", list(range(900)))
    (tmp_path / "text" / "law.txt").write_text("".join(f"line {number}\n" for number in range(900)))
    domains = router_texts.Domains(tmp_path, tmp_path / "work", 1)
    parts = [domains.draw("law", draw, 3, 400).read_text() for draw in range(3)]
    assert all(len(part) == 400 for part in parts)
    lines = [{*part.splitlines()[:-1]} for part in parts]
    assert not lines[0] & lines[1] and not lines[1] & lines[2] and not lines[0] & lines[2]
    whole = domains.draw("law", 1, 3, 10**6).read_text()
    assert sorted(whole.splitlines()) == sorted([*(f"line {number}" for number in range(900)), *([""] if "\n\n" in whole else [])]), (
        "round at the end"
    )


def test_the_texts_that_are_made_here_differ(monkeypatch):
    monkeypatch.setattr(
        router_texts, "licences", lambda: ["The GNU General Public License\nsays", "Permission is hereby granted", "under the LGPL"]
    )
    assert router_texts.of_law(True) == ["The GNU General Public License\nsays", "under the LGPL"]
    assert router_texts.of_law(False) == ["Permission is hereby granted"]
    monkeypatch.setitem(router_texts.DOCUMENTS, "gnu", lambda: [f"paragraph {number}\n\nparagraph {number}" for number in range(300)])
    made = router_texts.made_text("gnu")
    assert set(made.training.split("\n\n")).isdisjoint(made.heldout.split("\n\n")) and made.heldout


def test_what_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path) == 2
    assert "no seed, code, law, math. Run make example first" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path, "--only", "tables") == 2
