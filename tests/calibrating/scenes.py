"""Small sources with a tokenizer, a text for each, and recipes whose routers are made of these."""

import json
from pathlib import Path
from random import Random
from typing import Any

from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from vocabularies import tokenizer_json

LETTERS = {"seed": "abcdefgh ", "code": "aabbb ", "law": "ggghhhc ", "math": "ddeef "}
"""What the text of each source is written in."""


def write_texts(folder: Path, names: tuple[str, ...] = SOURCES, length: int = 600) -> None:
    for name in names:
        letters = Random(name)
        (folder / f"{name}.txt").write_text("".join(letters.choice(LETTERS[name]) for _ in range(length)))


def write_scene(folder: Path, config: dict[str, Any] | str = "llama", names: tuple[str, ...] = SOURCES, **options: Any) -> Path:
    """Sources, tokenizers and texts, in `folder`."""
    write_sources(folder, CONFIGS[config] if isinstance(config, str) else config, names, **options)
    for name in names:
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    write_texts(folder, names)
    return folder


def texts(names: tuple[str, ...] = SOURCES) -> str:
    return "{" + ", ".join(f"{name}: {name}.txt" for name in names) + "}"


def router(init: str = "ridge", names: tuple[str, ...] = SOURCES, **more: Any) -> str:
    """The router section of a recipe, in one line."""
    keys = {"init": init, "texts": texts(names), "tokens": 300, **more}
    return f"router: {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"


def recipe(folder: Path, text: str | None = None, **options: Any) -> Path:
    return write_recipe(folder, router() if text is None else text, **options)


FOUR = ("seed", "code", "law", "math")
"""The sources of the recipes in recipes/."""


def write_read_texts(folder: Path) -> None:
    """A tokenizer for every source of `folder`/checkpoints, and what `make example` leaves of texts, beside the pages of the project."""
    for name in FOUR:
        (folder / "checkpoints" / name / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    write_texts(folder, FOUR, 3000)
    (folder / "checkpoints" / "text").mkdir()
    (folder / "docs" / "how-to").mkdir(parents=True)
    for name in FOUR[1:]:
        (folder / f"{name}.txt").rename(folder / "checkpoints" / "text" / f"{name}.txt")
    (folder / "seed.txt").rename(folder / "docs" / "how-to" / "page.md")
    (folder / "README.md").write_text("abcdefgh " * 100)
