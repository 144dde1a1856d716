"""The experiment as stages: from config.yaml, one graph per random seed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from stages import Stage

COMPUTE = ", equal compute"


@dataclass
class Graph:
    """The stages of one random seed. `merged`, `trained`, `measured`: by setting; `measured` also has NAME@0, before training."""

    random_seed: int
    data: Stage
    dense: dict[str, Stage] = field(default_factory=dict)
    merged: dict[str, Stage] = field(default_factory=dict)
    trained: dict[str, Stage] = field(default_factory=dict)
    measured: dict[str, Stage] = field(default_factory=dict)

    def measurements(self, settings: Iterable[str]) -> Iterator[Stage]:
        """What is measured of the dense models and of these settings, in the order in which it should be made."""
        for name in (*self.dense, *(f"{setting}@0" for setting in settings)):
            yield self.measured[name]
        for name in (f"{setting}{suffix}" for setting in settings for suffix in ("", COMPUTE)):
            if name in self.measured:
                yield self.measured[name]


def load_config(file: Path) -> dict[str, Any]:
    """A configuration; one with `base` holds what differs from that file beside it, keys of mappings one by one."""
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    if "base" in config:
        config = overlaid(load_config(file.with_name(config.pop("base"))), config)
    return config


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: overlaid(below[key], value) for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **both}


def graph(config: dict[str, Any], random_seed: int) -> Graph:
    """All stages of one random seed; it decides initialisation, the order of the data and the routers."""
    made = Graph(random_seed, Stage("data", "data", config["data"], {}))
    window, general = config["data"]["window"], config["domains"][0]

    def training(phase: str, shares: dict[str, float], **others: Any) -> dict[str, Any]:
        return {**config["training"], **config[phase], "shares": shares, "random_seed": random_seed, **others}

    def label(name: str) -> str:
        return f"{name} (random seed {random_seed})"

    def measure(name: str, stage: Stage) -> None:
        made.measured[name] = Stage(label(f"measure {name}"), "measured", config["measure"], {"model": stage, "data": made.data})

    parameters = {
        "model": config["model"],
        "training": training("phase1", dict(zip(config["domains"], config["phase1_shares"], strict=True))),
    }
    made.dense["seed"] = seed = Stage(label("seed"), "seed", parameters, {"data": made.data})
    measure("seed", seed)
    for domain in config["domains"][1:]:
        shares = {general: config["general_share"], domain: 1 - config["general_share"]}
        made.dense[domain] = Stage(label(domain), "dense", training("phase2", shares), {"model": seed, "data": made.data})
        measure(domain, made.dense[domain])
    equal = dict.fromkeys(config["domains"], 1.0)
    for name, setting in chosen(config).items():
        recipe = {**setting["recipe"], "random_seed": random_seed}
        experts = [list(made.dense)[index] for index in setting.get("experts", range(len(made.dense)))]
        if recipe["method"] != "merge":
            recipe["experts"] = experts
        sources = list(dict.fromkeys(experts))
        inputs = {source: made.dense[source] for source in sources}
        parameters = {"recipe": recipe, "sources": sources, "window": window}
        if "texts" in setting:  # routers made of so many tokens of each source's domain
            recipe["router"] = {"init": "ridge", "tokens": setting["texts"], **setting.get("router", {})}
            parameters["texts"] = {source: config["domains"][list(made.dense).index(source)] for source in sources}
            inputs["data"] = made.data
        made.merged[name] = Stage(label(f"merge {name}"), "merged", parameters, inputs)
        measure(f"{name}@0", made.merged[name])
        if recipe["method"] == "merge":
            of = training("phase3", equal)
            made.trained[name] = Stage(label(name), "dense", of, {"model": made.merged[name], "data": made.data})
        else:
            of = training("phase3", equal, losses={**config["losses"], **setting.get("losses", {})})
            given = {"model": made.merged[name], "data": made.data}
            made.trained[name] = Stage(label(name), "mixture", of, given)
            if "equal_compute" in setting:
                given = {**given, "reference": made.merged[setting["equal_compute"]]}
                made.trained[f"{name}{COMPUTE}"] = Stage(label(f"{name}{COMPUTE}"), "mixture", of, given)
    for name, stage in made.trained.items():
        measure(name, stage)
    return made


def chosen(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings; of those that a configuration inherits, the ones that its `only` names."""
    return {name: setting for name, setting in config["settings"].items() if name in config.get("only", config["settings"])}


def graphs(config: dict[str, Any]) -> list[Graph]:
    """One graph per random seed."""
    return [graph(config, random_seed) for random_seed in config["random_seeds"]]
