"""Verification opens the result once, and each source once for plan and proof; what changes meanwhile is noticed all the same."""

import builtins
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe, write_sources
from proofs import SQUARE, UNPROVED, failed

from bam_merge.checkpoints import header
from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying import conversion, function, verification
from bam_merge.verifying.verification import verify


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight file's header is read, and each config.json opened, by what is above it and their names.

    The slow path reads tensors through the safetensors library, which opens files by its own ways: that is what it is for.
    """
    counts: Counter[str] = Counter()

    def count(path: object) -> None:
        if isinstance(path, str | os.PathLike) and Path(path).name == "config.json":
            counts[f"{Path(path).parent.name}/config.json"] += 1

    real_header, real_os, real_open = header._header_bytes, os.open, builtins.open

    def read(descriptor: int, path: str, *rest: Any) -> bytes:
        counts[f"{Path(path).parent.name}/{Path(path).name}"] += 1
        return real_header(descriptor, path, *rest)

    def os_open(path: Any, *args: Any, **options: Any) -> int:
        count(path)
        return real_os(path, *args, **options)

    def opened(file: Any, *args: Any, **options: Any) -> Any:
        count(file)
        return real_open(file, *args, **options)

    monkeypatch.setattr(header, "_header_bytes", read)
    monkeypatch.setattr(os, "open", os_open)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr("io.open", opened)
    return counts


TEXTS = {Path("text"): torch.arange(16).view(1, 16)}


@pytest.mark.parametrize("layout", ["bam", "mixtral"])
def test_everything_is_opened_once(layout: str, tmp_path: Path, opens: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With all checks and perplexities."""
    write_sources(tmp_path, SQUARE)
    method = "bam" if layout == "bam" else "btx"
    recipe = write_recipe(tmp_path, "", method, output=f"{{path: out, layout: {layout}, max_shard_size: 60kB}}")
    folder = publish(plan_file(recipe), None, UNPROVED)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1
    monkeypatch.setattr(verification, "read_texts", lambda *args: TEXTS)
    opens.clear()
    report = verify(folder)
    assert all(check.ok for check in report.checks), report.checks
    assert set(report.perplexity[0]["perplexity"]) == {"seed", "code", "law", "average", "merged"}
    once = [*(f"out/{name}" for name in (*files, "config.json"))]
    once += [f"{source}/{name}" for source in ("seed", "code", "law") for name in ("model.safetensors", "config.json")]
    assert opens == dict.fromkeys(once, 1)


def test_a_plan_that_was_given_is_not_believed_about_the_sources(tmp_path: Path, opens: Counter[str]) -> None:
    """It can be of an hour ago: what the manifest says of headers and configurations is compared with the files, read anew."""
    write_sources(tmp_path, SQUARE)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    opens.clear()
    assert verify(folder, plan).ok
    assert opens == dict.fromkeys((f"{at}/{name}" for at in ("out", *plan.models) for name in ("model.safetensors", "config.json")), 1)
    path = tmp_path / "law" / "model.safetensors"
    os.utime(path)  # the same bytes: nothing is wrong, and the reference model opens the file that is there now
    assert verify(folder, plan).ok
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = failed(verify(folder, plan))
    assert any("changed since the merge" in detail and "law:" in detail for detail in found.values()), found


def test_a_source_that_changes_after_it_was_opened_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path, SQUARE)
    folder = publish(plan_file(write_recipe(tmp_path)), None, UNPROVED)
    real = conversion.open_dense

    def opened(*args: Any) -> Any:
        found = real(*args)
        os.utime(tmp_path / "law" / "model.safetensors")
        return found

    monkeypatch.setattr(function, "open_dense", opened)
    (model,) = [check for check in verify(folder).checks if check.name == "model"]
    assert model.ok is False
    assert "law/model.safetensors changed since it was opened" in model.detail


def test_a_result_that_changes_while_it_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read after it was opened is of the files that were opened."""
    write_sources(tmp_path, SQUARE)
    folder = publish(plan_file(write_recipe(tmp_path)), None, UNPROVED)
    real = verification.digests

    def slow(*args: Any) -> Any:
        yield from real(*args)
        os.utime(folder / "model.safetensors")

    monkeypatch.setattr(verification, "digests", slow)
    try:
        (model,) = [check for check in verify(folder).checks if check.name == "model"]
    except CheckpointError as error:
        assert "changed since it was opened" in str(error)
    else:
        assert model.ok is False
        assert "out/model.safetensors changed since it was opened" in model.detail
