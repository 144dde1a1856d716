"""A mixture in a wrapper: where the seed is the text model of one, and the layout's own model has one too.

Servers know some mixtures only so. What stands beside the seed's text model is copied as it is, or left out, as the wrapper's table says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.wrappers import Wrapper, Written, wrappers
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES
from bam_merge.checkpoints.pieces import Read
from bam_merge.planning.plan import BESIDE, Step
from bam_merge.sources.dense import DenseModel
from bam_merge.text import listed, some

TRUNK = "model."
"""How names of a text model begin, but for the head's."""


@dataclass(frozen=True)
class Frame:
    """The wrapper that a merge stands in, how its table says so, and the source whose towers stand beside it."""

    wrapper: Wrapper
    written: Written
    seed: DenseModel

    def steps(self, steps: Sequence[Step]) -> list[Step]:
        """The text model's tensors under the wrapper's names, and what the seed has beside its own."""
        form = self.wrapper.spellings[0]
        named = [
            replace(step, name=form.trunk + step.name.removeprefix(TRUNK) if step.name.startswith(TRUNK) else form.rest + step.name)
            for step in steps
        ]
        return [*named, *self._beside()]

    def _beside(self) -> Iterator[Step]:
        for stored, what in self.seed.naming.beside.items():
            if what not in self.written.kept:
                continue
            entry = self.seed.checkpoint.tensors[stored]
            starts = next(start for start in self.wrapper.beside[what] if start in stored.split("."))
            words = stored.split(".")
            name = self.written.kept[what] + ".".join(words[words.index(starts) :])
            read = Read(self.seed.store_name, stored, entry.dtype, entry.shape)
            yield Step(name, BESIDE, None, None, entry.dtype, entry.shape, read, f"wrapper {self.wrapper.name}")

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the wrapper around the text model's: known keys of the seed's own, and nothing else of it."""
        outer = self.seed.checkpoint.config
        kept = {key: outer[key] for key in self.written.keys if key in outer}
        parts = {key: {**kept[key], "model_type": kind} for key, kind in self.written.parts.items() if isinstance(kept.get(key), dict)}
        text = {key: value for key, value in config.items() if key != "architectures"}
        whole = {
            **kept,
            **parts,
            "architectures": [self.wrapper.class_name],
            "model_type": self.wrapper.model_types[0],
            "dtype": config["dtype"],
            "tie_word_embeddings": config["tie_word_embeddings"],
            self.wrapper.config[0]: text,
        }
        return dict(sorted(whole.items()))

    def problems(self, file: str, giver: str | None) -> Iterator[str]:
        """What keeps the wrapper from standing around this merge. `giver`: the source whose tokenizer an aligned result takes."""
        where = f"{file}: output.layout: {self.wrapper.name} stands around the mixture, "
        if giver not in (None, self.seed.name):
            ids = ", ".join(key for key in self.written.keys if key.endswith("_token_id"))
            yield (
                f"{where}and {ids} are of the tokens of {self.seed.name}; the tokenizer is {giver}'s. Use tokenizer.source: union or "
                f"{self.seed.name}, or layout: bam, which is the text model alone."
            )
        odd = [step for step in self._beside() if step.dtype not in ARITHMETIC_DTYPES]
        if odd:
            tensors = some([str(step.expr) for step in odd])
            yield (
                f"{where}with what {self.seed.name} has beside its text model, and {tensors} is {odd[0].dtype}, which is not computed with "
                "here. Use the full-precision model, or layout: bam, which is the text model alone."
            )

    def notes(self) -> Iterator[str]:
        there = dict.fromkeys(self.seed.naming.beside.values())
        kept = [what for what in there if what in self.written.kept]
        left = [what for what in there if what not in self.written.kept]
        said = f"the result is a {self.wrapper.name} around the mixture"
        said += f", with the {listed(kept)} of {self.seed.name} as it is: other sources' are not read" if kept else ""
        said += f"; {listed(left)} is left out, since it is of the seed's layers and not of the mixture's" if left else ""
        yield f"{said}."


def frame_of(layout: Architecture, seed: DenseModel) -> Frame | None:
    """The frame of a merge in `layout`; None where the seed stands in no wrapper, or the layout's model in none that is of the seed's."""
    if layout.kind != "mixture" or seed.wrapper is None:
        return None
    for wrapper in wrappers():
        if wrapper.text in layout.model_types and wrapper.written is not None and wrapper.written.of == seed.wrapper.name:
            return Frame(wrapper, wrapper.written, seed)
    return None
