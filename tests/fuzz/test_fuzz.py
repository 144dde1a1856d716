"""A small part of `make fuzz`, and that each of its targets fails where what it holds up is taken away."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import meanings
import merges
import properties
import pytest

from bam_merge.sources.tokenizers.agreement import TokenizerFindings
from bam_merge.verifying.report import Check, Report


def test_two_thousand_cases() -> None:
    """In a process of its own because its memory is limited."""
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / "run.py"), "--cases", "2000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fuzz: 2,000 cases from seed 1, ")
    assert ", 0 failures; " in done.stdout


# ---- every oracle can fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", b'{"\\u0061uto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}', "auto_map"),
        ("generation_config.json", b'{"a": [{"Custom_Generate": "x/y"}]}', "Custom_Generate"),
        ("merges.txt", "secret", "outside"),
    ],
)
def test_companions_that_are_copied_as_they_are_fail(
    name: str, content: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = properties.companions(tmp_path)
    assert target.run(target.good)
    target.run({name: content})  # refused, or written without what is forbidden
    monkeypatch.setattr("bam_merge.publishing.companions.companion", lambda path: path.read_bytes())
    monkeypatch.setattr("bam_merge.planning.make.compare_tokenizers", lambda models: TokenizerFindings())
    with pytest.raises(AssertionError, match=words):
        target.run({name: content})


def test_tokenizers_that_are_not_compared_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    forms, edited = meanings.tokenizers(tmp_path / "a"), meanings.edited_tokenizers(tmp_path / "b")
    swapped = ("vocab.json", "tekken.json", ["a", "Ġb"], ("swap", 0, 1, "a"))
    other = ("vocab.json", "added_tokens.json", b'{"x": 2}')
    assert forms.run(forms.good) and edited.run(edited.good)
    assert not forms.run(swapped) and not edited.run(other)
    monkeypatch.setattr("bam_merge.planning.make.compare_tokenizers", lambda models: TokenizerFindings())
    with pytest.raises(AssertionError, match="pass"):
        forms.run(swapped)
    with pytest.raises(AssertionError, match="id 2 is"):
        edited.run(other)
    monkeypatch.setattr("bam_merge.planning.make.compare_tokenizers", lambda models: TokenizerFindings(["no"]))
    with pytest.raises(AssertionError, match="of one tokenizer are refused"):
        forms.run(forms.good)


def test_spellings_that_are_not_compared_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    target = meanings.spelled_twice(tmp_path)
    twice = ("gpt_neox", {"rope_theta": 5e5, "rotary_emb_base": 1e4})
    assert target.run(target.good) and not target.run(twice)
    with monkeypatch.context() as patch:
        patch.setattr("meanings.conflicts", lambda table, config: [])
        with pytest.raises(AssertionError, match=r"'rope_theta', 'rotary_emb_base'.* differ, and pass"):
            target.run(twice)
        patch.setattr("meanings.conflicts", lambda table, config: ["rotary_emb_base is wrong"])
        with pytest.raises(AssertionError, match=r"refused without naming \[500000\.0, 10000\.0\]"):
            target.run(twice)
    right = meanings.describe
    monkeypatch.setattr("meanings.describe", lambda *args: {**right(*args), "head_dim": 7})
    with pytest.raises(AssertionError, match="head_dim is 7, transformers takes 8"):
        target.run(target.good)


def test_a_staging_folder_that_is_not_looked_at_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = properties.staging(tmp_path)
    planted: properties.Planted = ([("pid", "link to a file")], 0o700, [], False, 1)
    assert target.run(target.good) and not target.run(planted)
    monkeypatch.setattr("bam_merge.publishing.staging.check_contents", lambda *args: None)
    monkeypatch.setattr("bam_merge.publishing.holder.open_file", lambda name, folder, flags: os.open(name, flags, 0o600, dir_fd=folder))
    with pytest.raises(AssertionError, match="was touched"):
        target.run(planted)


# ---- random merges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(18))
def test_a_random_merge_and_its_fault(number: int, tmp_path: Path) -> None:
    """One of every kind of fault, if it can be planted in the merge of its number."""
    outcome = merges.run_case(1, number, tmp_path)
    assert not outcome.findings, "\n".join(outcome.findings)
    assert outcome.fault


def test_a_check_that_never_fails_is_a_miss_and_one_that_always_does_a_false_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ok, words in ((True, "MISSED"), (False, "FALSE ALARM")):
        report = Report(checks=[Check("copies", ok)])
        monkeypatch.setattr("merges.verify", lambda folder, plan, report=report: report)
        home = tmp_path / str(ok)
        home.mkdir()
        findings = merges.run_case(1, 3, home).findings
        assert words in findings[0]
        assert "--seed 1 --only 3" in findings[-1] and json.dumps("hidden_size") in findings[-1]
