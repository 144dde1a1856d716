"""What is installed: every requirement pinned in constraints.txt within its range, every file in the package, every public name."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import bam_merge

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTS = {"dependencies": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def pins() -> dict[str, Version]:
    lines = [line.partition(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in found}


@pytest.mark.parametrize("of", LISTS)
def test_requirements_are_pinned_within_their_range(of: str) -> None:
    """`make lock` writes constraints.txt; a range that was changed since, or a requirement that was added, shows here."""
    wanted = [Requirement(text) for text in LISTS[of]]
    others = [item for item in wanted if canonicalize_name(item.name) != "bam-merge"]
    wrong = [str(item) for item in others if (pin := pins().get(canonicalize_name(item.name))) is None or pin not in item.specifier]
    assert others and not wrong, f"run make lock: {wrong}"


def test_constraints_name_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "--" not in text and "make lock" in text


def test_public_names() -> None:
    """Each is there, is documented, and lives where the package says; nothing else is promised."""
    assert sorted(bam_merge.__all__) == bam_merge.__all__
    for name in set(bam_merge.__all__) - {"__version__"}:
        value = getattr(bam_merge, name)
        assert value is getattr(import_module(f"bam_merge.{bam_merge._HOME_OF[name]}"), name)
        assert value.__module__ == f"bam_merge.{bam_merge._HOME_OF[name]}" and (value.__doc__ or "").strip(), name
    assert set(bam_merge.__all__) <= set(dir(bam_merge))
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        bam_merge.marge  # noqa: B018
