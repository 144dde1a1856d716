"""What pydantic found wrong, in the recipe's own words."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from bam_merge.documents import Path as DocumentPath
from bam_merge.text import nearest, printable


def dotted(path: DocumentPath) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return printable(text)


def explain(error: ValidationError, document: Any, name: str, places: Mapping[DocumentPath, str], root: type[BaseModel]) -> list[str]:
    """pydantic's findings as our messages: where, what was found, what was expected, the nearest valid name."""
    messages = []
    for item in error.errors(include_url=False):
        path, tags = _document_path(item["loc"], document)
        found = item["input"]
        what = {"bool": f"{str(found).lower()} (a bare yes, no, on or off is true or false in YAML: quote it)"}.get(
            type(found).__name__, printable(repr(found), 60)
        )
        match item["type"]:
            case "extra_forbidden":
                text = f"unknown key{nearest(str(path[-1]), _valid_keys(path, tags, root))}"
            case "missing":
                text = "is required and missing"
                path = path if path and path[-1] == item["loc"][-1] else (*path, str(item["loc"][-1]))
            case "union_tag_not_found":
                path, text = (*path, "init" if path[0] == "router" else "make"), "is required and missing"
            case "union_tag_invalid":
                context = item["ctx"]
                key = "init" if path[0] == "router" else "make"
                valid = [tag for tag in (word.strip(" '") for word in str(context["expected_tags"]).split(",")) if tag != "both"]
                tag = str(context["tag"])
                path, text = (*path, key), f"{printable(repr(tag), 60)} is none of {', '.join(valid)}{nearest(tag, valid)}"
            case "literal_error":
                valid = [word.strip(" '") for word in str(item["ctx"]["expected"]).replace(" or ", ", ").split(",")]
                text = f"found {what}, expected {' or '.join(valid)}{nearest(str(found), valid)}"
            case _:
                text = f"found {what}: {item['msg'][0].lower()}{item['msg'][1:]}"
        place = next((places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places), "")
        messages.append(f"{name}{place}: {dotted(path)}: {text}{'' if text.endswith('?') else '.'}")
    return list(dict.fromkeys(messages))


def _document_path(loc: tuple[int | str, ...], document: Any) -> tuple[DocumentPath, list[str]]:
    """Split pydantic's location into the path in the document and the union tags that it adds on the way."""
    path: list[str | int] = []
    tags: list[str] = []
    here = document
    for index, step in enumerate(loc):
        last = index == len(loc) - 1
        inside = (isinstance(here, dict) and step in here) or (isinstance(here, list) and isinstance(step, int) and step < len(here))
        if inside:
            path.append(step)
            here = here[step]
        elif last and isinstance(here, dict):
            path.append(step)
        else:
            tags.append(str(step))
    return tuple(path), tags


def _valid_keys(path: DocumentPath, tags: list[str], root: type[BaseModel]) -> list[str]:
    """The keys that are valid beside the one at `path`: those of the models that may stand there, of the tagged ones if any."""
    models = [root]
    for step in path[:-1]:
        if isinstance(step, str):
            fields = [info for model in models for key, info in model.model_fields.items() if step == (info.alias or key)]
            models = [model for info in fields for model in _models(info.annotation)]
    tagged = [model for model in models if set(tags) & {tag for key in ("make", "init") for tag in _tags(model, key)}]
    return sorted({info.alias or key for model in tagged or models for key, info in model.model_fields.items()})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model class inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tags(model: type[BaseModel], key: str) -> tuple[str, ...]:
    return get_args(model.model_fields[key].annotation) if key in model.model_fields else ()
