"""A folder's chat template: where transformers finds it, rendered as transformers renders it, in jinja2's sandbox."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import read_small_file
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.text import printable

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


SETTINGS = "tokenizer_config.json"


NO_JINJA = "{}: this is rendered by the package jinja2, which is not installed: pip install 'bam-merge[chat]'; or use --plain."


@dataclass(frozen=True)
class Template:
    """A chat template and the special tokens that it may name (bos_token, ...)."""

    text: str
    tokens: dict[str, str] = field(default_factory=dict)
    where: str = "chat template"

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model was trained to read it, up to where its answer begins. Raises CheckpointError in words."""
        try:
            import jinja2
            import jinja2.sandbox
        except ImportError:
            raise CheckpointError(NO_JINJA.format(self.where)) from None

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            made = environment.from_string(self.text)
            return made.render(messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **self.tokens)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ZeroDivisionError,
            OverflowError,
            RecursionError,
        ) as error:
            told = any(message["role"] == "system" for message in messages)
            way_out = "Leave --system out, or use --plain." if told else "Use --plain."
            raise CheckpointError(f"{self.where} does not take this conversation: {printable(str(error))}. {way_out}") from None


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def read_template(folder: Path) -> Template | None:
    """The chat template of a folder; None where it has none. Raises CheckpointError for one that cannot be read."""
    settings = _object(folder / SETTINGS)
    tokens = {**_tokens(_object(folder / "special_tokens_map.json")), **_tokens(settings)}
    shown = printable(str(folder))
    if (folder / "chat_template.jinja").is_file():
        try:
            text = read_small_file(folder / "chat_template.jinja").decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{shown}/chat_template.jinja: not UTF-8 text (byte {error.start}).") from None
        return Template(text, tokens, f"{shown}/chat_template.jinja")
    for name in ("chat_template.json", SETTINGS):
        found = _default((settings if name == SETTINGS else _object(folder / name)).get("chat_template"))
        if found is not None:
            return Template(found, tokens, f"{shown}/{name}")
    return None


def _object(path: Path) -> dict[str, Any]:
    """A small JSON file's object; {} where there is no such file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        found = load_json(read_small_file(path))
    except ValueError as error:
        raise CheckpointError(f"{printable(str(path))}: {error}.") from None
    return found if isinstance(found, dict) else {}


def _default(found: Any) -> str | None:
    """The template that is used where none is named: the only one, or the one called default."""
    if isinstance(found, list):
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) and found else None


def _tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by their names: written as text, or as an object that says how they are matched."""
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items() if key.endswith("_token")}
    return {key: text for key, text in texts.items() if isinstance(text, str)}
