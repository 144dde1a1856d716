"""Architectures as data: tables that map tensor names to roles, for dense families and for mixture layouts.

A role is what a tensor does ("attn.q", "ffn.down.bias"), the same word for every family. One table per architecture, in
`architectures/families/*.toml` and `architectures/layouts/*.toml`, lists which tensor holds which role and with what symbolic shape. Dense
families and mixture layouts are the same type; a row read backwards cuts a fused tensor into roles, read forwards it fuses them.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

from bam_merge.architectures.strict_tables import check_table
from bam_merge.architectures.table_files import left_out, table_names, table_text
from bam_merge.architectures.vocabulary import SYMBOLS


@dataclass(frozen=True)
class Row:
    """One tensor (per layer, per expert) of an architecture.

    `names` are alternative spellings, the first is written. A fused tensor has several `roles`: its rows are `groups`
    equal blocks, and each block holds `parts[i]` rows of role i. Where its `axis` is "expert", its first axis is the experts', of each of
    which it holds what is said here. `when` names the fact that must be true for the tensor to exist, or, as "not FACT", false (several
    by "and"); `pieces` is how many tensors with {head} in their name hold the one of `shape`, one after the other along its first axis;
    `make` is how a layout fills a tensor that no source has: "zeros" or "ones" of `shape`, or a role, whose tensor is stored once more;
    `without` is what then happens, in engines, to a model that lacks it or has zeros in the place of ones. `kinds` are the kinds of
    layers that have the tensor, where not all have it; `parameter` is what the reference model calls one of a role that bam has not, where
    it is not the name in files.
    """

    roles: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[str, ...] = ()
    groups: str = "1"
    parts: tuple[str, ...] = ()
    axis: str | None = None
    when: str | None = None
    make: str | None = None
    without: str | None = None
    pieces: str | None = None
    kinds: tuple[str, ...] = ()
    parameter: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.names[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.names[0] or self.stacked

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all experts."""
        return self.axis == "expert"

    def name(self, layer: int | None = None, expert: int | None = None, spelling: int = 0) -> str:
        return self.names[spelling].replace("{layer}", str(layer)).replace("{expert}", str(expert))


@dataclass(frozen=True)
class Limit:
    """What `engines` cannot do with a layout, and transformers can: where two symbolic sizes are not `equal`, or where a fact has another
    value than those of `only`, `otherwise` happens; `where` some facts have these values, if it says so. A fact that is a mapping is held
    to one of its keys as FACT.KEY, "none" where it lacks the key. `refuses`: the result itself says so when such an engine loads it, so
    that it is no note of the plan."""

    otherwise: str
    engines: tuple[str, ...]
    equal: tuple[str, ...] = ()
    fact: str | None = None
    only: tuple[Any, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    refuses: bool = False


@dataclass(frozen=True)
class Engine:
    """An engine beside transformers in which merges in a layout were run: its version, of which families' sources, how it went (`how`), and
    whether it `runs` them at all. What it computes otherwise than config.json says is a Limit. `tried` is empty where the engine has the
    layout and nobody ran it here: `how` then says where that is seen.

    `architecture` is what a GGUF file calls the layout, `paired` whether q and k have the rows that turn together side by side there,
    `divided_logits` whether its logit_scale is what logits are divided by.
    """

    name: str
    version: str
    tried: tuple[str, ...]
    how: str
    runs: bool = True
    architecture: str | None = None
    paired: bool = False
    divided_logits: bool = False


@dataclass(frozen=True)
class Quirks:
    """What transformers' configuration class takes of a config.json where classes differ. Most families need none of it.

    `rotary_base`       the key beside rope_parameters that holds the rotary base
    `rotary_by_kind`    whether layers with and without a sliding window have a rotary embedding each
    `rope_sets`         the two sets that are meant where rope_parameters is left out, of classes that read nothing beside it
    `sliding_base`      the key beside rope_parameters for the base of those with one; None: there is none, rope_theta is the others'
    `rotary_share`      the key beside rope_parameters that holds the share of a head that turns; None: whole heads turn, whatever is asked
    `rope_types`        types of rotary scaling that are read as another one
    `context`           where the context before the rotary scaling stands: "inner" (in rope_parameters) or "outer" (a key beside it)
    `windows`           which layers have sliding-window attention: a word of vocabulary.WINDOWS
    `worked_out`        facts that are always worked out, whatever a key says: each is another key, or "KEY / KEY"
    `pattern_is_read`   whether sliding_window_pattern is a key of it; else its table's default holds, whatever a file has there
    `pattern_is_text`   whether it may also be a text of L and G, for layers with a window and without, beside layer_types that agree
    `turning`           which layers have a rotary embedding: a word of vocabulary.TURNING
    `alpha`             whether `alpha` in rope_parameters of type dynamic stretches the base, once for all lengths
    `query_growth`      whether queries are multiplied with 1 + beta ln(1 + floor(position / original context)), beta being
                        llama_4_scaling_beta in rope_parameters
    `rope_needed`       whether a file that says nothing of the rotary embedding is refused, because the class fills in a scaling of its own
    `needed`            keys that must be there: what the class fills in for them is not computed here
    `kinds`             the kinds of layers that can be computed here, of a class that has others
    `linear`            the key N of classes whose layers have linear attention, all but each Nth, where layer_types is left out
    `mrope`             whether rope_parameters may have parts for images (mrope_section), which mean nothing for text
    `taken_from`        facts that stand under another key than in most families, and what is meant where that is left out: "KEY",
                        "KEY or 4 * SIZE"
    `norm_eps`          the key of the norms' epsilon; None: rms_norm_eps or layer_norm_eps, by the norms' kind
    `activation`        the key of the activation: hidden_act, or hidden_activation of classes that read nothing else
    `renamed`           keys that are read as another key
    `activations`       activations that are read as another one
    `only`              the values that a key can have to be understood: of others nobody here knows what they compute
    `reasons`           why a key of `only` can have no other value, where somebody does know
    `experts`           the keys that the number of experts is taken from, the first that is there before the next
    `experts_default`   that number where none of them is there; None: there is none to compare with
    """

    rotary_base: str = "rope_theta"
    rotary_by_kind: bool = False
    rope_sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sliding_base: str | None = None
    rotary_share: str | None = None
    rope_types: Mapping[str, str] = field(default_factory=dict)
    context: str = "inner"
    windows: str = "none"
    worked_out: Mapping[str, str] = field(default_factory=dict)
    pattern_is_read: bool = False
    pattern_is_text: bool = False
    turning: str = "all"
    alpha: bool = False
    query_growth: bool = False
    rope_needed: bool = False
    needed: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    linear: str | None = None
    mrope: bool = False
    taken_from: Mapping[str, str] = field(default_factory=dict)
    norm_eps: str | None = None
    activation: str = "hidden_act"
    renamed: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    experts_default: int | None = None


@dataclass(frozen=True)
class Case:
    """What several keys say together: where all those of `where` have these values, `facts` hold (a value, or the key that has it), or
    the file is refused, since `refused`."""

    where: Mapping[str, Any]
    facts: Mapping[str, Any]
    refused: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A dense family (`kind` "dense"), a mixture layout ("mixture"), or a mixture that is only looked at ("foreign").

    `sizes` are those that layers of one kind have otherwise: by the kind, the size and the key of config.json that has it, "KEY if FLAG"
    where another one decides whether it is read.

    `others` are rows that a public checkpoint may have besides, and that nothing here writes or loads. `implies` are facts of every
    merge in a layout, whatever its sources say, because its rows fill in what they lack; `limits` are what engines
    need besides, `engines` those that were tried. `told_by` is the key of config.json that a mixture has, and a dense model of the same
    model type has not, or has as 0 or false. `nulls` are keys of config.json that are written as null where a merge has no value for
    them, because the configuration class fills in another one. `drawn_routers` says why no router can be made of texts: what it sees is
    not what the FFN sees.
    """

    name: str
    kind: str
    model_types: tuple[str, ...]
    class_name: str
    rows: tuple[Row, ...]
    others: tuple[Row, ...]
    dropped: tuple[str, ...]
    function: tuple[str, ...]
    defaults: Mapping[str, Any]
    neutral: tuple[str, ...]
    traits: Mapping[str, Any]
    quirks: Quirks
    cases: tuple[Case, ...]
    sizes: Mapping[str, Mapping[str, str]]
    accepts: Mapping[str, Any]
    implies: Mapping[str, Any]
    config: Mapping[str, Any]
    limits: tuple[Limit, ...]
    engines: tuple[Engine, ...] = ()
    told_by: str | None = None
    nulls: tuple[str, ...] = ()
    drawn_routers: str | None = None


def evaluate(expression: str, facts: Mapping[str, Any]) -> int:
    """The value of a symbolic size such as "H*D+2*K*D" or "H/K*D" (sums of products of symbols, integers and whole quotients)."""

    def factor(text: str) -> int:
        whole, _, parts = text.partition("/")
        if parts:
            return factor(whole) // factor(parts)
        return int(text) if text.isdigit() else int(facts[SYMBOLS[text]])

    return sum(prod(factor(text) for text in term.split("*")) for term in expression.split("+"))


def at_layer(facts: Mapping[str, Any], layer: int | None) -> Mapping[str, Any]:
    """`facts` with the sizes that this layer has, where layers of one kind have others than all, and with what only such layers have."""
    by_kind, types = facts.get("sizes_by_kind"), facts.get("layer_types")
    if layer is None or not isinstance(types, list) or layer >= len(types) or not (by_kind or facts.get("values_are_keys")):
        return facts
    kind = str(types[layer])
    keys = {"own_values": False} if facts.get("values_are_keys") and kind == "full_attention" else {}
    return {**facts, **(by_kind or {}).get(kind, {}), **keys}


def why_left_out(model_type: object) -> str:
    """ ": " and the reason why models of this type do not merge here, where somebody has looked; else nothing."""
    reason = left_out().get(model_type) if isinstance(model_type, str) else None
    return f": {reason}" if reason else ""


def architecture_names() -> tuple[str, ...]:
    """The dense families and mixture layouts that can be merged and loaded."""
    return table_names("dense", "mixture")


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every table, the foreign ones too."""
    return tuple(map(load_architecture, table_names()))


@cache
def load_architecture(name: str) -> Architecture:
    """The table called `name`. Raises KeyError when there is none."""
    return read_table(table_text(name), f"{name}.toml")


def read_table(text: str, file: str) -> Architecture:
    """The architecture that the TOML document `text` of `file` describes. Raises TableError when it is none."""
    table = tomllib.loads(text)
    check_table(table, file)
    return Architecture(
        name=table["name"],
        kind=table["kind"],
        model_types=tuple(table["model_types"]),
        class_name=table["class"],
        rows=tuple(_row(record) for record in table["tensors"]["rows"]),
        others=tuple(_row(record) for record in table["tensors"].get("others", ())),
        dropped=tuple(table["tensors"].get("dropped", ())),
        function=tuple(table.get("function", ())),
        defaults=table.get("defaults", {}),
        neutral=tuple(table.get("neutral", ())),
        traits=table.get("traits", {}),
        quirks=_quirks(table.get("quirks", {})),
        cases=tuple(Case(record["where"], record.get("facts", {}), record.get("refused")) for record in table.get("cases", ())),
        sizes=table.get("sizes", {}),
        accepts=table.get("accepts", {}),
        implies=table.get("implies", {}),
        config=table.get("config", {}),
        limits=tuple(_limit(record) for record in table.get("limits", ())),
        engines=tuple(Engine(**{**record, "tried": tuple(record["tried"])}) for record in table.get("engines", ())),
        told_by=table.get("told_by"),
        nulls=tuple(table.get("nulls", ())),
        drawn_routers=table.get("drawn_routers"),
    )


def _quirks(record: Mapping[str, Any]) -> Quirks:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return Quirks(**values)


def _limit(record: Mapping[str, Any]) -> Limit:
    engines, equal, only = (tuple(record.get(key, ())) for key in ("engines", "equal", "only"))
    return Limit(record["otherwise"], engines, equal, record.get("fact"), only, record.get("where", {}), record.get("refuses", False))


def _row(record: Mapping[str, Any]) -> Row:
    names = record["name"]
    return Row(
        roles=tuple(record["roles"]) if "roles" in record else (record["role"],),
        names=(names,) if isinstance(names, str) else tuple(names),
        shape=tuple(record.get("shape", ())),
        groups=record.get("groups", "1"),
        parts=tuple(record.get("parts", ())),
        axis=record.get("axis"),
        when=record.get("when"),
        make=record.get("make"),
        without=record.get("without"),
        pieces=record.get("pieces"),
        kinds=tuple(record.get("kinds", ())),
        parameter=record.get("parameter"),
    )


def natural_order(architecture: Architecture, layers: int) -> Iterator[tuple[Row, int | None]]:
    """The rows in natural order: what comes before the layers, each layer, what comes after."""
    inside = [index for index, row in enumerate(architecture.rows) if row.per_layer]
    first, last = inside[0], inside[-1]
    yield from ((row, None) for row in architecture.rows[:first])
    for layer in range(layers):
        yield from ((row, layer) for row in architecture.rows[first : last + 1])
    yield from ((row, None) for row in architecture.rows[last + 1 :])


@cache
def dense_families() -> tuple[Architecture, ...]:
    return tuple(map(load_architecture, table_names("dense")))


@cache
def mixture_layouts() -> tuple[Architecture, ...]:
    return tuple(map(load_architecture, table_names("mixture")))


def find_by_model_type(model_type: object, config: Mapping[str, Any] | None = None) -> Architecture | None:
    """The architecture that config.json's `model_type` names: dense, mixture or foreign. Of one that is dense or a mixture, the rest of
    `config` says which; without it the dense one."""
    if config is not None and (mixture := _told_by_key(model_type, config)) is not None:
        return mixture
    if isinstance(model_type, str) and model_type in table_names():  # most tables are called so, and the others need not be read
        named = load_architecture(model_type)
        if model_type in named.model_types:
            return named
    return next((a for a in architectures() if model_type in a.model_types), None)


def _told_by_key(model_type: object, config: Mapping[str, Any]) -> Architecture | None:
    """The mixture whose model type is that of a dense family too, where its key is there and not 0, false or null."""
    found = (table for table in _of_dense_types() if model_type in table.model_types)
    return next((table for table in found if config.get(str(table.told_by), table.defaults.get(str(table.told_by)))), None)


@cache
def _of_dense_types() -> tuple[Architecture, ...]:
    return tuple(table for table in mixture_layouts() if table.told_by is not None)


def names_of_the_head(table: Architecture) -> tuple[str, ...]:
    """The names of all tensors that a head has, its bias among them: they need not begin as the trunk's do."""
    return tuple(name for row in table.rows if row.roles[:1] in (("head",), ("head.bias",)) for name in row.names)


def head_names(table: Architecture) -> tuple[str, ...]:
    """The names under which models of `table` may store a head."""
    return tuple(name for row in table.rows if row.roles == ("head",) for name in row.names)
