"""The code blocks of a model card, by what they are about, as a test runs them."""

import re
from pathlib import Path

from conftest import CONFIGS, write_recipe, write_sources
from vocabularies import SETTINGS, put, tokenizer_json

from bam_merge import MergeOptions, load_recipe, merge

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"

KINDS = {
    "bam": ("llama", "bam", "bam"),
    "bam_biased": ("gpt_neox", "bam", "bam"),
    "bam_btx": ("qwen3", "btx", "bam"),
    "mixtral": ("llama", "btx", "mixtral"),
    "qwen2_moe": ("qwen2", "sparse_upcycling", "qwen2_moe"),
    "qwen3_moe": ("qwen3", "btx", "qwen3_moe"),
    "dense": ("llama", "merge", "llama"),
}
"""Family, method and layout."""


def merged(folder: Path, kind: str, tokenizer: bool = True, chat: bool = False) -> Path:
    """A merged folder, with a tokenizer, with a chat template or without."""
    family, method, layout = KINDS[kind]
    write_sources(folder, CONFIGS[family])
    if tokenizer:
        put(
            folder / "seed",
            {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {**SETTINGS, **({"chat_template": TEMPLATE} if chat else {})}},
        )
    sources = "experts: [{}]".format(", ".join(["seed"] * 3)) if method == "sparse_upcycling" else ""
    recipe = write_recipe(
        folder, sources, method, output=f"{{path: out, layout: {layout}}}", names=("seed",) if sources else ("seed", "code", "law")
    )
    return merge(load_recipe(recipe), options=MergeOptions(verify="none"))


def snippets(folder: Path, language: str = "python") -> dict[str, str]:
    """The blocks of a language in the card of `folder`, by the line above each, with the folder's name in them."""
    card = (folder / "README.md").read_text()
    found = re.findall(rf"^([^\n]+):\n\n```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(found) == card.count(f"```{language}\n")
    return {above: text.replace("THIS_FOLDER", str(folder)) for above, text in found}


def about(folder: Path, word: str, language: str = "python") -> str:
    """The one block whose line above begins with `word`."""
    (text,) = [text for above, text in snippets(folder, language).items() if above.startswith(word)]
    return text
