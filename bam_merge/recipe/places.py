"""What stands for a source in a recipe: a folder's name, or a mapping that says more of it; and every folder that is read for it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from bam_merge.recipe.makes import Finite, Strict


class Folder(Strict):
    """The long form of a source that is a model by itself."""

    path: str = Field(description="a Hugging Face folder, relative to the recipe")
    dequantise: bool = Field(
        default=False, description="its 8-bit floats are multiplied with their scales, which makes bfloat16 of them (or its config's dtype)"
    )


class WeightedAdapter(Strict):
    """One of several adapters on one base."""

    path: str = Field(description="the folder of a LoRA adapter, relative to the recipe")
    weight: Finite = Field(default=1.0, description="multiplies the adapter's update")


class Adapted(Strict):
    """A source that is a model with low-rank updates (PEFT's LoRA)."""

    base: str = Field(description="the model that was adapted: a source's name, or a Hugging Face folder, relative to the recipe")
    adapter: str | Annotated[tuple[WeightedAdapter, ...], Field(strict=False)] = Field(
        description="the folder of its adapter, relative to the recipe; or a list of {path: ..., weight: ...}, whose updates are added"
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
        return long_form(sources, source.base) if source.base in sources else Folder(path=source.base)
    return Folder(path=source) if isinstance(source, str) else source


def recorded(source: Source, sources: Sources, place: Callable[[str], str]) -> Any:
    """A source as a document has it, with every path as `place` gives it: text where that says it all."""
    if isinstance(source, Adapted):
        base = source.base if source.base in sources else place(source.base)
        if base in sources and source.base not in sources:
            base = f"./{base}"  # a folder that is called as a source is
        if isinstance(source.adapter, str):
            return {"base": base, "adapter": place(source.adapter)}
        return {"base": base, "adapter": [{"path": place(item.path), "weight": item.weight} for item in source.adapter]}
    folder = Folder(path=source) if isinstance(source, str) else source
    document = folder.model_copy(update={"path": place(folder.path)}).model_dump(mode="json", exclude_defaults=True)
    return document["path"] if document.keys() == {"path"} else document


# ---- the folders that are read -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """A folder that tensors are read from: its path as written, whether it holds an adapter instead of a model, and whether its weights
    are dequantised."""

    path: str
    adapter: bool = False
    dequantise: bool = False


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
                found[base_store(name)] = Store(source.base)
            found |= {
                store: Store(item.path, adapter=True) for store, item in zip(adapter_stores(name, source), source.adapters, strict=True)
            }
        else:
            folder = Folder(path=source) if isinstance(source, str) else source
            found[name] = Store(folder.path, dequantise=folder.dequantise)
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
        if not isinstance(source, Adapted):
            continue
        chain, base = [name], source.base
        while base in sources and base not in chain and isinstance(above := sources[base], Adapted):
            chain.append(base)
            base = above.base
        if base == name:
            yield ("sources", name, "base"), f"leads back to itself: {' > '.join([*chain, name])}. Name the folder of the model."
        if not source.adapters:
            yield ("sources", name, "adapter"), "an empty list. Name an adapter, or write the base as a plain source."
        if base_store(name) in sources:
            yield ("sources", base_store(name)), f"the base of sources.{name} is called so in plans; rename this source."
