"""The page on mixtures that are used without training, carried out on small models."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, follow
from scenes import SOURCES, write_scene, write_texts

PAGE = DOCS / "how-to" / "use-without-training.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_scene(tmp_path / "models")
    write_texts(tmp_path / "models", SOURCES, 15_000)
    for source, target in (("seed", "general/seed"), ("code", "code/code"), ("law", "law-1"), ("law", "law-2")):
        file = tmp_path / "texts" / f"{target}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((tmp_path / "models" / f"{source}.txt").read_text()[:: -1 if target == "law-2" else 1])
    return tmp_path


def test_the_page_runs(here: Path, run: Any) -> None:
    def call(command: str) -> str:
        result = run(*shlex.split(command)[1:])
        assert result.status == 0, result.err
        return str(result.err + result.out)

    assert follow(PAGE, here, call) == 3
    said = json.loads((here / "out" / "other" / "bam_merge.json").read_text())
    assert said["recipe"]["router"]["ffn"]["init"] == "ridge" and said["recipe"]["output"]["path"] == "out/other"
