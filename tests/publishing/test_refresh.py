"""Code and card of an older version's folder are renewed: in one step, weights untouched, the manifest true before and after."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import MergeOptions, OutputError, VerificationFailed, VerifyError, load_recipe, merge, refresh, verify
from bam_merge._version import __version__
from bam_merge.checkpoints.provenance import MANIFEST, SEAL, read_manifest, sealed
from bam_merge.files import writing

QUICK = MergeOptions(verify="none")


def aged(folder: Path, version: str = "0.0.1") -> None:
    """Make the folder an older version's: its code, its card, its manifest, which is true of them."""
    import xxhash

    document = read_manifest(folder)
    del document[SEAL]
    document["version"] = version
    for name in ("README.md", "modeling_bam.py"):
        if name in document["files"]:
            path = folder / name
            path.write_text(path.read_text().replace(f"bam-merge {__version__}", f"bam-merge {version}") + "\n# older\n")
            document["files"][name] = xxhash.xxh3_128_hexdigest(path.read_bytes())
    for record in document["sources"].values():
        record.pop("license", None)
    (folder / MANIFEST).write_bytes(sealed(document))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An older version's result in two shards, with its sources."""
    write_sources(tmp_path, CONFIGS["llama"])
    folder = merge(load_recipe(write_recipe(tmp_path, output="{path: out, max_shard_size: 150kB}")), options=QUICK)
    aged(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_code_and_card_are_this_versions(out: Path, run: Any) -> None:
    before, inodes = files(out), {path.name: path.stat().st_ino for path in out.iterdir()}
    old = verify(out)
    assert old.ok and {check.name for check in old.checks if check.ok is None} >= {"code", "card"}
    result = run("refresh", out)
    assert result.status == 0, result.err
    assert result.out == f"{out}: README.md, modeling_bam.py renewed\n"
    after = files(out)
    changed = {name for name in before if before[name] != after[name]}
    assert (changed, before.keys()) == ({"README.md", "modeling_bam.py", MANIFEST}, after.keys())
    assert all(path.stat().st_ino == inodes[path.name] and path.stat().st_nlink == 1 for path in out.glob("*.safetensors"))
    report = verify(out)
    assert report.ok, list(report.failures)
    assert {check.name: check.ok for check in report.checks if check.name in ("code", "card")} == {"code": True, "card": True}
    document = read_manifest(out)
    assert document["version"] == "0.0.1"
    assert document["refreshed"] == {"version": __version__, "files": ["README.md", "configuration_bam.py", "modeling_bam.py"]}
    assert f"Made by bam-merge 0.0.1, card and model code by {__version__} from llama models" in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_a_second_time_nothing_is_to_do(out: Path, run: Any) -> None:
    refresh(out)
    before = files(out)
    assert "code and card are as this version writes them" in run("refresh", out).out
    assert files(out) == before


def test_of_another_state_of_the_same_version(out: Path, run: Any) -> None:
    """Between two releases the number stays and the code does not: what is renewed is as this version writes it, with nothing said of another."""
    aged(out, __version__)
    assert {check.name for check in verify(out).failures} == {"code", "card"}
    assert run("refresh", out).out == f"{out}: README.md, modeling_bam.py renewed\n"
    assert verify(out).ok
    assert f"Made by bam-merge {__version__} from llama models" in (out / "README.md").read_text()
    assert refresh(out) == ()


def test_a_new_folder_is_as_it_should_be(llamas: Path) -> None:
    folder = merge(load_recipe(write_recipe(llamas)), options=QUICK)
    assert refresh(folder) == ()


def test_what_is_refreshed_loads_and_tells_the_same(out: Path) -> None:
    import torch

    from bam_merge import load_model

    ids = torch.tensor([[1, 2, 3]])
    before = load_model(out)(ids)
    refresh(out)
    assert torch.equal(load_model(out)(ids), before)


def test_without_sources_the_card_stays(out: Path, run: Any) -> None:
    shutil.rmtree(out.parent / "code")
    card = (out / "README.md").read_bytes()
    result = run("refresh", out)
    assert result.status == 0, result.err
    assert result.out == f"{out}: modeling_bam.py renewed\n"
    assert "README.md stays as it is: " in result.err
    assert (out / "README.md").read_bytes() == card
    assert read_manifest(out)["refreshed"]["files"] == ["configuration_bam.py", "modeling_bam.py"]
    report = verify(out)
    assert report.ok, list(report.failures)


def test_moved_sources_are_named_by_the_recipe(out: Path, run: Any) -> None:
    moved = out.parent / "elsewhere"
    moved.mkdir()
    for name in ("seed", "code", "law", "recipe.yaml"):
        (out.parent / name).rename(moved / name)
    assert refresh(out) == ("modeling_bam.py",)
    result = run("refresh", out, "--recipe", moved / "recipe.yaml")
    assert result.out == f"{out}: README.md renewed\n", result.err
    assert verify(out).ok


def test_of_sources_that_changed_no_card_is_made(out: Path, run: Any) -> None:
    config = out.parent / "law" / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    result = run("refresh", out)
    assert result.status == 0
    assert "README.md stays as it is: " in result.err
    assert result.out == f"{out}: modeling_bam.py renewed\n"


def test_licenses_are_recorded_with_the_card(out: Path) -> None:
    for name in ("seed", "code", "law"):
        (out.parent / name / "README.md").write_text("---\nlicense: mit\n---\n")
    refresh(out)
    assert "\nlicense: mit\n" in (out / "README.md").read_text()
    assert read_manifest(out)["sources"]["law"]["license"] == "mit"
    report = verify(out)
    assert report.ok and all(check.ok for check in report.checks if check.name in ("card", "provenance", "code") and check.ok is not None)


def test_a_public_layout_has_a_card_alone(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    folder = merge(load_recipe(write_recipe(tmp_path, "", "btx", output="{path: out, layout: mixtral}")), options=QUICK)
    aged(folder)
    assert refresh(folder) == ("README.md",)
    assert verify(folder).ok


# ---- what is refused


@pytest.mark.parametrize(("change", "words"), [
    (lambda out: (out / "config.json").write_text("{}"), "config.json"),
    (lambda out: (out / "modeling_bam.py").write_text("import os"), "modeling_bam.py is not as it was written"),
    (lambda out: (out / "evil.py").write_text("import os"), "evil.py: not of this merge"),
    (lambda out: flip(next(out.glob("*.safetensors"))), "digests: "),
    (lambda out: (out / MANIFEST).write_text((out / MANIFEST).read_text().replace("0.0.1", "0.0.2")), "not as it was written"),
])  # fmt: skip
def test_a_folder_that_is_not_true_is_left_alone(change: Any, words: str, out: Path, run: Any) -> None:
    change(out)
    before = files(out)
    result = run("refresh", out)
    assert result.status in (1, 2)
    assert words in result.err, result.err
    assert files(out) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_other_peoples_files_are_not_moved(out: Path) -> None:
    (out / ".gitattributes").write_text("x")
    before = files(out)
    with pytest.raises(OutputError, match=r"holds \.gitattributes, which is not of the merge. Move it elsewhere"):
        refresh(out)
    assert files(out) == before


@pytest.mark.parametrize("again", [False, True])
def test_what_a_newer_version_wrote_is_left_alone(again: bool, out: Path) -> None:
    document = read_manifest(out)
    del document[SEAL]
    newer = {"refreshed": {"version": "999.0", "files": ["README.md"]}} if again else {"version": "999.0"}
    (out / MANIFEST).write_bytes(sealed({**document, **newer}))
    before = files(out)
    with pytest.raises(OutputError, match=r"written by bam-merge 999\.0, this is .* Refresh it with that version"):
        refresh(out)
    assert files(out) == before


def test_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="no such folder"):
        refresh(tmp_path / "absent")
    write_sources(tmp_path, CONFIGS["llama"])
    with pytest.raises(VerifyError, match=r"no bam_merge\.json"):
        refresh(tmp_path / "seed")


def test_an_unfinished_merge_is_not_thrown_away(out: Path) -> None:
    staging = out.parent / ".out.bam-merge"
    staging.mkdir(mode=0o700)
    (staging / "journal").write_text("x")
    with pytest.raises(OutputError, match="an unfinished merge into it"):
        refresh(out)
    assert (staging / "journal").read_text() == "x"


def test_where_code_would_run_from_elsewhere_nothing_is_changed(out: Path) -> None:
    """Another auto_map is no older version's: what would run then is checked before the folder is in its place."""
    import xxhash

    config = json.loads((out / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "evil/repo--modeling.Evil"
    (out / "config.json").write_text(json.dumps(config))
    document = read_manifest(out)
    del document[SEAL]
    document["files"]["config.json"] = xxhash.xxh3_128_hexdigest((out / "config.json").read_bytes())
    (out / MANIFEST).write_bytes(sealed(document))
    before = files(out)
    with pytest.raises((VerificationFailed, Exception), match=r"auto_map|evil"):
        refresh(out)
    assert files(out) == before


@pytest.mark.parametrize(
    "forged",
    [{"version": "0.0.1", "files": ["README.md", "gone.py"]}, {"version": 1, "files": ["README.md"]}, {"version": "1", "files": []}, "yes"],
)
def test_a_record_that_cannot_be_fails(forged: Any, out: Path) -> None:
    document = read_manifest(out)
    del document[SEAL]
    (out / MANIFEST).write_bytes(sealed({**document, "refreshed": forged}))
    assert {check.name for check in verify(out).failures} == {"provenance"}


def test_code_that_is_said_to_be_this_versions_is_compared(out: Path) -> None:
    """Who claims a refresh claims this version's code, and that is looked at."""
    document = read_manifest(out)
    del document[SEAL]
    (out / MANIFEST).write_bytes(sealed({**document, "refreshed": {"version": __version__, "files": ["README.md", "modeling_bam.py"]}}))
    assert {check.name for check in verify(out).failures} == {"code", "card"}


# ---- in one step


def test_without_second_names_files_are_copied(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no")

    said: list[str] = []
    monkeypatch.setattr(os, "link", refuse)
    assert refresh(out, notify=said.append) == ("README.md", "modeling_bam.py")
    assert any("no second name, so it is copied" in text for text in said)
    assert verify(out).ok


DRIVER = """
import os, signal, sys
from pathlib import Path
import bam_merge
from bam_merge.publishing.refresh import refresh
from bam_merge.checkpoints.provenance import read_manifest
from bam_merge.verifying.alone import folder_checks
import bam_merge.verifying.record, shutil
out, keep = Path(sys.argv[1]), Path(sys.argv[2])
EVENTS = ("os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "open", "os.listdir", "ctypes.dlsym", "os.truncate")
bam_merge.publishing.refresh
old = {p.name: p.read_bytes() for p in keep.iterdir()}
refreshed = 0
for number in range(10**6):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, arguments):
            global seen
            if event in EVENTS and armed:
                seen += 1
                if seen > number:
                    os.kill(os.getpid(), signal.SIGKILL)
        armed = False
        sys.addaudithook(hook)
        import bam_merge.publishing.refresh as module
        real = module._replace
        def replace(*arguments):
            global armed
            armed = True
            real(*arguments)
            armed = False
        module._replace = replace
        refresh(out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = {p.name: p.read_bytes() for p in out.iterdir()}
    bad = [c for c in folder_checks(out, read_manifest(out)) if c.ok is False]
    assert not bad, (number, bad)
    if found != old:
        refreshed += 1
        assert "refreshed" in read_manifest(out), number
    if status == 0:
        print(number, refreshed)
        break
    assert os.WIFSIGNALED(status), status
    shutil.rmtree(out)
    shutil.copytree(keep, out)
"""


def test_killed_anywhere_the_folder_is_the_old_one_or_the_new_one(out: Path) -> None:
    """At every call that makes, links, renames or deletes; what a killed run left does not disturb the next one."""
    keep = out.parent / "keep"
    shutil.copytree(out, keep)
    done = subprocess.run([sys.executable, "-c", DRIVER, str(out), str(keep)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, refreshed = map(int, done.stdout.split())
    assert killed > 20
    assert 1 < refreshed < killed, "some died before the folder was in its place, and some after"
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert verify(out).ok


def test_a_plan_by_headers_alone_is_made_again_of_folders(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--recipe may name models of the hub: they are downloaded before the card is made."""
    from bam_merge.planning.make import plan_file
    from bam_merge.planning.plan import Plan

    plan, asked = plan_file(out.parent / "recipe.yaml"), []

    def brought(recipe: Any) -> Any:
        asked.append(recipe)
        return recipe

    monkeypatch.setattr(Plan, "remotes", property(lambda self: {"seed": None} if self is plan else {}))
    monkeypatch.setattr("bam_merge.publishing.refresh.at_hand", brought)
    assert refresh(out, plan) == ("README.md", "modeling_bam.py")
    assert asked == [plan.recipe]


def test_a_full_disk_is_words_with_a_way_out_that_there_is(out: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """refresh has no --resume: it begins anew."""
    import bam_merge.publishing.refresh as module

    before = files(out)

    def full(path: Path, data: bytes, folder: int) -> None:
        with writing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_file", full)
    result = run("refresh", out)
    assert result.status == 2
    assert result.err.endswith("No space left on device. Free some space, then run again.\n")
    assert files(out) == before
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
