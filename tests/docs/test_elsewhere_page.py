"""The how-to about models elsewhere is followed, with stores of fsspec's memory."""

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_sources
from pages import DOCS, follow
from test_stores import FaultyStore, put
from test_stores import store as store  # a fixture

PLACES = {"seed": "models/seed", "code": "lab/code", "law": "container/law"}


def test_page_is_true(store: type[FaultyStore], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for scheme in ("s3", "gs", "az"):
        of_scheme = classmethod(lambda cls, path, scheme=scheme: FaultyStore._strip_protocol(path.replace(f"{scheme}://", "faulty://")))
        made = type(scheme, (FaultyStore,), {"protocol": scheme, "_strip_protocol": of_scheme})
        monkeypatch.setitem(import_module("fsspec.registry")._registry, scheme, made)
    write_sources(tmp_path / "sources", CONFIGS["llama"])
    for name, place in PLACES.items():
        put(place, tmp_path / "sources" / name, "")

    def call(command: str) -> str:
        if command.startswith("pip "):
            return ""
        options = ["--force", "--no-verify"] if "--ranges" in command else []
        result = run(*shlex.split(command)[1:], *options)
        assert result.status == 0, result.err
        return str(result.err + result.out)

    assert follow(DOCS / "how-to" / "models-elsewhere.md", tmp_path, call) == 7
