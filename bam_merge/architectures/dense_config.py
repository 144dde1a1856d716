"""A dense family's config.json made of facts: what a config.json of the family must say, for a model of which another table's file says it.

The way of config.py backwards. Nothing is believed of it: what is written is read again, and a fact that comes back as another one is a
problem.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from math import gcd
from typing import Any

from bam_merge.architectures.config import COMMON_FUNCTION, NEUTRAL, describe
from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.traits import BETA, own_key
from bam_merge.architectures.vocabulary import QUIET, TRAITS
from bam_merge.validation_words import shown

SAID = (
    *COMMON_FUNCTION, *TRAITS, *QUIET, "rope_parameters", "sliding_rope_parameters", "rope_layers", "query_growth", "sliding_window",
    "layer_types", "sizes_by_kind", "max_position_embeddings",
)  # fmt: skip
"""The facts that say what a dense model computes, beside the epsilon of its norms."""


def dense_config(family: Architecture, facts: Mapping[str, Any], source: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The config.json of a model of `family` with these facts; what changes no function is that of `source`, another file's.

    Empty, with the reasons appended to `problems`, where the family cannot say a fact.
    """
    config = {
        **{key: source[key] for key in NEUTRAL if key in source},
        **_plain(family, facts),
        **_rotary(family, facts),
        **_idle(family, facts),
    }
    fewest: list[str] | None = None
    for more in _choices(family, facts):
        wrong = list(_differences(family, {**config, **more}, facts))
        if not wrong:
            return {"model_type": family.model_types[0], **config, **more}
        fewest = wrong if fewest is None or len(wrong) < len(fewest) else fewest
    problems += fewest or []
    return {}


def as_said(family: Architecture, config: Mapping[str, Any], facts: Mapping[str, Any], said: Callable[[str], bool]) -> dict[str, Any]:
    """`config` with no key that another file of the family, whose keys `said` knows, left out for its default, and rope_theta as there."""
    kept, rope = dict(config), config.get("rope_parameters")
    if isinstance(rope, dict) and not said("rope_parameters") and said("rope_theta") and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        older = {"rope_theta": rope["rope_theta"], **({"rope_scaling": scaling} if scaling != {"rope_type": "default"} else {})}
        others = {key: value for key, value in kept.items() if key != "rope_parameters"}
        kept = kept if any(_differences(family, {**others, **older}, facts)) else {**others, **older}
    for key in [key for key in kept if key != "model_type" and not said(key)]:
        fewer = {other: value for other, value in kept.items() if other != key}
        kept = kept if any(_differences(family, fewer, facts)) else fewer
    return kept


def _differences(family: Architecture, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    """What `config` does not say that is to be said."""
    wrong: list[str] = []
    found = describe(family, config, wrong)
    if wrong or not found:  # a file of the family that nobody wrote: what the family is says more than what is wrong in that
        yield from list(_other_kinds(family, facts)) or wrong
        return
    eps = "layer_norm_eps" if found["norm_type"] == "layer_norm" else "rms_norm_eps"
    for key in dict.fromkeys((*SAID, eps)):
        mine, theirs = found.get(key, QUIET.get(key)), facts.get(key, QUIET.get(key, TRAITS.get(key)))
        if key == "layer_types" and not facts.get("sliding_window"):  # no kind of layer is unlike another
            continue
        if key == "parallel_norms" and not facts.get("parallel_block"):
            continue
        if key in ("rope_parameters", "sliding_rope_parameters"):
            mine, theirs = _turning(mine), _turning(theirs)
        if key == "logit_scale":  # a saved mixture of layout bam says 1, of logits that nothing scales
            mine, theirs = (1 if scale is None else scale for scale in (mine, theirs))
        if mine != theirs and not (mine is None and theirs is False):
            yield _apart(family, key, mine, theirs)


def _other_kinds(family: Architecture, facts: Mapping[str, Any]) -> Iterator[str]:
    """What every model of the family is, whatever its config.json says, and these facts are not."""
    for trait, rule in family.traits.items():
        theirs = facts.get(trait, QUIET.get(trait, TRAITS.get(trait)))
        idle = trait == "parallel_norms" and not facts.get("parallel_block")
        if trait in SAID and not idle and not str(rule).startswith("config:") and rule != theirs:
            yield _apart(family, trait, rule, theirs)


def _apart(family: Architecture, key: str, mine: Any, theirs: Any) -> str:
    return f"a {family.name} model has {key} = {shown(mine)}, and this mixture has {shown(theirs)}."


def _turning(rope: Any) -> Any:
    """A rotary embedding with nothing left out that is usual."""
    return rope if not isinstance(rope, dict) else {"partial_rotary_factor": 1.0, **rope}


def _knows(family: Architecture, key: str) -> bool:
    return key in {*family.function, *family.neutral, *family.defaults, *family.quirks.needed, *family.quirks.only}


def _plain(family: Architecture, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, activation, windows, epsilon and traits, each under the family's own key."""
    quirks, config = family.quirks, dict[str, Any]()
    for word in COMMON_FUNCTION:
        if word not in quirks.worked_out and quirks.only.get(own_key(family, word)) not in ((), []):
            config[own_key(family, word)] = facts.get(word)
    config.pop("hidden_act", None)
    act = facts.get("hidden_act")
    config[quirks.activation] = next((old for old, new in quirks.activations.items() if new == act), act)
    eps = "layer_norm_eps" if family.traits.get("norm_type") == "layer_norm" else "rms_norm_eps"
    config |= {quirks.norm_eps or eps: facts[eps]} if facts.get(eps) is not None else {}
    config |= {"max_position_embeddings": facts["max_position_embeddings"]} if facts.get("max_position_embeddings") is not None else {}
    window = facts.get("sliding_window")
    stated = {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": facts.get("layer_types")}
    config |= {key: value for key, value in stated.items() if _knows(family, key)}
    for kind, keys in family.sizes.items():
        of_kind = (facts.get("sizes_by_kind") or {}).get(kind, {})
        config |= {key.partition(" if ")[0]: of_kind.get(size, facts.get(size)) for size, key in keys.items()}
    for trait, rule in family.traits.items():
        key, _, power = str(rule).removeprefix("config:").partition("^")
        if str(rule).startswith("config:") and key not in COMMON_FUNCTION:
            config[key] = _stated(trait, facts.get(trait, QUIET.get(trait)), power, facts)
    for key, possible in quirks.only.items():
        options = possible if isinstance(possible, list | tuple) else (possible,)
        if options and family.defaults.get(key, options[0]) not in options:
            config[key] = options[0]
    if family.quirks.turning == "listed":
        turning = facts.get("rope_layers")
        config["no_rope_layers"] = [int(turning is None or layer in turning) for layer in range(facts["num_hidden_layers"])]
    elif family.quirks.turning == "if rope":
        config["position_embedding_type"] = "rope" if facts.get("rope_layers") is None else "nope"
    config |= {key: facts[key] for key in family.function if key in facts and key not in (*config, *quirks.only)}
    unsaid = [key for key, value in config.items() if value is None and key not in family.defaults and key != "sliding_window"]
    return {key: value for key, value in config.items() if key not in unsaid}


STATE_SPACE_HEADS = 128
"""transformers' default of mamba_n_heads."""


def _idle(family: Architecture, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A key of state-space layers that the model has none of: transformers asks all the same that it divides twice the width."""
    heads = gcd(STATE_SPACE_HEADS, 2 * facts["hidden_size"])
    return {"mamba_n_heads": heads} if "mamba_n_heads" in family.neutral and heads < STATE_SPACE_HEADS else {}


def _stated(trait: str, fact: Any, power: str, facts: Mapping[str, Any]) -> Any:
    """The value of the key that a trait is read from; of a power of it the plainest one that gives the same number."""
    if isinstance(TRAITS[trait], bool):
        return bool(fact)
    if fact is None and trait == "attention_scale":
        fact = facts["head_dim"] ** -0.5
    if fact is None and (power or trait in ("embedding_scale", "residual_scale")):
        fact = 1.0
    if fact is None or not power:
        return fact
    root = float(fact) ** (1 / float(power))
    plain = (round(root), round(root, 6), round(root, 12))
    return next((number for number in plain if number and float(number) ** float(power) == fact), root)


def _rotary(family: Architecture, facts: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters, one set or one for each kind of layer, and what stands beside them."""
    rope, beside = dict(facts["rope_parameters"]), dict[str, Any]()
    if family.quirks.rotary_share is None and rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    if family.quirks.query_growth and facts.get("query_growth") is not None:
        rope[BETA] = facts["query_growth"]
    if family.quirks.context == "outer":
        beside["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings", None)
    if family.quirks.rotary_by_kind:
        near = dict(facts.get("sliding_rope_parameters") or rope)
        near.pop("partial_rotary_factor", None)
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": near}, **beside}
    return {"rope_parameters": rope, **{key: value for key, value in beside.items() if value is not None}}


def _choices(family: Architecture, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every way to state what several keys say together; one that states nothing where the family has no such keys."""
    values: dict[str, list[Any]] = {}
    for case in family.cases:
        for key, value in case.where.items():
            values.setdefault(key, []).extend([value, not value] if isinstance(value, bool) else [value, family.defaults.get(key)])
        for fact, value in case.facts.items():
            if isinstance(value, str) and fact in facts and value not in COMMON_FUNCTION:
                values.setdefault(value, []).append(facts[fact])
    options = {key: list({repr(value): value for value in of_key}.values()) for key, of_key in values.items()}
    for chosen in product(*options.values()):
        yield {key: value for key, value in zip(options, chosen, strict=True) if value is not None}
