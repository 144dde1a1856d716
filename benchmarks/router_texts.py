"""Texts and experts that routers made of text are tried on: those of `make example`, and harder ones that are made here.

general    the pages of this project, for the seed
code law math   what the walk-through's branches were trained on, and what was held out of it
cpp        headers of torch: a second programming language
gnu, free  paragraphs of licences with and without the GNU project's words: two kinds of law
docstrings, tables   of Python's standard library
noise      for an expert that is the seed with noise on every weight, so that it is good at nothing; its text is the tables'
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "examples" / "smollm2"), str(ROOT / "benchmarks" / "paper")]
import texts as paper_texts  # noqa: E402
from branch import Text, branch, distinct, licences, shuffled  # noqa: E402

HELDOUT = 60_000
"""Characters of each domain that are held out, or a tenth of what there is: more than 2,048 tokens of any."""
TRAINING = 1_500_000
NOISE = 0.3
"""Standard deviation of the noise on a useless expert's weights, relative to that of each tensor."""


def pages() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]


def headers() -> list[str]:
    return shuffled((Path(torch.__file__).parent / "include" / "ATen").rglob("*.h"))


def of_law(gnu: bool) -> list[str]:
    """Paragraphs of licences with or without the GNU project's words."""
    words = re.compile(r"\bGNU\b|\bA?L?GPL|Free Software Foundation")
    return [paragraph for paragraph in licences() if bool(words.search(paragraph)) == gnu]


DOCUMENTS: dict[str, Callable[[], Sequence[str]]] = {
    "general": pages,
    "cpp": headers,
    "gnu": lambda: of_law(True),
    "free": lambda: of_law(False),
    "docstrings": paper_texts.docstrings,
    "tables": paper_texts.SETS["stdlib"]["tables"],
}


def made_text(domain: str) -> Text:
    """A domain's text in two parts that share no paragraph."""
    joined = "\n\n".join(part for part in distinct(DOCUMENTS[domain]()) if part.strip())[: TRAINING + HELDOUT]
    border = joined.rindex("\n\n", 0, len(joined) - min(HELDOUT, len(joined) // 10))
    return Text(training=joined[:border], heldout=joined[border:].strip())


class Domains:
    """Models and texts by domain: those in `checkpoints`, and those that are made in `work` when they are asked for first."""

    def __init__(self, checkpoints: Path, work: Path, steps: int) -> None:
        self.checkpoints, self.work, self.steps = checkpoints, work, steps

    def model(self, name: str) -> Path:
        """The folder of a dense model; "seed" is the general expert."""
        if (self.checkpoints / name).is_dir():
            return self.checkpoints / name
        if not (self.work / "models" / name).is_dir():
            if name == "noise":
                self._noise(self.work / "models" / name)
            else:
                branch(self.checkpoints / "seed", made_text(name), self.steps, self.work / "models", name)
        return self.work / "models" / name

    def text(self, name: str, part: str) -> Path:
        """A domain's text, part text or heldout, in one file."""
        domain = {"seed": "general", "noise": "tables"}.get(name, name)
        there = self.checkpoints / part / f"{domain}.txt"
        if there.is_file():
            return there
        file = self.work / "texts" / part / f"{domain}.txt"
        if not file.is_file():
            made = made_text(domain)
            for which, content in (("text", made.training), ("heldout", made.heldout)):
                target = self.work / "texts" / which / f"{domain}.txt"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(content, encoding="utf-8")
        return file

    def draw(self, name: str, draw: int, draws: int, characters: int) -> Path:
        """So many characters of a domain's training text, from its own place for each draw on, and round at its end."""
        file = self.work / "draws" / f"{name}-{draw}-of-{draws}-{characters}.txt"
        if not file.is_file():
            content = self.text(name, "text").read_text(encoding="utf-8")
            first = content.find("\n", len(content) * draw // draws) + 1
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text((content[first:] + "\n" + content[:first])[:characters], encoding="utf-8")
        return file

    def _noise(self, out: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        seed = self.checkpoints / "seed"
        out.mkdir(parents=True)
        for file in seed.iterdir():
            if file.suffix != ".safetensors":
                (out / file.name).write_bytes(file.read_bytes())
                continue
            noisy = {}
            for key, value in load_file(file).items():
                wide = value.float()
                spread = wide.std() if wide.dim() > 1 else 0.0
                noisy[key] = (wide + NOISE * spread * torch.randn(wide.shape, generator=generator)).to(value.dtype)
            save_file(noisy, out / file.name, {"format": "pt"})
