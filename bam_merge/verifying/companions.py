"""The output's tokenizer and generation files against the sources': byte for byte what the rule of publication gives, or that with the
tokens and the chat template of other sources, and nothing else.

Which source gives a file, and what an alignment adds, is worked out here from the recipe and the folders, apart from the plan's code.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import TOKENIZER_FILES, VOCABULARIES, read_small_file
from bam_merge.documents import load_json
from bam_merge.errors import BamMergeError
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.companions import companion
from bam_merge.text import printable, some
from bam_merge.verifying.report import Check
from bam_merge.verifying.tokens import same_document, tokens_of

MOST_NAMES = 8
"""Keys that differ that are named."""


ADDED_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""How an added token is matched where nothing says otherwise."""


SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


def companion_check(folder: Path, recipe: Recipe, manifest: Mapping[str, Any], changed: Mapping[str, Sequence[str]]) -> Check | None:
    """Tokenizer and generation files are what the sources give. Files that `changed` since the merge are not compared. None where a source
    that is not at hand may give them."""
    folders = {name: recipe.located(recipe.source(name).path) for name in dict.fromkeys((recipe.seed_name, *recipe.sources))}
    if not all(path.is_dir() for path in (folders.values() if recipe.tokenizer else (folders[recipe.seed_name],))):
        return None
    giver = _giver(recipe, folders)
    if giver is None:
        return None
    found = _Companions(folder, recipe, manifest, changed, folders, giver)
    found.compare()
    return found.check()


def _giver(recipe: Recipe, folders: Mapping[str, Path]) -> str | None:
    """The source whose tokenizer the output takes: the one that the recipe names, or the first, the seed before all, that has one."""
    if recipe.tokenizer is not None and recipe.tokenizer.source in recipe.sources:
        return recipe.tokenizer.source
    for name, path in folders.items():
        if not path.is_dir():
            return None
        if any((path / file).is_file() for file in VOCABULARIES):
            return name
    return recipe.seed_name


@dataclass
class _Companions:
    """The comparison: `wrong` is what no merge gives, `stale` what a changed source explains, `files` what was compared."""

    folder: Path
    recipe: Recipe
    manifest: Mapping[str, Any]
    changed: Mapping[str, Sequence[str]]
    folders: Mapping[str, Path]
    giver: str
    wrong: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def source_of(self, file: str) -> str:
        """Which source gives a file, if it has it: generation settings stay the seed's, unless a tokenizer was chosen by name."""
        chosen = self.recipe.tokenizer is not None and self.recipe.tokenizer.source in self.recipe.sources
        return self.recipe.seed_name if file == "generation_config.json" and not chosen else self.giver

    def compare(self) -> None:
        try:
            aligned = _Alignment.of(self) if self.recipe.tokenizer is not None else None
        except BamMergeError as error:
            self.stale += error.problems
            return
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            self.wrong.append(f"the tokenizer files cannot be compared: {printable(str(error))}")
            return
        for file in TOKENIZER_FILES:
            source = self.source_of(file)
            path = self.folders[source] / file
            if not path.is_file() and file not in self.manifest["files"]:
                continue
            try:
                expected = companion(path) if path.is_file() else None
            except BamMergeError as error:
                self.stale += error.problems
                continue
            try:
                found = read_small_file(self.folder / file) if file in self.manifest["files"] else None
            except BamMergeError:
                continue  # `files` says so
            self.files[file] = source
            self.one(file, source, found, expected, aligned)

    def one(self, file: str, source: str, found: bytes | None, expected: bytes | None, aligned: "_Alignment | None") -> None:
        """Compare one file of the output with what its source gives."""
        if aligned is not None:
            try:
                problems = list(aligned.differences(file, found, expected))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems = [f"{file} cannot be compared: {printable(str(error))}"]
            (self.stale if any(self.changed.values()) else self.wrong).extend(problems)
            return
        changed = file in self.changed.get(source, ())
        if found != expected:
            (self.stale if changed else self.wrong).append(f"{file} {_difference(found, expected, source)}")
        elif expected is not None and changed and read_small_file(self.folders[source] / file) == expected:
            record = "but not what the manifest records of it: the record is not the merge's"
            self.wrong.append(f"{file} is what sources.{printable(source)} has, {record}")

    def check(self) -> Check:
        if self.wrong:
            return Check("companions", False, "; ".join([*self.wrong, *self.stale]))
        names = [name for name, files in self.changed.items() if files] or [self.giver]
        if self.stale:
            return Check("companions", None, f"sources.{printable(names[0])} changed since the merge: {'; '.join(self.stale)}")
        by_source: dict[str, list[str]] = {}
        for file, source in self.files.items():
            by_source.setdefault(source, []).append(file)
        given = [f"{', '.join(files)} as sources.{printable(source)} gives them" for source, files in by_source.items()]
        more = ", with tokens of others as the recipe asks" if self.recipe.tokenizer is not None and given else ""
        return Check("companions", True, f"{'; '.join(given)}{more}" if given else "there are none")


def _difference(found: bytes | None, expected: bytes | None, source: str) -> str:
    source = printable(source)
    if expected is None:
        return f"is not in sources.{source}: it is of no merge"
    if found is None:
        return f"is in sources.{source}, but not in the output"
    try:
        keys = _other_keys(load_json(found), load_json(expected))
    except (ValueError, AttributeError, TypeError):
        keys = []
    return f"is not what sources.{source} gives{f': {some(keys, MOST_NAMES)} differ' if keys else ''}"


def _other_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*ours, *theirs} if (key in ours, ours.get(key)) != (key in theirs, theirs.get(key)))


# ---- with tokens and a template of others ------------------------------------------------------------------------------------


@dataclass
class _Alignment:
    """What the output may have beside the giver's files: `more` are the tokens of other sources by their ids, as the output's files
    name them (that they are the right ones is the check `tokens`), `flags` how each is matched, `listed` those that a source lists as
    special; `own` the giver's tokens. `template` is the folder of another source's chat template. `begun` is the file that names added
    tokens in the output where none of the giver's does.
    """

    giver: str
    begun: str
    more: Mapping[int, str]
    own: Mapping[int, str]
    flags: Mapping[str, Mapping[str, bool]]
    listed: frozenset[str]
    template: Path | None

    @classmethod
    def of(cls, of: _Companions) -> "_Alignment":
        result, first = tokens_of(of.folder), tokens_of(of.folders[of.giver])
        ours, theirs = (dict(tokens.text) if tokens is not None else {} for tokens in (result, first))
        more = {number: token for number, token in ours.items() if number not in theirs}
        flags: dict[str, Mapping[str, bool]] = {}
        listed: set[str] = set()
        order = (of.giver, *(name for name in of.folders if name != of.giver)) if more else ()
        for name in order:  # the first that has a token says how it is matched
            mine, special = _matching(of.folders[name])
            for token, how in mine.items():
                flags.setdefault(token, how)
                listed.update({token} & special if flags[token] is how else ())
        wanted = of.recipe.tokenizer.chat_template if of.recipe.tokenizer else None
        template = of.folders[wanted] if wanted not in (None, of.giver) else None
        return cls(of.giver, _begun(of.folders[of.giver]), more, theirs, flags, frozenset(listed), template)

    def differences(self, file: str, found: bytes | None, expected: bytes | None) -> Iterator[str]:
        """What of an output's file is neither the giver's nor the recipe's."""
        if self.template is not None and file in ("chat_template.jinja", "chat_template.json"):
            path = self.template / file
            expected = companion(path) if path.is_file() else None
        elif file in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
            theirs, more = self._with_more(file, expected)
            if more:
                ours = load_json(found) if found is not None else {}
                if not same_document(ours, theirs):
                    keys = some(_other_keys(ours, theirs), MOST_NAMES)
                    yield f"{file} is not what sources.{printable(self.giver)} gives with tokens of others: {keys} differ"
                return
        if found != expected:
            yield f"{file} {_difference(found, expected, self.giver)}"

    def _with_more(self, file: str, data: bytes | None) -> tuple[dict[str, Any], bool]:
        """The giver's document, empty where it has none, with all that an alignment adds; and whether that is anything."""
        document = load_json(data) if data is not None else {}
        if file == "tokenizer.json":
            late = self._late(document) if data is not None else []
            document |= {"added_tokens": [*(document.get("added_tokens") or ()), *late]} if late else {}
            return document, bool(late)
        before = json.dumps(document)
        if file == "added_tokens.json" and self.more and (data is not None or self.begun == file):
            document |= {token: number for number, token in self.more.items()}
        elif file == "tokenizer_config.json":
            self._settings(document)
        elif file == "special_tokens_map.json" and data is not None:
            self._lists(document)
        return document, json.dumps(document) != before

    def _late(self, document: Mapping[str, Any]) -> list[Any]:
        """The entries after those of a tokenizer.json, in the order in which a library numbers them."""
        entries = document.get("added_tokens") or ()
        vocab = document["model"]["vocab"]
        names = {entry["content"] for entry in entries} | set(vocab if isinstance(vocab, dict) else (item[0] for item in vocab))
        last = max((entry["id"] for entry in entries), default=-1)
        late = {number: token for number, token in (*self.own.items(), *self.more.items()) if token not in names and number > last}
        return [{"id": number, "content": token, **self._how(token)} for number, token in sorted(late.items())] if self.more else []

    def _how(self, token: str) -> Mapping[str, bool]:
        return self.flags.get(token, ADDED_FLAGS)

    def _settings(self, document: dict[str, Any]) -> None:
        if self.more and (document.get("added_tokens_decoder") or self.begun == "tokenizer_config.json"):
            decoder = document.setdefault("added_tokens_decoder", {})
            decoder |= {str(number): {"content": token, **self._how(token)} for number, token in self.more.items()}
        if any(key in document for key in SPECIAL_LISTS):
            self._lists(document)
        if self.template is None:
            return
        settings = self.template / "tokenizer_config.json"
        document.pop("chat_template", None)
        if settings.is_file() and "chat_template" in (theirs := load_json(companion(settings))):
            document["chat_template"] = theirs["chat_template"]

    def _lists(self, document: dict[str, Any]) -> None:
        new = [token for _, token in sorted(self.more.items()) if token in self.listed]
        keys = [key for key in SPECIAL_LISTS if isinstance(document.get(key), list)]
        if new and not keys and not any(key in document for key in SPECIAL_LISTS):
            document[SPECIAL_LISTS[0]], keys = [], [SPECIAL_LISTS[0]]
        for key in keys[:1]:
            there = [item.get("content") if isinstance(item, dict) else item for item in document[key]]
            document[key] = [*document[key], *(token for token in new if token not in there)]


def _begun(giver: Path) -> str:
    """The file that has to be begun for added tokens to be named at all; '' where one of the giver's names them."""
    settings = giver / "tokenizer_config.json"
    if (giver / "tokenizer.json").is_file() or (giver / "added_tokens.json").is_file():
        return ""
    if not settings.is_file():
        return "added_tokens.json"
    return "" if load_json(companion(settings)).get("added_tokens_decoder") else settings.name


def _matching(folder: Path) -> tuple[dict[str, dict[str, bool]], set[str]]:
    """How a folder's added tokens are matched, and which it lists as special beside those that have a name."""
    how: dict[str, dict[str, bool]] = {}
    listed: set[str] = set()
    documents = {
        name: load_json(read_small_file(folder / name)) if (folder / name).is_file() else {}
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    }
    numbered = (documents["tokenizer_config.json"].get("added_tokens_decoder") or {}).values()
    for entry in (*numbered, *(documents["tokenizer.json"].get("added_tokens") or ())):
        special = entry.get("special") is True
        given = {key: bool(entry[key]) for key in ADDED_FLAGS if key in entry}
        how[entry["content"]] = {**ADDED_FLAGS, "normalized": not special, "special": special, **given}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key in SPECIAL_LISTS:
            value = documents[name].get(key) or []
            items = value.values() if isinstance(value, dict) else value
            listed |= {item["content"] if isinstance(item, dict) else item for item in items}
    return how, listed
