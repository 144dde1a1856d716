"""Do the sources tokenise alike? Models whose token ids mean different words cannot share embeddings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from bam_merge.errors import CheckpointError
from bam_merge.recipe.schema import Vocabulary as Wanted
from bam_merge.sources.companions import companion
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.tokenizers.alignment import UNION, Alignment, align
from bam_merge.sources.tokenizers.forms import PARTIAL, Form, as_json, same_token
from bam_merge.sources.tokenizers.reading import Tokenizer, TokenizerFindings, open_tokenizers
from bam_merge.sources.tokenizers.vocabulary import Vocabulary, base_differs, in_numbers, vocabulary
from bam_merge.sources.tokenizers.writing import writing_notes, writing_problems
from bam_merge.text import printable, some

__all__ = ["TokenizerFindings", "companion", "compare_tokenizers"]


REMEDY = "The embeddings would be averaged over different words; align the tokenizers first."


STALE = "Remove the one that is out of date."


def compare_tokenizers(models: Sequence[DenseModel]) -> TokenizerFindings:
    """Compare every form of every source's tokenizer with the others', and check what the output takes of the first source, the seed.

    Ids must mean the same tokens wherever two sources name them, and merges or scores be the same; how text is split before that may
    differ between versions of a library, so it is a note, as is what cannot be compared.
    """
    found, tokenizers = open_tokenizers(models)
    if not tokenizers:
        return found
    _within(tokenizers, found)
    _between(tokenizers, found)
    _absences(tokenizers, found)
    found.notes += _without_rows(tokenizers[0], models[0].facts["vocab_size"])
    return found


def align_tokenizers(models: Sequence[DenseModel], wanted: Wanted, file: str) -> tuple[TokenizerFindings, Alignment | None]:
    """The sources' tokens aligned as `wanted`, where no folder contradicts itself. `file` is what messages call the recipe."""
    found, tokenizers = open_tokenizers(models, None if wanted.source == UNION else wanted.source)
    if not tokenizers:
        return found, None
    _within(tokenizers, found)
    vocabularies: dict[str, Vocabulary | None] = {}
    for tokenizer in tokenizers:
        try:
            vocabularies[tokenizer.source] = mine = vocabulary(tokenizer.source, tokenizer.forms)
        except ValueError as error:
            found.problems.append(f"sources.{tokenizer.source}: {error}.")
        else:
            if mine is not None and mine.misnumbered:
                found.notes.append(f"sources.{tokenizer.source}: tokenizer.json: {mine.misnumbered}; the file is believed.")
    if found.problems:
        return found, None
    try:
        aligned = align(wanted, vocabularies, {model.name: model.facts["vocab_size"] for model in models}, file)
        folders = {model.name: model.checkpoint.path for model in models}
        found.problems += writing_problems(found.files, folders, aligned, file)
    except CheckpointError as error:
        found.problems += error.problems
        return found, None
    found.problems += _numbered_otherwise(next(t for t in tokenizers if t.source == aligned.giver), aligned)
    pairs = [(mine, theirs) for mine, theirs in combinations(tokenizers, 2) if mine.there and theirs.there]
    found.notes += dict.fromkeys(note for mine, theirs in pairs for note in _cut_otherwise(theirs, mine))
    found.notes += [*_unread(tokenizers), *aligned.notes, *writing_notes(found.files, aligned)]
    found.notes += _ends(aligned, vocabularies, models, union=wanted.source == UNION)
    return found, aligned


def _ends(aligned: Alignment, vocabularies: Mapping[str, Vocabulary | None], models: Sequence[DenseModel], union: bool) -> Iterator[str]:
    """Tokens with which the chat template's source ends a text, by its config.json, and that do not end the result's."""
    configs = {model.name: model.config.get("eos_token_id") for model in models}
    theirs = vocabularies[aligned.template] if aligned.template is not None else None
    if theirs is None:
        return
    ours = models[0].name if union else aligned.giver
    ends, known = ([value] if type(value) is int else value or [] for value in (configs[theirs.source], configs[ours]))
    for token in (theirs.names[number] for number in ends if number in theirs.names):
        if aligned.ids.get(token) not in known:
            yield (
                f"tokenizer.chat_template: sources.{theirs.source} ends a text with {_shown(token)}, the result does not: generation may "
                f"need its id {aligned.ids.get(token, '')} among eos_token_id."
            )


def _numbered_otherwise(giver: Tokenizer, aligned: Alignment) -> Iterator[str]:
    """Why added tokens would have other ids in the library tokenizers than in the result, where the giver's own have the right ones."""
    form = giver.forms.get("tokenizer.json")
    if form is None or form.misnumbered or not aligned.added:
        return
    after = sorted(number for token, number in aligned.ids.items() if token not in form.ids)
    if after and after != list(range(form.next_number, form.next_number + len(after))):
        yield (
            f"sources.{giver.source}: tokenizer.json leaves ids unused below {after[-1]}: the library tokenizers would give the tokens of "
            f"other sources ids from {form.next_number} on, they are to have {after[0]} and up. Use the tokenizer of another source "
            "(tokenizer.source)."
        )


# ---- the forms in one folder -----------------------------------------------------------------------------------------------


def _within(tokenizers: Sequence[Tokenizer], found: TokenizerFindings) -> None:
    """Two forms in one folder that contradict each other: which one counts depends on who loads the output."""
    for tokenizer in tokenizers:
        for a, b in combinations(tokenizer.forms.values(), 2):
            clash = _clash(a, b)
            if clash is None and (orders := _orders_differ(a, b)):
                found.problems.append(f"sources.{tokenizer.source}: {a.file} and {b.file} contradict each other: {orders}. {STALE}")
            if clash is None:
                continue
            text = f"sources.{tokenizer.source}: {a.file} and {b.file} contradict each other: {clash.text}"
            if a.is_added(clash.number) == b.is_added(clash.number):
                found.problems.append(f"{text}. {STALE}")
            else:
                found.notes.append(f"{text}; it is taken as renamed, by {a.file if a.is_added(clash.number) else b.file}.")


@dataclass(frozen=True)
class Clash:
    """An id that two forms give to different tokens, in words."""

    number: Any
    text: str


def _clash(a: Form, b: Form) -> Clash | None:
    """The first contradiction between the ids that both forms name; what only one names is none."""
    if a.ids == b.ids or not a.ids or not b.ids:
        return None
    theirs = b.names
    renamed = None
    for token, number in a.ids.items():
        other = b.ids.get(token)
        if other is None and type(number) is int:
            names = theirs.get(number, [token])
            if any(same_token(token, name) for name in names):
                continue
            text = f"id {number} is {_shown(token)} in {a.file}, {_shown(names[0])} in {b.file}"
        elif other is None or other == number:
            continue
        else:
            text = f"token {_shown(token)} has id {_id(number)} in {a.file}, {_id(other)} in {b.file}"
        clash = Clash(number, text)
        if a.is_added(number) == b.is_added(number):
            return clash
        renamed = renamed or clash
    return renamed


def _orders_differ(a: Form, b: Form) -> str:
    """What is said of merges or scores that both forms hold, and that are not the same."""
    if a.order is None or b.order is None or a.order[0] != b.order[0] or a.order[1] == b.order[1]:
        return ""
    return f"the {a.order[0]} are not the same"


def _shown(token: str) -> str:
    return printable(repr(token))


def _id(number: Any) -> str:
    return printable(str(number), 40)


# ---- one source and another ------------------------------------------------------------------------------------------------


def _between(tokenizers: Sequence[Tokenizer], found: TokenizerFindings) -> None:
    """Every source with every one before it, unless their files are the same; one problem for each source."""
    alike: dict[tuple[str, ...], str] = {}
    distinct = [t for t in tokenizers if alike.setdefault(_fingerprint(t), t.source) == t.source]
    for index, mine in enumerate(distinct):
        for theirs in distinct[:index]:
            if problem := _differ(mine, theirs):
                found.problems.append(f"sources.{mine.source}: {problem}{_way_out(mine, theirs)}. {REMEDY}")
                break
        else:
            pairs = ((mine, theirs) for theirs in distinct[:index] if mine.there and theirs.there)
            found.notes += (note for pair in pairs for note in _not_compared(*pair))


def _way_out(mine: Tokenizer, theirs: Tokenizer) -> str:
    """How two sources that differ can be aligned, or why no recipe can, with numbers; '' where their tokens cannot be told."""
    try:
        ours, others = (vocabulary(side.source, side.forms) for side in (mine, theirs))
    except ValueError:
        return ""
    if ours is None or others is None:
        return ""
    numbers = in_numbers(ours, others)
    if base_differs(ours, others):
        return f" ({numbers}; the base vocabularies differ, so that no recipe can align them)"
    return f" ({numbers}; tokenizer: {{source: union}} in the recipe aligns them by token)"


def _fingerprint(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The files, their bytes: of tokenizer_config.json only the tokens, for the rest of it is settings."""
    return tuple(
        f"{name} {as_json(form.ids) if name == 'tokenizer_config.json' else form.digest}" for name, form in tokenizer.forms.items()
    )


def _differ(mine: Tokenizer, theirs: Tokenizer) -> str:
    """What differs between two sources' tokenizers; '' when nothing does."""
    for name in [name for name in mine.forms if name in theirs.forms]:
        if difference := _same_file_differs(mine.forms[name], theirs.forms[name], mine, theirs):
            return f"{name} differs from sources.{theirs.source}: {difference}"
    for a, b in _across(mine, theirs):
        clash = _clash(a, b)
        difference = clash.text if clash else _orders_differ(a, b)
        if difference:
            return f"{a.file} differs from {b.file} of sources.{theirs.source}: {difference}"
    return ""


def _across(mine: Tokenizer, theirs: Tokenizer) -> Iterator[tuple[Form, Form]]:
    """The pairs of different files that must agree: not those that a file of both folders links, for a folder agrees with itself."""
    for a in mine.forms.values():
        for b in theirs.forms.values():
            linked = a.file in theirs.forms or b.file in mine.forms
            if a.file != b.file and (not linked or {a.file, b.file} & {"added_tokens.json", "tokenizer_config.json"}):
                yield a, b


def _same_file_differs(a: Form, b: Form, mine: Tokenizer, theirs: Tokenizer) -> str:
    """What differs between one file, `a` and `b`, of two folders.

    Where a file holds a whole vocabulary, a token that only one names differs too, unless the other folder names it in another file.
    """
    if a.digest == b.digest:
        return ""
    if a.unread or b.unread:
        return "not the same bytes"
    if a.file in PARTIAL or a.file == "tekken.json":  # which names its special tokens in some versions only
        clash = _clash(a, b)
        return (clash.text if clash else "") or _orders_differ(a, b)
    if a.ids == b.ids:
        return _orders_differ(a, b)
    here, there = ({**_elsewhere(side), **form.ids} for side, form in ((mine, a), (theirs, b)))
    for token in a.ids:
        if token not in there or there[token] != a.ids[token]:
            return f"token {_shown(token)} has id {_id(a.ids[token])} here, {_id(there.get(token, 'none'))} there"
    if not b.ids.keys() <= here.keys():
        return f"{len(a.ids)} tokens here, {len(b.ids)} there"
    return _orders_differ(a, b)


def _elsewhere(tokenizer: Tokenizer) -> dict[str, Any]:
    """Every token that a file of the folder names."""
    return {token: number for form in tokenizer.forms.values() for token, number in form.ids.items()}


# ---- what a plan has to say ------------------------------------------------------------------------------------------------


def _not_compared(mine: Tokenizer, theirs: Tokenizer) -> Iterator[str]:
    """What of two tokenizers that do not contradict each other could not be compared, or differs without changing what an id means."""
    where = f"sources.{mine.source} and sources.{theirs.source}"
    for a, b in ((mine, theirs), (theirs, mine)):
        known = set[int]().union(*(form.names for form in b.forms.values()))
        alone = {n: names for form in a.forms.values() for n, names in form.names.items() if n not in known}
        if alone:
            first = min(alone)
            yield (
                f"sources.{a.source} names {len(alone)} token ids that no file of sources.{b.source} names "
                f"(the first: {first}, {_shown(alone[first][0])}): not compared."
            )
    orders = [{form.order[0] for form in t.forms.values() if form.order} for t in (mine, theirs)]
    if not orders[0] & orders[1] and (orders[0] or orders[1]):
        has = [" and ".join(sorted(order)) or "neither merges nor scores" for order in orders]
        yield f"{where}: the order in which pieces are joined is not compared ({has[0]} in one, {has[1]} in the other)."
    yield from _cut_otherwise(mine, theirs)


def _cut_otherwise(mine: Tokenizer, theirs: Tokenizer) -> Iterator[str]:
    for name, form in mine.forms.items():
        other = theirs.forms.get(name)
        if other and not form.unread and as_json(form.split) != as_json(other.split):
            where = f"sources.{mine.source} and sources.{theirs.source}"
            yield f"{where}: {name} splits text otherwise before its tokens are looked up; the output takes the seed's files."


def _absences(tokenizers: Sequence[Tokenizer], found: TokenizerFindings) -> None:
    """Notes on sources without a tokenizer, and on files that nobody here can read."""
    have = [tokenizer.source for tokenizer in tokenizers if tokenizer.there]
    lack = [tokenizer.source for tokenizer in tokenizers if not tokenizer.there]
    if have and lack:
        found.notes.append(f"{_named(lack)} no tokenizer: taken to have that of {_named_plain(have)}, which nothing here can check.")
    if have and tokenizers[0].source in lack:
        seed = tokenizers[0].source
        found.notes.append(f"the output takes the tokenizer of sources.{found.giver}, for sources.{seed}, which would give it, has none.")
    found.notes += _unread(tokenizers)


def _unread(tokenizers: Sequence[Tokenizer]) -> Iterator[str]:
    for tokenizer in tokenizers:
        for form in tokenizer.forms.values():
            if form.unread:
                yield f"sources.{tokenizer.source}: {form.file} cannot be read ({form.unread}): compared with the same bytes only."


def _without_rows(tokenizer: Tokenizer, rows: int) -> Iterator[str]:
    """Tokens that the output's files name and that its embeddings have no row for: whoever feeds one in gets an error, or memory."""
    beyond = {n: names[0] for form in tokenizer.forms.values() for n, names in form.names.items() if not 0 <= n < rows}
    if beyond:
        first = min(beyond)
        more = f" nor for {len(beyond) - 1} more" if len(beyond) > 1 else ""
        which = f"{_shown(beyond[first])} of id {_id(first)}{more}"
        yield (
            f"sources.{tokenizer.source}: the embeddings have {rows} rows, none for the token {which}: no program can read a text with it. "
            "Remove it from the tokenizer, or resize the embeddings."
        )


def _named(sources: Sequence[str]) -> str:
    return f"{_named_plain(sources)} {'has' if len(sources) == 1 else 'have'}"


def _named_plain(sources: Sequence[str]) -> str:
    return some(f"sources.{name}" for name in sources)
