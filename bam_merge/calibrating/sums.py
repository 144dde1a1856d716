"""Sums over a router's true inputs, in float64 and in a fixed order: means by text, and second moments with every text weighing the same.

Shape suffixes:  M tokens of a batch    K texts    D hidden_size    n tokens of all texts
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

SPANS, LEAST_ROWS = 8, 64
"""Pieces that a matrix is worked out in, by however many threads there are, and the fewest rows of one. They follow from its size alone, so
that its bits do too."""


def spans(rows: int) -> Iterator[range]:
    """The rows of a matrix in the pieces that threads take."""
    step = max(LEAST_ROWS, -(-rows // SPANS))
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))


def by_rows(pool: Executor, rows: int, make: Callable[[range], object]) -> None:
    """Call `make` for every piece of a matrix of so many rows, each by one thread."""
    pieces = list(spans(rows))
    if len(pieces) == 1:  # not worth a thread
        make(pieces[0])
    else:
        list(pool.map(make, pieces))


class Sums:
    """What a rule needs of the inputs of one router: `means`, mu_j of every text, and the second moments S.

    `tokens` says how many inputs each text will have. With `moments`, S is kept as a matrix [D, D], or, where there are fewer inputs than
    D, as the inputs themselves, weighted so that their product is S.
    """

    def __init__(self, tokens: Sequence[int], width: int, moments: bool, pool: Executor, device: torch.device) -> None:
        self.tokens, self.pool, total = tokens, pool, sum(tokens)
        self.total_KD = torch.zeros(len(tokens), width, dtype=torch.float64, device=device)
        self.dual = moments and total < width
        self.second_DD = torch.zeros(width, width, dtype=torch.float64, device=device) if moments and not self.dual else None
        self.inputs_nD = torch.empty(total, width, dtype=torch.float64, device=device) if self.dual else None
        self.taken = [0] * len(tokens)

    @property
    def means(self) -> Tensor:
        """mu_j [K, D]."""
        counts_K1 = torch.tensor(self.tokens, dtype=torch.float64, device=self.total_KD.device)[:, None]
        return self.total_KD / counts_K1

    def weight(self, text: int) -> float:
        """What an input of a text counts for in S."""
        return 1 / (len(self.tokens) * self.tokens[text])

    def add(self, text: int, x_MD: Tensor) -> None:
        """Add inputs of a text, in float64."""
        self.total_KD[text] += x_MD.sum(0)
        weighted_MD = x_MD * self.weight(text) ** 0.5
        if self.inputs_nD is not None:
            first = sum(self.tokens[:text]) + self.taken[text]
            self.inputs_nD[first : first + len(x_MD)] = weighted_MD
        elif (second_DD := self.second_DD) is not None:

            def piece(rows: range) -> None:
                part = second_DD[rows.start : rows.stop]
                torch.addmm(part, weighted_MD[:, rows.start : rows.stop].T, weighted_MD, out=part)

            by_rows(self.pool, len(second_DD), piece)
        self.taken[text] += len(x_MD)
