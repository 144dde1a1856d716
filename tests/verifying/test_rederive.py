"""The slow second way to a tensor, where it has an algorithm of its own."""

import ast
import inspect
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Read
from bam_merge.verifying import election, formulas, rederive, rounding
from bam_merge.verifying.rederive.thresholds import kth_largest
from bam_merge.verifying.rounding import Derived, half_ulp, worst
from bam_merge.verifying.rows import concat_runs

SHARED = {"parts", "in_float64", "proportion"}
"""The functions of expressions/ that both ways to a tensor call: rederive/ says why."""

magnitudes = st.lists(
    st.sampled_from([0.0, 1e-45, 1e-8, 0.25, 0.5, 0.5000001, 3.0, 3e38]) | st.floats(0, 1e4, width=32), min_size=1, max_size=60
)


@given(magnitudes, st.data())
def test_kth_largest_is_what_a_sort_gives(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values) - 1))
    parts = [torch.tensor(part, dtype=torch.float32) for part in (values[:cut], values[cut:]) if part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bam_merge.verifying.rederive.thresholds.SURVEY_BINS", 4)
        patch.setattr("bam_merge.verifying.rederive.thresholds.SURVEY_SORTED", data.draw(st.sampled_from([0, 3, 100])))
        assert kth_largest(lambda: iter(parts), k) == sorted(torch.cat(parts).tolist(), reverse=True)[k - 1]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("start", "stop"), [(0, 24), (0, 1), (5, 6), (3, 20), (23, 24)])
def test_runs_of_a_fused_tensor_are_its_rows(groups: int, start: int, stop: int) -> None:
    parts = [torch.arange(rows) + 100 * i for i, rows in enumerate((12, 4, 8))]
    fused = torch.cat([part.view(groups, -1) for part in parts], 1).flatten()
    reads = tuple(Read("seed", str(i), "F32", (len(part),)) for i, part in enumerate(parts))
    runs = concat_runs(expressions.Concat(reads, groups, "F32", (24,)), start, stop)
    assert torch.cat([parts[int(part.tensor)][a:b] for part, a, b in runs]).tolist() == fused[start:stop].tolist()


@pytest.mark.parametrize(("dtype", "least"), [("F64", 2.0**-1074), ("F32", 2.0**-149), ("F16", 2.0**-24), ("BF16", 2.0**-133)])
def test_where_zero_is_right_nothing_else_is(dtype: str, least: float) -> None:
    """The rounding of 0 is 0 and that of what is too small for the dtype: not half a step of the numbers near 1."""
    zero = torch.zeros(2, dtype=torch.float64)
    assert half_ulp(zero, dtype).tolist() == [least / 2] * 2
    for derived in (Derived(zero), Derived(zero, torch.zeros_like(zero))):
        assert worst(torch.tensor([0.0, -0.0], dtype=torch.float64), derived, dtype)[0] == 0
        for planted in (least, 1e-9, 1e-3):
            if planted >= least:
                error, where = worst(torch.tensor([0.0, planted], dtype=torch.float64), derived, dtype)
                assert (error > 1, where) == (True, 1)


MODULES = [import_module(f"{rederive.__name__}.{found.name}") for found in iter_modules(rederive.__path__)]
"""The files of the second way."""


@pytest.mark.parametrize("module", [rederive, *MODULES, election, rounding, formulas])
def test_only_what_a_plan_says_is_shared_with_execution(module: ModuleType) -> None:
    """Records, and the functions that are named; import-linter forbids the modules that carry a plan out."""
    tree = ast.parse(inspect.getsource(module))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "expressions"}
    imported = {(node.module or "", alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    functions = {name for name in used if inspect.isfunction(getattr(expressions, name))}
    assert functions <= SHARED
    assert {name for source, name in imported if source.startswith("bam_merge.expressions")} == set()
    assert {name for source, name in imported if source == "bam_merge.checkpoints.pieces"} <= {"Read", "Slice", "Shape", "numel"}
    assert {name for source, name in imported if source == "bam_merge.values.streams"} <= {"generator", "uniforms"}
