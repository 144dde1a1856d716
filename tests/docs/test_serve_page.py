"""The how-to about serving is followed: what it says of plans, GGUF, chat, push and refresh, with a hub of its own."""

import io
import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from card_snippets import merged
from hub_models import TOKEN
from hub_models import hub as hub  # a fixture
from hub_server import FakeHub
from pages import DOCS, ROOT, follow

from bam_merge.exporting import converter as converters


def test_page_is_true(hub: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(tmp_path, "bam", chat=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hub.token = TOKEN
    pytest.importorskip("gguf")
    monkeypatch.setattr(converters, "NEEDED", {"gguf": "gguf"})  # the stand-in imports less than llama.cpp's own
    Path("llama.cpp").mkdir()
    shutil.copy(ROOT / "tests" / "exporting" / "converter.py", Path("llama.cpp") / converters.SCRIPT)

    def call(command: str) -> str:
        words = shlex.split(command)
        if "|" in words:
            assert words[0] == "echo"
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(words[1].encode() + b"\n")))
            words = words[words.index("|") + 1 :]
        assert words[0] == "bam-merge"
        result = run(*words[1:])
        assert result.status == 0, result.err
        return str(result.err + result.out)

    assert follow(DOCS / "how-to" / "serve.md", tmp_path, call) == 7
    assert hub.repos["acme/mixture"].private
