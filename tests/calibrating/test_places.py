"""A calibrator is four places; each that is forgotten is an error that names it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from bam_merge.calibrating.rows import rows
from bam_merge.calibrating.sums import Sums, spans
from bam_merge.recipe.makes import FromTexts
from bam_merge.recipe.rules import ROUTER_INITS, makes_of
from bam_merge.records import CALIBRATORS, Calibrator
from bam_merge.verifying.calibrated import _Inputs, derived


def test_every_record_has_its_make_its_rows_and_its_second_way() -> None:
    makes = {make.record for make in makes_of(FromTexts)}
    assert makes == set(CALIBRATORS.values()) and {record.name for record in makes} <= ROUTER_INITS.keys()
    assert all(record in rows.registry and record in derived.registry for record in makes)


def test_a_place_that_is_forgotten_is_named() -> None:
    @dataclass(frozen=True)
    class Toy(Calibrator):
        name: ClassVar = "toy"

    try:
        with pytest.raises(NotImplementedError, match=r"calibrating/rows\.py makes no rows of Toy"):
            rows(Toy(), None, None)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match=r"verifying/calibrated\.py derives no Toy"):
            derived(Toy(), _Inputs(), _Inputs(), ())
        with pytest.raises(TypeError, match="lacks `record"):

            class Recordless(FromTexts):
                pass

        with pytest.raises(TypeError, match="lacks `calibrator`"):

            class Ruleless(FromTexts):
                record: ClassVar = Toy

        with pytest.raises(TypeError, match="Toy has the name 'toy' already"):
            type("Other", (Calibrator,), {"name": "toy"})
    finally:
        del CALIBRATORS["toy"]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 512, 513, 4096])
def test_the_pieces_of_a_matrix_follow_from_its_size(size: int) -> None:
    pieces = list(spans(size))
    assert [row for piece in pieces for row in piece] == list(range(size)) and len(pieces) <= 8


def test_sums_by_both_ways_are_the_same() -> None:
    """Second moments as a matrix, and as the inputs themselves."""
    from concurrent.futures import ThreadPoolExecutor

    x_MD = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(2) as pool:
        few, many = (Sums(tokens, 16, True, pool, torch.device("cpu")) for tokens in ([5, 10], [10, 30]))
        for sums, parts in ((few, (x_MD[:5], x_MD[5:8], x_MD[8:15])), (many, (x_MD[:10], x_MD[10:20], x_MD[20:]))):
            for text, part in zip((0, 1, 1), parts, strict=True):
                sums.add(text, part)
        assert few.dual and few.inputs_nD is not None and not many.dual and many.second_DD is not None
        expected = (x_MD[:5].T @ x_MD[:5] / 5 + x_MD[5:15].T @ x_MD[5:15] / 10) / 2
        torch.testing.assert_close(few.inputs_nD.T @ few.inputs_nD, expected)
        torch.testing.assert_close(many.second_DD, (x_MD[:10].T @ x_MD[:10] / 10 + x_MD[10:].T @ x_MD[10:] / 30) / 2)
        torch.testing.assert_close(many.means[1], x_MD[10:].mean(0))
