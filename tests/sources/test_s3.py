"""Models in S3, by s3fs where it is installed: what fsspec's memory cannot show of it, by a server of S3's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, SOURCES, write_sources
from s3_server import KEY, FakeS3, serving_s3
from web_models import write_away_recipe

from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.publish import publish
from bam_merge.sources import trying

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.filterwarnings("default")  # of a stack of packages that are not ours

PLACES = {name: f"s3://bucket/models/{name}" for name in SOURCES}


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """A bucket with seed, code and law."""
    monkeypatch.setattr(trying, "WAITS", (0.01, 0.01, 0.01))
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": "planted",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    write_sources(tmp_path / "models", CONFIGS["llama"])
    with serving_s3() as fake:
        monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url)
        s3fs.S3FileSystem.clear_instance_cache()
        for name in SOURCES:
            for path in (tmp_path / "models" / name).iterdir():
                fake.objects[f"bucket/models/{name}/{path.name}"] = path.read_bytes()
        yield fake
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_merge_is_that_of_the_folders(s3: FakeS3, tmp_path: Path, run: Any) -> None:
    recipe = write_away_recipe(tmp_path, PLACES)
    result = run("merge", recipe)
    assert result.status == 0 and "verified" in result.out, result.err
    assert all(span for path, span in s3.spans if path.endswith(".safetensors"))
    run("merge", write_away_recipe(tmp_path, {name: f"models/{name}" for name in SOURCES}, output="here"), "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()
    record = (tmp_path / "out" / "bam_merge.json").read_text()
    assert '"etag": "one"' in record and KEY not in record and "planted" not in record


@pytest.mark.parametrize(
    ("faults", "message"),
    [([503], ""), ([500], ""), ([400] * 50, "s3://bucket/models/"), ([403] * 50, "access is refused")],
)
def test_faults(faults: list[int], message: str, s3: FakeS3, tmp_path: Path, run: Any) -> None:
    s3.faults = list(faults)
    result = run("plan", write_away_recipe(tmp_path, PLACES))
    assert result.status == (2 if message else 0) and message in result.err and "secret" not in result.err, result.err
    assert "Traceback" not in result.err


def test_wrong_places_and_keys(s3: FakeS3, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("inspect", "s3://bucket/models/lav")
    assert result.status == 2 and "s3://bucket/models/lav: no such folder, or nothing in it; did you mean 'law'?" in result.err, result.err
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAANOTHER")
    s3fs.S3FileSystem.clear_instance_cache()
    result = run("inspect", "s3://bucket/models/law")
    assert result.status == 2 and "s3://bucket/models/law: access is refused" in result.err and "Set AWS_PROFILE" in result.err, result.err
    assert "AKIAANOTHER" not in result.err


def test_a_source_that_changes(s3: FakeS3, tmp_path: Path) -> None:
    plan = plan_file(write_away_recipe(tmp_path, PLACES))

    def progress(count: int) -> None:
        s3.etags["bucket/models/law/model.safetensors"] = "two"

    with pytest.raises(
        CheckpointError, match=r"sources.law: s3://bucket/models/law/model.safetensors changed: found .* etag two, expected .* etag one"
    ):
        publish(plan, None, MergeOptions(workers=1, verify=False, progress=progress))
