"""Parameters of mergekit's recipes: one number, a gradient over the layers, or several for tensors whose names hold a text.

What is looked up for a tensor is asked for every role and layer, and said again as rules of ours: so it is the same for each tensor.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge.architectures.tables import find_by_model_type
from bam_merge.text import printable, ranges

NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm.attn": "model.layers.{}.input_layernorm.weight",
    "norm.ffn": "model.layers.{}.post_attention_layernorm.weight",
    "attn.q": "model.layers.{}.self_attn.q_proj.weight",
    "attn.k": "model.layers.{}.self_attn.k_proj.weight",
    "attn.v": "model.layers.{}.self_attn.v_proj.weight",
    "attn.o": "model.layers.{}.self_attn.o_proj.weight",
    "attn.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "attn.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "ffn.gate": "model.layers.{}.mlp.gate_proj.weight",
    "ffn.up": "model.layers.{}.mlp.up_proj.weight",
    "ffn.down": "model.layers.{}.mlp.down_proj.weight",
    "norm.final": "model.norm.weight",
    "head": "lm_head.weight",
}
"""What mergekit calls each role's tensor in the families that it merges by name (Llama, Mistral, Qwen2, Qwen3)."""


OPTIONAL = ("attn.q_norm", "attn.k_norm")
"""Roles that only some families have: a rule for them alone would match nothing in the others."""


GLOBS = {"attn.*": ("attn.q", "attn.k", "attn.v", "attn.o", "attn.q_norm", "attn.k_norm"), "ffn.*": ("ffn.gate", "ffn.up", "ffn.down")}


@dataclass
class Settings:
    """The parameters of a recipe: those of all models, and each model's own, by the name that it has in our recipe."""

    common: Any
    own: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def value(self, tensor: str, t: float, parameter: str, model: str | None, default: Any) -> Any:
        """What is looked up for a tensor, at `t` of the way through the layers: the model's own, else the common one, else the default."""
        for found in (self.own.get(model) if model is not None else None, self.common):
            if isinstance(found, dict) and parameter in found and (value := _evaluated(found[parameter], tensor, t)) is not None:
                return value
        return default

    @property
    def vary(self) -> bool:
        """Whether any of them is not the same for all tensors."""
        return any(
            isinstance(value, list | dict)
            for found in (self.common, *self.own.values())
            if isinstance(found, dict)
            for value in found.values()
        )

    @property
    def need_layers(self) -> bool:
        """Whether any of them depends on the layer."""

        def gradual(value: Any) -> bool:
            if isinstance(value, dict):
                return gradual(value.get("value")) or any(character.isdigit() for character in str(value.get("filter") or ""))
            return isinstance(value, list) and (any(map(gradual, value)) or not any(isinstance(item, dict) for item in value))

        return any(gradual(value) for found in (self.common, *self.own.values()) if isinstance(found, dict) for value in found.values())

    def says(self, parameter: str, models: Sequence[str] | None, value: Any) -> bool:
        """Whether the parameter is `value` for every tensor (of every one of these models)."""
        where = [(name, t) for name in NAMES.values() for t in (0.0, 0.5, 1.0)]
        return all(self.value(name, t, parameter, model, value) == value for name, t in where for model in (models or [None]))  # type: ignore[list-item]

    def sums_to_one(self, parameter: str, models: Sequence[str]) -> bool:
        values = [self.value(NAMES["attn.q"], 0.0, parameter, model, 0.0) for model in models]
        return all(isinstance(value, int | float) for value in values) and abs(sum(values) - 1) <= 1e-6 and not self.vary


def _evaluated(setting: Any, tensor: str, t: float) -> Any:
    """A setting for a tensor; None where it says nothing of it."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(item, int | float) and not isinstance(item, bool) for item in setting):
        place = t * (len(setting) - 1)
        below = int(place)
        above = min(len(setting) - 1, below + 1)
        return (1 - (place - below)) * setting[below] + (place - below) * setting[above]
    for item in setting:
        if isinstance(item, dict) and ((wanted := item.get("filter")) in (None, "*") or (isinstance(wanted, str) and wanted in tensor)):
            return _evaluated(item.get("value"), tensor, t)
    return None


def layers_of(document: Mapping[str, Any], folder: Path, models: Sequence[str]) -> tuple[int | None, bool]:
    """How many layers the models have, by layer_range or the config.json of one that is in `folder` (None where nothing says it), and
    whether such a config.json says that their heads are tied."""
    slices, layers, tied = document.get("slices"), None, False
    if isinstance(slices, list) and slices:
        layers = slices[0]["sources"][0]["layer_range"][1]
    for model in models:
        try:
            config = json.loads((folder / model / "config.json").read_bytes()[:1_000_000])
            found, tied = config.get("num_hidden_layers"), tied or config.get("tie_word_embeddings") is True
        except (OSError, ValueError, AttributeError):
            continue
        layers = found if layers is None else layers
    return (layers if type(layers) is int and 0 < layers < 10_000 else None), tied


def named_otherwise(settings: Settings, folder: Path, models: Sequence[str]) -> str | None:
    """Which tensor of these models, where their config.json is there, gets other settings than Llama's in its role (None: none does).

    mergekit's filters go by tensors' names. In Gemma 2, for one, post_attention_layernorm stands after the attention.
    """
    given = [(None, settings.common), *settings.own.items()]
    keys = [(model, key) for model, found in given if isinstance(found, dict) for key in found]

    def of(name: str) -> list[Any]:
        return [settings.value(name.format(0), t, key, model, None) for model, key in keys for t in (0.0, 0.5, 1.0)]

    for model in models:
        try:
            family = find_by_model_type(json.loads((folder / model / "config.json").read_bytes()[:1_000_000]).get("model_type"))
        except (OSError, ValueError, AttributeError):
            continue
        for row in family.rows if family is not None else ():
            name = row.names[0].replace("{layer}", "{}")
            for role in row.roles:
                if not role.endswith(".bias") and (role not in NAMES or of(name) != of(NAMES[role])):
                    return f"{row.names[0]}, which is {role}"
    return None


# ---- rules -----------------------------------------------------------------------------------------------------------------


def over_layers(
    make: Callable[[Callable[[str, str | None, Any], Any]], dict[str, Any] | str],
    settings: Settings,
    layers: int | None,
    tied: bool,
    lacks: list[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The make of most tensors, and rules for the others: every role in every layer as mergekit makes it. What has no words goes to
    `lacks`."""
    if settings.need_layers and layers is None:
        lacks.append(
            "a gradient over the layers, and nothing says how many there are: write layer_range, or have the models where their paths lead"
        )
        return {}, []
    count = (layers or 1) if settings.vary else 1
    made: dict[str, list[str]] = {}
    for role, template in NAMES.items():
        if role == "head" and tied:
            continue
        for layer in range(count) if "{}" in template else (None,):
            t = (layer / (count - 1) if count > 1 else 1.0) if layer is not None else 0.0  # of norm.final and head too
            name = template if layer is None else template.format(layer if settings.need_layers else 0)
            found = make(lambda parameter, model, default, name=name, t=t: settings.value(name, t, parameter, model, default))  # type: ignore[misc]
            if isinstance(found, str):
                lacks.append(f"{found} ({printable(name)})" if settings.vary else found)
                return {}, []
            made.setdefault(role, []).append(json.dumps(found))
    most = Counter(text for texts in made.values() for text in texts).most_common(1)[0][0]
    groups: dict[tuple[str, ...], list[str]] = {}
    for role, texts in made.items():
        groups.setdefault(tuple(texts), []).append(role)
    return json.loads(most), [rule for texts, roles in groups.items() for rule in _rules(texts, roles, most)]


def _rules(texts: Sequence[str], roles: Sequence[str], most: str) -> list[dict[str, Any]]:
    """A rule for each make that these roles have in some of their layers, apart from the shared one."""
    rules = []
    if set(roles) <= set(OPTIONAL):
        return []
    for text in dict.fromkeys(texts):
        if text != most:
            where = [layer for layer, found in enumerate(texts) if found == text]
            layers = {} if len(where) == len(texts) else {"layers": ranges(where).strip("{}")}
            rules.append({"roles": _globs(roles), **layers, **json.loads(text)})
    return rules


def _globs(roles: Sequence[str]) -> list[str]:
    """The roles, those of whole groups as one. Of roles that some families lack only as part of a group."""
    found = list(roles)
    for glob, members in GLOBS.items():
        if set(members) <= set(found):
            found = [glob, *(role for role in found if role not in members)]
    return [role for role in found if role not in OPTIONAL]
