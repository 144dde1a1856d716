"""Facts of sliding windows that a config.json can spell in two places: which transformers takes, and where a file contradicts itself."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from bam_merge.architectures.tables import Architecture
from bam_merge.text import printable

BY_LAYER = ("by layer", "every other layer")


BY_TYPES = ("by layer or all", "all but each last", "all but each last, never the last", "all but each first", "where nothing turns")
"""Where nothing but layer_types, or what stands in for it, says which layers slide."""


WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def window_conflicts(table: Architecture, config: Mapping[str, Any], window: Any) -> Iterator[str]:
    """Contradictions among use_sliding_window, sliding_window (`window`, by default too), max_window_layers and layer_types."""
    kind, how, layers, types = table.name, table.quirks.windows, config.get("num_hidden_layers"), config.get("layer_types")
    use, first = config.get("use_sliding_window"), config.get("max_window_layers")
    if how == "stated" or table.kind == "foreign" or not is_count(layers) or not (window is None or is_count(window)):
        return
    given = [t == "sliding_attention" for t in types] if isinstance(types, list) and len(types) == layers else None
    left_out = "" if "use_sliding_window" in config else " (left out)"
    if how in (*BY_LAYER, "all if used", "where nothing turns") and not use:
        if given and any(given):
            yield f"layer_types has sliding layers, but use_sliding_window is false{left_out}, so that {kind} has no window. Correct one."
        return
    if how == "none":
        if (window and use is not False and (given is None or any(given))) or (given and any(given)):
            key = "layer_types" if given and any(given) else "sliding_window"
            yield f"{key} asks for sliding-window attention, which {kind} has not in transformers: the key is ignored there. Remove it."
        return
    if how in ("all", *BY_TYPES) and use is False and window:
        yield (
            f"sliding_window = {brief(window)}, but use_sliding_window is false, which transformers ignores for {kind}. "
            "Set sliding_window to null, or remove use_sliding_window."
        )
    if how in BY_TYPES:
        yield from _by_types(table, config, given, window)
    elif how in BY_LAYER:
        implied = _implied(how, layers, first) if type(first) is int and window else None
        if given is not None and implied is not None and given != implied:
            yield (
                f"layer_types says that layers {_layers(given)} slide, max_window_layers = {first} that layers {_layers(implied)} do; "
                f"transformers takes layer_types. Correct one, or remove max_window_layers."
            )
        if given and any(given) and not window:
            yield "layer_types has sliding layers, but sliding_window is no number. Correct one."
    elif window and given is not None and not all(given):
        yield (
            f"sliding_window = {brief(window)} slides in every layer of {kind}, and layer_types says that layers {_layers(given)} slide; "
            "transformers ignores layer_types here. Correct one."
        )
    elif window and type(first) is int and first > 0:
        yield (
            f"sliding_window = {brief(window)} slides in every layer of {kind}, max_window_layers = {first} leaves out the first {first}; "
            "transformers ignores max_window_layers here. Remove one."
        )
    elif how == "all" and not window and given and any(given):
        yield f"layer_types has sliding layers, but sliding_window is no number, so that {kind} has no window. Correct one."


def _by_types(table: Architecture, config: Mapping[str, Any], given: list[bool] | None, window: Any) -> Iterator[str]:
    """Contradictions where layer_types decides, or a pattern where it is left out."""
    key, kind = "sliding_window_pattern", table.name
    patterned = table.quirks.windows.startswith("all but each")
    if given is not None and any(given) and not window:
        yield "layer_types has sliding layers, but sliding_window is no number. Correct one."
    elif patterned and given is None and not window:
        yield f"sliding_window is no number, and layers of {kind} slide unless layer_types says otherwise. Write one of the two."
    every, default = config.get(key), table.defaults.get(key)
    if table.quirks.pattern_is_text and isinstance(every, str):
        yield from _by_text(kind, every, given)
    if not patterned or not is_count(every):
        return
    if not table.quirks.pattern_is_read:
        if given is None and every != default:
            yield f"{key} = {every}, which transformers ignores for {kind}: its pattern is {default}. Write layer_types, or remove the key."
    elif given is not None and given != [(layer + 1) % every != 0 for layer in range(len(given))]:
        yield (
            f"layer_types says that layers {_layers(given)} slide, {key} = {every} that all but each {every}th do; "
            "transformers takes layer_types. Correct one."
        )


def is_text_pattern(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value) and set(value) <= {"L", "G"}


def _by_text(kind: str, pattern: str, given: list[bool] | None) -> Iterator[str]:
    """A pattern such as LLLG: transformers reads layer_types alone, and other programs make the last layer one without a window."""
    if not is_text_pattern(pattern):
        return
    if given is None:
        yield f"sliding_window_pattern = {brief(pattern)} without layer_types: transformers loads no such {kind}. Write layer_types."
        return
    meant = [pattern[layer % len(pattern)] == "L" for layer in range(len(given))]
    if given[:-1] != meant[:-1] or (given[-1] and not meant[-1]):
        yield (
            f"layer_types says that layers {_layers(given)} slide, sliding_window_pattern = {brief(pattern)} that layers {_layers(meant)} "
            "do; transformers takes layer_types. Correct one."
        )


def _implied(how: str, layers: int, first: int) -> list[bool]:
    """The layers that slide by max_window_layers: from it on, or every other one before it."""
    return [layer % 2 == 0 and layer < first if how == "every other layer" else layer >= first for layer in range(layers)]


def is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def brief(value: Any) -> str:
    return "nothing" if value is None else printable(repr(value), 60)


def _layers(sliding: list[bool]) -> str:
    return ", ".join(str(layer) for layer, slides in enumerate(sliding) if slides) or "none"
