"""bam-merge calibrate: other routers in a mixture that is there; everything else byte for byte, and a manifest that stays true."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from proofs import UNPROVED, failed
from runs import Stop, folder_bytes, options
from safetensors.torch import load_file
from scenes import SOURCES, recipe, router, write_scene

from bam_merge import calibrate, load_model, merge, verify
from bam_merge.calibrating import sums
from bam_merge.errors import BamMergeError, VerificationFailed
from bam_merge.publishing import states
from bam_merge.publishing.mixtures import open_mixture, order_of
from bam_merge.recipe.load import load_recipe

LAYOUTS = {
    "bam": ("bam", "llama"),
    "mixtral": ("btx", "llama"),
    "qwen2_moe": ("btx", "qwen2"),
    "qwen3_moe": ("btx", "qwen3"),
    "granitemoe": ("btx", "granite"),
    "glm4_moe": ("btx", "llama"),
}
GATES = {"glm4_moe": "topk_then_sigmoid"}
SETTINGS = {"tokens": 300}


def given(folder: Path) -> dict[str, str]:
    return {name: str(folder / f"{name}.txt") for name in SOURCES}


def gates(layout: str) -> str:
    return f"ffn: {{top_k: 2, gate: {GATES.get(layout, 'topk_then_softmax')}}}"


def merged(folder: Path, layout: str = "bam", text: str | None = None) -> Path:
    method, family = LAYOUTS[layout]
    write_scene(folder, family)
    text = text or f"router: {{init: normal}}\n{gates(layout)}"
    return merge(load_recipe(recipe(folder, text, method=method, output=f"{{path: out, layout: {layout}}}")), options=UNPROVED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_gives_what_a_merge_with_these_routers_gives(layout: str, tmp_path: Path) -> None:
    """With the sources at hand: the seed's hidden states. Every file is that of the merge."""
    out = merged(tmp_path, layout)
    how, _ = options(verify=True)
    assert calibrate(out, given(tmp_path), settings=SETTINGS, options=how) == out
    assert verify(out).ok
    anew = folder_bytes(out)
    method, _ = LAYOUTS[layout]
    text = f"{router()}\n{gates(layout)}"
    other = merge(
        load_recipe(recipe(tmp_path, text, method=method, output=f"{{path: out, layout: {layout}}}")), options=options(force=True)[0]
    )
    found = folder_bytes(other)
    mine, theirs = (json.loads(files.pop("bam_merge.json")) for files in (anew, found))
    assert anew == found and {**mine, "manifest_digest": ""} == {**theirs, "manifest_digest": ""}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_sources_routers_are_for_the_mixtures_own_states(layout: str, tmp_path: Path) -> None:
    out = merged(tmp_path, layout)
    before = load_file(out / "model.safetensors")
    for name in SOURCES:
        (tmp_path / name).rename(tmp_path / f"{name}.away")
    how, said = options(verify=True)
    target = calibrate(out, given(tmp_path), tmp_path / "new", SETTINGS, how)
    assert any("the sources are not at hand" in line for line in said)
    after = load_file(target / "model.safetensors")
    routers = [name for name in before if "router" in name or (name.endswith("gate.weight") and "shared" not in name)]
    assert all(torch.equal(before[name], after[name]) is (name not in routers) for name in before)
    for name in SOURCES:
        (tmp_path / f"{name}.away").rename(tmp_path / name)
    report = verify(target)  # the manifest is that of a merge with inputs: mixture
    assert report.ok and {check.name: check.ok for check in report.checks}["calibration"]
    text = f"{router(inputs='mixture')}\n{gates(layout)}"
    method, _ = LAYOUTS[layout]
    other = merge(
        load_recipe(recipe(tmp_path, text, method=method, output=f"{{path: new, layout: {layout}}}")), options=options(force=True)[0]
    )
    assert folder_bytes(other)["model.safetensors"] == (target / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"])
def test_a_mixture_that_nobody_recorded(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = merged(tmp_path, layout)
    (out / "bam_merge.json").unlink()
    (out / "README.md").unlink()
    texts = {str(index): [str(tmp_path / f"{name}.txt")] for index, name in enumerate(SOURCES)}
    monkeypatch.chdir(tmp_path)
    mixture = open_mixture(out)
    order = order_of(mixture, {"init": "mean", "texts": texts}, tmp_path / "new")
    (corpus,) = order.corpora.values()
    assert [text.parts[0].name for text in corpus.texts.values()] == [f"{name}.txt" for name in SOURCES], "as they are called here"
    target = calibrate(out, texts, tmp_path / "new", {"tokens": 300, "init": "mean"}, options(verify=True)[0])
    assert not (target / "bam_merge.json").exists()
    before, after = load_model(out).state_dict(), load_model(target).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.mlp.router.weight" for layer in (0, 1)}


def test_rules_for_routers_give_way(tmp_path: Path) -> None:
    text = "ffn: {top_k: 2}\nrules: [{roles: ['router.*'], make: zeros}, {roles: [norm.*], make: copy, from: seed}]"
    out = calibrate(merged(tmp_path, text=text), given(tmp_path), settings=SETTINGS, options=options(verify=True)[0])
    said = json.loads((out / "bam_merge.json").read_text())["recipe"]
    assert [rule["make"] for rule in said["rules"]] == ["copy"] and said["router"]["ffn"]["init"] == "ridge"
    assert "made of texts" in (out / "README.md").read_text() and verify(out).ok


def test_again_and_again(tmp_path: Path) -> None:
    out = merged(tmp_path)
    calibrate(out, given(tmp_path), settings=SETTINGS, options=UNPROVED)
    first = folder_bytes(out)
    calibrate(out, given(tmp_path), settings={**SETTINGS, "lambda": 0.5}, options=UNPROVED)
    assert folder_bytes(out) != first
    calibrate(out, given(tmp_path), settings=SETTINGS, options=UNPROVED)
    assert folder_bytes(out) == first


def test_shards(tmp_path: Path) -> None:
    write_scene(tmp_path)
    text = "router: {init: normal}\nffn: {top_k: 2}"
    out = merge(load_recipe(recipe(tmp_path, text, output="{path: out, max_shard_size: 60kB}")), options=UNPROVED)
    calibrate(out, given(tmp_path), settings=SETTINGS, options=options(verify=True)[0])
    assert verify(out).ok


def test_the_command(tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    out = merged(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = run(
        "calibrate", "out", "--texts", "seed=seed.txt", "code=*ode.txt", "law=law.txt", "--output", "new", "--tokens", 300, "--lambda", 0.2
    )
    assert done.status == 0 and "routers made anew" in done.out and "verified: " in done.out and "go to the expert" in done.err
    said = json.loads((tmp_path / "new" / "bam_merge.json").read_text())["recipe"]
    assert (
        said["output"]["path"] == "new"
        and said["router"]["attention"]["lambda"] == 0.2
        and said["router"]["ffn"]["texts"]["code"] == ["*ode.txt"]
    )
    assert run("verify", "new").status == 0
    assert run("calibrate", "out", "--texts", "seed=seed.txt", "--output", "new").err.count("already exists") == 1
    assert "write NAME=FILE" in run("calibrate", "out", "--texts", "seed.txt").err
    assert "texts come after --texts" in run("calibrate", "out", "seed=seed.txt").err
    assert folder_bytes(out)["config.json"] == (tmp_path / "new" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("texts", "settings", "said"),
    [
        ({"seed": "seed.txt", "code": "code.txt", "lwa": "law.txt"}, {}, "texts: 'lwa' is no expert of"),
        ({"seed": "seed.txt", "code": "code.txt"}, {}, "nothing for law"),
        ({"seed": "seed.txt", "code": "code.txt", "law": "gone.txt"}, {}, "gone.txt: no such file or folder"),
        (None, {}, "is required and missing"),
        ({}, {"init": "normal"}, "init: 'normal' is none of ridge, mean"),
        ({"seed": "seed.txt", "code": "code.txt", "law": "law.txt"}, {"token": 3}, "router.attention.token: unknown key"),
        ({"seed": "law.txt", "code": "law.txt", "law": "law.txt"}, {}, "all texts are the same"),
    ],
)
def test_what_is_wrong_leaves_the_folder(texts: Any, settings: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = merged(tmp_path)
    before = folder_bytes(out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BamMergeError) as error:
        calibrate(out, texts, settings=settings)
    assert said in str(error.value)
    assert folder_bytes(out) == before and not (tmp_path / ".out.bam-merge").exists()


def test_a_dense_model_has_no_routers(tmp_path: Path) -> None:
    with pytest.raises(BamMergeError, match="a dense model, which has no routers"):
        calibrate(write_scene(tmp_path) / "seed", {"a": "x"})


def test_what_no_saver_writes_stays_where_it_is(tmp_path: Path) -> None:
    out = merged(tmp_path)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BamMergeError, match=r"notes\.txt"):
        calibrate(out, given(tmp_path), settings=SETTINGS, options=UNPROVED)
    how, said = options()
    calibrate(out, given(tmp_path), tmp_path / "new", SETTINGS, how)
    assert not (tmp_path / "new" / "notes.txt").exists() and any("notes.txt: not what a saved model has" in line for line in said)


@pytest.mark.parametrize("at_hand", [True, False])
def test_routers_that_are_wrong_are_not_published(at_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = merged(tmp_path)
    before = folder_bytes(out)
    if not at_hand:
        rmtree(tmp_path / "law")
    add = sums.Sums.add
    monkeypatch.setattr(sums.Sums, "add", lambda self, text, x_MD: add(self, (text + 1) % len(self.tokens), x_MD))
    with pytest.raises(VerificationFailed, match="calibration: "):
        calibrate(out, given(tmp_path), settings={"tokens": 300, "init": "mean"})
    assert folder_bytes(out) == before and (tmp_path / "out.failed").exists()


def test_it_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "SAVE_SECONDS", 0.0)
    out = merged(tmp_path)
    copytree(out, tmp_path / "copy")
    whole = folder_bytes(calibrate(out, given(tmp_path), tmp_path / "new", SETTINGS, options()[0]))
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise Stop

    with pytest.raises(Stop):
        calibrate(out, given(tmp_path), tmp_path / "new", SETTINGS, options(on_calibrate=stop, force=True)[0])
    assert len(seen) == 2
    seen.clear()
    again = calibrate(
        out,
        given(tmp_path),
        tmp_path / "new",
        SETTINGS,
        options(on_calibrate=lambda done, total: seen.append(done), resume=True, force=True)[0],
    )
    assert folder_bytes(again) == whole and len(seen) == 1
    assert not failed(verify(again))
