"""The tensors of an adapter by what they are: PEFT's names, with and without its prefixes, as pieces of the base's modules."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bam_merge.architectures.locate import Cell, applies, in_order
from bam_merge.architectures.naming import INSERTED
from bam_merge.architectures.wrappers import Wrapper
from bam_merge.sources.dense import DenseModel

PREFIXES = (
    ("base_model.model.", ""), ("base_model.", ""), ("", ""), ("base_model.model.", "model."), ("base_model.model.model.", "model."),
    ("base_model.model.model.", ""), ("base_model.", "model."), ("", "model."),
)  # fmt: skip
"""(what a file's names begin with, what the base's modules do in its place). The first is PEFT's own."""


INSIDE = (("model.language_model.", ""), ("language_model.model.", "language_model."))
"""What the names of a text model inside a model of images begin with, and its head's; further ones stand in the wrappers' tables."""


HEAD = "lm_head"
"""What transformers 5 calls the head of every family."""


WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(INSERTED)})\.|^module\.")
"""Parts of a name that torch.compile, FSDP and DDP put there."""


_KINDS = {
    "A": r"\.lora_A(?:\.[\w-]+)?\.weight",
    "B": r"\.lora_B(?:\.[\w-]+)?\.weight",
    "B.bias": r"\.lora_B(?:\.[\w-]+)?\.bias",
    "magnitude": r"\.lora_magnitude_vector(?:\.[\w-]+){0,2}",
    "velora": r"\.lora_velora_embed(?:\.[\w-]+)?",
    "embedding A": r"\.lora_embedding_A(?:\.[\w-]+)?",
    "embedding B": r"\.lora_embedding_B(?:\.[\w-]+)?",
    "tokens": r"\.token_adapter\.trainable_tokens_delta(?:\.[\w-]+)?",
    "base weight": r"\.base_layer\.weight",
    "base bias": r"\.base_layer\.bias",
    "weight": r"(?:\.modules_to_save(?:\.[\w-]+)?)?\.weight",
    "bias": r"(?:\.modules_to_save(?:\.[\w-]+)?)?\.bias",
}
"""What a tensor is of its module, by the end of its name; the adapter's own name may stand inside."""


_NAME = re.compile("(?P<module>.+?)(?:" + "|".join(f"(?P<k{i}>{end})" for i, end in enumerate(_KINDS.values())) + ")")


@dataclass(frozen=True)
class Module:
    """A module of the base, by its name in the base's file. `cells` are its weight and bias, as far as it has them; a tied head has none.
    `other` is another name of it, in another version of transformers."""

    name: str
    cells: Mapping[str, Cell]
    embedding: bool = False
    head: bool = False
    linear: bool = False
    other: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.other is None else (self.name, self.other)


def modules_of(base: DenseModel) -> dict[str, Module]:
    """Every module of the base that has weights, by its name."""
    found: dict[str, dict[str, Cell]] = {}
    for cell in in_order(base.family, base.facts["num_hidden_layers"]):
        if cell.row.pieces is None and (applies(cell, base.facts) or cell.row.roles == ("head",)):
            name, _, part = cell.names[0].rpartition(".")
            found.setdefault(name, {})[part] = cell
    modules = {}
    for name, cells in found.items():
        roles = {role for cell in cells.values() for role in cell.row.roles}
        embedding, head = "embed" in roles, "head" in roles
        linear = not embedding and not any(role.startswith("norm.") or role.endswith("_norm") for role in roles)
        if head and not applies(cells["weight"], base.facts):
            cells = {}
        modules[name] = Module(name, cells, embedding, head, linear, HEAD if head and name != HEAD else None)
    return modules


Prefix = tuple[str, str, str]
"""What a file's names begin with, what the base's modules do in its place, and what the names of its head begin with."""


def prefixes_of(wrapper: Wrapper | None) -> Iterator[Prefix]:
    """Every way to begin the names, of an adapter on a text model, and of one that was trained with a wrapper around it."""
    yield from ((before, word, before) for before, word in PREFIXES)
    spellings = [(spelling.trunk, spelling.rest) for spelling in wrapper.spellings] if wrapper is not None else []
    for trunk, rest in dict.fromkeys((*INSIDE, *spellings)):
        yield from ((before + trunk, "model.", before + rest) for before in (PREFIXES[0][0], "base_model.", ""))


def trained_names(module: Module, prefix: Prefix) -> tuple[str, ...]:
    """What a module was called where the adapter was trained, by the prefix of its file: what the configuration's patterns are for."""
    before, word, rest = (part.removeprefix(PREFIXES[0][0]) for part in prefix)
    if not prefix[0].startswith(PREFIXES[0][0]) or not before:
        return module.names
    return tuple(before + name.removeprefix(word) if name.startswith(word) else rest + name for name in module.names)


Parts = dict[str, dict[str, str]]
"""By module, what the adapter has of it, by kind: the names of its tensors."""


def beside_of(name: str, wrapper: Wrapper | None) -> str | None:
    """What of a wrapper an adapter's tensor changes that is no part of its text model."""
    short = WRAPPERS.sub("", name)
    starts = (PREFIXES[0][0], "base_model.", "")
    found = (wrapper.what(short.removeprefix(start)) for start in starts if wrapper is not None and short.startswith(start))
    return next((what for what in found if what is not None), None)


def parts_of(names: Iterable[str], modules: Mapping[str, Module], wrapper: Wrapper | None = None) -> tuple[Parts, list[str], Prefix]:
    """(parts, the names that are of no module, the prefix that explains most): one prefix is to explain every tensor."""
    others = {module.other: module.name for module in modules.values() if module.other is not None}
    read = {name: _NAME.fullmatch(WRAPPERS.sub("", name)) for name in names}
    best: tuple[Parts, list[str], Prefix] | None = None
    for prefix in prefixes_of(wrapper):
        before, word, rest = prefix
        parts: Parts = {}
        unknown = []
        for name, match in read.items():
            stem = match["module"] if match else ""
            module = word + stem.removeprefix(before) if stem.startswith(before) else stem.removeprefix(rest)
            module = module if module in modules else others.get(module, module)
            kind = next((kind for i, kind in enumerate(_KINDS) if match and match[f"k{i}"]), "")
            if match and stem.startswith((before, rest)) and module in modules and kind not in parts.get(module, {}):
                parts.setdefault(module, {})[kind] = name
            else:
                unknown.append(name)
        if best is None or len(unknown) < len(best[1]):
            best = parts, unknown, prefix
    assert best is not None
    return best
