"""The how-to about models of the hub is followed, with a hub of its own."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from hub_models import acme as acme  # a fixture
from hub_models import hub as hub
from hub_server import FakeHub
from pages import DOCS, follow


def test_page_is_true(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(command: str) -> str:
        if command.startswith("pip "):
            return ""
        if command == "bam-merge verify acme/mix":
            acme.add("acme/mix", tmp_path / "out")
        result = run(*shlex.split(command)[1:])
        assert result.status == 0, result.err
        return str(result.err + result.out)

    assert follow(DOCS / "how-to" / "models-from-the-hub.md", tmp_path, call) == 4
