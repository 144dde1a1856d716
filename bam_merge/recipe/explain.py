"""What pydantic found wrong, in the recipe's own words."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from bam_merge.documents import Path as DocumentPath
from bam_merge.recipe.checks import _OF_KEYS
from bam_merge.text import count, nearest, printable
from bam_merge.validation_words import bare, expectation, hint, literals, shown


def dotted(path: DocumentPath) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return printable(text) or "a key"


def explain(error: ValidationError, document: Any, name: str, places: Mapping[DocumentPath, str], root: type[BaseModel]) -> list[str]:
    """pydantic's findings as our messages: where, what was found, what was expected, the nearest valid name."""
    found: dict[DocumentPath, list[tuple[Any, list[str]]]] = {}
    for item in error.errors(include_url=False):
        path, tags = _document_path(item, document)
        found.setdefault(path, []).append((item, tags))
    messages = []
    for path, items in found.items():
        if items[0][0]["type"] == "too_short" and any(path == other[: len(path)] != other for other in found):
            continue  # pydantic counts the entries that are right
        for key, text in _described(path, items, root):
            place = next((places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in places), "")
            messages.append(f"{name}{place}: {dotted(key)}: {text}{'' if text.endswith('?') else '.'}")
    return list(dict.fromkeys(messages))


def _described(path: DocumentPath, items: list[tuple[Any, list[str]]], root: type[BaseModel]) -> Iterator[tuple[DocumentPath, str]]:
    """(key, what is wrong) of all that pydantic found at `path`; what a value of several types might have been stands in one message."""
    wrong_types = [item for item, _ in items if item["type"] not in _OF_KEYS]
    if wrong_types:
        item = next((item for item in wrong_types if not item["type"].endswith("_type")), wrong_types[0])  # of the type that did fit
        of_type = [item] if not item["type"].endswith("_type") else wrong_types
        expected = " or ".join(dict.fromkeys(map(expectation, of_type)))
        close = nearest(bare(item["input"]), literals(item["ctx"]["expected"])) if item["type"] == "literal_error" else ""
        yield path, f"found {shown(item['input'])}{hint(item)}, expected {expected}{close}"
    lacking = [item for item, _ in items if item["type"] == "missing" and isinstance(item["loc"][-1], int)]
    if lacking:  # entries of a list of fixed length
        yield path, f"found {count(len(lacking[-1]['input']), 'entry', 'entries')}, expected {lacking[-1]['loc'][-1] + 1}"
    for item, tags in items:
        key = "init" if path[:1] == ("router",) else "make"
        match item["type"]:
            case "extra_forbidden":
                others = [key for key in _valid_keys(path, tags, root) if key != path[-1]]  # it may be one of another form
                yield path, f"unknown key{nearest(str(path[-1]), others)}"
            case "missing" if item not in lacking:
                yield path, "is required and missing"
            case "union_tag_not_found":
                yield (*path, key), "is required and missing"
            case "union_tag_invalid":
                valid = [tag for tag in literals(item["ctx"]["expected_tags"]) if tag not in ("both", "list")]
                value = item["input"].get(key) if isinstance(item["input"], dict) else item["input"]
                yield (*path, key), f"{shown(value)} is none of {', '.join(valid)}{nearest(bare(value), valid)}"


def _document_path(error: Any, document: Any) -> tuple[DocumentPath, list[str]]:
    """Split pydantic's location into the path in the document and the union tags that it adds on the way."""
    path: list[str | int] = []
    tags: list[str] = []
    here = document
    for index, step in enumerate(error["loc"]):
        last = index == len(error["loc"]) - 1
        inside = (isinstance(here, dict) and step in here) or (isinstance(here, list) and isinstance(step, int) and step < len(here))
        of_type = last and here is error["input"] and error["type"] != "missing"  # int, str: the type that was tried
        if of_type or (not tags and _is_union(path)) or (tags == ["both"] and len(path) == 2):
            tags.append(str(step))
        elif inside:
            path.append(step)
            here = here[step]
        elif last and isinstance(here, dict):
            path.append(step)
        else:
            tags.append(str(step))
    return tuple(path), tags


def _is_union(path: list[str | int]) -> bool:
    """Whether what stands at `path` is one of several models, so that pydantic's next step names which."""
    return path in (["shared"], ["router"], ["experts"]) or (len(path) == 2 and path[0] in ("rules", "sources"))


def _valid_keys(path: DocumentPath, tags: list[str], root: type[BaseModel]) -> list[str]:
    """The keys that are valid beside the one at `path`: those of the models that may stand there, of the tagged ones if any."""
    models = [root]
    for step in path[:-1]:
        if isinstance(step, str):
            fields = [info for model in models for key, info in model.model_fields.items() if step == (info.alias or key)]
            models = [model for info in fields for model in _models(info.annotation)] or models  # a name in a mapping is no field
    tagged = [model for model in models if set(tags) & {tag for key in ("make", "init") for tag in _tags(model, key)}]
    return sorted({info.alias or key for model in tagged or models for key, info in model.model_fields.items()})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model class inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tags(model: type[BaseModel], key: str) -> tuple[str, ...]:
    return get_args(model.model_fields[key].annotation) if key in model.model_fields else ()
