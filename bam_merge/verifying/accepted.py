"""What a recipe accepts, as verification understands it: by its own reading of every source, not by the plan's.

A source whose facts were accepted at another source's value is compared as what it was merged as: its weights, computing under the accepted
configuration. What it computed on its own is then not what the mixture's expert computes, and no check says that it is; that the result has
the accepted value, and that the source named in the recipe has it, are checked here. A fact that was not accepted is compared as ever.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bam_merge.model.loading import StoredModel
from bam_merge.model.model_config import ModelConfig
from bam_merge.recipe.schema import Recipe
from bam_merge.text import listed
from bam_merge.verifying.config import meaning
from bam_merge.verifying.report import Check

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The reference model's names of what may be tied."""


FIELDS = {
    "rms_norm_eps": ("rms_norm_eps",),
    "layer_norm_eps": ("layer_norm_eps",),
    "logit_scale": ("logit_scale",),
    "rope_parameters": ("rope_parameters", "sliding_rope_parameters", "max_position_embeddings"),
    "sliding_window": ("sliding_window", "layer_types"),
}
"""What of the reference model's configuration goes with a fact that can be accepted."""


SAYS = {
    "rms_norm_eps": ("norm",),
    "layer_norm_eps": ("norm",),
    "logit_scale": ("logit scale",),
    "rope_parameters": ("rotary frequencies", "rotary factor", "context"),
    "sliding_window": ("windows",),
}
"""What of a configuration's meaning (config.py) a fact decides."""


def as_accepted(dense: dict[str, StoredModel], recipe: Recipe) -> dict[str, StoredModel]:
    """The dense models under what the recipe accepts: facts of the sources that it names, and heads where any source has its own."""
    configs = {name: _under(recipe, name, dense) for name in dense}
    models = {name: replace(model, config=configs[name]) for name, model in dense.items()}
    accept = recipe.accept
    if accept is None or accept.head != "stored" or all(model.config.tie_word_embeddings for model in dense.values()):
        return models
    return {name: _untied(model) for name, model in models.items()}


def _under(recipe: Recipe, name: str, dense: Mapping[str, StoredModel]) -> ModelConfig:
    config = dense[name].config
    for fact, source in _facts(recipe).items():
        if source in dense:
            config = replace(config, **{field: getattr(dense[source].config, field) for field in FIELDS[fact]})
    return config


@dataclass(frozen=True)
class Untied(StoredModel):
    """`own`, which is tied, with its embeddings in the head's place too."""

    own: StoredModel | None = None

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        assert self.own is not None
        return self.own.read(EMBEDDINGS if parameter == HEAD else parameter, dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        assert self.own is not None
        return self.own.read_rows(EMBEDDINGS if parameter == HEAD else parameter, rows, dtype)


def _untied(model: StoredModel) -> StoredModel:
    if not model.config.tie_word_embeddings:
        return model
    leaves = {**model.leaves, HEAD: model.leaves[EMBEDDINGS]}
    return Untied(model.checkpoint, replace(model.config, tie_word_embeddings=False), leaves, model)


def _facts(recipe: Recipe) -> Mapping[str, str]:
    return (recipe.accept.facts or {}) if recipe.accept is not None else {}


def accepted_check(result: StoredModel, dense: Mapping[str, StoredModel], recipe: Recipe) -> Iterator[Check]:
    """Where the recipe accepts facts: one check that the result has each as the source that the recipe names, and who had it otherwise."""
    if not _facts(recipe):
        return
    wrong, said = [], []
    mine = meaning(result.config)
    for fact, source in _facts(recipe).items():
        theirs = {name: meaning(model.config) for name, model in dense.items()}
        wrong += [
            f"{key} is not that of {source}, whose {fact} the recipe accepts" for key in SAYS[fact] if mine[key] != theirs[source][key]
        ]
        others = [name for name, means in theirs.items() if any(means[key] != theirs[source][key] for key in SAYS[fact])]
        if others:
            said.append(f"{listed(others)} compared with {fact} of {source}, as accepted, not as trained")
    yield Check("accepted", not wrong, "; ".join(wrong or said) or "no source differs in what the recipe accepts")
