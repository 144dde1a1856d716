"""A recipe of mergekit that was given by mistake: recognised, and said in our words where there are any.

Written from mergekit 0.1.5 as it is documented and as benchmarks/mergekit_parity.py measures it: which parameters there are, what they
default to, and what is looked up for which tensor. What gives other numbers here stands as a comment in the recipe that is printed; what
has no words here is named, and then there is no recipe.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from bam_merge.recipe.mergekit_methods import METHODS
from bam_merge.recipe.mergekit_settings import Settings, layers_of, named_otherwise, over_layers
from bam_merge.recipe.mergekit_stacks import layers_in
from bam_merge.recipe.mergekit_words import Equivalent, recipe_text, short_names
from bam_merge.text import count, nearest, printable, some

MERGE_KEYS = ("merge_method", "slices", "models", "modules", "base_model", "tokenizer_source", "parameters")
MOE_KEYS = ("gate_mode", "experts_per_token", "shared_experts")


KNOWN = {
    "merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source", "tokenizer",
    "chat_template", "random_seed", "name",
}  # fmt: skip
KNOWN_MOE = {"base_model", "gate_mode", "dtype", "experts", "experts_per_token", "shared_experts", "architecture"}


PASSTHROUGH = "passthrough"


OTHER_METHODS = (
    "breadcrumbs_ties", "della_linear", "multislerp", "arcee_fusion", "nearswap", "core_space", "ramplus_tl",
)  # fmt: skip
"""mergekit's methods that have no equivalent here."""


DTYPES = ("float32", "float16", "bfloat16")


def is_mergekit(document: Any) -> bool:
    """Whether a document is a recipe of mergekit, or mergekit-moe, and none of ours."""
    if not isinstance(document, dict) or "method" in document or "sources" in document:
        return False
    models = isinstance(document.get("models"), list) or isinstance(document.get("slices"), list)
    return isinstance(document.get("merge_method"), str) or _is_moe(document) or (models and "output" not in document)


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a document."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def _is_moe(document: Mapping[str, Any]) -> bool:
    experts = document.get("experts")
    return isinstance(experts, list) and any(isinstance(expert, dict) and "source_model" in expert for expert in experts)


def equivalent(document: Mapping[str, Any], folder: Path = Path()) -> Equivalent:
    """The recipe of ours that does what `document`, a recipe of mergekit, asks for. Models in `folder` say how many layers they have."""
    if odd := [printable(str(number), 40) for number in _numbers(document) if not abs(number) < 2**63]:
        return Equivalent("mergekit", lacks=[f"the number {odd[0]}"])
    return _Moe(document, folder).convert() if _is_moe(document) else _Merge(document, folder).convert()


@dataclass
class _Reading:
    """What both kinds of recipe share: the models by name, the dtype, and what is said of all that is no more than that."""

    document: Mapping[str, Any]
    folder: Path
    found: Equivalent = field(default_factory=lambda: Equivalent("mergekit"))
    models: list[str] = field(default_factory=list)

    def model(self, value: Any) -> str:
        """A model's path or id as it is written; what is more than that has no words here."""
        if isinstance(value, dict):
            inner = value.get("model")
            value = inner.get("path") if isinstance(inner, dict) else inner if isinstance(inner, str) else value
        if not isinstance(value, str) or not value:
            self.found.lacks.append(f"a model must be a path or an id, found {printable(repr(value), 60)}")
            return "?"
        if value not in self.models:
            self.models.append(value)
        return value

    def output(self, arithmetic: bool = True) -> dict[str, Any]:
        """Where the result goes, and in which dtype."""
        dtype, computed = self.document.get("out_dtype") or self.document.get("dtype"), self.document.get("dtype")
        if dtype is None:
            return {"path": "merged"}
        if dtype not in DTYPES:
            self.found.lacks.append(f"dtype {printable(repr(dtype), 40)}; here it is {', '.join(DTYPES)}")
        if arithmetic and computed in ("float16", "bfloat16"):
            self.found.differs.append(f"mergekit computes in {computed}; here it is float32, rounded once, so the last bits differ")
        return {"path": "merged", "dtype": dtype}

    def unknown_keys(self, known: set[str]) -> None:
        for key in self.document:
            if key not in known:
                self.found.lacks.append(
                    f"the key {printable(repr(key), 60)}, which mergekit does not have{nearest(str(key), known).rstrip('?')}"
                )

    def written(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The sources, by name: a model with an adapter behind a plus as base and adapter."""
        if any(not Path(path).is_absolute() and not path.startswith("~") for path in names):
            self.found.differs.append("paths are relative to this file; mergekit's are relative to where it is run")
        return {name: _source(path) for path, name in names.items()}


def _source(path: str) -> Any:
    base, plus, adapter = path.partition("+")
    return {"base": base, "adapter": adapter} if plus and base and adapter else path


# ---- merges ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Merge(_Reading):
    """mergekit-yaml: one dense model of several."""

    def convert(self) -> Equivalent:
        method = str(self.document.get("merge_method"))
        self.found.kind = f"mergekit (merge_method: {printable(str(method), 40)})"
        self.unknown_keys(KNOWN)
        if method == PASSTHROUGH:
            return self.stack()
        if method not in METHODS:
            known = ", ".join([*METHODS, PASSTHROUGH])
            also = "" if method in OTHER_METHODS else f"{nearest(str(method), [*METHODS, *OTHER_METHODS]).rstrip('?')}"
            self.found.lacks.append(f"merge_method {printable(repr(method), 40)}{also}; the methods with an equivalent are {known}")
            return self.found
        listed = self.listed()
        base = self.model(self.document["base_model"]) if self.document.get("base_model") is not None else None
        self.beside()
        output = self.output()
        if self.found.lacks or not listed:
            self.found.lacks = self.found.lacks or ["there are no models in it"]
            return self.found
        names = short_names([*([base] if base in self.models else []), *(model for model in self.models if model != base)], base)
        settings = Settings(self.document.get("parameters"), {names[model]: parameters for model, parameters in listed.items()})
        make = METHODS[method](self.found, settings, [names[model] for model in listed], names[base] if base else None)
        if make is None or self.found.lacks:
            return self.found
        layers, tied = layers_of(self.document, self.folder, list(listed))
        if settings.vary and (other := named_otherwise(settings, self.folder, list(listed))):
            self.found.lacks.append(f"filters and gradients for models whose names mean other tensors than Llama's: {printable(other)}")
        shared, rules = over_layers(make, settings, layers, tied, self.found.lacks)
        if self.found.lacks:
            return self.found
        used = {name for made in (shared, *rules) for name in _named(made, [names[model] for model in listed])}
        if names.get(base or "") not in {*used, None}:
            self.found.differs.append("base_model gives no tensor here, so tokenizer and configuration are those of the first model")
        sources = {name: path for name, path in self.written(names).items() if name in used}
        seed = self.document.get("random_seed")
        seed = seed if type(seed) is int and seed >= 0 else None
        recipe = {"method": "merge", "sources": sources, "shared": shared, "rules": rules, "random_seed": seed, "output": output}
        self.found.text = recipe_text(self.found.kind, recipe, self.found.differs)
        return self.found

    def stack(self) -> Equivalent:
        """passthrough: layers of models behind one another."""
        layers = layers_in(self.document, self.model, self.found)
        base = self.document.get("base_model")
        self.beside()
        output = self.output(arithmetic=False)
        if self.found.lacks:
            return self.found
        base = base if base in self.models else None
        names = short_names([*([base] if base else []), *(model for model in self.models if model != base)], base)
        output["layers"] = [{"from": names[model], "layers": text} for model, text in layers]
        recipe = {"method": "merge", "sources": self.written(names), "output": output}
        self.found.text = recipe_text(self.found.kind, recipe, self.found.differs)
        return self.found

    def listed(self) -> dict[str, Any]:
        """The models that are merged, each with its own parameters, over all layers."""
        slices, models = self.document.get("slices"), self.document.get("models")
        if self.document.get("modules") is not None:
            self.found.lacks.append("modules, which merge the parts of a model apart")
        if slices is not None:
            if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
                self.found.lacks.append("several slices, which put layers of models behind one another (here by passthrough alone)")
                return {}
            models, one = slices[0].get("sources"), slices[0]
            if one.get("base_model") is not None or one.get("parameters") is not None:
                self.found.lacks.append("base_model or parameters of a slice; write them at the top")
            ranges = [model.get("layer_range") for model in models or [] if isinstance(model, dict)]
            if any(found != ranges[0] for found in ranges) or not _from_first(ranges[0] if ranges else None):
                self.found.lacks.append(f"layer_range {printable(str(some(map(str, ranges))), 80)}: other layers than all of every model")
        if not isinstance(models, list) or not all(isinstance(model, dict) and "model" in model for model in models):
            self.found.lacks.append("models must be a list of {model: ..., parameters: ...}")
            return {}
        found: dict[str, Any] = {}
        for model in models:
            path = self.model(model["model"])
            if path in found and found[path] and model.get("parameters"):
                self.found.lacks.append(f"{printable(path)} stands twice, with parameters of its own each time")
            found[path] = model.get("parameters") or found.get(path)
        return found

    def beside(self) -> None:
        """What else a recipe may say, and what becomes of it."""
        source, tokenizer = self.document.get("tokenizer_source"), self.document.get("tokenizer")
        if tokenizer is not None or source not in (None, "base"):
            what = "tokenizer" if tokenizer is not None else f"tokenizer_source: {source}"
            self.found.differs.append(
                f"{printable(what, 80)} is not carried over: sources whose tokenizers differ are refused or aligned by the plan"
            )
        if self.document.get("chat_template") not in (None, "auto"):
            self.found.differs.append("chat_template is not carried over: the result has the first source's")
        parameters = self.document.get("parameters")
        if isinstance(parameters, dict) and "int8_mask" in parameters:
            self.found.differs.append("int8_mask is how mergekit stores its masks, and changes no number: left out")


def _from_first(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 2 and found[0] == 0


def _named(make: Mapping[str, Any], everyone: list[str]) -> Iterator[str]:
    """The sources that a make is of: those that it names, or every one."""
    yield from everyone if "from" not in make and "weights" not in make else make.get("weights", {})
    named = make.get("from", ())
    yield from [named] if isinstance(named, str) else named
    if "base" in make:
        yield make["base"]


# ---- mixtures --------------------------------------------------------------------------------------------------------------


@cache
def layouts() -> Mapping[str, str]:
    """mergekit-moe's architectures that are layouts here."""
    table: dict[str, str] = tomllib.loads((files("bam_merge.recipe") / "mergekit.toml").read_text(encoding="utf-8"))["layouts"]
    return table


GATES: dict[str, tuple[dict[str, Any], str]] = {
    "random": ({"init": "normal", "std": 1.0}, ""),
    "uniform_random": ({"init": "uniform"}, ""),
    "hidden": ({"init": "normal", "std": 0.02}, "the hidden states of the prompts in every layer"),
    "cheap_embed": ({"init": "normal", "std": 0.02}, "the embeddings of the prompts, the same in every layer"),
}
"""gate_mode: how the routers start here, and of what mergekit makes them where that is of prompts."""


_MEANS = "so that the average token of a prompt is 6 nearer to its expert than to the others (scale)"
PROMPTS = {
    "hidden": [
        "gate_mode hidden takes the hidden states between the layers; here it is what each router will see",
        f"its rows have length 1; here their length is chosen {_MEANS}",
    ],
    "cheap_embed": [
        "gate_mode cheap_embed takes the prompts' embeddings for every layer; here it is their hidden states, in each layer its own",
        f"its rows have length 1; here their length is chosen {_MEANS}",
    ],
}
"""What is not the same where routers are made of prompts in both."""


@dataclass
class _Moe(_Reading):
    """mergekit-moe: a mixture whose experts are the FFNs of models, in the attention of one."""

    def convert(self) -> Equivalent:
        document, found = self.document, self.found
        mode = str(document.get("gate_mode", "hidden"))
        found.kind = f"mergekit-moe (gate_mode: {printable(str(mode), 40)})"
        self.unknown_keys(KNOWN_MOE)
        if document.get("base_model") is None:
            found.lacks.append("base_model is missing, the model that all but the FFNs is of")
        base = self.model("?" if document.get("base_model") is None else document["base_model"])
        experts = document["experts"]
        paths = [self.model(expert.get("source_model") if isinstance(expert, dict) else expert) for expert in experts]
        for key, what in (("residual_scale", "scales the expert's output"), ("noise_scale", "adds noise to its weights")):
            if any(isinstance(expert, dict) and expert.get(key) for expert in experts):
                found.lacks.append(f"{key} of an expert, which {what}")
        if document.get("shared_experts"):
            found.lacks.append("shared_experts: experts of every token")
        layout = layouts().get(str(document.get("architecture") or next(iter(layouts()))).lower())
        if layout is None:
            found.lacks.append(
                f"architecture {printable(repr(document['architecture']), 40)}; the layouts with an equivalent are {', '.join(layouts())}"
            )
        if mode not in GATES:
            found.lacks.append(
                f"gate_mode {printable(repr(mode), 40)}{nearest(str(mode), GATES).rstrip('?')}; known are {', '.join(GATES)}"
            )
        if len(paths) < 2:
            found.lacks.append(f"{count(len(paths), 'expert')}; a mixture has two or more")
        top_k = document.get("experts_per_token", 2)
        if type(top_k) is not int or not 1 <= top_k <= len(paths):
            found.lacks.append(f"experts_per_token {printable(repr(top_k), 40)} of {len(paths)} experts")
        output = {**self.output(arithmetic=False), "layout": layout}
        if found.lacks:
            return found
        names = short_names([base, *(path for path in self.models if path != base)], base)
        router, of = GATES[mode]
        if of and (prompts := self.prompts([names[path] for path in paths], base)):
            router = {"init": "mean", **prompts}
            found.differs += PROMPTS[mode]
        elif of:
            found.differs.append(
                f"gate_mode {mode} makes the routers of {of}; here they start at random, and the mixture is to be trained before it is used"
            )
        recipe = {
            "method": "btx", "sources": self.written(names), "experts": [names[path] for path in paths],
            "shared": {"make": "copy", "from": names[base]}, "ffn": {"top_k": top_k, "gate": "topk_then_softmax"}, "router": router,
            "output": output,
        }  # fmt: skip
        found.text = recipe_text(found.kind, recipe, found.differs)
        return found

    def prompts(self, names: list[str], base: str) -> dict[str, Any]:
        """The experts' prompts by source, where each has some and the base model, whose hidden states they become, has a tokenizer."""
        folder = self.folder / Path(base.partition("+")[0]).expanduser()
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            return {}
        kinds: dict[str, dict[str, list[str]]] = {}
        for key, ours in (("positive_prompts", "prompts"), ("negative_prompts", "negative_prompts")):
            found: dict[str, list[str]] = {}
            for name, expert in zip(names, self.document["experts"], strict=True):
                given = expert.get(key) if isinstance(expert, dict) else None
                texts = [text for text in given if isinstance(text, str) and text] if isinstance(given, list) else []
                if key == "positive_prompts" and not texts:
                    return {}
                found[name] = [*found.get(name, []), *(text for text in texts if text not in found.get(name, []))]
            kinds[ours] = {name: texts for name, texts in found.items() if texts}
        if len(set(names)) < 2:
            return {}
        if len(set(names)) < len(names):
            self.found.differs.append("an expert that stands twice has one row here, of the prompts of both")
        return {key: texts for key, texts in kinds.items() if texts}
