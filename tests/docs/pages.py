"""Pages of the documentation as the tests read them: their code blocks, and a page that is carried out, block by block.

A block is fenced with its language, or indented by four. What a page asks to be written says so in its first line:
`# FILE` is a file of its own; `# FILE, above "TEXT"`, `# FILE, below "TEXT"`, `# FILE, instead of "TEXT"` go to the one line of FILE that
starts so, and `# FILE, at the end` to its end. In a console block what follows `$ ` is a command, and the lines below it are what it
prints, of which `...` leaves some out.
"""

import doctest
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MARK = "<!-- run on what make example makes -->"
TITLE = re.compile(r"# (?P<file>[\w./-]+\.\w+)(?:, (?P<how>at the end|above|below|instead of)(?: \"(?P<text>.+)\")?)?\n")


@dataclass(frozen=True)
class Block:
    """One code block: where it begins, its language ("" where it is indented), its text, whether MARK stands above it."""

    page: str
    line: int
    language: str
    text: str
    marked: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """(command, what it prints) of a console block. An indented block without a `$` is commands alone."""
        if self.language not in ("", "console"):
            return []
        lines = self.text.splitlines()
        if not self.language and not any(line.startswith("$ ") for line in lines):
            return [(line, "") for line in lines if re.match(r"(bam-merge|python|make|pip) ", line)]
        found: list[tuple[str, list[str]]] = []
        for line in lines:
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
        return [(command.partition("  #")[0].strip(), "\n".join(printed)) for command, printed in found]


def pages() -> list[Path]:
    """README and every page that is written by hand."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "reference")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The code blocks of `page`, in order."""
    return list(_blocks(name(page), page.read_text(encoding="utf-8").splitlines()))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    marked, at = False, 0
    while at < len(lines):
        line, start = lines[at], at
        if line == MARK:
            marked = True
        if line.startswith("```"):
            at = lines.index("```", at + 1)
            yield Block(page, start + 1, line[3:].strip(), "\n".join(lines[start + 1 : at]) + "\n", marked)
            marked = False
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield Block(page, start + 1, "", "\n".join(text[4:] for text in lines[start:at]).rstrip() + "\n", marked)
            marked = False
            continue
        at += 1


def write(block: Block, folder: Path) -> bool:
    """Write or edit the file in `folder` that the block's first line names; False where it names none."""
    title = TITLE.match(block.text)
    if not title:
        return False
    path, text = folder / title["file"], block.text[title.end() :]
    if title["how"] is None:
        assert not path.exists(), f"{block}: {title['file']} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return True
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if text.startswith(("@", "class ", "def ")):  # two blank lines between it and what is there
        text = f"\n\n{text}" if title["how"] == "at the end" else f"{text}\n\n"
    if title["how"] == "at the end":
        lines.append(text)
    else:
        places = [index for index, line in enumerate(lines) if line.strip().startswith(title["text"])]
        assert len(places) == 1, f"{block}: {len(places)} lines of {title['file']} begin with {title['text']!r}, expected one"
        first = places[0] + (title["how"] == "below")
        lines[first : first + (title["how"] == "instead of")] = [text]
    path.write_text("".join(lines), encoding="utf-8")
    return True


def follow(page: Path, folder: Path, call: Callable[[str], str], execute: Callable[[str], None] | None = None) -> int:
    """Carry out `page` in `folder`: write its files, run its commands with `call`, its Python with `execute`. Returns the commands' count.

    What a command prints must be what the page shows. Marked blocks are passed over.
    """
    count = 0
    for block in blocks(page):
        if block.marked or write(block, folder):
            continue
        if block.language == "python" and execute is not None:
            execute(block.text)
        for command, shown in block.commands:
            printed = call(command)
            count += 1
            same = doctest.OutputChecker().check_output(shown + "\n", printed, doctest.ELLIPSIS)
            assert not shown.strip() or same, f"{block}: {command}\nprints\n{printed}\nand not\n{shown}"
    return count
