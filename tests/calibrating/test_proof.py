"""What verification notices of routers from texts: by its own pass, and by the bytes of the texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from proofs import UNPROVED, Forger, failed
from scenes import SOURCES, recipe, router, texts, write_scene, write_texts

from bam_merge import VerificationFailed, merge, verify
from bam_merge.calibrating import rows as rules
from bam_merge.calibrating import stage
from bam_merge.recipe.load import load_recipe

A0, A1 = "model.layers.0.self_attn.router.weight", "model.layers.1.self_attn.router.weight"
F0, F1 = "model.layers.0.mlp.router.weight", "model.layers.1.mlp.router.weight"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_scene(tmp_path_factory.mktemp("scene"))
    merge(load_recipe(recipe(folder)), options=UNPROVED)
    return folder


@pytest.fixture
def forge(scene: Path, tmp_path: Path) -> Forger:
    """A copy of the merge beside its sources, as it stands after the run."""
    from shutil import copytree

    copytree(scene, tmp_path / "scene")
    return Forger(tmp_path / "scene" / "out")


FORGERIES: dict[str, Callable[[Forger], None]] = {
    "two rows exchanged": lambda forge: forge.write(A1, forge.read(A1)[[1, 0, 2]]),
    "scaled by 1.01": lambda forge: forge.write(F0, forge.read(F0) * 1.01),
    "negated": lambda forge: forge.write(F1, -forge.read(F1)),
    "two layers exchanged": lambda forge: forge.swap(F0, F1),
    "two routers exchanged": lambda forge: forge.swap(A0, F0),
    "one row of zeros": lambda forge: forge.write(A0, torch.cat((forge.read(A0)[:2], torch.zeros(1, 32)))),
    "a constant in every row": lambda forge: forge.write(A0, forge.read(A0) + 0.01 * forge.read(A0).abs().max()),
    "one number": lambda forge: forge.write(A1, forge.read(A1).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(0.5))),
    "not a number": lambda forge: forge.write(A1, forge.read(A1).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(float("nan")))),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_router_that_does_not_follow_from_the_texts(what: str, forge: Forger) -> None:
    FORGERIES[what](forge)
    found = failed(verify(forge.folder))
    assert "router.weight" in found["calibration"] and "expected ridge(seed, code, law; tokens=300" in found["calibration"]


def test_what_is_not_touched_passes(forge: Forger) -> None:
    report = verify(forge.folder)
    assert report.ok and {check.name for check in report.checks} >= {"texts", "calibration", "accuracy"}
    assert all(check.ok for check in report.checks if check.name in ("texts", "calibration", "accuracy"))


def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Forger], None]:
    return lambda forge: forge.record(lambda manifest: change(manifest["calibration"]))


RECORDS: dict[str, tuple[Callable[[Forger], None], str]] = {
    "a better accuracy": (record(lambda said: said["accuracy"][A0].update(tokens=1.0, windows=1.0)), "accuracy"),
    "a router left out": (record(lambda said: said["accuracy"].pop(A0)), "accuracy"),
    "a router more": (record(lambda said: said["accuracy"].update({"x": {"tokens": 1, "windows": 1}})), "accuracy"),
    "other tokens": (record(lambda said: said["texts"]["router.ffn"]["texts"]["law"].update(tokens=8192)), "texts"),
    "another digest": (record(lambda said: said["texts"]["router.ffn"]["texts"]["law"].update(digest="0" * 32)), "texts"),
    "no record": (lambda forge: forge.record(lambda manifest: manifest.pop("calibration")), "provenance"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_is_not_true(what: str, forge: Forger) -> None:
    change, check = RECORDS[what]
    change(forge)
    assert check in failed(verify(forge.folder))


@pytest.mark.parametrize("damage", [[], {"texts": {}}, {"texts": {"router": {}}, "accuracy": {}}, {"texts": {}, "accuracy": {"x": 1}}])
def test_a_record_of_another_form_is_damage(damage: Any, forge: Forger) -> None:
    from bam_merge import VerifyError

    forge.record(lambda manifest: manifest.update(calibration=damage))
    with pytest.raises(VerifyError, match="calibration missing or damaged"):
        verify(forge.folder)


def test_texts_that_changed_or_are_gone_leave_digests(forge: Forger) -> None:
    home = forge.folder.parent
    (home / "law.txt").unlink()
    report = verify(forge.folder)
    (check,) = (check for check in report.checks if check.name == "calibration")
    assert report.ok and check.ok is None and "law.txt" in check.detail
    write_texts(home, ("law",), 610)
    (home / "law.txt").write_text("abc abc abc " * 100)
    found = failed(verify(forge.folder))
    assert "tokens, bytes or digests differ" in found["texts"]


WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def wrong(function: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    WRONG[function.__name__] = function
    return function


@wrong
def a_text_for_another(patch: pytest.MonkeyPatch) -> None:
    made = stage._Collected._names
    patch.setattr(stage._Collected, "_names", lambda self, site: made(self, site)[::-1])


@wrong
def first_tokens_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stage, "counted", lambda x_BTD: x_BTD[:, :-1].flatten(0, 1))


@wrong
def another_lambda(patch: pytest.MonkeyPatch) -> None:
    solved = rules._solved
    patch.setattr(rules, "_solved", lambda matrix, added, right: solved(matrix, 1.1 * added, right))


@wrong
def texts_that_count_by_their_length(patch: pytest.MonkeyPatch) -> None:
    from bam_merge.calibrating.sums import Sums

    patch.setattr(Sums, "weight", lambda self, text: 1 / sum(self.tokens))


@wrong
def the_layer_after(patch: pytest.MonkeyPatch) -> None:
    block = stage.streamed_block
    patch.setattr(stage, "streamed_block", lambda model, layer, computing: block(model, 1 - layer, computing))


@wrong
def the_input_of_the_other_router(patch: pytest.MonkeyPatch) -> None:
    advanced = stage.advanced

    def exchanged(block: Any, batch: Any) -> Any:
        hidden, seen = advanced(block, batch)
        return hidden, dict(zip(seen, reversed(seen.values()), strict=True))

    patch.setattr(stage, "advanced", exchanged)


@pytest.mark.parametrize("tokens", [300, 16])
@pytest.mark.parametrize("what", WRONG)
def test_a_pass_that_goes_wrong_is_not_published(what: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(write_scene(tmp_path), f"router: {{init: ridge, texts: {texts()}, tokens: {tokens}}}")
    (tmp_path / "law.txt").write_text("ghc " * 3)
    WRONG[what](monkeypatch)
    with pytest.raises(VerificationFailed) as error:
        merge(load_recipe(path))
    assert any(problem.startswith("calibration: ") for problem in error.value.problems)
    assert not (tmp_path / "out").exists()


def test_a_mixture_that_takes_the_seeds_inputs_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(write_scene(tmp_path), router(inputs="mixture"))
    make = stage._Pass._of_seed
    monkeypatch.setattr(stage._Pass, "_of_mixture", make)  # FFN routers before the attention's are there
    with pytest.raises(VerificationFailed, match="calibration: "):
        merge(load_recipe(path))


def test_the_manifest_is_the_same_from_anywhere(scene: Path) -> None:
    said = json.loads((scene / "out" / "bam_merge.json").read_text())
    assert str(scene) not in json.dumps(said)
    assert said["recipe"]["router"]["ffn"]["scale"] == 6 and said["recipe"]["router"]["ffn"]["texts"] == {
        name: f"{name}.txt" for name in SOURCES
    }
