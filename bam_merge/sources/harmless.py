"""Config keys that change nothing, as data: harmless_keys.toml, each with its reason, some at certain values alone; and the opposite."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bam_merge.validation_words import shown


@dataclass(frozen=True)
class Harmless:
    """One key, or with `prefix` all keys that begin so. `values` are those at which it is harmless; None: at any."""

    key: str
    reason: str
    values: tuple[Any, ...] | None = None

    @property
    def prefix(self) -> str | None:
        return self.key.removesuffix("*") if self.key.endswith("*") else None


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads((files("bam_merge.sources") / "harmless_keys.toml").read_text(encoding="utf-8"))


@cache
def harmless_keys() -> Mapping[str, Harmless]:
    """The whole list, by key."""
    return {item.key: item for group in _table()["group"] for item in _group(group)}


def refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """A message for every key that changes what transformers computes in a way that no layout here can say."""
    for record in _table()["refused"]:
        key, value = record["key"], config.get(record["key"])
        if key in config and not _is_one_of(value, record["unless"]) and not (value is None and {} in record["unless"]):
            yield f"config.json: {key} = {shown(value)}: {record['reason']}, which cannot be merged. Remove the key if it is a mistake."


def _group(group: Mapping[str, Any]) -> Iterator[Harmless]:
    yield from (Harmless(key, group["reason"]) for key in group.get("keys", ()))
    yield from (Harmless(key, group["reason"], tuple(values)) for key, values in group.get("only", {}).items())


def find(key: str) -> Harmless | None:
    """What the table says of `key`."""
    table = harmless_keys()
    return table.get(key) or next((item for item in table.values() if item.prefix and key.startswith(item.prefix)), None)


def is_harmless(key: str, value: Any) -> bool:
    """Whether a config.json may have `key` at this value or not, and its model computes the same.

    null is what a key that is not there is, but where only a value that counts as true is harmless: transformers takes a null
    is_causal for a no.
    """
    found = find(key)
    if value is None:
        return found is None or found.values is None or not all(found.values)
    return found is not None and (found.values is None or _is_one_of(value, found.values))


def _is_one_of(value: Any, values: Sequence[Any]) -> bool:
    return any(type(value) is type(known) and value == known for known in values)
