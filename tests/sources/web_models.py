"""For tests of models elsewhere: three small ones on a server of the web, and in fsspec's memory."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from conftest import CONFIGS, SOURCES, write_sources
from web_server import FakeWeb, serving_web

from bam_merge.sources import trying


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWeb]:
    """A server, empty as yet; nobody here is known to it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(trying, "WAITS", (0.01, 0.01, 0.01))
    with serving_web() as fake:
        yield fake
    huggingface_hub.close_session()


@pytest.fixture
def shelf(web: FakeWeb, tmp_path: Path) -> FakeWeb:
    """The server with seed, code and law; each has files that nobody may ask for."""
    write_sources(tmp_path / "models", CONFIGS["llama"])
    for name in SOURCES:
        (tmp_path / "models" / name / "pytorch_model.bin").write_bytes(b"\x80pickle")
        web.put(name, tmp_path / "models" / name)
        (tmp_path / "models" / name / "pytorch_model.bin").unlink()
    return web


def write_away_recipe(folder: Path, places: dict[str, str], method: str = "bam", text: str = "", output: str = "out") -> Path:
    path = folder / f"{output}.yaml"
    sources = ", ".join(f"{name}: '{place}'" for name, place in places.items())
    path.write_text(f"method: {method}\nsources: {{{sources}}}\n{text}\noutput: {{path: {output}}}\n")
    return path
