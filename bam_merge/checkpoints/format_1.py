"""Manifests of format 1, which recorded no reads: what a tensor was made of is read from its expression, as that format spelled it."""

import re
from collections.abc import Iterator, Mapping

FORMAT_1 = 1


METHODS = re.compile(r"\b(?:mean|linear|slerp|task_arithmetic|ties|dare_ties)\(([^()]*)\)(?:: ([^\s,()]+))?")
"""The methods that there were. A later one is in no such manifest."""


def reads_in(expression: str, name: str, sources: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """(source, tensor) of the stored tensors in the expression of tensor `name`; `sources` gives the tensors that were read of each.

    Names of sources and of dense families' tensors have no blanks or commas.
    """
    words = "|".join(re.escape(source) for source in sorted(sources, key=len, reverse=True))
    leaf = re.compile(rf"(?<![^\s(,])({words}):([^\s,()\[\]]+)")
    yield from leaf.findall(expression)
    for method in METHODS.finditer(expression):
        operands, _, arguments = method[1].partition("; ")
        after = method[2] or name
        common = None if leaf.match(after) else after.partition("[")[0]
        base = re.match(r"base=([^,]+)", arguments)
        if common:
            yield from ((operand, common) for operand in operands.split(", ") if operand in sources)
        if base and base[1] in sources:
            tensor = common or next((found for _, found in leaf.findall(expression) if found in sources[base[1]]), None)
            if tensor:
                yield base[1], tensor
