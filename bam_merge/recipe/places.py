"""What stands for a source in a recipe: a folder's name, or a mapping that says more of it; and every folder that is read for it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from bam_merge.recipe.makes import Finite, Strict


@dataclass(frozen=True)
class Known:
    """Where a model of the hub, or of an address, is that a recipe names: what documents record of it, of the hub with its commit; its
    folder on this machine; and whether its weights are `ranged`, read where they are by ranges when they are needed."""

    recorded: str
    folder: Path
    ranged: bool = False


class Folder(Strict):
    """The long form of a source that is a model by itself."""

    path: str = Field(
        description="a Hugging Face folder, relative to the recipe; or a model of the hub, org/name or "
        "org/name@revision; or the address of a folder elsewhere, s3://bucket/folder"
    )
    dequantise: bool = Field(
        default=False, description="its 8-bit floats are multiplied with their scales, which makes bfloat16 of them (or its config's dtype)"
    )
    expert: str | int | None = Field(
        default=None, description="an expert's name or number: the folder is a mixture, and the source the dense model of that expert"
    )
    family: str | None = Field(default=None, description="of an expert: the dense family that it is a model of, where several could be")


MARK_OF_EXPERT = "#experts."
"""What stands between a mixture's folder and an expert's name or number where one text says both."""


def folder_of(text: str) -> Folder:
    """The long form of a source's text. (A folder whose own name has the mark can be written with a slash behind it.)"""
    path, mark, name = text.rpartition(MARK_OF_EXPERT)
    return Folder(path=path, expert=name) if mark and path and name and not {"/", "\\"} & set(name) else Folder(path=text)


def as_text(folder: Folder) -> str:
    """What a folder, or an expert of it, is called in one text."""
    return folder.path if folder.expert is None else f"{folder.path}{MARK_OF_EXPERT}{folder.expert}"


class WeightedAdapter(Strict):
    """One of several adapters on one base."""

    path: str = Field(description="the folder of a LoRA adapter, relative to the recipe, or one of the hub")
    weight: Finite = Field(default=1.0, description="multiplies the adapter's update")


class Adapted(Strict):
    """A source that is a model with low-rank updates (PEFT's LoRA)."""

    base: str = Field(
        description="the model that was adapted: a source's name, or a Hugging Face folder, relative to the recipe, or a model of the hub"
    )
    adapter: str | Annotated[tuple[WeightedAdapter, ...], Field(strict=False)] = Field(
        description="the folder of its adapter, relative to the recipe, or one of the hub; or a list of {path: ..., weight: ...}, whose "
        "updates are added"
    )

    @property
    def adapters(self) -> tuple[WeightedAdapter, ...]:
        """One adapter or several, with their weights."""
        return (WeightedAdapter(path=self.adapter),) if isinstance(self.adapter, str) else self.adapter


def _form(value: Any) -> str:
    if isinstance(value, Adapted) or (isinstance(value, dict) and not {"base", "adapter"}.isdisjoint(value)):
        return "adapted"
    return "folder" if isinstance(value, dict | Folder) else "text"


if TYPE_CHECKING:
    Source = str | Folder | Adapted
else:
    Source = Annotated[
        Annotated[str, Tag("text")] | Annotated[Folder, Tag("folder")] | Annotated[Adapted, Tag("adapted")], Discriminator(_form)
    ]

Sources = Mapping[str, Source]


def long_form(sources: Sources, name: str) -> Folder:
    """The model that a source is, or is an adapter on, with everything about it that a recipe can say."""
    source = sources[name]
    if isinstance(source, Adapted):
        return long_form(sources, source.base) if source.base in sources else folder_of(source.base)
    return folder_of(source) if isinstance(source, str) else source


def recorded(source: Source, sources: Sources, place: Callable[[str], str]) -> Any:
    """A source as a document has it, with every path as `place` gives it: text where that says it all."""

    def placed(text: str) -> str:
        found = folder_of(text)
        return as_text(found.model_copy(update={"path": place(found.path)}))

    if isinstance(source, Adapted):
        base = source.base if source.base in sources else placed(source.base)
        if base in sources and source.base not in sources:
            base = f"./{base}"  # a folder that is called as a source is
        if isinstance(source.adapter, str):
            return {"base": base, "adapter": place(source.adapter)}
        return {"base": base, "adapter": [{"path": place(item.path), "weight": item.weight} for item in source.adapter]}
    if isinstance(source, str):
        return placed(source)
    document = source.model_copy(update={"path": place(source.path)}).model_dump(mode="json", exclude_defaults=True)
    return document["path"] if document.keys() == {"path"} else document


# ---- the folders that are read -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """What tensors are read from, a folder or a model of the hub: its place as written, whether an adapter is there instead of a model,
    whether its weights are dequantised; and which expert of it is meant, of which family."""

    path: str
    adapter: bool = False
    dequantise: bool = False
    expert: str | None = None
    family: str | None = None


def _store(folder: Folder) -> Store:
    expert = None if folder.expert is None else str(folder.expert)
    return Store(folder.path, dequantise=folder.dequantise, expert=expert, family=folder.family)


def base_store(name: str) -> str:
    """What plans call the folder of a base that is no source itself."""
    return f"{name}.base"


def adapter_stores(name: str, source: Adapted) -> list[str]:
    """What plans call the folders of a source's adapters: by the source's name, where there is one."""
    return [name] if isinstance(source.adapter, str) else [f"{name}.adapter[{index}]" for index in range(len(source.adapter))]


def stores(sources: Sources) -> dict[str, Store]:
    """Every folder that tensors are read from, by the name that plans and manifests call it."""
    found: dict[str, Store] = {}
    for name, source in sources.items():
        if isinstance(source, Adapted):
            if source.base not in sources:
                found[base_store(name)] = _store(folder_of(source.base))
            found |= {
                store: Store(item.path, adapter=True) for store, item in zip(adapter_stores(name, source), source.adapters, strict=True)
            }
        else:
            found[name] = _store(folder_of(source) if isinstance(source, str) else source)
    return found


def model_store(sources: Sources, name: str) -> str:
    """What plans call the folder of the model that a source is, or is an adapter on: there are its config.json and its tokenizer."""
    source = sources[name]
    if not isinstance(source, Adapted):
        return name
    return model_store(sources, source.base) if source.base in sources else base_store(name)


def based_on(sources: Sources) -> set[str]:
    """The sources that another one is an adapter on."""
    return {source.base for source in sources.values() if isinstance(source, Adapted) and source.base in sources}


def base_problems(sources: Sources) -> Iterator[tuple[tuple[str, ...], str]]:
    """(place, message) of bases that lead round in a circle, and of names that another source's base would have."""
    for name, source in sources.items():
        if isinstance(source, Folder) and source.expert is None and source.family is not None:
            yield ("sources", name, "family"), "it is for an expert of a mixture: add expert, or remove this key."
        if isinstance(source, Folder) and source.expert is None and (inside := folder_of(source.path)).expert is not None:
            yield ("sources", name, "path"), f"found {source.path!r}: write path: {inside.path} and expert: {inside.expert}."
        if isinstance(source, Folder) and source.expert is not None and source.dequantise:
            yield ("sources", name, "dequantise"), "mixtures are not dequantised. Remove the key, or take a mixture in 16 bits."
        if not isinstance(source, Adapted):
            continue
        chain, base = [name], source.base
        while base in sources and base not in chain and isinstance(above := sources[base], Adapted):
            chain.append(base)
            base = above.base
        if base == name:
            yield ("sources", name, "base"), f"leads back to itself: {' > '.join([*chain, name])}. Name the folder of the model."
        under = sources.get(base, base)
        if isinstance(under, Folder | str) and (of := folder_of(under) if isinstance(under, str) else under).expert is not None:
            way = f"Write it as a folder, bam-merge extract {as_text(of)} FOLDER, and name that."
            yield ("sources", name, "base"), f"an expert of a mixture is no base of an adapter here. {way}"
        if not source.adapters:
            yield ("sources", name, "adapter"), "an empty list. Name an adapter, or write the base as a plain source."
        if base_store(name) in sources:
            yield ("sources", base_store(name)), f"the base of sources.{name} is called so in plans; rename this source."
