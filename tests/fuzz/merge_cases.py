"""Random merges that must work: sources of any family, size and dtype, and a recipe over them; each by a seed and an index alone."""

import json
import math
from dataclasses import dataclass
from fnmatch import fnmatch
from random import Random
from typing import Any

import yaml
from conftest import CONFIGS

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import applies, in_order
from bam_merge.architectures.tables import load_architecture
from bam_merge.architectures.traits import own_key

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 4}, "merges": ["a b"]},
    "added_tokens": [{"id": 3, "content": "<s>"}],
}
COMPANIONS: dict[str, Any] = {
    "tokenizer.json": TOKENIZER, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 99},
    "generation_config.json": {"do_sample": True, "temperature": 0.7, "eos_token_id": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One dense model: the dtype of its matrices, that of its vectors, its number of files, how its weights differ from the seed's, which
    of the family's names it uses, and whether a tied head is stored all the same."""

    dtype: str
    vectors: str
    shards: int
    drift: str
    spelling: int = 0
    stored_head: bool = False


@dataclass(frozen=True)
class Case:
    """One merge. `std` is that of the seed's weights; `companions` are the tokenizer files that every source has."""

    name: str
    config: dict[str, Any]
    sources: dict[str, Source]
    recipe: dict[str, Any]
    workers: int
    std: float
    companions: tuple[str, ...] = ()

    def summary(self) -> str:
        """The merge in one line."""
        recipe, output = self.recipe, self.recipe["output"]
        makes = [recipe.get("shared", {}).get("make", "mean"), *(rule["make"] for rule in recipe.get("rules", ()))]
        dtypes = "+".join(dict.fromkeys(d for source in self.sources.values() for d in (source.dtype, source.vectors)))
        tied = " tied" if self.config.get("tie_word_embeddings") else ""
        rope = (self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}).items()
        sets = [(key, value) for _, inner in rope if isinstance(inner, dict) for key, value in inner.items()]
        kind = next((value for key, value in (*rope, *sets) if key in ("rope_type", "type")), "default")
        return (
            f"{recipe['method']} of {len(recipe.get('experts', self.sources))} from {len(self.sources)} {self.config['model_type']}{tied} "
            f"{dtypes} to {output['dtype']}, {output.get('layout', '-')}, {'+'.join(dict.fromkeys(makes))}, rope {kind}, {self.workers} workers"
        )

    def text(self) -> str:
        """All of it, for whoever wants to make it by hand."""
        return f"{yaml.safe_dump(self.recipe, sort_keys=False)}{self.sources}\nstd {self.std}, config {json.dumps(self.config)}"


# ---- drawing ---------------------------------------------------------------------------------------------------------------


def draw(seed: int, index: int) -> Case:
    """The case of this number. The same for ever, as long as this module is."""
    chance = Random(f"bam-merge {seed} {index}")
    config = draw_config(chance)
    sources = draw_sources(chance)
    recipe = Drawing(chance, config, list(sources)).recipe(
        mixed=len({s.dtype for s in sources.values()} | {s.vectors for s in sources.values()}) > 1
    )
    if recipe["method"] == "sparse_upcycling":
        first = next(iter(sources))
        sources = {first: sources[first]}
    companions = tuple(name for name in COMPANIONS if chance.random() < 0.5)
    return Case(f"{seed}:{index}", config, sources, recipe, chance.randint(1, 3), chance.choice((0.02, 0.02, 0.1, 0.5, 2.0)), companions)


LISTED = {"rope_scaling", "rope_parameters", "layer_types", "no_rope_layers"}
"""Keys that would contradict what is drawn."""


def draw_config(chance: Random) -> dict[str, Any]:
    """A small model of any family and variant: sizes that differ, rotary embeddings and windows of all kinds."""
    name = chance.choice([name for name, config in CONFIGS.items() if not LISTED & config.keys()])
    config = dict(CONFIGS[name])
    heads = chance.choice((1, 2, 3, 4))
    head_dim = chance.choice((4, 6, 8, 16) if name != "phi3" else (4, 8, 16))
    own = config["model_type"] in ("llama", "mistral", "qwen3") and chance.random() < 0.5
    table = load_architecture(config["model_type"])
    names = {word: own_key(table, word) for word in ("intermediate_size", "num_key_value_heads")}
    names |= {word: key for key, word in table.quirks.renamed.items() if key in config}
    drawn = {
        "num_attention_heads": heads, "hidden_size": 2 * chance.randint(4, 24) if own else heads * head_dim,
        "intermediate_size": chance.randint(3, 56), "num_hidden_layers": chance.randint(1, 3), "vocab_size": chance.randint(16, 90),
        "max_position_embeddings": chance.choice((32, 64, 128, 2048)),
    }  # fmt: skip
    if own or config["model_type"] == "qwen3":
        drawn["head_dim"] = head_dim
    if config["model_type"] != "gpt_neox":
        drawn["num_key_value_heads"] = chance.choice([n for n in range(1, heads + 1) if heads % n == 0])
    config |= {names.get(word, word): value for word, value in drawn.items()}
    if chance.random() < 0.6:
        config["tie_word_embeddings"] = chance.random() < 0.5
    eps = table.quirks.norm_eps or next(key for key in (*table.function, "") if key.endswith(("norm_eps", "epsilon")) or not key)
    epsilon = chance.choice((1e-5, 1e-6))
    if eps and eps not in table.quirks.only:
        config[eps] = epsilon
    _draw_windows(chance, config, drawn["num_hidden_layers"])
    facts = describe(table, config, [])  # with the rotary embedding that the variant has by itself
    stated = facts["rope_parameters"]["partial_rotary_factor"]
    rope = draw_rope(chance, config["model_type"], facts["head_dim"], stated, config["max_position_embeddings"])
    if table.quirks.rotary_by_kind and "rope_parameters" in rope:
        plain = {"rope_type": "default", "rope_theta": rope["rope_parameters"]["rope_theta"]}
        rope = {"rope_parameters": {"full_attention": rope["rope_parameters"], "sliding_attention": plain}}
    if table.quirks.rotary_by_kind and "rope_scaling" in rope:  # of which these classes know the newer word alone
        rope["rope_scaling"]["rope_type"] = rope["rope_scaling"].pop("type")
    return config | rope


def _draw_windows(chance: Random, config: dict[str, Any], layers: int) -> None:
    family = config["model_type"]
    if family in ("mistral", "phi3"):
        config["sliding_window"] = chance.choice((None, 4, 16))
    if family in ("qwen2", "qwen3") and chance.random() < 0.4:
        config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": chance.randint(0, layers)}


def draw_rope(chance: Random, family: str, head_dim: int, stated: float, most: int) -> dict[str, Any]:
    """The rotary embedding, in the spelling of transformers 5 or of 4; `stated` is the share of a head that turns without it."""
    theta = chance.choice((10000.0, 500000.0))
    share = 0.5 if family == "gpt_neox" and chance.random() < 0.5 else 1.0 if family == "gpt_neox" or chance.random() < 0.7 else 0.5
    own = family in ("gpt_neox", "phi3")
    if not own:
        share = 1.0
    types: dict[str, dict[str, Any]] = {
        "default": {}, "linear": {"factor": 2.0}, "yarn": {"factor": 4.0, "original_max_position_embeddings": most // 4},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": most // 4},
    }  # fmt: skip
    if int(head_dim * (share if own else stated)) > 2:
        types["dynamic"] = {"factor": 2.0}
    if family == "phi3":  # which transformers runs with these two only
        pairs = int(head_dim * share) // 2
        factors = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
        types = {"default": {}, "longrope": factors}
    kind = "default" if chance.random() < 0.5 else chance.choice(list(types))
    if kind == "longrope":
        return {
            "rope_parameters": {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": share, **types[kind]},
            "original_max_position_embeddings": most // 2,
        }
    if family in ("gpt_neox", "phi3") or chance.random() < 0.6:
        extra = {"partial_rotary_factor": share} if share != 1.0 or family == "gpt_neox" else {}
        return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **extra, **types[kind]}}
    scaling = {"rope_scaling": {"type": kind, **types[kind]}} if kind != "default" else {}
    return {"rope_theta": theta, **scaling}


DRIFTS = ("all", "all", "all", "few", "steps", "none", "layer 0", "negated")


def draw_sources(chance: Random) -> dict[str, Source]:
    """Two to four sources; half of the time in one dtype, else each in its own, or vectors in float32."""
    names = [chance.choice(("seed", "base")), *chance.sample(("code", "law", "math.v2", "a-b", "X_1"), chance.randint(1, 3))]
    chance.shuffle(names)
    dtype = chance.choice(("F32", "F32", "BF16", "BF16", "F16", "F64"))
    spread = chance.random()
    result = {}
    for name in names:
        own = chance.choice(list(DTYPES)) if spread < 0.15 else dtype
        vectors = "F32" if 0.15 < spread < 0.3 else own
        drift = "seed" if name in ("seed", "base") else chance.choice(DRIFTS)
        result[name] = Source(own, vectors, chance.randint(1, 3), drift, chance.randrange(2), chance.random() < 0.3)
    return result


class Drawing:
    """Draws a recipe over the sources `names` of models with `config`."""

    def __init__(self, chance: Random, config: dict[str, Any], names: list[str]) -> None:
        self.chance, self.config, self.names = chance, config, names
        problems: list[str] = []
        table = load_architecture(config["model_type"])
        self.facts = describe(table, config, problems)
        assert not problems, problems
        self.layers: int = self.facts["num_hidden_layers"]
        self.roles = {role for cell in in_order(table, 1) if applies(cell, self.facts) for role in cell.row.roles}

    def recipe(self, mixed: bool) -> dict[str, Any]:
        chance, method = self.chance, self.chance.choice(("bam", "bam", "bam", "btx", "btx", "sparse_upcycling", "merge", "merge"))
        if method == "sparse_upcycling":
            self.names = self.names[:1]
        recipe: dict[str, Any] = {"method": method, "sources": {name: name for name in self.names}}
        experts = list(self.names)
        if method != "merge" and (len(experts) < 2 or chance.random() < 0.3):
            experts += [chance.choice(self.names) for _ in range(chance.randint(1, 2))]
        chance.shuffle(experts)
        if experts != self.names:
            recipe["experts"] = experts
        if method != "merge":
            recipe["ffn"], layout = self.ffn(method, len(experts))
            recipe["router"] = self.router(both=method == "bam")
        if method == "bam" and chance.random() < 0.8:
            recipe["attention"] = self.attention(len(experts))
        if chance.random() < 0.8:
            recipe["shared"] = self.make()
        recipe["rules"] = self.rules(method)
        recipe["random_seed"] = chance.choice((0, 3, 2**62))
        dtype = chance.choice(("float32", "float16", "bfloat16")) if mixed or chance.random() < 0.4 else "source"
        recipe["output"] = {"path": "out", "dtype": dtype, "max_shard_size": chance.choice(("5GB", "20kB", "3000"))}
        if method != "merge" and layout != "bam":
            recipe["output"]["layout"] = layout
        return recipe

    def ffn(self, method: str, count: int) -> tuple[dict[str, Any], str]:
        """The section, and a layout that can express it."""
        chance = self.chance
        ffn: dict[str, Any] = {"top_k": chance.randint(1, count), "gate": chance.choice(("softmax_then_topk", "topk_then_softmax"))}
        public = self.public_layouts(renormalised=ffn["gate"] == "topk_then_softmax") if method != "bam" else []
        if public and chance.random() < 0.7:
            return ffn, chance.choice(public)
        if chance.random() < 0.3:
            ffn["gate_scale"] = chance.choice((0.5, 2.0, 1.7))
        return ffn, "bam"

    def public_layouts(self, renormalised: bool) -> list[str]:
        """The layouts of transformers that have a place for models of these facts (their tables' `accepts`)."""
        facts, family = self.facts, self.config["model_type"]
        if family not in ("llama", "mistral", "qwen2", "qwen3") or facts["mlp_bias"] or facts["attention_out_bias"]:
            return []
        result = []
        if family in ("llama", "mistral") and renormalised:
            result.append("mixtral")
        if family != "qwen3":
            result.append("qwen2_moe")
        windows = facts.get("sliding_window") and len(set(facts["layer_types"])) > 1
        if family == "qwen3" and not windows:
            result.append("qwen3_moe")
        return result

    def router(self, both: bool) -> dict[str, Any]:
        if both and self.chance.random() < 0.4:
            return {"attention": self.initialiser("init"), "ffn": self.initialiser("init")}
        return self.initialiser("init")

    def initialiser(self, key: str) -> dict[str, Any]:
        chance = self.chance
        kinds: tuple[dict[str, Any], ...] = (
            {key: "normal", "std": chance.choice((0.02, 0.5))}, {key: "normal"}, {key: "uniform"}, {key: "uniform", "bound": 0.3},
            {key: "zeros"}, {key: "orthogonal", "gain": chance.choice((0.5, 1.0))},
        )  # fmt: skip
        many = self.config["hidden_size"] < 8  # no more rows than columns can be orthogonal
        return chance.choice(kinds[:-1] if many else kinds)

    def attention(self, count: int) -> dict[str, Any]:
        chance = self.chance
        result: dict[str, Any] = {"kv": chance.choice(("expert", "shared"))}
        if chance.random() < 0.5:
            result |= {"routing": "top_k", "top_k": chance.randint(1, count)}
        return result

    def make(self) -> dict[str, Any]:
        """How shared tensors are made: any method that the number of sources allows."""
        chance, names = self.chance, self.names
        if len(names) == 1:
            return chance.choice(({"make": "mean"}, {"make": "copy", "from": names[0]}))
        base = chance.choice(names)
        others = [name for name in names if name != base]
        weights = {name: chance.choice((0.3, 0.5, 1.0, 1.7)) for name in chance.sample(others, chance.randint(1, len(others)))}
        density = chance.choice((0.05, 0.2, 0.5, 0.9, 1.0))
        signed = {name: chance.choice((-0.5, 0.5, [1.0, -0.3], 0.0)) for name in weights}
        options = (
            {}, {"weights": weights}, {"scale": chance.choice((0.3, 1.0, -1.0))}, {"weights": weights, "scale": 0.7}, {"weights": signed},
            {"scale": [0.2, 1.0, 0.5]},
        )  # fmt: skip
        shares = [chance.choice((-0.5, 0.1, 0.3, 0.7)) for _ in names[1:]]
        pair = chance.sample(names, 2)
        kinds: tuple[dict[str, Any], ...] = (
            {"make": "mean"}, {"make": "copy", "from": base}, {"make": "slerp", "from": pair, "t": chance.choice((0.0, 0.3, 0.5, 1.0))},
            {"make": "linear", "weights": dict(zip(names, [*shares, 1 - math.fsum(shares)], strict=True))},
            {"make": "task_arithmetic", "base": base, **chance.choice(options)},
            {"make": "ties", "base": base, "density": density, **chance.choice(options)},
            {"make": "dare_ties", "base": base, "density": density, **chance.choice(options)},
            {"make": "dare_linear", "base": base, "density": density, **chance.choice(options)},
            {"make": "breadcrumbs", "base": base, "density": density, "gamma": chance.choice((0.0, 0.05, 0.4)), **chance.choice(options)},
            {"make": "della", "base": base, "density": density, "epsilon": 0.9 * min(density, 1 - density), **chance.choice(options)},
            {"make": "ram", "base": base, "epsilon": chance.choice((1e-5, 0.01))}, {"make": "karcher"},
            {"make": "nuslerp", "from": pair, "t": chance.choice((0.0, 0.3, [0.0, 1.0])), "by": chance.choice(("tensor", "rows"))},
        )  # fmt: skip
        if len(others) > 1:
            kinds += ({"make": "sce", "base": base, "density": density}, {"make": "model_stock", "base": base})
        return chance.choice(kinds)

    def rules(self, method: str) -> list[dict[str, Any]]:
        """Up to three rules for groups of roles that do not overlap, some by layer, so that every rule makes something."""
        chance = self.chance
        groups = [["norm.attn"], ["norm.attn.post"], ["norm.final"], ["embed"], ["router.ffn"], ["attn.k*", "attn.v*"]]
        if self.facts["untied"]:
            groups.append(["head"])
        if method == "btx":
            groups += [["attn.q*", "attn.o*"]]
        if method == "bam":
            groups.append(["router.attn"])
        if method == "merge":
            groups = [group for group in groups if group != ["router.ffn"]] + [["attn.q*", "attn.o*"], ["ffn.up"], ["ffn.*"]]
        made = (*self.roles, "router.ffn", "router.attn")  # not every family has norms before attention, or weights in them
        groups = [group for group in groups if all(any(fnmatch(role, pattern) for role in made) for pattern in group)]
        rules = []
        for group in chance.sample(groups, chance.randint(0, 3)):
            make = self.initialiser("make") if group[0].startswith("router") else self.make()
            rule = {"roles": group, **make}
            if "final" not in group[0] and group[0] not in ("embed", "head") and chance.random() < 0.5:
                layer = chance.randrange(self.layers)
                rule["layers"] = chance.choice((layer, f"0-{layer}", f"{layer}-"))
            rules.append(rule)
        if ["ffn.*"] in [rule["roles"] for rule in rules]:  # after ffn.up, or that would make nothing
            rules.sort(key=lambda rule: rule["roles"] == ["ffn.*"])
        return rules
