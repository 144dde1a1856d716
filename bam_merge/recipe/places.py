"""What stands for a source in a recipe: a folder's name, or a mapping that says more of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from bam_merge.recipe.makes import Strict


@dataclass(frozen=True)
class Store:
    """What tensors are read from, a folder or a model of the hub: its place as written, and whether an adapter is there, and no model."""

    path: str
    adapter: bool = False


@dataclass(frozen=True)
class Known:
    """Where a model of the hub is that a recipe names: what documents record of it, with its commit, and its folder on this machine."""

    recorded: str
    folder: Path


class Folder(Strict):
    """The long form of a source that is a model by itself."""

    path: str = Field(description="a Hugging Face folder, relative to the recipe; or a model of the hub, org/name or org/name@revision")


def _form(value: Any) -> str:
    return "folder" if isinstance(value, dict | Folder) else "text"


if TYPE_CHECKING:
    Source = str | Folder
else:
    Source = Annotated[Annotated[str, Tag("text")] | Annotated[Folder, Tag("folder")], Discriminator(_form)]


def long_form(source: Source) -> Folder:
    """A source with everything about it that a recipe can say."""
    return Folder(path=source) if isinstance(source, str) else source


def short_form(source: Folder) -> Any:
    """A source as a document has it: text where that says it all."""
    document = source.model_dump(mode="json", exclude_defaults=True)
    return document["path"] if document.keys() == {"path"} else document
