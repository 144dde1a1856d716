"""Models of the hub whose weights are read there, by ranges: the same result, byte for byte, and nothing of them on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from conftest import SOURCES
from hub_models import TOKEN, write_hub_recipe
from hub_models import acme as acme  # fixtures
from hub_models import hub as hub
from hub_server import FakeHub, Fault
from runs import folder_bytes

from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.publish import publish


def weights_here(tmp_path: Path) -> list[str]:
    """Files of the cache that are as large as weights."""
    return [path.name for path in (tmp_path / "cache" / "hub").rglob("*") if path.is_file() and path.stat().st_size > 20_000]


def merged(run: Any, recipe: Path, *options: str) -> Any:
    result = run("merge", recipe, *options)
    assert result.status == 0, result.err
    return result


def test_the_result_is_that_of_a_download(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    result = merged(run, write_hub_recipe(tmp_path), "--ranges")
    assert "verified" in result.out and "by ranges" in result.err and "downloading" not in result.err
    assert not weights_here(tmp_path) and acme.asked(r"model.safetensors")
    assert run("verify", tmp_path / "out", "--ranges").status == 0
    assert not weights_here(tmp_path)
    found = folder_bytes(tmp_path / "out")
    merged(run, write_hub_recipe(tmp_path), "--force", "--no-verify")
    assert weights_here(tmp_path) and folder_bytes(tmp_path / "out") == found
    acme.answered.clear()
    result = merged(run, write_hub_recipe(tmp_path), "--force", "--no-verify", "--ranges")
    assert not acme.asked(r"model.safetensors") and "by ranges" not in result.err  # what is in the cache whole is read there


def test_diff_stats_and_extract(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    assert run("diff", "acme/seed", tmp_path / "models" / "seed", "--ranges").status == 0
    assert run("diff", "--seed", "acme/seed", "acme/law", "acme/code", "--ranges").status in (0, 1)
    found = json.loads(run("inspect", "acme/seed", "--json", "--stats", "--ranges").out)
    here = json.loads(run("inspect", tmp_path / "models" / "seed", "--json", "--stats").out)
    assert {**found, "path": ""} == {**here, "path": ""} and not weights_here(tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("model.safetensors", headers={"location": ""}, status=500), "the hub has a fault of its own (it answers 500)"),
        (Fault("X-Signature", cut=30), "broke off"),
        (Fault("X-Signature", spoil=lambda data: data[:-7]), "broke off"),
        (Fault("X-Signature", status=403), "the hub refuses (403)"),
        (Fault("X-Signature", length=10), "broke off"),
    ],
)
def test_faults_in_the_middle(fault: Fault, message: str, acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """Told in words without a token or a signed address; the run goes on with --resume."""
    acme.token = TOKEN
    recipe = write_hub_recipe(tmp_path)
    plan, seen = plan_file(recipe), []

    def progress(count: int) -> None:
        seen.append(count)
        if len(seen) == 8:
            acme.faults.append(Fault(**vars(fault)))

    with pytest.raises(CheckpointError) as caught:
        publish(plan, None, MergeOptions(workers=1, verify=False, progress=progress, ranges=True))
    problem = "\n".join(caught.value.problems)
    assert problem.startswith("sources.") and message in problem and "ignature" not in problem and TOKEN not in problem, problem
    acme.faults.clear()
    resumed = merged(run, recipe, "--resume", "--ranges", "--no-verify")
    assert "by ranges" in resumed.err and not weights_here(tmp_path)
    merged(run, write_hub_recipe(tmp_path, "{seed: models/seed, code: models/code, law: models/law}", output="here"), "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


def test_another_file_than_the_hub_lists(acme: FakeHub, tmp_path: Path) -> None:
    """A cache between that serves another state of the file under the name of this commit."""
    plan = plan_file(write_hub_recipe(tmp_path))
    repo = acme.repos["acme/law"]
    files = repo.commits[repo.refs["main"]]

    def notify(text: str) -> None:
        if "by ranges" in text:
            data = files["model.safetensors"].data  # type: ignore[union-attr]
            files["model.safetensors"] = type(files["model.safetensors"])(data[:-1] + b"x")  # type: ignore[call-arg]

    with pytest.raises(CheckpointError, match=r"law@.*: model.safetensors changed: found digest .*, expected"):
        publish(plan, None, MergeOptions(workers=1, verify=False, notify=notify, ranges=True))
    assert not (tmp_path / "out").exists()


def test_parts_and_adapters(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    write_adapter(tmp_path / "models" / "lora", tmp_path / "models" / "seed")
    acme.add("acme/lora", tmp_path / "models" / "lora")
    recipe = write_hub_recipe(tmp_path, "{seed: acme/seed, code: {base: seed, adapter: acme/lora}, law: acme/law}")
    recipe.write_text(recipe.read_text().replace("path: out}", "path: out, max_shard_size: 60kB}"))
    for number in (2, 1):
        assert run("merge", recipe, "--part", f"{number}/2", "--ranges").status == 0
    result = run("finish", recipe, "--ranges", "--no-verify")
    assert result.status == 0 and {"model.safetensors"}.isdisjoint(weights_here(tmp_path)), result.err
    local = tmp_path / "local.yaml"
    local.write_text(recipe.read_text().replace("acme/", "models/").replace("path: out", "path: here"))
    merged(run, local, "--no-verify")
    there, here = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "here")
    assert {name: data for name, data in there.items() if name.endswith("safetensors")} == {
        name: data for name, data in here.items() if name.endswith("safetensors")
    }
    assert len(SOURCES) == 3
