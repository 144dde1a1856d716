"""How deep a verification looks: what quick leaves to full. docs/explanation/verification.md says what each proves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bam_merge.model.model_config import ModelConfig


@dataclass(frozen=True)
class Level:
    """Every level compares all bytes, and runs every layer of every model.

    `tokens` are those of each of two sequences. Of a `thorough` one every hidden state is float64; every layer is asked whether a
    sequence computes the same alone and in cached parts, and for the identity; and no two probes stand in one batch.
    """

    name: str
    tokens: int
    thorough: bool


LEVELS = {level.name: level for level in (Level("quick", 8, False), Level("full", 24, True))}


def layers_asked(config: ModelConfig, level: Level) -> frozenset[int]:
    """The layers that answer for all of their kind: the first, the middle and the last of each; all of them where it is thorough.

    What tells kinds apart are the configuration's lists: one entry a layer, as layer_types, or the layers themselves, as shared_kv_layers.
    """
    count = config.num_hidden_layers
    if level.thorough:
        return frozenset(range(count))
    kinds: dict[tuple[object, ...], list[int]] = {}
    for layer in range(count):
        kinds.setdefault(tuple(_says(config, layer)), []).append(layer)
    return frozenset(layers[place] for layers in kinds.values() for place in (0, len(layers) // 2, -1))


def _says(config: ModelConfig, layer: int) -> Iterator[object]:
    """What each list of the configuration says of a layer."""
    for key, value in vars(config).items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            yield (
                value[layer]
                if len(value) == config.num_hidden_layers and key not in ("shared_kv_layers", "rope_layers")
                else layer in value
            )
