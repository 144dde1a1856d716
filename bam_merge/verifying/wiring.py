"""Is every expert's block put together as its dense model's, in every layer? Blocks are built without memory, and nothing is read.

What a block computes follows from its parameters and from what its modules keep beside them: windows, norms' epsilons, activations,
the rotary embedding. Those are compared as they stand in the modules, not as config.json has them.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block
from bam_merge.model.model_config import ModelConfig
from bam_merge.text import some
from bam_merge.verifying.config import meaning

OF_MIXTURES = {"training", "shares_kv", "gates", "gate_scale"}
"""What a module of a mixture keeps, or every module, and what an expert computes does not depend on."""


def miswired(mixture: StoredModel, dense: Mapping[str, StoredModel], names: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    """(layer, expert, what differs) of every expert whose block is not built as its dense model's. `names` are the experts' sources."""
    meanings = _Meanings()
    for layer in range(mixture.config.num_hidden_layers):
        block = _built(mixture, layer)
        of_source = {name: dict(_facts(_built(dense[name], layer), meanings)) for name in dict.fromkeys(names)}
        for j, name in enumerate(names):
            known = of_source[name]  # not all: of a mixture's attention and its expert's both may have a fact
            wrong = [key for key, said in _facts(block, meanings, f"experts.{j}.") if key in known and known[key] != said]
            if wrong:
                yield layer, j, some(list(dict.fromkeys(wrong)), 4)


def unlike_blocks(one: StoredModel, layer: int, other: StoredModel, its_layer: int) -> list[str]:
    """What the blocks of two models, each at its layer, keep and in which they differ: all but which layer it is, and what their
    configurations say of other layers."""
    meanings = _Meanings()
    mine, theirs = (
        {where: said for where, said in _facts(_built(model, at), meanings) if not where.endswith(OF_LAYERS)}
        for model, at in ((one, layer), (other, its_layer))
    )
    return [where for where in dict.fromkeys((*mine, *theirs)) if mine.get(where) != theirs.get(where)]


OF_LAYERS = (".layer", ": windows", ": layers that rotate", ": linear attention")
"""What a block keeps of the model's other layers, or of its place among them."""


def _built(model: StoredModel, layer: int) -> Block:
    with torch.device("meta"):
        return Block(model.config, layer)


def _facts(block: Block, meanings: Callable[[ModelConfig], Mapping[str, Any]], expert: str = "") -> Iterator[tuple[str, Any]]:
    """(module.attribute, value) of all that a block's modules keep; of a mixture's those of one expert, under its dense model's names."""
    for path, module in block.named_modules():
        path = f"{path}.".replace(expert, "") if expert else f"{path}."
        if ".experts." in path:
            continue  # another expert's, or all of them
        for key, value in vars(module).items():
            if key.startswith("_") or key in OF_MIXTURES or isinstance(value, Tensor):
                continue
            where = f"{path}{key}".lstrip(".")
            if isinstance(value, ModelConfig):
                yield from ((f"{where}: {word}", said) for word, said in meanings(value).items())
            else:
                yield where, (value.func, value.args, value.keywords) if isinstance(value, partial) else value


class _Meanings:
    """`meaning` of configurations, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ModelConfig, Mapping[str, Any]]] = {}

    def __call__(self, config: ModelConfig) -> Mapping[str, Any]:
        if id(config) not in self._known:
            self._known[id(config)] = config, meaning(config)  # kept, so that no other gets its identity
        return self._known[id(config)][1]
