"""How a recipe that was mergekit's is written: names for its models, and YAML as people write it."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

INLINE = 110
"""Characters of a section that stands on one line."""


@dataclass
class Equivalent:
    """What a recipe of mergekit is in ours: `text`, None where there is none because of what is in `lacks`. `differs` says what of it
    gives other numbers, or nothing, here."""

    kind: str
    text: str | None = None
    differs: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)


def short_names(models: Sequence[str], base: str | None) -> dict[str, str]:
    """A source's name for every path or id: the last part of it, and `seed` for the base, which gives tokenizer and configuration."""
    names: dict[str, str] = {}
    for model in models:
        if model == base:
            names[model] = "seed"
            continue
        last = re.split(r"[/\\+]", model.rstrip("/").partition("@")[0])[-1]
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).lstrip(".-") or "model"
        taken = {*names.values(), *(["seed"] if base is not None or names else [])}
        names[model] = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(models) + 3))) if n not in taken)
    return names


def recipe_text(kind: str, recipe: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The recipe as YAML, with what is to be known of it as comments."""
    lines = [f"# What a recipe of {kind} asks for, as one of bam-merge."]
    for remark in dict.fromkeys(remarks):
        lines += textwrap.wrap(f"{remark}.", 100, initial_indent="# * ", subsequent_indent="#   ", break_on_hyphens=False)
    for key, value in recipe.items():
        if value in (None, [], {}):
            continue
        line = f"{key}: {_inline(value)}"
        if len(line) <= INLINE or not isinstance(value, dict | list):
            lines.append(line)
        elif isinstance(value, dict):
            lines += [f"{key}:", *(f"  {_inline(name)}: {_inline(item)}" for name, item in value.items())]
        else:
            lines += [f"{key}:", *(f"  - {_inline(item)}" for item in value)]
    return "\n".join(lines)


def _inline(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump([value], default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=False)
    return text.strip()[1:-1]
