"""A pass over texts that is killed goes on where it was, with the same bytes in the end; what it kept is believed as far as its digest."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS
from runs import Stop, folder_bytes, options
from scenes import recipe, router, write_scene, write_texts

from bam_merge import MergeOptions
from bam_merge.calibrating import stage
from bam_merge.errors import OutputError
from bam_merge.planning.make import plan_file
from bam_merge.publishing import states
from bam_merge.publishing.publish import publish

CONFIG = {**CONFIGS["llama"], "num_hidden_layers": 4}


@pytest.fixture(autouse=True)
def keep_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "SAVE_SECONDS", 0.0)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were run, in order."""
    ran: list[int] = []
    block = stage.streamed_block

    def run(model: Any, layer: int, computing: Any) -> Any:
        ran.append(layer)
        return block(model, layer, computing)

    monkeypatch.setattr(stage, "streamed_block", run)
    return ran


def stopped_after(layer: int) -> MergeOptions:
    def stop(done: int, total: int) -> None:
        if done * 4 > layer * total:
            raise Stop

    return options(on_calibrate=stop)[0]


MIXED = "router: {{attention: {}, ffn: {}}}"


@pytest.mark.parametrize("inputs", ["seed", "mixture"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_it_goes_on_after_the_last_layer_that_was_kept(inputs: str, layer: int, tmp_path: Path, layers: list[int]) -> None:
    plan = plan_file(recipe(write_scene(tmp_path, CONFIG), router(inputs=inputs)))
    whole = folder_bytes(publish(plan, tmp_path / "whole", options()[0]))
    layers.clear()
    with pytest.raises(Stop):
        publish(plan, None, stopped_after(layer))
    assert layers == list(range(layer + 1))
    layers.clear()
    assert folder_bytes(publish(plan, None, options(resume=True, verify=True)[0])) == whole
    assert layers == list(range(layer, 4))
    assert not (tmp_path / ".out.bam-merge").exists()


def test_one_router_of_the_seeds_inputs_and_one_of_the_mixtures(tmp_path: Path, layers: list[int]) -> None:
    ffn = router(inputs="mixture").removeprefix("router: ")
    text = MIXED.format(router().removeprefix("router: "), ffn)
    plan = plan_file(recipe(write_scene(tmp_path, CONFIG), text))
    whole = folder_bytes(publish(plan, tmp_path / "whole", options(verify=True)[0]))
    assert layers == [0, 1, 2, 3] * 2
    ran = 0

    def stop(done: int, total: int) -> None:
        nonlocal ran
        ran += 1
        if ran == 6:
            raise Stop

    with pytest.raises(Stop):
        publish(plan, None, options(on_calibrate=stop)[0])
    layers.clear()
    assert folder_bytes(publish(plan, None, options(resume=True)[0])) == whole
    assert layers == [1, 2, 3]


def test_nothing_is_run_again_when_the_routers_were_made(tmp_path: Path, layers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_file(recipe(write_scene(tmp_path, CONFIG)))
    whole = folder_bytes(publish(plan, tmp_path / "whole", options()[0]))
    import bam_merge.publishing.publish as publishing

    def fail(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(publishing, "write_companions", fail)
        publish(plan, None, options()[0])
    layers.clear()
    assert folder_bytes(publish(plan, None, options(resume=True)[0])) == whole
    assert layers == []


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "garbage"])
def test_what_was_kept_and_is_damaged_is_made_again(damage: str, tmp_path: Path, layers: list[int]) -> None:
    plan = plan_file(recipe(write_scene(tmp_path, CONFIG)))
    whole = folder_bytes(publish(plan, tmp_path / "whole", options()[0]))
    with pytest.raises(Stop):
        publish(plan, None, stopped_after(2))
    kept = tmp_path / ".out.bam-merge" / "states"
    data = bytearray(kept.read_bytes())
    data[-5] ^= 4
    kept.write_bytes({"a bit": bytes(data), "cut": bytes(data[:-9]), "empty": b"", "garbage": b"x" * 100}[damage])
    layers.clear()
    assert folder_bytes(publish(plan, None, options(resume=True)[0])) == whole
    assert layers == [0, 1, 2, 3]


def test_another_text_is_another_plan(tmp_path: Path, layers: list[int]) -> None:
    path = recipe(write_scene(tmp_path, CONFIG))
    with pytest.raises(Stop):
        publish(plan_file(path), None, stopped_after(2))
    write_texts(tmp_path, ("law",), 601)
    (tmp_path / "law.txt").write_text("abcd efgh " * 60)
    layers.clear()
    how, said = options(resume=True, verify=True)
    out = publish(plan_file(path), None, how)
    assert layers == [0, 1, 2, 3] and any("of another recipe, version or set of sources" in line for line in said)
    assert folder_bytes(out) == folder_bytes(publish(plan_file(path), tmp_path / "whole", options()[0]))


def test_a_finished_result_of_other_texts_is_not_this_plans(tmp_path: Path, layers: list[int]) -> None:
    path = recipe(write_scene(tmp_path, CONFIG))
    publish(plan_file(path), None, options()[0])
    layers.clear()
    how, said = options(resume=True)
    publish(plan_file(path), None, how)
    assert layers == [] and any("already finished" in line for line in said)
    (tmp_path / "law.txt").write_text("abcd efgh " * 60)
    with pytest.raises(OutputError, match="already exists"):
        publish(plan_file(path), None, options(resume=True)[0])


def test_a_new_run_forgets_what_was_kept(tmp_path: Path, layers: list[int]) -> None:
    plan = plan_file(recipe(write_scene(tmp_path, CONFIG)))
    with pytest.raises(Stop):
        publish(plan, None, stopped_after(2))
    layers.clear()
    publish(plan, None, options()[0])
    assert layers == [0, 1, 2, 3]


KILLED = """
import os, signal, sys
from bam_merge import MergeOptions
from bam_merge.planning.make import plan_file
from bam_merge.publishing import states
from bam_merge.publishing.publish import publish
states.SAVE_SECONDS = 0.0
seen = []
def kill(done, total):
    seen.append(done)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
publish(plan_file(sys.argv[1]), None, MergeOptions(verify=False, on_calibrate=kill))
"""


def test_kill_9_in_the_middle(tmp_path: Path, layers: list[int]) -> None:
    path = recipe(write_scene(tmp_path, CONFIG))
    whole = folder_bytes(publish(plan_file(path), tmp_path / "whole", options()[0]))
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], env={**os.environ}, timeout=300)
    assert ended.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    layers.clear()
    assert folder_bytes(publish(plan_file(path), None, options(resume=True)[0])) == whole
    assert layers == [2, 3]
