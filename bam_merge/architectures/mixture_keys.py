"""What is wrong with keys that only a mixture's config.json has, or has otherwise."""

from collections.abc import Iterator, Mapping
from typing import Any

from bam_merge.validation_words import shown


def odd_keys(keys: Mapping[str, str], spelled: Mapping[str, Any]) -> Iterator[str]:
    """A message for every value that no such model has. `keys` are those of the layout by bam's words, `spelled` what the file says."""
    types, window = spelled.get("layer_types"), spelled.get("sliding_window")
    slides = isinstance(types, list) and "sliding_attention" in types
    if slides and not window and "sliding_window" in keys and "use_sliding_window" not in keys:
        yield f"config.json: layer_types names layers that slide, and {keys['sliding_window']} is {shown(window)}. Write the window."
    shared = spelled.get("shared_experts", 0)
    if type(shared) is not int or shared < 0:
        yield f"config.json: {keys['shared_experts']} must be an integer, 0 or more, found {shown(shared)}."
    for word, known in (("scoring_func", ("softmax", "sigmoid")), ("shared_expert_mix", ("sum", "average"))):
        if word in keys and spelled.get(word, known[0]) not in known:
            yield f"config.json: {keys[word]} must be {' or '.join(known)}, found {shown(spelled[word])}."
