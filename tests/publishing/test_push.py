"""A result goes to the hub: whole, private, proved before and compared after; refused in words, and never with a token in them."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from conftest import CONFIGS, write_recipe, write_sources
from hub_models import TOKEN
from hub_models import hub as hub  # a fixture
from hub_server import FakeHub, Fault, Repo

import bam_merge
from bam_merge import BamMergeError, MergeOptions, OutputError, VerificationFailed, VerifyError, load_recipe, merge, push

QUICK = MergeOptions(verify="none")


@pytest.fixture
def acme(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub that a token may write to; files in chunks (xet) are not of it."""
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return hub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A result of several shards."""
    write_sources(tmp_path, CONFIGS["llama"])
    return merge(load_recipe(write_recipe(tmp_path, output="{path: out, max_shard_size: 60kB}")), options=QUICK)


def on_hub(fake: FakeHub, repo: str, ref: str = "main") -> dict[str, bytes]:
    """The files there."""
    found = fake.repos[repo]
    return {name: item.data for name, item in found.commits[found.refs[ref]].items()}


def here(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_there_whole_and_private(acme: FakeHub, out: Path, run: Any) -> None:
    result = run("push", out, "acme/mix")
    assert result.status == 0, result.err
    files = on_hub(acme, "acme/mix")
    assert files.pop(".gitattributes")
    assert files == here(out)
    repo = acme.repos["acme/mix"]
    assert repo.private
    assert result.out == f"acme/mix@{repo.refs['main']}: {len(files)} files, private, on branch main\n"
    assert len(acme.committed) == 1
    assert TOKEN not in result.out + result.err and "X-Signature" not in result.err


def test_what_was_pushed_is_a_model_of_the_hub_and_proves_itself(acme: FakeHub, out: Path) -> None:
    done = push(out, "acme/mix", public=True, message="First")
    assert (done.repo, done.revision, done.private) == ("acme/mix", "main", False)
    assert acme.committed[0]["summary"] == "First"
    assert bam_merge.verify(done.place).ok
    assert not acme.repos["acme/mix"].private


def test_the_command_in_a_process_of_its_own(out: Path, tmp_path: Path) -> None:
    """Where nothing else has imported the library's parts."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {**kept, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "bam_merge", "push", str(out), "acme/mix"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: acme/mix: nobody is logged in here, and a push needs a token that may write.")


def test_a_branch(acme: FakeHub, out: Path) -> None:
    push(out, "acme/mix", revision="trial/one")
    assert set(on_hub(acme, "acme/mix")) == {".gitattributes"}
    assert here(out).items() <= on_hub(acme, "acme/mix", "trial/one").items()
    push(out, "acme/mix", revision="trial/one")  # which is there now, and has all this
    assert len(acme.committed) == 1


def test_a_push_that_broke_off_goes_on(acme: FakeHub, out: Path, run: Any) -> None:
    shards = len(list(out.glob("*.safetensors")))
    assert shards > 2
    acme.faults = [Fault("X-Signature", times=10**9, status=500, method="PUT")]
    first = run("push", out, "acme/mix")
    assert first.status == 2
    assert "the hub has a fault of its own (it answers 500). Run again; what was uploaded is kept" in first.err
    assert set(on_hub(acme, "acme/mix")) == {".gitattributes"}, "nothing half made"
    acme.faults = [Fault(r"/commit/", times=1, status=503, method="POST")]
    assert run("push", out, "acme/mix").status == 2
    sent = len(acme.asked("X-Signature", "PUT"))
    acme.faults = []
    assert run("push", out, "acme/mix").status == 0
    assert len(acme.asked("X-Signature", "PUT")) == sent, "what was uploaded is not sent again"
    assert here(out).items() <= on_hub(acme, "acme/mix").items()


def test_an_earlier_result_is_replaced_and_other_files_stay(acme: FakeHub, out: Path, run: Any) -> None:
    run("push", out, "acme/mix")
    repo = acme.repos["acme/mix"]
    repo.commit({**repo.commits[repo.refs["main"]], "LICENSE": b"ours"})
    one = merge(load_recipe(write_recipe(out.parent, output="{path: one}")), options=QUICK)
    result = run("push", one, "acme/mix")
    assert result.status == 0, result.err
    assert set(on_hub(acme, "acme/mix")) == {*here(one), ".gitattributes", "LICENSE"}
    assert "of what was there before, removed" in result.err
    assert "LICENSE: there before, and not of this folder; kept" in result.err


def test_somebody_elses_model_is_not_replaced(acme: FakeHub, out: Path) -> None:
    acme.repos["acme/llama"] = Repo(private=True)
    before = acme.repos["acme/llama"].commit({"config.json": b"{}", "model.safetensors": b"theirs"})
    with pytest.raises(OutputError, match=r"acme/llama: there is a model on the hub that bam-merge did not make \(model.safetensors\)"):
        push(out, "acme/llama")
    assert acme.repos["acme/llama"].refs["main"] == before


def test_a_public_model_takes_public(acme: FakeHub, out: Path, run: Any) -> None:
    push(out, "acme/mix", public=True)
    refused = run("push", out, "acme/mix")
    assert (refused.status, "this model is public on the hub. If that is meant, push with --public" in refused.err) == (2, True)
    assert run("push", out, "acme/mix", "--public").status == 0
    push(out, "acme/other")
    result = run("push", out, "acme/other", "--public")
    assert "this model is private on the hub, and stays so" in result.err
    assert acme.repos["acme/other"].private


# ---- what is refused before the hub is asked


def damage(out: Path, name: str, data: bytes) -> None:
    (out / name).write_bytes(data)


@pytest.mark.parametrize(("change", "words"), [
    (lambda out: damage(out, "README.md", b"---\n"), "files: README.md is not as it was written"),
    (lambda out: damage(out, "extra.safetensors", b"x"), "extra.safetensors: not of this merge"),
    (lambda out: damage(out, "modeling_bam.py", b"import os\n"), "modeling_bam.py is not the model code"),
    (lambda out: damage(out, "token.txt", b"hf_x"), "token.txt: not of this merge"),
    (lambda out: (lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])))(out / "model-00002-of-00004.safetensors"), "digests: "),
    (lambda out: (out / "model-00002-of-00004.safetensors").unlink(), "headers: "),
    (lambda out: (lambda p: p.write_text(p.read_text().replace('"total": ', '"total": 1')))(out / "bam_merge.json"), "not as it was written"),
])  # fmt: skip
def test_what_verify_refuses_is_not_pushed(change: Any, words: str, acme: FakeHub, out: Path, run: Any) -> None:
    change(out)
    result = run("push", out, "acme/mix")
    assert result.status in (1, 2)
    assert words in result.err, result.err
    assert acme.requests == []


def test_what_is_no_result_is_not_pushed(acme: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    for folder, words in ((tmp_path / "notes", "no bam_merge.json"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(VerifyError, match=words):
            push(folder, "acme/mix")
    write_sources(tmp_path, CONFIGS["llama"])
    config = tmp_path / "seed" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"unheard_of"'))
    with pytest.raises(VerifyError, match="model_type 'unheard_of' is of no family or layout that is known here"):
        push(tmp_path / "seed", "acme/mix")
    assert acme.requests == []


def test_a_saved_model_of_a_known_kind_is_pushed(acme: FakeHub, out: Path, run: Any) -> None:
    """A mixture that was trained on has no manifest, and leftovers of the trainer stay here."""
    saved = out.parent / "trained"
    shutil.copytree(out, saved)
    (saved / "bam_merge.json").unlink()
    (saved / "training_args.bin").write_bytes(b"\x80")
    (saved / "checkpoint-5").mkdir()
    result = run("push", saved, "acme/trained")
    assert result.status == 0, result.err
    assert "no bam_merge.json: nothing proves how this model was made" in result.err
    assert "not pushed: checkpoint-5, training_args.bin" in result.err
    assert set(on_hub(acme, "acme/trained")) == {*here(out), ".gitattributes"} - {"bam_merge.json"}
    (saved / "modeling_bam.py").write_text("import os")
    with pytest.raises(VerifyError, match=r"modeling_bam\.py is not model code of this bam-merge"):
        push(saved, "acme/trained")


def test_nan_is_not_pushed(acme: FakeHub, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_sources(tmp_path, CONFIGS["llama"])
    tensors = load_file(tmp_path / "seed" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "seed" / "model.safetensors")
    with pytest.raises(OutputError, match=r"model\.norm\.weight: NaN or infinite values"):
        push(tmp_path / "seed", "acme/mix")
    assert acme.requests == []


@pytest.mark.parametrize(("repo", "revision", "words"), [
    ("mix", None, "no name of a model on the hub. Write org/name"),
    ("a/b/c", None, "no name of a model on the hub"),
    ("acme/mix@main", None, "write the branch as --revision main"),
    ("https://user:hf_secret@huggingface.co/acme/mix/resolve/x", None, "an address of the web"),
    ("acme/mix", "a..b", "is no name of a branch"),
    ("acme/mix", "0" * 40, "is no name of a branch"),
    ("acme/mix", "refs/pr/1", "is no name of a branch"),
    ("acme/mix", "", "is no name of a branch"),
])  # fmt: skip
def test_names(repo: str, revision: str | None, words: str, acme: FakeHub, out: Path) -> None:
    with pytest.raises(BamMergeError, match=re.escape(words)) as caught:
        push(out, repo, revision=revision)
    assert "hf_secret" not in str(caught.value)
    assert acme.requests == []


# ---- what the hub refuses


REFUSALS = {
    "model": ("GET", r"/api/models/acme/mix"),
    "create": ("POST", r"/api/repos/create"),
    "preupload": ("POST", r"/preupload/"),
    "batch": ("POST", r"/objects/batch"),
    "store": ("PUT", r"X-Signature"),
    "commit": ("POST", r"/commit/"),
    "tree": ("GET", r"/tree/"),
}
WORDS = {
    401: "(401). Log in again",
    403: "(403): the token in use may not write",
    404: "(404)",
    409: "(409)",
    413: "(413)",
    429: "too many requests",
    500: "answers 500",
    503: "answers 503",
}


@pytest.mark.parametrize("status", WORDS)
@pytest.mark.parametrize("place", REFUSALS)
def test_refusals_are_words(place: str, status: int, acme: FakeHub, out: Path, run: Any) -> None:
    method, pattern = REFUSALS[place]
    acme.faults = [Fault(pattern, status=status, method=method, headers={"x-error-message": f"token {TOKEN}"})]
    result = run("push", out, "acme/mix")
    assert result.status == 2, result.err
    assert result.out == ""
    assert result.err.count("error:") == 1
    assert "acme/mix: " in result.err
    assert WORDS[status].replace("(409)", "409") in result.err, result.err
    for secret in (TOKEN, "X-Signature", "Traceback", acme.store):
        assert secret not in result.err


@pytest.mark.parametrize("place", REFUSALS)
def test_a_cut_connection_is_words(place: str, acme: FakeHub, out: Path, run: Any) -> None:
    method, pattern = REFUSALS[place]
    acme.faults = [Fault(pattern, reset=True, cut=0, method=method)]
    result = run("push", out, "acme/mix")
    assert result.status == 2, result.err
    assert "broke off. Is the network up? Run again; what was uploaded is kept by the hub" in result.err, result.err
    for secret in (TOKEN, "X-Signature", "Traceback", acme.store):
        assert secret not in result.err


def test_without_a_token_nothing_is_asked(acme: FakeHub, out: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = run("push", out, "acme/mix")
    assert (result.status, acme.requests) == (2, [])
    assert "nobody is logged in here, and a push needs a token that may write" in result.err


def test_offline_nothing_is_asked(acme: FakeHub, out: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = run("push", out, "acme/mix")
    assert (result.status, acme.requests) == (2, [])
    assert "HF_HUB_OFFLINE is set" in result.err


def test_without_the_package(out: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = run("push", out, "acme/mix")
    assert result.status == 2
    assert "pip install 'bam-merge[hub]'" in result.err


def test_an_account_that_is_not_ours(acme: FakeHub, out: Path, run: Any) -> None:
    result = run("push", out, "others/mix")
    assert (result.status, "the token in use may not write to others" in result.err) == (2, True)


def test_somebody_pushed_meanwhile(acme: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = huggingface_hub.HfApi.preupload_lfs_files

    def race(self: Any, *args: Any, **more: Any) -> Any:
        repo = acme.repos["acme/mix"]
        repo.commit({"theirs": b"x"})
        return real(self, *args, **more)

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", race)
    with pytest.raises(OutputError, match="somebody else changed this model meanwhile"):
        push(out, "acme/mix")
    assert set(on_hub(acme, "acme/mix")) == {"theirs"}


def test_what_the_hub_has_then_is_compared(acme: FakeHub, out: Path) -> None:
    acme.faults = [Fault("X-Signature", times=1, spoil=lambda data: data[:-1] + b"x", method="PUT")]
    with pytest.raises(
        OutputError,
        match=r"what the hub now has is not what was sent: (model-0000\d-of-00004\.safetensors|(modeling|configuration)_bam\.py)\.",
    ):
        push(out, "acme/mix")


def test_the_library_is_as_loud_as_before(acme: FakeHub, out: Path) -> None:
    logger = logging.getLogger("huggingface_hub")
    before = logger.level, huggingface_hub.utils.are_progress_bars_disabled()
    with pytest.raises(VerificationFailed):
        damage(out, "README.md", b"x")
        push(out, "acme/mix")
    assert (logger.level, huggingface_hub.utils.are_progress_bars_disabled()) == before
    assert json.loads((out / "bam_merge.json").read_text())["tool"] == "bam-merge"
