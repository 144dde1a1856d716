"""Everything that is computed, is computed on the device that was asked for.

Few machines that run these tests have one. So a device is made up: a kind of tensor that says it is on it, refuses to be computed with
together with what is not, as a device does, and is computed on the CPU. It has no way back but .cpu() and reading a number.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED, failed
from runs import RECIPES, small_scene
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from bam_merge import MergeOptions, merge
from bam_merge.errors import VerifyError
from bam_merge.model.routes import run_texts
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe
from bam_merge.system import available_processors
from bam_merge.verifying import verification
from bam_merge.verifying.options import VerifyOptions
from bam_merge.verifying.verification import verify

ELSEWHERE = torch.device("xla:0")  # any that no build of torch for tests has


class Elsewhere(Tensor):
    """A tensor on the made-up device."""

    device = ELSEWHERE

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        mixed = [leaf for leaf in tensors if not isinstance(leaf, Elsewhere) and leaf.dim()]
        moves = name == "to"
        assert not mixed or moves, f"{name} of tensors on two devices"
        if any(leaf == torch.device("cpu") for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.device)):
            return func(*tree_map(plain, args), **tree_map(plain, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        return result if name in ("cpu", "tolist", "item", "numpy") else tree_map(wrapped, result)


def bare(value: Any) -> Any:
    """Without the made-up device in it: what is really computed."""
    if isinstance(value, Elsewhere):
        return value.as_subclass(Tensor)
    return torch.device("cpu") if value == ELSEWHERE and isinstance(value, torch.device) else value


def plain(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    return value


def wrapped(value: Any) -> Any:
    return value.as_subclass(Elsewhere) if type(value) is Tensor else value


class Factories(TorchFunctionMode):
    """Tensors that are made on the made-up device, or moved to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(leaf, torch.device) and leaf == ELSEWHERE for leaf in tree_flatten((args, kwargs))[0])
        if there and not any(isinstance(leaf, Elsewhere) for leaf in tree_flatten((args, kwargs))[0]):
            return tree_map(wrapped, func(*tree_map(bare, args), **tree_map(bare, kwargs)))
        return func(*args, **kwargs)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device is there, in all threads, and is looked at when a verification ends: something was computed on it."""
    from bam_merge.model import streaming
    from bam_merge.verifying import probes

    real = streaming.Computing.taken
    seen = []

    def taken(self: streaming.Computing, x: Tensor) -> Tensor:
        assert self.device == ELSEWHERE
        with torch._C.DisableTorchFunctionSubclass():
            inner = x.as_subclass(Tensor).to(self.dtype)
        return inner.as_subclass(Elsewhere)

    def head(*args: Any) -> Tensor:
        logits = streaming.streamed_head(*args)
        seen.append(type(logits))
        return logits

    assert real is not taken
    monkeypatch.setattr(streaming.Computing, "taken", taken)
    monkeypatch.setattr(probes, "streamed_head", head)
    monkeypatch.setattr(verification, "open_device", lambda name: ELSEWHERE)
    with Factories():
        yield
    assert seen and set(seen) == {Elsewhere}


@contextmanager
def nothing() -> Iterator[None]:
    yield


WAYS = {
    "expert kv": ("bam", "llama", ""),
    "shared kv, biases, top-k": ("bam", "qwen2", "attention: {kv: shared, routing: top_k, top_k: 2}"),
    "layer norms, parallel": ("bam", "gpt_neox", ""),
    "interleaved": ("bam", "cohere", ""),
    "btx": ("btx", "qwen3", ""),
    "dense": ("merge", "mistral", ""),
}


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_computed_elsewhere(way: str, level: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    method, family, sections = WAYS[way]
    write_sources(tmp_path, CONFIGS[family])
    plan = plan_file(write_recipe(tmp_path, sections, method))
    folder = publish(plan, None, UNPROVED)
    on_cpu = verify(folder, plan, options=VerifyOptions(level))
    request.getfixturevalue("made_up")
    report = verify(folder, plan, options=VerifyOptions(level, "elsewhere"))
    assert report.ok, failed(report)
    values = [[(check.name, check.value) for check in found.checks] for found in (on_cpu, report)]
    assert values[0] == values[1] and on_cpu.routing == report.routing


def test_perplexities_too(tmp_path: Path, made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    ids = {Path("text"): torch.arange(32).view(2, 16) % 30}
    monkeypatch.setattr(verification, "read_texts", lambda *args: ids)
    found = verify(folder, plan, options=VerifyOptions(device="elsewhere")).perplexity[0]["perplexity"]
    assert set(found) == {"seed", "code", "law", "average", "merged"}
    assert all(1 < value < 1e6 for value in found.values())


@pytest.mark.parametrize(("name", "why"), [("gpu", "gpu"), ("cuda:97", "cuda"), ("", "")])
def test_a_device_that_is_not_there(name: str, why: str, llamas: Path, run: Any) -> None:
    """Said before anything is merged."""
    if name.startswith("cuda") and torch.cuda.device_count() > 97:
        pytest.skip("this machine has it")
    recipe = write_recipe(llamas)
    result = run(recipe, "--device", name)
    assert result.status == 2
    assert f"device {name!r} cannot be used: " in result.err and "Devices here: cpu" in result.err
    assert not (llamas / "out").exists() and not list(llamas.glob(".out*"))
    folder = publish(plan_file(recipe), None, MergeOptions(verify="none"))
    with pytest.raises(VerifyError, match="cannot be used"):
        verify(folder, options=VerifyOptions(device=name))


def test_the_command_takes_level_and_device(llamas: Path, run: Any) -> None:
    recipe = write_recipe(llamas)
    assert "verifying, full" in run(recipe, "--verify", "full", "--device", "cpu").err
    document = json.loads(run("verify", llamas / "out", "--verify", "full", "--device", "cpu", "--json").out)
    assert document["level"] == "full" and document["ok"]
    assert all(type(check["seconds"]) is float for check in document["checks"])
    assert sum(check["seconds"] for check in document["checks"]) > 0
    for option in (["--no-verify"], ["--verify", "none"]):
        assert "verifying" not in run(recipe, "--force", *option).err
    assert run(recipe, "--force", "--verify", "deep").status == 2


@pytest.mark.parametrize(("threads", "most", "expected"), [("1", None, 1), ("2", 1, 1), ("3", 64, 3)])
def test_the_threads_that_were_asked_for(threads: str, most: int | None, expected: int) -> None:
    """OMP_NUM_THREADS says how many at most, and so does the caller; processors are the bound."""
    code = f"from bam_merge.verifying.devices import torch_workers; print(torch_workers({most}))"
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == min(expected, available_processors())


def test_while_it_computes_torch_starts_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no thread, so that none spins beside others; afterwards torch has what it had."""
    from bam_merge.model import streaming

    seen: set[tuple[bool, int]] = set()
    real = streaming.Computing.taken

    def taken(self: streaming.Computing, x: Tensor) -> Tensor:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return real(self, x)

    monkeypatch.setattr(streaming.Computing, "taken", taken)
    monkeypatch.setattr(streaming, "CHUNK_ELEMENTS", 64)
    write_sources(tmp_path, CONFIGS["llama"])
    folder = publish(plan_file(write_recipe(tmp_path)), None, UNPROVED)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert verify(folder).ok
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {(True, 1), (False, 1)}


def test_work_adds_up(tmp_path: Path) -> None:
    """Done never goes down or beyond the whole, and is the whole at the end."""
    write_sources(tmp_path, CONFIGS["llama"])
    folder = publish(plan_file(write_recipe(tmp_path)), None, UNPROVED)
    for level in ("quick", "full"):
        told: list[tuple[int, int]] = []
        assert verify(folder, options=VerifyOptions(level, progress=lambda done, total, told=told: told.append((done, total)))).ok
        done = [one for one, _ in told]
        assert len(told) > 20 and done == sorted(done)
        assert {total for _, total in told} == {done[-1]}


def test_work_has_a_share_for_texts_that_a_mixture_is_tried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that not all counts as done while they take their minutes."""
    (recipe,) = (path for path in RECIPES if path.stem == "bam_untrained")
    told: list[tuple[int, int]] = []
    before: list[float] = []

    def run(*args: Any, **named: Any) -> Any:
        before.append(told[-1][0] / told[-1][1])
        return run_texts(*args, **named)

    monkeypatch.setattr("bam_merge.verifying.perplexity.run_texts", run)
    merge(
        load_recipe(small_scene(recipe, tmp_path)), tmp_path / "out", MergeOptions(on_verify=lambda done, total: told.append((done, total)))
    )
    done = [one for one, _ in told]
    assert done == sorted(done) and {total for _, total in told} == {done[-1]}
    assert len(before) == 7 and before == sorted(before), "four models, their average, and the mixture twice"
    assert before[0] < 0.99 and len({*before}) == 7
