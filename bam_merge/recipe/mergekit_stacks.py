"""mergekit's passthrough: layers of models behind one another, as output.layers has them."""

from collections.abc import Callable, Mapping
from typing import Any

from bam_merge.recipe.mergekit_words import Equivalent
from bam_merge.text import printable


def layers_in(document: Mapping[str, Any], model: Callable[[Any], str], found: Equivalent) -> list[tuple[str, str]]:
    """(model, its layers) of every slice, by what `model` makes of a model's path. What has no words goes to `found.lacks`.

    mergekit's ranges end before their last number. Embeddings are of the first slice's model, norm and head of the last one's, as here.
    """
    slices = document.get("slices")
    if not isinstance(slices, list) or not slices:
        found.lacks.append("passthrough needs slices, each with one model and its layer_range")
        return []
    if document.get("parameters") or any(isinstance(one, dict) and one.get("parameters") for one in slices):
        found.lacks.append("parameters of passthrough (scale), which multiply layers; here every layer is as it is")
    layers = []
    for number, one in enumerate(slices):
        sources = one.get("sources") if isinstance(one, dict) else None
        source = sources[0] if isinstance(sources, list) and len(sources) == 1 and isinstance(sources[0], dict) else {}
        first, stop = _range(source.get("layer_range"))
        if "model" not in source:
            found.lacks.append(f"slice {number} must have one source, with model and layer_range; passthrough merges nothing")
        elif stop <= first:
            shown = printable(repr(source.get("layer_range")), 40)
            found.lacks.append(f"layer_range {shown} of slice {number}; expected two numbers, the first layer and the one after the last")
        elif source.get("parameters"):
            found.lacks.append(f"parameters of slice {number} (scale), which multiply layers; here every layer is as it is")
        else:
            layers.append((model(source["model"]), str(first) if stop == first + 1 else f"{first}-{stop - 1}"))
    return layers


def _range(found: Any) -> tuple[int, int]:
    """(first, stop) of a layer_range; an empty one where it is none."""
    right = isinstance(found, list) and len(found) == 2 and all(type(number) is int and 0 <= number < 10_000 for number in found)
    return (found[0], found[1]) if right else (0, 0)
