"""benchmarks/diff.py: the commands that diff is timed against read what they should, and a ratio above its limit fails. Nothing is timed."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import diff
from paired import Row


@pytest.fixture
def models(tmp_path):
    """Four models of two files each, all files different, with names that a shell would take apart."""
    folders = [tmp_path / f"model {index}" for index in range(4)]
    for index, folder in enumerate(folders):
        folder.mkdir()
        for shard in range(2):
            (folder / f"it's $HOME-{shard}.safetensors").write_bytes(bytes([index, shard]) * 1000)
    return [sorted(folder.iterdir()) for folder in folders]


def ran(command):
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("digest", diff.DIGESTS)
def test_every_file_is_digested_once(models, digest, count):
    if not shutil.which(digest[0]):
        pytest.skip(f"no {digest[0]} on this machine")
    result = ran(diff.digests(models[:count], digest))
    assert result.returncode == 0
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for files in models[:count] for file in files]
    assert sorted(line.split()[0] for line in result.stdout.splitlines()) == sorted(expected)


@pytest.mark.parametrize("missing", range(4))
def test_a_digest_that_fails_is_no_measurement(models, missing):
    models[missing][1].unlink()
    assert ran(diff.digests(models, diff.digest_command())).returncode != 0


def test_digests_are_taken_two_at_a_time(models, tmp_path):
    """Two processes with half of the files each, neither of which ends before both have begun."""
    begun = tmp_path / "begun"
    script = f'echo one >> {begun}; for i in $(seq 1000); do [ "$(wc -l < {begun})" -eq 2 ] && echo "$#" && exit; sleep 0.01; done'
    result = ran(diff.digests(models, ("sh", "-c", script)))
    assert result.stdout.split() == ["4", "4"]  # the shell takes "--" for its name


def test_cmp_reads_every_pair_and_sees_a_difference_in_the_last_byte(models, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models[0][0].parent, copy)
    pair = [models[0], sorted(copy.iterdir())]
    assert ran(diff.compared(pair)).returncode == 0
    pair[1][1].write_bytes(pair[1][1].read_bytes()[:-1] + b"x")
    assert ran(diff.compared(pair)).returncode == 1
    with pytest.raises(ValueError, match="shorter"):
        diff.compared([models[0], models[1][:1]])


def test_without_a_digest_command_it_says_which_are_looked_for(monkeypatch):
    monkeypatch.setattr(diff.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="Neither sha256sum nor shasum"):
        diff.digest_command()
    monkeypatch.setattr(diff.shutil, "which", lambda name: "/usr/bin/shasum" if name == "shasum" else None)
    assert diff.digest_command() == ("shasum", "-a", "256")


@pytest.mark.parametrize(("kind", "ratios", "status"), [
    ("equal", [0.9, 1.1, 5.0], 0), ("equal", [1.0, 1.11, 1.2], 1),
    ("different", [0.1, 0.5, 0.9], 0), ("different", [0.4, 0.51, 0.6], 1),
    ("--seed", [0.1, 0.5, 0.9], 0), ("--seed", [0.4, 0.51, 0.6], 1),
])  # fmt: skip
def test_a_median_above_its_limit_fails(kind, ratios, status, monkeypatch, tmp_path, capsys):
    """With ratios given, whatever is measured: the files are real, the commands are not run."""
    seen = []

    def alternate(commands, rounds, anchors):
        seen.extend(command.argv for command in commands)
        [anchor] = anchors
        mine, other = (Row(command.label, [1.0] * 3, [1.0] * 3, [1] * 3) for command in commands)
        mine.ratios[anchor] = ratios
        return [mine, other]

    monkeypatch.setattr(diff, "alternate", alternate)
    monkeypatch.setattr(diff, "bam_merge", lambda: "bam-merge")
    monkeypatch.setattr(diff, "scaled", lambda scale: TINY)
    monkeypatch.setattr(sys, "argv", ["diff.py", f"--only={kind}", "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        diff.main()
    assert ended.value.code == status
    assert f"limit {diff.KINDS[kind].limit:g}: {'BROKEN' if status else 'kept'}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    names = {"equal": ["seed", "copy"], "different": ["seed", "code"], "--seed": ["seed", "code", "law", "math"]}[kind]
    mine, other = seen
    assert mine[:2] == ["bam-merge", "diff"]
    assert [Path(folder).name for folder in mine[-len(names) :]] == names
    assert other[0] == "sh"
    assert all(f"/{name}/model.safetensors" in other[-1] for name in names)


TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
