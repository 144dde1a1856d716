"""Wrappers: models of images or sound around a text model. Which keys and tensors are the text model's, as data: wrapper_tables/*.toml.

A wrapper's text model is a model of a dense family under other names, with its configuration inside the wrapper's. What stands beside it,
towers and projectors, has no part in what it computes of text.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from bam_merge.architectures.config import ROPE_KEYS, describe
from bam_merge.architectures.strict_tables import check_wrapper
from bam_merge.architectures.tables import Architecture, dense_families, find_by_model_type, load_architecture, mixture_layouts
from bam_merge.text import listed, printable, some
from bam_merge.validation_words import shown

OUTSIDE = ("dtype", "torch_dtype", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of the text model that may stand outside its own configuration."""


NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which some model type has the configuration of a text model: a config.json of no table here that has one wraps one."""


@dataclass(frozen=True)
class Spelling:
    """`trunk` stands in the place of the first word of the family's own names, `rest` before names that do not begin with it."""

    trunk: str
    rest: str


@dataclass(frozen=True)
class Written:
    """How a mixture is written in a wrapper: `of` is the wrapper of its sources; `kept` maps what is copied of what that one has beside its
    text model to the words before its names; `keys` are those of config.json that come with it, `parts` the model types of configurations
    among them."""

    of: str
    kept: Mapping[str, str]
    keys: tuple[str, ...]
    parts: Mapping[str, str]


@dataclass(frozen=True)
class Wrapper:
    """A model type around a text model.

    `config` are the keys under which the text model's configuration stands; with `flat` it may stand at the top, beside the keys that
    `flat` lists. `text` is its model type where none is written, `tied` whether transformers ties its head where nothing is said.
    `beside` maps what is no part of the text model to the first words of its names. `refused` is why the text model cannot be taken out.
    `written` is how a mixture is written in it, where one is.
    """

    name: str
    model_types: tuple[str, ...]
    class_name: str
    config: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    beside: Mapping[str, tuple[str, ...]]
    flat: tuple[str, ...] = ()
    text: str | None = None
    tied: bool = False
    refused: str | None = None
    written: Written | None = None

    def what(self, name: str) -> str | None:
        """What of the wrapper the tensor `name` belongs to, where that is beside the text model."""
        short = name.removeprefix("model.")
        starts = ((what, start) for what, starts in self.beside.items() for start in starts)
        return next((what for what, start in starts if short == start or short.startswith(f"{start}.")), None)


@dataclass(frozen=True)
class TextModel:
    """A text model's model type: the family that computes the same for text, and what its configuration class fills in."""

    model_type: str
    family: str
    defaults: Mapping[str, Any]
    mrope: bool = False


@dataclass(frozen=True)
class Unwrapped:
    """The configuration of a text model in its family's own keys, and the wrapper that it came out of, if it did.

    `ties` is what config.json says of the head, None where it says nothing or (`contradicts`) both: then what is stored decides.
    """

    config: Mapping[str, Any]
    wrapper: Wrapper | None = None
    ties: bool | None = None
    contradicts: bool = False
    problems: tuple[str, ...] = field(default=())


@cache
def wrappers() -> tuple[Wrapper, ...]:
    """Every table of a wrapper."""
    folder = files("bam_merge.architectures") / "wrapper_tables"
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml") and not item.name.startswith("_"))
    return tuple(read_wrapper((folder / name).read_text(encoding="utf-8"), name) for name in names)


def read_wrapper(text: str, file: str) -> Wrapper:
    """The wrapper that the TOML document `text` of `file` describes. Raises TableError when it is none."""
    table = tomllib.loads(text)
    check_wrapper(table, file)
    return Wrapper(
        name=table["name"],
        model_types=tuple(table["model_types"]),
        class_name=table["class"],
        config=tuple(table["config"]),
        spellings=tuple(Spelling(**record) for record in table["spellings"]),
        beside={what: tuple(starts) for what, starts in table["beside"].items()},
        flat=tuple(table.get("flat", ())),
        text=table.get("text"),
        tied=table["tied"],
        refused=table.get("refused"),
        written=Written(**{**table["written"], "keys": tuple(table["written"]["keys"])}) if "written" in table else None,
    )


@cache
def text_models() -> Mapping[str, TextModel]:
    """Every model type of a text model that a family here computes, by that type: those with a record, then all families' own.

    Of a family without a record, what its configuration class fills in beyond the table (its sizes) must be said by the file.
    """
    document = tomllib.loads((files("bam_merge.architectures") / "wrapper_tables" / "_text_models.toml").read_text(encoding="utf-8"))
    known = {key: TextModel(key, record["family"], record["defaults"], record.get("mrope", False)) for key, record in document.items()}
    wrapped = {wrapper.text for wrapper in wrappers()}
    mixtures = (kind for layout in mixture_layouts() for kind in layout.model_types if kind in wrapped)
    return (
        known
        | {kind: TextModel(kind, family.name, {}) for family in dense_families() for kind in family.model_types if kind not in known}
        | {kind: TextModel(kind, kind, {}) for kind in mixtures}
    )


def find_wrapper(model_type: object) -> Wrapper | None:
    return next((wrapper for wrapper in wrappers() if model_type in wrapper.model_types), None)


# ---- the text model's configuration ----------------------------------------------------------------------------------------------


def unwrap(config: Mapping[str, Any]) -> Unwrapped:
    """The text model's configuration. A config.json that is no wrapper's is its own; a wrapper of a stranger is a problem."""
    wrapper = find_wrapper(config.get("model_type"))
    if wrapper is None:
        return Unwrapped(config, problems=tuple(_stranger(config)))
    if wrapper.refused:
        return Unwrapped({}, wrapper, problems=(f"config.json: model_type {wrapper.name!r}: {wrapper.refused}, which cannot be merged.",))
    key = next((key for key in wrapper.config if config.get(key) is not None), None)
    inner = config if key is None else config[key]
    if not isinstance(inner, dict) or (key is None and not wrapper.flat):
        wanted = f"{' or '.join(wrapper.config)} must be an object with the text model's configuration"
        return Unwrapped({}, wrapper, problems=(f"config.json: {wanted}, found {shown(config.get(key or wrapper.config[0]))}.",))
    stated = inner.get("model_type", wrapper.text) if key else wrapper.text
    text = text_models().get(stated) if isinstance(stated, str) else None
    if text is None:
        return Unwrapped({}, wrapper, problems=(_unknown_text(wrapper, stated),))
    known = {*wrapper.flat, "tie_word_embeddings", "model_type", "architectures"}
    found = {name: value for name, value in inner.items() if name not in known}
    found |= {name: config[name] for name in OUTSIDE if name in config and name not in found}
    found = _filled(text, found)
    if text.mrope:
        found = {name: _without_mrope(value) if name in ("rope_scaling", "rope_parameters") else value for name, value in found.items()}
    ties = {side["tie_word_embeddings"] for side in (config, inner) if isinstance(side.get("tie_word_embeddings"), bool)}
    said = next(iter(ties)) if len(ties) == 1 else None
    problems = tuple(_contradictions(config, inner, text, found, key)) if key and wrapper.flat else ()
    return Unwrapped({"model_type": text.family, **found}, wrapper, said, len(ties) > 1, problems)


def _filled(text: TextModel, found: Mapping[str, Any]) -> dict[str, Any]:
    """A text model's keys, with what its class implies for those that are left out."""
    nested = (found.get(key) for key in ("rope_scaling", "rope_parameters"))
    has_base = any(isinstance(rope, dict) and "rope_theta" in rope for rope in nested)
    defaults = {key: value for key, value in text.defaults.items() if key not in found and not (key == "rope_theta" and has_base)}
    return {**defaults, **found}


def _without_mrope(rope: Any) -> Any:
    """Rotary parameters without the parts for images: for text, whose positions are one number, they are the ordinary ones."""
    if not isinstance(rope, dict):
        return rope
    plain = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if key in ("type", "rope_type") and value == "mrope" else value for key, value in plain.items()}


def _contradictions(
    config: Mapping[str, Any], inner: Mapping[str, Any], text: TextModel, found: Mapping[str, Any], key: str
) -> Iterator[str]:
    """Keys of the text model that stand at the top as well and mean something else there: the older and the newer form of one file."""
    family = load_architecture(text.family)
    means = _meaning(family, found)
    for name in sorted((inner.keys() & config.keys()) - {*OUTSIDE, "model_type", "architectures", "tie_word_embeddings"}):
        value = _without_mrope(config[name]) if text.mrope and name in ("rope_scaling", "rope_parameters") else config[name]
        if inner[name] != config[name] and means and _meaning(family, {**found, name: value}) != means:
            rope = " (the rotary embedding)" if name in ROPE_KEYS else ""
            yield (
                f"config.json: {printable(name)}{rope} = {shown(config[name])}, and {key} has {shown(inner[name])}: two spellings that "
                f"differ. transformers takes {key}'s. Make them equal, or remove the other one."
            )


def _meaning(family: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says, in facts; empty where it says nothing usable, which is said elsewhere."""
    facts = describe(family, config, [])
    silent = ("max_position_embeddings", "use_sliding_window", "max_window_layers")
    return {name: value for name, value in facts.items() if name not in silent}


def _unknown_text(wrapper: Wrapper, stated: object) -> str:
    """Why the text model inside cannot be merged, by the names of both."""
    mixed = {kind for layout in mixture_layouts() for kind in layout.model_types}
    table = find_by_model_type(stated)
    what = "is a mixture" if table is not None and table.kind != "dense" else "is in no table here"
    return (
        f"config.json: model_type {wrapper.name!r} wraps a text model of model_type {printable(repr(stated), 60)}, which {what}. "
        f"Text models that can be taken out of a wrapper: {', '.join(kind for kind in text_models() if kind not in mixed)}."
    )


def _stranger(config: Mapping[str, Any]) -> Iterator[str]:
    """What a config.json says that wraps a text model and is of no wrapper here."""
    key = next((key for key in NESTED if isinstance(config.get(key), dict)), None)
    if key is not None and find_by_model_type(config.get("model_type")) is None:
        inner = config[key].get("model_type")
        yield (
            f"config.json: model_type {printable(repr(config.get('model_type')), 60)} wraps a text model ({key}: model_type "
            f"{printable(repr(inner), 60)}), and is no wrapper known here. Known: {some([w.name for w in wrappers()], 100)}."
        )


def beside_text(wrapper: Wrapper, what: str) -> str:
    """The reason why tensors beside a text model are not read."""
    return f"{what} of {wrapper.name}: the text model alone is read"


def wrapper_note(wrapper: Wrapper, beside: Mapping[str, str]) -> str:
    """That a model is taken out of a wrapper, and what of it stays behind."""
    left = listed(list(dict.fromkeys(beside.values()))) if beside else ""
    return f"the text model of model_type {wrapper.name}" + (f", without its {left}" if left else "")
