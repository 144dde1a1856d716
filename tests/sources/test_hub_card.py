"""The card of a merge of models of the hub: their names, their licenses, and never a token."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SOURCES
from hub_models import TOKEN, write_hub_recipe
from hub_models import acme as acme  # a fixture
from hub_models import hub as hub
from hub_server import FakeHub, Repo

from bam_merge import verify

RECIPE = "{seed: acme/seed, code: acme/code@main, law: hf://acme/law}"


def with_cards(fake: FakeHub, models: Path, text: str = "license: mit") -> None:
    """Every model of the hub has a card that states a license."""
    for name in SOURCES:
        fake.add(f"acme/{name}", models / name, **{"README.md": f"---\n{text}\n---\n# {name}\n".encode()})


def front_matter(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---\n")[1]))


def test_names_and_licenses(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    with_cards(acme, tmp_path / "models")
    result = run(write_hub_recipe(tmp_path, RECIPE))
    assert result.status == 0, result.err
    out = next(path.parent for path in tmp_path.rglob("bam_merge.json"))
    found = front_matter(out)
    assert found["base_model"] == ["acme/seed", "acme/code", "acme/law"]
    assert (found["base_model_relation"], found["license"]) == ("merge", "mit")
    report = verify(out)
    assert report.ok
    assert next(check.ok for check in report.checks if check.name == "card")


def test_whether_weights_were_in_the_cache_changes_nothing(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """A cache that an older version filled has the weights and no card."""
    with_cards(acme, tmp_path / "models")
    recipe = write_hub_recipe(tmp_path, RECIPE)
    assert run(recipe, "--no-verify").status == 0
    out = next(path.parent for path in tmp_path.rglob("bam_merge.json"))
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    cards = list((tmp_path / "cache").rglob("README.md"))
    assert len(cards) == 3
    for path in cards:
        path.unlink()
    assert run(recipe, "--no-verify", "--force").status == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_a_card_that_is_no_text_of_a_card_is_left_there(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    with_cards(acme, tmp_path / "models")
    acme.add("acme/law", tmp_path / "models" / "law", **{"README.md": b"---\nlicense: mit\n---\n" + b" " * 2**20})
    result = run(write_hub_recipe(tmp_path, RECIPE), "--no-verify")
    assert result.status == 0, result.err
    out = next(path.parent for path in tmp_path.rglob("bam_merge.json"))
    assert "license" not in front_matter(out)
    assert "| licenses | seed: mit, code: mit, law: not stated |" in (out / "README.md").read_text()


def test_a_token_is_nowhere(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a private model, asked for with a token: neither card nor manifest has it, nor what is printed."""
    with_cards(acme, tmp_path / "models", f"license: other\nlicense_name: ours\nlicense_link: https://user:{TOKEN}@example.org/?t={TOKEN}")
    acme.token = TOKEN
    for repo in acme.repos.values():
        assert isinstance(repo, Repo)
        repo.private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = run(write_hub_recipe(tmp_path, RECIPE))
    assert result.status == 0, result.err
    out = next(path.parent for path in tmp_path.rglob("bam_merge.json"))
    assert front_matter(out)["license_name"] == "ours"
    assert TOKEN not in result.out + result.err
    for name in ("README.md", "bam_merge.json", "config.json"):
        assert TOKEN not in (out / name).read_text()
    assert json.loads((out / "bam_merge.json").read_text())["sources"]["law"]["license"] == "other"
