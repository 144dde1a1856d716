"""Which row of which source belongs to which token of the result: vocabularies that differ a little, aligned token by token.

Plain data from tokenizers and row counts alone. Row r of the result belongs to its token r. A source gives the row in which it has that
token; where it has none, the row is made of those of the sources that have it. Rows without a token are padding, kept by their number.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bam_merge.errors import CheckpointError
from bam_merge.recipe.schema import Vocabulary as Wanted
from bam_merge.sources.tokenizers.forms import same_token
from bam_merge.sources.tokenizers.vocabulary import Vocabulary, base_differs, in_numbers
from bam_merge.text import count, printable, some

UNION = "union"
"""What stands at tokenizer.source for all tokens of all sources."""


class Run(NamedTuple):
    """So many rows, each the mean of one row of each source in `of` (source, first row), in their order; zeros where there is none."""

    rows: int
    of: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Aligned:
    """What one source gives to the result. `runs` are its rows in the order of the result; the rest counts tokens.

    `lost` are tokens of the source that the result has not.
    """

    runs: tuple[Run, ...]
    tokens: int
    moved: int
    made: int
    lost: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The sources whose rows these are, in order of appearance."""
        return tuple(dict.fromkeys(source for run in self.runs for source, _ in run.of))


@dataclass(frozen=True)
class Alignment:
    """The result's vocabulary: `ids` of its tokens, `rows` of its embeddings. `giver` is the source whose tokenizer files it takes;
    `added` are the tokens, in the order of their ids, that these lack, each with the source that has it first; `template` is the source
    of the chat template, if one was asked for. `sources` say what each gives. `renumbered` has the ids of the seed's tokens that have
    another one in the result, None where they have none.
    """

    giver: str
    ids: Mapping[str, int]
    rows: int
    added: Mapping[str, str]
    shared: int
    sources: Mapping[str, Aligned]
    template: str | None = None
    padding: int = 0
    unmade: int = 0
    notes: tuple[str, ...] = ()
    renumbered: Mapping[int, int | None] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As plans in JSON show it."""
        sources = {
            name: {"tokens": mine.tokens, "moved": mine.moved, "made": mine.made, "left_out": len(mine.lost)}
            for name, mine in self.sources.items()
        }
        counts = {"tokens": len(self.ids), "rows": self.rows, "shared": self.shared, "added": len(self.added), "padding": self.padding}
        return {"of": self.giver, **counts, "sources": sources}

    def moves(self, source: str) -> bool:
        """Whether what the source gives is anything else than its own rows as they stand."""
        return self.sources[source].runs != (Run(self.rows, ((source, 0),)),)


def align(wanted: Wanted, vocabularies: Mapping[str, Vocabulary | None], rows: Mapping[str, int], file: str = "recipe") -> Alignment:
    """The alignment of the sources, in the order of `rows`, the seed first. Raises CheckpointError with every reason why there is none.

    `vocabularies` are their tokens, None where no file names any, and `rows` the rows of their embeddings. `file` is what messages call
    the recipe.
    """
    have = {name: found for name in rows if (found := vocabularies.get(name)) is not None}
    giver = next(iter(have), None) if wanted.source == UNION else wanted.source
    if giver not in have or giver is None:
        why = "no source has a tokenizer" if giver is None else f"sources.{printable(giver)} has no tokenizer"
        raise CheckpointError(
            f"{file}: tokenizer.source: {why}, so nothing says which row of the embeddings belongs to which token. Put its files there."
        )
    first = have[giver]
    problems = [
        f"sources.{name}: its base vocabulary is not that of sources.{giver}: {difference}. {_numbers(other, first)}. "
        "Base pieces and merges must be the same: tokenizer aligns tokens that were added, and rows."
        for name, other in have.items()
        if name != giver and (difference := base_differs(other, first))
    ]
    if problems:
        raise CheckpointError(*problems)
    tokens = {name: _spelled(found, first) for name, found in have.items()}
    tokens |= {name: tokens[giver] for name in rows if name not in have}
    ids, added = _result(wanted, giver, tokens, rows)
    last = max(tokens[giver], key=tokens[giver].__getitem__, default="")
    if added and last and ids[last] >= max(rows.values()) + len(ids):
        raise CheckpointError(
            f"sources.{giver}: {_shown(last)} has id {ids[last]}, its embeddings have {rows[giver]:,} rows: the tokens of a "
            "vocabulary are numbered without such gaps. Mend its tokenizer files."
        )
    size = _size(wanted, giver, ids, tokens, rows)
    own = {name: _own_rows(ids, tokens[name], rows[name], size) for name in rows}
    sources = {name: _aligned(ids, tokens[name], rows[name], own[name], _filled(wanted.missing, name, own)) for name in rows}
    places = [number for number in ids.values() if number < size]
    return Alignment(
        giver,
        ids,
        size,
        added,
        shared=sum(all(column[place] >= 0 for column in own.values()) for place in places),
        sources=sources,
        template=wanted.chat_template,
        padding=size - len(places),
        unmade=sum(all(column[place] < 0 for column in own.values()) for place in range(size)),
        renumbered={number: ids.get(token) for token, number in tokens[next(iter(rows))].items() if ids.get(token) != number},
        notes=tuple(_notes(wanted, giver, sources, places, own, [name for name in rows if name not in have])),
    )


def _aligned(ids: Mapping[str, int], mine: Mapping[str, int], rows: int, own: "array[int]", runs: tuple[Run, ...]) -> Aligned:
    there = [(token, number) for token, number in mine.items() if number < rows]
    moved = sum(token in ids and ids[token] != number for token, number in there)
    lost = tuple(token for token, _ in there if token not in ids)
    return Aligned(runs, len(there), moved, sum(own[number] < 0 for number in ids.values() if number < len(own)), lost)


def _numbers(mine: Vocabulary, theirs: Vocabulary) -> str:
    text = in_numbers(mine, theirs)
    return text[0].upper() + text[1:]


def _spelled(mine: Vocabulary, first: Vocabulary) -> dict[str, int]:
    """Ids by token, each base piece as the first vocabulary spells it: forms write a space, or a byte, in different letters."""
    if mine is first:
        return mine.ids
    names = first.names
    ids: dict[str, int] = {}
    for number, token in mine.names.items():
        other = names.get(number)
        ids.setdefault(other if other is not None and (other == token or same_token(other, token)) else token, number)
    return ids


def _result(
    wanted: Wanted, giver: str, tokens: Mapping[str, Mapping[str, int]], rows: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, str]]:
    """The result's ids, and the tokens that were added to the giver's, each with the first source that has it."""
    ids, added = dict(tokens[giver]), dict[str, str]()
    end = max(ids.values(), default=-1) + 1
    if wanted.source == UNION:
        for name, mine in tokens.items():
            for token, number in sorted(mine.items(), key=lambda item: item[1]):
                if token not in ids and number < rows[name]:
                    ids[token], added[token] = end, name
                    end += 1
    return ids, added


def _size(wanted: Wanted, giver: str, ids: Mapping[str, int], tokens: Mapping[str, Mapping[str, int]], rows: Mapping[str, int]) -> int:
    """The rows of the result: as many as its tokens need for which a source has a row, and of a union no source's padding is cut."""
    needed = (ids[token] + 1 for name, mine in tokens.items() for token, number in mine.items() if number < rows[name] and token in ids)
    size = max(max(needed, default=1), *(rows.values() if wanted.source == UNION else (rows[giver],)))
    multiple = wanted.pad_to_multiple_of or 1
    return -(-size // multiple) * multiple


def _own_rows(ids: Mapping[str, int], mine: Mapping[str, int], rows: int, size: int) -> "array[int]":
    """For every row of the result the source's row of the same token, or of padding with the same number; -1 where it has none."""
    own = array("q", range(min(rows, size))) + array("q", [-1]) * max(0, size - rows)
    for number in (*ids.values(), *mine.values()):
        if number < size:
            own[number] = -1
    for token, number in ids.items():
        place = mine.get(token, -1)
        if number < size:
            own[number] = place if place < rows else -1
    return own


def _filled(missing: str, name: str, own: Mapping[str, "array[int]"]) -> tuple[Run, ...]:
    """The runs of a source, with what it lacks made as `missing` says."""
    mine, others = own[name], {other: column for other, column in own.items() if other != name}
    chosen = others.get(missing)

    def origin(place: int) -> tuple[tuple[str, int], ...]:
        if mine[place] >= 0:
            return ((name, mine[place]),)
        if missing == "zeros":
            return ()
        if chosen is not None and chosen[place] >= 0:
            return ((missing, chosen[place]),)
        return tuple((other, column[place]) for other, column in others.items() if column[place] >= 0)

    return tuple(_runs(map(origin, range(len(mine)))))


def _runs(origins: Iterator[tuple[tuple[str, int], ...]]) -> Iterator[Run]:
    """Rows that follow each other in every source, together."""
    first: tuple[tuple[str, int], ...] | None = None
    length = 0
    for origin in origins:
        if first is not None and origin == tuple((source, row + length) for source, row in first):
            length += 1
            continue
        if first is not None:
            yield Run(length, first)
        first, length = origin, 1
    if first is not None:
        yield Run(length, first)


# ---- in words ----------------------------------------------------------------------------------------------------------------


def _notes(
    wanted: Wanted,
    giver: str,
    sources: Mapping[str, Aligned],
    places: Sequence[int],
    own: Mapping[str, "array[int]"],
    without: Sequence[str],
) -> Iterator[str]:
    """What a plan has to say. `without` are the sources that have no tokenizer."""
    for name in without:
        whose = f"of the tokens of sources.{giver}"
        yield f"sources.{name} has no tokenizer: its rows are taken to be those {whose}, which nothing here can check."
    for name, mine in sources.items():
        if mine.lost:
            yield f"sources.{name}: {count(len(mine.lost), 'token')} that sources.{giver} has not left out: {_some(mine.lost)}."
    columns = list(own.values())
    if (chosen := own.get(wanted.missing)) is not None:
        both = sum(chosen[place] < 0 for place in places if any(column[place] < 0 for column in columns if column is not chosen))
        if both:
            yield f"tokenizer.missing: sources.{wanted.missing} lacks {count(both, 'token')} as well: made by mean of those that have it."
    padding = len(columns[0]) - len(places)
    nobodys = sum(all(column[place] < 0 for column in columns) for place in range(len(columns[0])))
    if padding or nobodys:
        text = f"{count(padding, 'row')} of the embeddings without a token (padding): a source's own, where it has a row of that number"
        yield text + (f"; {count(nobodys, 'row')} that no source has are zeros." if nobodys else ".")


def _some(tokens: Sequence[str]) -> str:
    return some((_shown(token) for token in tokens), 5)


def _shown(token: str) -> str:
    return printable(repr(token), 60)
