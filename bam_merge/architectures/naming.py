"""The names of a text model in a file: its family's own, or with something before or inside them that programs put there.

torch.compile, DDP, FSDP and PEFT wrap a module, and the names of its tensors get longer; a model saved without its head has shorter ones; a
text model inside a wrapper has the wrapper's. Nothing is guessed: a naming counts where it alone explains every tensor that is stored.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

from bam_merge.architectures.locate import read_name, spellings
from bam_merge.architectures.tables import Architecture, head_names
from bam_merge.architectures.wrappers import Spelling, Unwrapped, Wrapper
from bam_merge.text import count, listed, printable, some

INSERTED = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
"""Words that a program puts anywhere into a name, where it wraps a part of the model: no model has them of its own."""


BEFORE = {"module.": "DataParallel, DDP or DeepSpeed", "base_model.model.": "PEFT"}
"""What a program puts before all names."""


ADAPTERS = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.", ".ranknum", ".hada_", ".lokr_")
"""What names have in a model that was saved with an adapter beside its weights."""


@dataclass(frozen=True)
class Naming:
    """`names` maps a family's own name of each tensor that belongs to the text model to the name it is stored under; `beside` the stored
    names of what a wrapper has besides to what that is; `others` are explained by neither, and `unknown` has what they would be in the
    family's own spelling. `note` says what is unlike that.
    """

    names: Mapping[str, str]
    beside: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    note: str | None = None
    problem: str | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _own(self) -> dict[str, str]:
        return {**self.unknown, **{stored: own for own, stored in self.names.items()}}

    def own_name(self, stored: str) -> str:
        """A stored name in the family's own spelling, whether the family has such a tensor or not."""
        return self._own.get(stored, stored)


@dataclass(frozen=True)
class _Reading:
    """One way to read the names: what stands before all of them, and the spelling of what follows. `others` are of no known tensor."""

    before: str
    spelling: Spelling
    names: Mapping[str, str]
    beside: Mapping[str, str]
    others: Mapping[str, str]


def find_naming(stored: Collection[str], table: Architecture, wrapper: Wrapper | None = None) -> Naming:
    """How the tensors `stored` are named, of a model of `table`, which may be inside `wrapper`."""
    known = spellings(table)

    def is_known(name: str) -> bool:
        return read_name(name, known) is not None

    if wrapper is None and all(map(is_known, stored)):
        return Naming({name: name for name in stored})
    cleaned: dict[str, str] = {}
    inserted: dict[str, None] = {}
    for name in stored:
        words = name.split(".")
        inserted.update(dict.fromkeys(word for word in words if word in INSERTED))
        short = ".".join(word for word in words if word not in INSERTED)
        if short in cleaned:
            return Naming(
                {},
                others=tuple(stored),
                problem=f"{printable(cleaned[short])} and {printable(name)} are two names of one tensor. Keep one.",
            )
        cleaned[short] = name
    readings = [_read(cleaned, before, spelling, table, wrapper, is_known) for before, spelling in _candidates(cleaned, table, wrapper)]
    different = {frozenset(reading.names.items()): reading for reading in reversed(readings)}  # of equal ones the plainest
    best = sorted(different.values(), key=lambda reading: (len(reading.others), len(reading.before), reading.before))
    if not best or not best[0].names:
        beside = {name: what for name in stored if wrapper is not None and (what := wrapper.what(name)) is not None}
        return Naming({name: name for name in stored if name not in beside}, beside)
    chosen, *rest = best
    rival = next((reading for reading in rest if _rivals(chosen, reading)), None)
    if rival is not None:
        return Naming({}, others=tuple(stored), problem=_two(chosen, rival, table))
    note = _note(chosen, list(inserted), table, wrapper)
    names = {own: cleaned[short] for own, short in chosen.names.items()}
    beside = {cleaned[short]: what for short, what in chosen.beside.items()}
    unknown = {cleaned[short]: own for short, own in chosen.others.items()}
    return Naming(names, beside, tuple(unknown), note, unknown=unknown)


def ties_of(unwrapped: Unwrapped, family: Architecture, naming: Naming) -> dict[str, bool]:
    """Whether the head of a text model in a wrapper is its embeddings: as config.json says, or else as it is stored.

    (A stored head counts in transformers whatever its class implies, and one that equals the embeddings is found to do so.)
    """
    if unwrapped.wrapper is None:
        return {}
    stored = any(head in naming.names for head in head_names(family))
    said = unwrapped.ties
    return {"tie_word_embeddings": said if said is not None else not stored and (unwrapped.contradicts or unwrapped.wrapper.tied)}


def _rivals(chosen: _Reading, other: _Reading) -> bool:
    """Whether nobody can say which of two readings is meant: both explain all, or the other one half as much, of what this one does not."""
    more = set(other.names.values()) - set(chosen.names.values())
    return (not chosen.others and not other.others) or 2 * len(more) >= len(chosen.names)


def _own(table: Architecture) -> Spelling:
    """The family's own spelling: its names begin with one word, but for the head's."""
    return Spelling(_base(table), "")


def _base(table: Architecture) -> str:
    embed = next((row.names[0] for row in table.rows if row.roles == ("embed",)), "")
    return embed.partition(".")[0] + "." if "." in embed else ""


def _anchors(table: Architecture) -> Iterator[str]:
    """Names that every model has, once."""
    rows = [row for row in table.rows if row.roles in (("embed",), ("norm.final",)) and not row.per_layer and not row.per_expert]
    yield from (name for row in rows for name in row.names)


def _candidates(cleaned: Mapping[str, str], table: Architecture, wrapper: Wrapper | None) -> Iterator[tuple[str, Spelling]]:
    """Every (what stands before, spelling) by which a name that every model has is stored, plainer ones first."""
    base = _base(table)
    if wrapper is not None:
        forms = list(wrapper.spellings)
    else:
        inside = [Spelling(f"language_model.{base}", "language_model."), Spelling(f"{base}language_model.", "")]
        forms = [_own(table), *inside, Spelling("", "")]
    for form in forms:
        found: dict[str, None] = {}
        for anchor in _anchors(table):
            tail = form.trunk + anchor.removeprefix(base)
            fronts = (name[: -len(tail)] for name in cleaned if name.endswith(tail))
            found.update(dict.fromkeys(before for before in fronts if not before or before.endswith(".")))
        yield from ((before, form) for before in sorted(found, key=len))


def _read(
    cleaned: Mapping[str, str], before: str, form: Spelling, table: Architecture, wrapper: Wrapper | None, is_known: Callable[[str], bool]
) -> _Reading:
    base, names, beside, others = _base(table), dict[str, str](), dict[str, str](), dict[str, str]()
    heads = tuple(name for row in table.rows for name in row.names if not name.startswith(base))
    own_of = partial(_own_name, before=before, form=form, base=base, heads=heads)
    for name in cleaned:
        own = own_of(name)
        what = wrapper.what(name.removeprefix(before)) if wrapper is not None and name.startswith(before) else None
        if own is not None and is_known(own) and own not in names:
            names[own] = name
        elif what is not None:
            beside[name] = what
        else:
            others[name] = own or name
    return _Reading(before, form, names, beside, others)


def _own_name(name: str, before: str, form: Spelling, base: str, heads: tuple[str, ...]) -> str | None:
    """What the family calls a stored tensor; None where the reading has no such name."""
    trunk, rest = before + form.trunk, before + form.rest
    if name.startswith(trunk) and form.trunk:
        return base + name[len(trunk) :]
    if not name.startswith(rest):
        return None
    own = name[len(rest) :]
    if form.trunk:
        return None if own.startswith(base) else own
    return own if own in heads else base + own


def _begins(reading: _Reading) -> str:
    return printable(reading.before + reading.spelling.trunk) or "no word before them"


def _two(a: _Reading, b: _Reading, table: Architecture) -> str:
    return (
        f"{count(len(a.names), 'tensor')} of a {table.name} model have names that begin with {_begins(a)}, and {len(b.names):,} have "
        f"names that begin with {_begins(b)}: two prefixes, which are two models or one that was saved twice. Nothing is guessed: keep one."
    )


def _note(reading: _Reading, inserted: list[str], table: Architecture, wrapper: Wrapper | None) -> str | None:
    """What is unlike the family's own names, in words; None where nothing is but what the wrapper's table says."""
    parts = [f"names with {word} in them ({INSERTED[word]})" for word in inserted]
    before = reading.before
    if before:
        makers = [maker for prefix, maker in BEFORE.items() if prefix in before]
        parts.append(f"prefix {printable(before)} before every name" + (f" ({listed(makers)})" if makers else ""))
    if wrapper is None and reading.spelling != _own(table):
        if reading.spelling.trunk:
            parts.append(f"prefix {reading.spelling.trunk} in the place of {_base(table)}")
        else:
            parts.append(f"names without the prefix {_base(table)} (a model saved without its head)")
    return f"{listed(parts)}: read as {table.name}'s own" if parts else None


def adapter_problem(others: Collection[str]) -> str | None:
    """What is said of tensors that are an adapter's, beside the weights that it was made for."""
    found = [name for name in others if any(mark in name for mark in ADAPTERS)]
    if not found:
        return None
    return (
        f"{some(found)}: {count(len(found), 'tensor')} of an adapter that was saved beside the weights it changes. Merge it into them "
        "first (PEFT: merge_and_unload), or give the base model and the adapter by themselves."
    )
