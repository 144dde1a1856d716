"""The recipe: what to merge from what, typed and strict. Every wrong key, type or name is reported with its place."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, PrivateAttr, Tag

from bam_merge import expressions
from bam_merge.address import is_address
from bam_merge.errors import RecipeError
from bam_merge.hub_id import MARK
from bam_merge.paths import located, relative
from bam_merge.recipe.accepting import Accept
from bam_merge.recipe.makes import Count, Initialising, Integer, Mean, Positive, Strict
from bam_merge.recipe.makes.data_routers import FromTexts, default_scale
from bam_merge.recipe.makes.gradual import shown
from bam_merge.recipe.places import Folder, Known, Source, Store, long_form, model_store, recorded, stores
from bam_merge.recipe.rules import ROUTER_INITS, AnyExperts, AnyMerging, Copies, OneInit, Rule, covers

# ---- the sections ----------------------------------------------------------------------------------------------------------


class Attention(Strict):
    kv: Literal["expert", "shared"] = Field(
        default="expert", description="keys and values per expert, or averaged, so that the KV cache stays that of one model"
    )
    routing: Literal["soft", "top_k"] = Field(
        default="soft", description="a token's attention is that of all experts, weighted by soft gates, or of the best few"
    )
    top_k: Count | None = Field(default=None, description="attention experts per token; needed with routing top_k, and only then")
    linear: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="layers with linear attention, in families that have them: expert (the default): each expert its own, with its own "
        "state; mean: one that is averaged; or the source whose it is",
    )


ZEROS = "zeros"
"""What ffn.shared_expert says of a shared expert that adds nothing."""


class Ffn(Strict):
    top_k: Count | None = Field(
        default=None,
        description="experts per token; default 1 for bam; 2 for btx, sparse_upcycling, sigmoid gates, routers from texts, and where a "
        "norm stands after the FFN; two of each shard for a virtual_group",
    )
    gate: Literal["softmax_then_topk", "topk_then_softmax", "topk_then_sigmoid"] | None = Field(
        default=None,
        description="gates of the softmax over all experts, not renormalised (default for bam); or over the chosen ones, "
        "so that they sum to one (default for btx, sparse_upcycling, routers from texts, and where a norm stands after the FFN; "
        "what Mixtral computes); or the sigmoids of the chosen ones, divided by their sum (what DeepSeek-V3 and layouts after it compute)",
    )
    shared_expert: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="in layouts that have an expert of every token: the source whose FFN it is, or zeros (the default), which add nothing",
    )
    gate_scale: Positive = Field(default=1.0, description="multiplies the combined output of the experts; makes up for gates below one")


NORMAL: Any = ROUTER_INITS["normal"].model_validate({"init": "normal"})
"""What a router is where a recipe says nothing."""


class Routers(Strict):
    attention: OneInit = Field(default=NORMAL, description="how the routers of attention experts start")
    ffn: OneInit = Field(default=NORMAL, description="how the routers of FFN experts start")


ROUTER_PLACES = {"router.attn": "router.attention", "router.ffn": "router.ffn"}
"""Where a recipe says how a router of that role is made."""


def _init_or_both(value: Any) -> str:
    return str(value["init"]) if isinstance(value, dict) and "init" in value else getattr(value, "init", "both")


if TYPE_CHECKING:
    RouterSection = Initialising | FromTexts | Routers
else:
    RouterSection = Annotated[
        Union[tuple(Annotated[init, Tag(name)] for name, init in (*ROUTER_INITS.items(), ("both", Routers)))],  # noqa: UP007
        Discriminator(_init_or_both),
    ]


class Vocabulary(Strict):
    source: str = Field(
        default="union",
        min_length=1,
        description="union: the first source's tokenizer, with the tokens that only others have after its own; or the source whose it is",
    )
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=2**16)] | None = Field(
        default=None, description="embeddings and head have a multiple of so many rows"
    )
    missing: str = Field(
        default="mean",
        min_length=1,
        description="a token's row for a source that lacks it: mean of the rows of those that have it, zeros, or a source's name",
    )
    chat_template: str | None = Field(default=None, min_length=1, description="the source whose chat template the result has")


class Layers(Strict):
    """Layers of one source, as the next ones of the result."""

    from_: str = Field(alias="from", description="name of the source")
    layers: Integer | str = Field(description='its layers, in this order: 3, "0-23", "0,4-7" or "8-" (to the last)')


ENGINES = {"transformers": "transformers", "vllm": "vLLM", "gguf": "llama.cpp"}
"""What output.serves can name, and the engines that are meant."""


class Output(Strict):
    path: str = Field(min_length=1, description="the folder where the result appears, relative to the recipe")
    layout: str | None = Field(default=None, description="names and config of the result; default bam, for method merge the dense family")
    layers: Annotated[tuple[Layers, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="method merge only: layers of sources behind one another, each as it is: [{from: a, layers: 0-23}, ...]"
    )
    dtype: Literal["source", "float32", "float16", "bfloat16"] = Field(
        default="source", description="of every tensor; source: as stored, and sources that disagree are an error"
    )
    max_shard_size: Integer | str = Field(default="5GB", description="the most bytes of tensors in one file: 5GB, 500MB, 2GiB, ...")
    serves: Annotated[tuple[Literal["transformers", "vllm", "gguf"], ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="engines that must compute the result as transformers does (gguf: llama.cpp); a layout or gate that one of them "
        "computes otherwise is an error, which names those that would do",
    )


class Recipe(Strict):
    """A recipe as written, with defaults; `resolved` fills in what depends on the method. Paths are relative to `folder`."""

    method: Literal["bam", "btx", "sparse_upcycling", "merge"] = Field(
        description="what becomes an expert: attention and FFN; FFN; FFN, of copies of one model; nothing, the result is dense"
    )
    sources: dict[str, Source] = Field(
        min_length=1,
        description="name: a Hugging Face folder, relative to the recipe, or a model of the hub; FOLDER#experts.NAME: one expert of a "
        "mixture; or {base: ..., adapter: ...}: with a LoRA adapter",
    )
    experts: AnyExperts | None = Field(
        default=None,
        description="order = expert index; a source may stand more than once; default: all. "
        "For sparse_upcycling also {count: ..., make: ...}",
    )
    attention: Attention | None = Field(default=None, description="method bam only")
    ffn: Ffn | None = Field(default=None, description="methods of mixtures only")
    router: RouterSection | None = Field(default=None, description="both routers, or {attention: ..., ffn: ...}")
    shared: AnyMerging = Field(
        default=Mean(make="mean"), description="how a tensor without an expert axis is made; for method merge: every tensor"
    )
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = Field(
        default=(), description="before the method's own rules; the first rule that matches a tensor makes it"
    )
    tokenizer: Vocabulary | None = Field(
        default=None, description="align sources whose vocabularies differ a little, token by token; without it they must agree"
    )
    accept: Accept | None = Field(default=None, description="differences between the sources that are refused otherwise")
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="with a tensor's name it seeds that tensor's generator, and nothing else does"
    )
    output: Output

    _folder: Path = PrivateAttr(default_factory=Path)
    _file: str = PrivateAttr(default="recipe")
    _known: Mapping[str, Known] = PrivateAttr(default_factory=dict)
    _from_document: bool = PrivateAttr(default=False)

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folder

    @property
    def file(self) -> str:
        """What error messages call this recipe."""
        return self._file

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The source of each expert, by expert index."""
        if isinstance(self.experts, Copies):
            return (getattr(self.experts, "from_", None) or next(iter(self.sources)),) * self.experts.count
        return self.experts or tuple(self.sources)

    @property
    def distinct(self) -> tuple[str, ...]:
        """The distinct sources among the experts, in order: what a mean is over."""
        return tuple(dict.fromkeys(self.expert_names))

    @property
    def seed_name(self) -> str:
        """The source whose tokenizer and neutral configuration the output takes: `seed`, or else the first expert."""
        return "seed" if "seed" in self.sources else self.expert_names[0]

    @property
    def experts_shown(self) -> str:
        """The experts for people: their sources in order; of copies of one how many, and what is made of them."""
        if not isinstance(self.experts, Copies):
            return ", ".join(self.expert_names)
        keys = self.experts.model_dump(by_alias=True, exclude_none=True)
        numbers = ", ".join(f"{key}: {shown(value)}" for key, value in keys.items() if key not in ("count", "make", "from"))
        made = "" if keys["make"] == "expert" else f", {keys['make']}" + (f" ({numbers})" if numbers else "")
        return f"{self.experts.count} of {self.expert_names[0]}{made}"

    @property
    def shards(self) -> int:
        """Into how many parts the FFN of each copy is split, each an expert; 1 where experts are whole FFNs."""
        shards: int = getattr(self.experts, "shards", 1)
        return shards

    @property
    def shared_expert(self) -> str | None:
        """What the recipe says of an expert of every token."""
        return self.ffn.shared_expert if self.ffn is not None else None

    @property
    def shared_source(self) -> str | None:
        """The source whose FFN is an expert of every token."""
        return None if self.shared_expert == ZEROS else self.shared_expert

    @property
    def gates(self) -> tuple[int, bool]:
        """(FFN experts per token, whether their gates are renormalised to sum to one)."""
        ffn = self.ffn or Ffn()
        asks = ffn.gate == "softmax_then_topk" or (ffn.gate is None and ffn.top_k == 1)
        paper = self.method == "bam" and (asks or not self._routes_ffn_by_texts)  # routers that are right at once can do with sure gates
        top_k = ffn.top_k or (1 if paper and not self.sigmoid else 2 * self.shards)
        gate = ffn.gate or ("softmax_then_topk" if paper else "topk_then_softmax")
        return top_k, gate != "softmax_then_topk"

    @property
    def sigmoid(self) -> bool:
        """Whether the FFN's gates are shares of the chosen experts' sigmoids, and not of their softmax."""
        return self.ffn is not None and self.ffn.gate == "topk_then_sigmoid"

    def router_make(self, role: str) -> Initialising | FromTexts:
        """How `router.attn` or `router.ffn` is made where no rule says otherwise."""
        router = self.router or Routers()
        if isinstance(router, Routers):
            return router.attention if role == "router.attn" else router.ffn
        return router

    def router_init(self, role: str) -> expressions.Initialiser | expressions.Calibrator:
        """The record of `router_make`."""
        make = self.router_make(role)
        return self.calibrator(make, role) if isinstance(make, FromTexts) else make.initialiser()

    def calibrator(self, make: FromTexts, role: str) -> expressions.Calibrator:
        """The record of a router of `role` that is made of texts."""
        return make.calibrator(make.scale or default_scale(role, self.gates), self.sigmoid and role == "router.ffn")

    @property
    def from_texts(self) -> dict[str, FromTexts]:
        """The makes that say which text an expert gets, by the place in the recipe that each has where every default is written out."""
        makes: dict[str, Any] = {place: self.router_make(role) for role, place in ROUTER_PLACES.items()}
        makes |= {f"rules[{index}]": rule for index, rule in enumerate(self.rules)}
        return {place: make for place, make in makes.items() if isinstance(make, FromTexts)}

    def written(self, place: str) -> str:
        """A place of `from_texts` as it stands in this recipe: one section may be for both routers."""
        return place if isinstance(self.router, Routers) or place not in ROUTER_PLACES.values() else "router"

    @property
    def _routes_ffn_by_texts(self) -> bool:
        first = next((rule for rule in self.rules if any(covers(pattern, "router.ffn") for pattern in rule.roles)), None)
        return isinstance(first or self.router_make("router.ffn"), FromTexts)

    @property
    def needs_tokenizers(self) -> bool:
        """Whether a plan depends on what the tokenizers hold, and not only on whether they are alike."""
        return self.tokenizer is not None or bool(self.from_texts)

    @property
    def known(self) -> Mapping[str, Known]:
        """Where the models of the hub are that this recipe names, by what stands there; none before they were looked for."""
        return self._known

    @property
    def from_document(self) -> bool:
        """Whether a merge recorded this recipe, with the commit of every model of the hub."""
        return self._from_document

    def of_document(self) -> "Recipe":
        """The same recipe, as one that a merge recorded."""
        recipe = self.model_copy()
        recipe._from_document = True
        return recipe

    def knowing(self, known: Mapping[str, Known]) -> "Recipe":
        """The same recipe, where some models of the hub were found."""
        recipe = self.model_copy()
        recipe._known = {**self._known, **known}
        return recipe

    def located(self, path: str) -> Path:
        """Where a path of this recipe leads: from the recipe's folder, or from a home folder where it begins with ~; into the hub's cache
        where it is a model of the hub that was found."""
        return self._known[path].folder if path in self._known else located(path, self.folder, RecipeError)

    def source(self, name: str) -> Folder:
        """Everything that the recipe says of the model that a source is, or is an adapter on."""
        return long_form(self.sources, name)

    @property
    def stores(self) -> dict[str, Store]:
        """Every folder that tensors are read from, by the name that plans and manifests call it."""
        return stores(self.sources)

    def model_store(self, name: str) -> str:
        """The name in `stores` of the folder that has a source's config.json and tokenizer."""
        return model_store(self.sources, name)

    def recorded(self, name: str) -> Any:
        """A source as a document has it that must not hold absolute paths."""
        return recorded(self.sources[name], self.sources, self.relative)

    def relative(self, path: str) -> str:
        """`path` relative to the recipe's folder, for documents that must not hold absolute paths; a model of the hub with its commit."""
        if path in self._known:
            return self._known[path].recorded
        return path if path.startswith(MARK) or is_address(path) else relative(path, self.folder)

    def resolved(self) -> dict[str, Any]:
        """The recipe as a document with every default written out and no absolute path."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if not isinstance(self.experts, Copies):
            document["experts"] = list(self.expert_names)
        document["sources"] = {name: self.recorded(name) for name in self.sources}
        document["output"]["path"] = relative(self.output.path, self.folder)
        if self.output.layers is not None and "shared" not in self.model_fields_set:
            del document["shared"]  # what stands outside the layers is of the first source and the last one then
        if self.method != "merge":
            top_k, renormalised = self.gates
            gate = "topk_then_sigmoid" if self.sigmoid else "topk_then_softmax" if renormalised else "softmax_then_topk"
            document["ffn"] = {"top_k": top_k, "gate": gate, "gate_scale": (self.ffn or Ffn()).gate_scale}
            document["ffn"] |= {} if self.shared_expert is None else {"shared_expert": self.shared_expert}
            if not isinstance(self.router, Routers):
                both = (self.router or NORMAL).model_dump(mode="json", by_alias=True, exclude_none=True)
                document["router"] = {"attention": both, "ffn": both}
            document["router"] = {router: self._said(router, section) for router, section in document["router"].items()}
            document["rules"] = [self._said(None, rule) for rule in document["rules"]]
        if self.method == "bam":
            document["attention"] = (self.attention or Attention()).model_dump(mode="json", exclude_none=True)
        elif "router" in document:
            del document["router"]["attention"]
        return document

    def _said(self, router: str | None, section: dict[str, Any]) -> dict[str, Any]:
        """A router section, or a rule, as a document has it: with no absolute path, and with the scale of a router from texts."""
        if not {"texts", "prompts"} & section.keys():
            return section
        texts = {
            name: self._text(files) if isinstance(files, str) else [self._text(file) for file in files]
            for name, files in section.get("texts", {}).items()
        }
        said = {**section, **({"texts": texts} if texts else {})}
        if router is not None and "scale" not in section:
            said["scale"] = default_scale("router.attn" if router == "attention" else "router.ffn", self.gates)
            fields = ROUTER_INITS[section["init"]].model_fields  # in whose order a document that is read again has them
            said = {key: said[key] for key in (info.alias or name for name, info in fields.items()) if key in said}
        return said

    def _text(self, path: str) -> str:
        """A file, folder or glob relative to the recipe's folder."""
        return relative(path, self.folder)


def schema() -> dict[str, Any]:
    """The recipe's JSON Schema (draft 2020-12), for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(), "title": "bam-merge recipe"}
