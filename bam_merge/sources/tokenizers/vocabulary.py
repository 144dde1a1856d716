"""The tokens of one source and their ids, by all files of its folder together; and whether two sources have one base vocabulary.

A token that was added to a finished vocabulary is matched as it stands, so that it can have any id. A base piece is found by merges or
scores, which name each other: base vocabularies are the same or they are not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bam_merge.checkpoints.folder import VOCABULARIES
from bam_merge.sources.tokenizers.forms import FORMS, PARTIAL, Form, same_token
from bam_merge.text import count, printable

CONTROL, USER_DEFINED = 3, 4
"""Types of sentencepieces that are matched as they stand, as added tokens are (sentencepiece_model.proto)."""


@dataclass(frozen=True)
class Vocabulary:
    """`names`: the token of every id, one for each. `added` are ids of tokens that stand beside the base vocabulary; `orders` what joins
    base pieces, by kind (merges, scores). `misnumbered` says of which token a loader may have another id.
    """

    source: str
    names: Mapping[int, str]
    added: frozenset[int]
    orders: Mapping[str, Any] = field(default_factory=dict)
    misnumbered: str = ""

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token; of a token that has two, the first."""
        ids: dict[str, int] = {}
        for number, token in self.names.items():
            ids.setdefault(token, number)
        return ids

    @property
    def end(self) -> int:
        """One more than the largest id."""
        return max(self.names, default=-1) + 1


def vocabulary(source: str, forms: Mapping[str, Form]) -> Vocabulary | None:
    """What the files of one folder name together, which do not contradict each other; None where no file names tokens.

    The first file that a loader takes decides, and what adds to a tokenizer is added. Raises ValueError, in words, for an id that is no
    natural number.
    """
    main = next((forms[name] for name in FORMS if name in VOCABULARIES and name in forms and not forms[name].unread), None)
    if main is None:
        return None
    names: dict[int, str] = {}
    for token, number in main.ids.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{main.file}: the id of {printable(repr(token))} is {printable(repr(number), 40)}, no natural number")
        if number not in names or number in main.added:
            names[number] = token
    added = set(main.added)
    if main.file == "tokenizer.model" and isinstance(main.split, tuple):
        added.update(i for i, kind in enumerate(main.split[1]) if kind in (CONTROL, USER_DEFINED))
    for form in (forms[name] for name in forms if name in PARTIAL):
        for token, number in form.ids.items():
            if number not in names or not same_token(names[number], token):
                names[number] = token
        added |= form.added
    orders = {form.order[0]: form.order[1] for form in reversed(list(forms.values())) if form.order}
    return Vocabulary(source, names, frozenset(added), orders, main.misnumbered)


# ---- whether two sources have one base ---------------------------------------------------------------------------------------


def base_differs(mine: Vocabulary, theirs: Vocabulary) -> str:
    """Where two base vocabularies differ first, in words; '' where they are one."""
    number = next(_contradictions(mine, theirs), None)
    if number is None:
        number = next(_contradictions(theirs, mine), None)
    if number is not None:
        others = len({*_contradictions(mine, theirs), *_contradictions(theirs, mine)}) - 1
        more = f", and {count(others, 'more id')} differ{'s' if others == 1 else ''}" if others else ""
        return f"id {number} is {_named(mine.names.get(number))} here, {_named(theirs.names.get(number))} there{more}"
    for kind in mine.orders.keys() & theirs.orders.keys():
        if difference := _orders_differ(kind, mine.orders[kind], theirs.orders[kind]):
            return difference
    return ""


def _contradictions(a: Vocabulary, b: Vocabulary) -> Iterator[int]:
    """The ids of base pieces of `a` that are not the same tokens in `b`."""
    names = b.names
    for number, token in a.names.items():
        other = names.get(number)
        if other != token and number not in a.added and (other is None or not same_token(token, other)):
            yield number


def _orders_differ(kind: str, mine: Any, theirs: Any) -> str:
    """The first merge or score that two vocabularies do not share. Of scores, those of the ids that both have."""
    if mine == theirs:
        return ""
    if kind == "scores":
        (algorithm, ours), (other, others) = mine, theirs
        if algorithm != other:
            return f"scores of kind {algorithm} here, {other} there"
        pairs = enumerate(zip(ours, others, strict=False))
    elif len(mine) != len(theirs):
        return f"{len(mine):,} merges here, {len(theirs):,} there"
    else:
        pairs = enumerate(zip(mine, theirs, strict=True))
    index, pair = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (0, None))
    if pair is None:
        return ""
    ours, others = (printable(" ".join(map(str, item)) if isinstance(item, list) else str(item), 60) for item in pair)
    return f"the {kind} are not the same: number {index} is {ours} here, {others} there"


def _named(token: str | None) -> str:
    return "no token" if token is None else printable(repr(token), 60)


def in_numbers(mine: Vocabulary, theirs: Vocabulary) -> str:
    """How many tokens two sources share, and an example of what only one has."""
    shared = mine.ids.keys() & theirs.ids.keys()
    parts = [f"both have {count(len(shared), 'token')}"]
    for side, where in ((mine, "here"), (theirs, f"in sources.{theirs.source}")):
        alone = [token for token in side.ids if token not in shared]
        if alone:
            parts.append(f"{len(alone):,} only {where} ({_named(alone[0])})")
    moved = [token for token in mine.ids if theirs.ids.get(token, mine.ids[token]) != mine.ids[token]]
    if moved:
        first = moved[0]
        parts.append(f"{len(moved):,} have another id ({_named(first)} has {mine.ids[first]} here, {theirs.ids[first]} there)")
    return ", ".join(parts)
