"""adapter_config.json read strictly: what an adapter is, by PEFT's keys. Every key that PEFT 0.21 knows is read, harmless, or refused.

Facts from PEFT's code (tuners/lora/config.py, tuners/tuners_utils.py): how modules are matched, and what scales an update.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bam_merge.text import nearest, printable
from bam_merge.validation_words import shown

ALL_LINEAR = "all-linear"


HARMLESS = {
    "task_type": "what it was trained for", "auto_mapping": "for models of one's own", "peft_version": "who wrote the file",
    "inference_mode": "whether it is trained on", "revision": "of the base on the hub", "base_model_name_or_path": "compared in a note",
    "lora_dropout": "training only", "megatron_core": "a name, used with megatron_config only",
    "qalora_group_size": "used with use_qalora only", "runtime_config": "not kept between runs",
    "eva_config": "how A started", "loftq_config": "used with init_lora_weights loftq only",
    "corda_config": "used with init_lora_weights corda only", "lora_ga_config": "used with init_lora_weights lora_ga only",
    "velora_config": "how gradients were stored",
}  # fmt: skip
"""Keys that change nothing of the weights, with the reason."""


REFUSED = {
    "megatron_config": "it is of a model that Megatron split over processors. Gather it into a LoRA adapter of the whole model first",
    "target_parameters": "it updates parameters that are no modules' weights, as in mixtures of experts. Merge it with PEFT first",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so it cannot be merged into weights",
    "use_qalora": "QA-LoRA pools the inputs of quantised layers, which no update of the weights is",
    "monteclora_config": "it samples its updates, so that no weights are equal to it",
    "layer_replication": "it is of a model whose layers are repeated. Make that model first, and train or name the adapter on it",
    "use_bdlora": "its updates are block-diagonal. Merge it with PEFT first (merge_and_unload, save_pretrained)",
    "arrow_config": "it routes between adapters, so that no weights are equal to it",
    "kasa_config": "KaSA cuts the smallest singular values out of the base's weights. Merge it with PEFT first",
}  # fmt: skip
"""Keys that ask for what is not done here, with why and the way out."""


KEPT_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights after which base and update are what they say."""


CHANGED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Those that changed the base's weights before training: the adapter is of other weights than the base's."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter updates, and by how much: PEFT's keys, by PEFT's names."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    bias: str = "none"
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] = field(default_factory=list)
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def rank(self, *names: str) -> int:
        """The rank of a module's update, by the module's names."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, names), self.r)

    def scale(self, *names: str) -> float:
        """What a module's product B A is multiplied with: alpha / r, of rsLoRA alpha / sqrt(r) (arXiv 2312.03732)."""
        alpha, rank = self.alpha_pattern.get(_pattern(self.alpha_pattern, names), self.lora_alpha), self.rank(*names)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether a module was trained whole, itself or with one that it is in."""
        parts = module.split(".")
        above = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(name.endswith(saved) for name in above for saved in self.modules_to_save or ())

    def targets(self, module: str, linear: bool, head: bool) -> bool:
        """Whether a module has a low-rank update. `linear`: it is no embedding; `head`: it is the output layer, which all-linear leaves."""
        if self._excludes(module) or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or ()):
            return False
        targets = self.target_modules
        if isinstance(targets, str):
            return linear and not head if targets.lower() == ALL_LINEAR else re.fullmatch(targets, module) is not None
        return _ends(module, targets) and self._of_layer(module)

    def tokens(self, module: str, embedding: bool) -> list[int] | None:
        """The rows of a module that were trained alone."""
        indices = self.trainable_token_indices
        if not indices:
            return None
        if isinstance(indices, list):
            return indices if embedding else None
        return next((rows for name, rows in indices.items() if _ends(module, [name])), None)

    def _excludes(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return bool(self.exclude_modules) and re.fullmatch(self.exclude_modules, module) is not None
        return _ends(module, self.exclude_modules or [])

    def _of_layer(self, module: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        starts = [r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"] * len(patterns)
        for start, pattern in zip(starts, patterns, strict=True):
            match = re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", module)
            if match:
                return int(match["index"]) in ([wanted] if isinstance(wanted, int) else wanted)
        return False


def _ends(module: str, names: list[str]) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first pattern that the end of a module's name matches."""
    return next((pattern for pattern in patterns if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)), "")


# ---- reading ---------------------------------------------------------------------------------------------------------------


def read_adapter_config(document: Mapping[str, Any], problems: list[str]) -> AdapterConfig | None:
    """The adapter that an adapter_config.json describes; None, with what is wrong added to `problems`, where it describes none that can
    be merged here."""
    found = list(_problems(document))
    problems += [f"adapter_config.json: {problem}" for problem in found]
    if found:
        return None
    known = {key: document[key] for key in KINDS if document.get(key) is not None}
    return AdapterConfig(**known)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_pattern(value: object) -> bool:
    """Text that is a regular expression, or names."""
    return _is_names(value) or (isinstance(value, str) and _is_regex(value))


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _are_indices(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**63 for i in value)


def _is_mapping(value: object, of: Any) -> bool:
    return isinstance(value, dict) and all(_is_regex(key) and of(item) for key, item in value.items())


def _flag(value: object) -> bool:
    return isinstance(value, bool)


KINDS: dict[str, tuple[Any, str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a number"),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), (_flag, "true or false")),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "text"),
    "target_modules": (_is_pattern, "a list of names, or a regular expression"),
    "exclude_modules": (_is_pattern, "a list of names, or a regular expression"),
    "modules_to_save": (lambda value: _is_names(value) and all(map(_is_regex, value)), "a list of names"),
    "layers_to_transform": (lambda value: _are_indices([value]) or _are_indices(value), "a layer's number, or a list of them"),
    "layers_pattern": (_is_pattern, "a name, or a list of names"),
    "rank_pattern": (lambda value: _is_mapping(value, _is_rank), "an object of regular expressions and ranks"),
    "alpha_pattern": (lambda value: _is_mapping(value, _is_number), "an object of regular expressions and numbers"),
    "trainable_token_indices": (
        lambda value: _are_indices(value) or _is_mapping(value, _are_indices), "a list of token ids, or an object of such lists",
    ),
}  # fmt: skip
"""The keys that are read: what a value must be, and how that is said."""


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    kind = document.get("peft_type")
    if kind != "LORA":
        yield (
            f"peft_type is {shown(kind)}, and only LORA (LoRA, rsLoRA, DoRA) is merged here. Merge it into its base with PEFT "
            "(merge_and_unload, save_pretrained), and write that folder as a plain source."
        )
        return
    for key, value in document.items():
        if key in KINDS:
            is_right, expected = KINDS[key]
            if value is not None and not is_right(value):
                yield f"{key}: found {shown(value)}, expected {expected}."
        elif key in REFUSED:
            if value:
                yield f"{key} is set: {REFUSED[key]}."
        elif key not in HARMLESS and key not in ("peft_type", "init_lora_weights") and value not in (None, False, "", [], {}):
            known = (*KINDS, *REFUSED, *HARMLESS, "init_lora_weights")
            yield (
                f"{printable(key)} = {shown(value)}: a key that PEFT 0.21 does not know{nearest(key, known)} It may change what is "
                "computed. Merge the adapter with the PEFT that wrote it (merge_and_unload, save_pretrained), or remove the key if it "
                "changes nothing."
            )
    yield from _init_problems(document)
    yield from _contradictions(document)


def _init_problems(document: Mapping[str, Any]) -> Iterator[str]:
    start = document.get("init_lora_weights", True)
    if start is None or start in KEPT_INITS:
        return
    name = str(start).lower()
    if name.startswith(CHANGED_INITS):
        yield (
            f"init_lora_weights is {shown(start)}, which changed the base's weights before training: the adapter is of those, not of the "
            "base's own. Save it as a plain LoRA adapter: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...), or merge "
            "it with PEFT."
        )
    else:
        yield f"init_lora_weights: found {shown(start)}, expected {', '.join(map(shown, KEPT_INITS))}."


def _contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    targets = document.get("target_modules")
    if targets is None:
        yield "target_modules is null: write the names of the modules that have updates, or all-linear."
    if isinstance(targets, str) and document.get("layers_to_transform") is not None:
        yield "layers_to_transform beside a target_modules that is a regular expression: PEFT refuses both. Remove one."
    if document.get("layers_pattern") and document.get("layers_to_transform") is None:
        yield "layers_pattern without layers_to_transform: PEFT refuses it. Remove it, or name the layers."
    if document.get("use_dora") and document.get("lora_bias"):
        yield "use_dora beside lora_bias: PEFT refuses both. Set one to false."
