"""The records of the rules by which routers are made of texts, and the expression of such a router. Rows are worked out in
calibrating/rows.py, and a second time in verifying/calibrated.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bam_merge.checkpoints.pieces import Shape
from bam_merge.records import Calibrator


@dataclass(frozen=True, slots=True)
class Ridge(Calibrator):
    """Ridge regression of the expert on x, without a bias (after DUME, arXiv 2603.29765, for FFN routers):

    S = mean over j of E_j[x x^T],  B_j = (mu_j - mean over k of mu_k) / N,  W_j = scale (S + penalty tr(S)/D I)^-1 B_j

    x [D] is the router's true input, E_j the mean over the tokens of text j, mu_j = E_j[x]. S is not centred: the constant direction of
    normed inputs does what a bias would.

    With `sigmoid`, B_j = mu_j / N - mean over k of mu_k: what is regressed is 0 for the right expert and -1 for the others, not 1 - 1/N
    and -1/N. The difference is one vector for all rows, which changes no softmax; a sigmoid of low logits is about their exponential, so
    that its shares are about those of the softmax, and none of them is at 1, where sigmoids tell nothing apart.
    """

    scale: float
    penalty: float
    sigmoid: bool = False
    name: ClassVar = "ridge"

    def arguments(self) -> Iterator[str]:
        yield f"scale={self.scale:g}"
        yield f"lambda={self.penalty:g}"
        if self.sigmoid:
            yield "sigmoid"


@dataclass(frozen=True, slots=True)
class HiddenMean(Calibrator):
    """The directions of the texts' means (mergekit's gate_mode hidden, at the router's true input), with a scale that means what ridge's
    does:

    d_j = mu_j / |mu_j|,  e_j = d_j - mean over k of d_k,  W_j = scale e_j / (N / (N - 1) mean over k of e_k . mu_k)

    so that the mean token of a text is `scale` nearer to its expert than to the others. Negative prompts' means are subtracted from mu_j
    in d_j. (Subtracting the same from every row changes no softmax.)

    With `sigmoid`, (1 - 1/N) scale m / |m|^2 is subtracted from every row, m being the mean over k of mu_k: of an expert's own text the
    logit is then about 0, of the others about -scale, as ridge's are.
    """

    scale: float
    sigmoid: bool = False
    name: ClassVar = "mean"

    def arguments(self) -> Iterator[str]:
        yield f"scale={self.scale:g}"
        if self.sigmoid:
            yield "sigmoid"


# ---- the expression -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A router whose row j is made for the text of source `names[j]`; `of` is the place in the recipe that says which text that is.

    `inputs` says whose hidden states those are: the seed's or the mixture's. `tokens` of each text are wanted.
    """

    method: Calibrator
    names: tuple[str, ...]
    of: str
    tokens: int
    inputs: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        shown = [f"tokens={self.tokens}", *self.method.arguments(), *([f"inputs={self.inputs}"] if self.inputs != "seed" else [])]
        return f"{self.method.name}({', '.join(dict.fromkeys(self.names))}; {', '.join(shown)})"
