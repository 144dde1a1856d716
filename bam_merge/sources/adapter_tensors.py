"""The tensors of an adapter by what they are: PEFT's names, with and without its prefixes, as pieces of the base's modules."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bam_merge.architectures.locate import Cell, applies, in_order
from bam_merge.sources.dense import DenseModel

PREFIXES = (
    ("base_model.model.", ""), ("base_model.", ""), ("", ""), ("base_model.model.", "model."), ("base_model.model.model.", "model."),
    ("base_model.model.model.", ""), ("base_model.", "model."), ("", "model."),
)  # fmt: skip
"""(what a file's names begin with, what the base's modules do in its place). The first is PEFT's own."""


HEAD = "lm_head"
"""What transformers 5 calls the head of every family."""


WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.|^module\.")
"""Parts of a name that torch.compile, FSDP and DDP put there."""


_KINDS = {
    "A": r"\.lora_A(?:\.[^.]+)?\.weight",
    "B": r"\.lora_B(?:\.[^.]+)?\.weight",
    "B.bias": r"\.lora_B(?:\.[^.]+)?\.bias",
    "magnitude": r"\.lora_magnitude_vector(?:\.[^.]+){0,2}",
    "velora": r"\.lora_velora_embed(?:\.[^.]+)?",
    "embedding A": r"\.lora_embedding_A(?:\.[^.]+)?",
    "embedding B": r"\.lora_embedding_B(?:\.[^.]+)?",
    "tokens": r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?",
    "base weight": r"\.base_layer\.weight",
    "base bias": r"\.base_layer\.bias",
    "weight": r"(?:\.modules_to_save(?:\.[^.]+)?)?\.weight",
    "bias": r"(?:\.modules_to_save(?:\.[^.]+)?)?\.bias",
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
        if applies(cell, base.facts) or cell.row.roles == ("head",):
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


Parts = dict[str, dict[str, str]]
"""By module, what the adapter has of it, by kind: the names of its tensors."""


def parts_of(names: Iterable[str], modules: Mapping[str, Module]) -> tuple[Parts, list[str], tuple[str, str]]:
    """(parts, the names that are of no module, the prefix that explains most): one prefix is to explain every tensor."""
    others = {module.other: module.name for module in modules.values() if module.other is not None}
    read = {name: _NAME.fullmatch(WRAPPERS.sub("", name)) for name in names}
    best: tuple[Parts, list[str], tuple[str, str]] | None = None
    for prefix in PREFIXES:
        parts: Parts = {}
        unknown = []
        for name, match in read.items():
            stem = match["module"] if match else ""
            module = prefix[1] + stem.removeprefix(prefix[0])
            module = module if module in modules else others.get(module, module)
            kind = next((kind for i, kind in enumerate(_KINDS) if match and match[f"k{i}"]), "")
            if match and stem.startswith(prefix[0]) and module in modules and kind not in parts.get(module, {}):
                parts.setdefault(module, {})[kind] = name
            else:
                unknown.append(name)
        if best is None or len(unknown) < len(best[1]):
            best = parts, unknown, prefix
    assert best is not None
    return best
