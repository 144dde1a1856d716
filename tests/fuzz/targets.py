"""What the fuzzer aims at: a file of a good folder, the inputs to put there, and everything that reads it."""

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from adapter_files import shapes_of, write_adapter
from conftest import CONFIGS
from hypothesis import strategies as st
from mutations import inputs, text_of
from torch import zeros

import bam_merge.sources.opening
from bam_merge.checkpoints.folder import INDEX
from bam_merge.checkpoints.header import read_header
from bam_merge.checkpoints.provenance import MANIFEST_FORMAT, read_manifest, sealed
from bam_merge.demo.synthetic import write_checkpoint
from bam_merge.errors import BamMergeError
from bam_merge.inspecting.inspection import inspect
from bam_merge.planning.make import make_plan, plan_file
from bam_merge.recipe.load import load_recipe
from bam_merge.recipe.schema import Recipe
from bam_merge.showing.inspection import inspection_text
from bam_merge.showing.plan import plan_text
from bam_merge.showing.terminal import Terminal

LONGEST = 20_000
"""Characters of the longest message that is bearable."""

DRAWN = 8
"""One in so many inputs is drawn too, which takes longer than all the rest."""


class InTurn:
    """Stands in for the planner's threads: a thread cannot be interrupted, and starting it takes longer than what it does."""

    def __init__(self, max_workers: int) -> None:
        pass

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [function(item) for item in items]


bam_merge.sources.opening.ThreadPoolExecutor = InTurn  # type: ignore[attr-defined, assignment, misc]


Reader = Callable[[bool], None]
"""Reads a target's folder; draws what it found if it is told to."""


@dataclass(frozen=True)
class Target:
    """`inputs` are put into `path`, then one of `readers`, as chance has it, reads what is there; some draw it too."""

    name: str
    path: Path
    good: bytes
    inputs: st.SearchStrategy[bytes]
    readers: tuple[Reader, ...]

    def run(self, data: bytes) -> bool:
        """Whether the input was accepted. Raises what is a bug: any exception but ours, and an error that cannot be printed."""
        self.path.write_bytes(data)
        chance = zlib.crc32(data)
        try:
            for reader in self.readers if data == self.good else (self.readers[chance % len(self.readers)],):
                reader(data == self.good or chance // 8 % DRAWN == 0)
        except BamMergeError as error:
            check_error(error)
            return False
        finally:
            self.path.write_bytes(self.good)
        return True


def check_error(error: BamMergeError) -> None:
    """An error says something, in words that can be printed and read."""
    assert error.problems and all(problem.strip() for problem in error.problems), "an error without a message"
    for problem in error.problems:
        assert problem.isprintable(), f"a message with control characters: {problem!r}"
        assert len(problem) < LONGEST, f"a message of {len(problem)} characters"


def check_text(text: str) -> None:
    """What is printed holds no control character but the end of a line."""
    assert all(line.isprintable() for line in text.split("\n")), f"control characters in {text!r}"


def look(path: Path, draw: bool, where: str | None = None) -> None:
    found = inspect(path, tensors="*", where=where)
    json.dumps(found.document(), allow_nan=False)
    if draw:
        check_text(inspection_text(found, Terminal()))
        check_text(inspection_text(found, Terminal(), zoomed=True))


def plan(recipe: Path | Recipe, draw: bool) -> None:
    made = plan_file(recipe) if isinstance(recipe, Path) else make_plan(recipe)
    json.dumps(made.document(), allow_nan=False).encode()
    json.dumps(made.config, allow_nan=False, ensure_ascii=False).encode()
    if draw:
        check_text(plan_text(made, made.recipe.folder / "out", 1))
        check_text(plan_text(made, made.recipe.folder / "out", 1, "*"))


RECIPE: dict[str, Any] = {
    "method": "bam", "sources": {"seed": "seed", "code": "code"}, "experts": ["seed", "code", "seed"],
    "attention": {"kv": "expert", "routing": "top_k", "top_k": 2}, "ffn": {"top_k": 1, "gate": "softmax_then_topk", "gate_scale": 1.0},
    "router": {"attention": {"init": "normal", "std": 0.02}, "ffn": {"init": "zeros"}}, "shared": {"make": "mean"},
    "rules": [
        {"roles": ["norm.*"], "make": "copy", "from": "seed"}, {"roles": ["head"], "make": "linear", "weights": {"seed": 0.4, "code": 0.6}},
        {"roles": ["attn.k", "attn.v"], "layers": "0", "make": "mean"},
        {"roles": ["embed"], "make": "ties", "base": "seed", "density": 0.5},
    ],
    "random_seed": 3, "output": {"path": "out", "layout": "bam", "dtype": "bfloat16", "max_shard_size": "5GB"},
}  # fmt: skip
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1, "c": 2}, "merges": ["a b", ["b", "c"]]}, "added_tokens": [{"id": 3, "content": "<s>"}],
}  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
PHI3_ROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
UNLIKE = ("granite", "gemma", "smollm3", "cohere2", "starcoder2")
"""Families with keys of their own for what others have not."""


TWICE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, "dtype": "float32", "torch_dtype": "float32"}
"""Facts that have a second spelling, so that a change of either contradicts the other."""


def targets(home: Path) -> list[Target]:
    """Every target, over good folders made below `home`."""
    recipe = home / "recipe.yaml"
    for name in ("seed", "code"):
        write_checkpoint(home / name, CONFIGS["llama"], lambda name, shape: None, "BF16", shards=2)
        (home / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    recipe.write_text(yaml.safe_dump(RECIPE))
    merged = merged_folder(home)
    loaded = load_recipe(recipe)
    code = home / "code"
    shard = code / "model-00001-of-00002.safetensors"
    return [
        header_target(shard, loaded),
        target(code / INDEX, lambda draw: plan(loaded, draw), lambda draw: look(code, draw)),
        *(config_target(home, name) for name in ("llama", "phi3", "cohere", "gpt_neox", "qwen2", *UNLIKE)),
        target(merged / "config.json", lambda draw: look(merged, draw)),
        target(code / "tokenizer.json", lambda draw: plan(loaded, draw)),
        target(recipe, lambda draw: plan(recipe, draw), good=RECIPE),
        target(merged / "bam_merge.json", lambda draw: look_at_provenance(merged, draw), to_bytes=resealed),
        *adapter_targets(home),
    ]


def target(path: Path, *readers: Reader, good: Any = None, to_bytes: Callable[[Any], bytes] | None = None) -> Target:
    document = json.loads(path.read_text()) if good is None else good
    strategy = inputs(document, to_bytes or (lambda value: text_of(value).encode("utf-8", "surrogatepass")))
    return Target(f"{path.parent.name}/{path.name}" if good is None else path.name, path, path.read_bytes(), strategy, readers)


def header_target(shard: Path, recipe: Recipe) -> Target:
    """A shard: its header edited and framed again with the length it has (or, edited as bytes, with another one)."""
    good = shard.read_bytes()
    length = int.from_bytes(good[:8], "little")
    data = good[8 + length :]

    def framed(document: Any) -> bytes:
        raw = text_of(document).encode("utf-8", "surrogatepass")
        return len(raw).to_bytes(8, "little") + raw + data

    folder = shard.parent
    readers = (lambda draw: plan(recipe, draw), lambda draw: look(folder, draw), lambda draw: look(shard, draw), lambda _: accept(shard))
    return Target("a shard's header", shard, good, inputs(json.loads(good[8 : 8 + length]), framed), readers)


def adapter_targets(home: Path) -> list[Target]:
    """The configuration of an adapter, and the header of its tensors."""
    write_checkpoint(home / "base", CONFIGS["llama_biased"], lambda name, shape: None, "BF16")
    keys = {"bias": "lora_only", "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 8}, "layers_to_transform": [0, 1]}
    biases = {
        f"model.layers.{layer}.self_attn.{part}.base_layer.bias": zeros(rows)
        for layer in (0, 1)
        for part, rows in (("q_proj", 32), ("v_proj", 16))
    }
    saved = {"modules_to_save": ["norm"], "trainable_token_indices": {"embed_tokens": [3]}}
    norms = {name: zeros(*shape) for name, shape in shapes_of(home / "base").items() if name.endswith("norm.weight")}
    tokens = {"model.embed_tokens.token_adapter.trainable_tokens_delta": zeros(1, 32)}
    folder = write_adapter(home / "adapter", home / "base", more={**biases, **norms, **tokens}, **keys, **saved)
    recipe = home / "adapters.yaml"
    recipe.write_text("method: bam\nsources: {base: base, code: {base: base, adapter: adapter}}\noutput: {path: out}\n")
    loaded = load_recipe(recipe)
    file = folder / "adapter_model.safetensors"
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")

    def framed(document: Any) -> bytes:
        raw = text_of(document).encode("utf-8", "surrogatepass")
        return len(raw).to_bytes(8, "little") + raw + good[8 + length :]

    readers = (lambda draw: plan(loaded, draw), lambda _: accept(file))
    header = Target("an adapter's header", file, good, inputs(json.loads(good[8 : 8 + length]), framed), readers)
    return [target(folder / "adapter_config.json", lambda draw: plan(loaded, draw)), header]


def accept(shard: Path) -> None:
    """What we accept, the reference library accepts too."""
    from safetensors import SafetensorError, safe_open

    read_header(str(shard))
    try:
        with safe_open(shard, "np"):
            pass
    except SafetensorError as error:
        raise AssertionError(f"accepted what the library refuses: {error}") from None


def config_target(home: Path, name: str) -> Target:
    """config.json of a family, in one of two sources that are otherwise the same."""
    rope = {"gpt_neox": {**ROPE, "rope_type": "default"}, "phi3": PHI3_ROPE}.get(name, CONFIGS[name].get("rope_parameters", ROPE))
    config = {**CONFIGS[name], "rope_parameters": rope, **TWICE}
    folders = [home / f"{name}_{which}" for which in ("a", "b")]
    for folder in folders:
        write_checkpoint(folder, config, lambda name, shape: None)
    recipe = home / f"{name}.yaml"
    recipe.write_text(f"method: btx\nsources: {{a: {folders[0].name}, b: {folders[1].name}}}\noutput: {{path: out}}\n")
    loaded = load_recipe(recipe)
    return target(folders[1] / "config.json", lambda draw: plan(loaded, draw), lambda draw: look(folders[1], draw))


def merged_folder(home: Path) -> Path:
    """A BAM mixture as a merge would leave it, without values (making it would load torch)."""
    made = plan_file(home / "recipe.yaml")
    folder = home / "merged"
    folder.mkdir()
    for file in made.shards:
        with open(folder / file.file, "wb") as stream:
            stream.write(file.header)
            stream.truncate(file.nbytes)
    (folder / "config.json").write_text(json.dumps(made.config))
    tensors = {
        step.name: {
            "expression": step.expression, "reads": step.reads, "file": step.file, "dtype": step.dtype, "shape": list(step.shape),
            "digest": "0" * 32,
        }
        for step in made.steps
    }  # fmt: skip
    sources = {
        name: {
            "path": name, "config": "0" * 32,
            "files": {
                file: {"bytes": 1, "header": "0", "digest": "0", "tensors": {entry.name: "0" for entry in header.tensors}}
                for file, header in model.checkpoint.files.items()
            },
        }
        for name, model in made.models.items()
    }  # fmt: skip
    shards = {file.file: {"bytes": file.nbytes, "header": "0" * 32} for file in made.shards}
    document = {
        "format": MANIFEST_FORMAT, "tool": "bam-merge", "version": "0", "recipe": made.recipe.resolved(), "recipe_folder": "..", "sources": sources,
        "files": {"config.json": "0" * 32}, "shards": shards, "tensors": tensors, "unused": {"seed": {"x": "not needed"}},
    }  # fmt: skip
    (folder / "bam_merge.json").write_bytes(sealed(document))
    return folder


def resealed(document: Any) -> bytes:
    """The bytes of a forged manifest, with the right digest of itself where it can have one."""
    try:
        return sealed(json.loads(text_of(document)))
    except (ValueError, TypeError, RecursionError):
        return text_of(document).encode("utf-8", "surrogatepass")


def look_at_provenance(folder: Path, draw: bool) -> None:
    look(folder, draw)  # which takes a damaged manifest for a finding
    read_manifest(folder)
    look(folder, draw, where="*:*")
