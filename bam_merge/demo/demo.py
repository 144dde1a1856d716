"""The demo: a small dense seed, three branches of it, and the recipe that merges them."""

import os
from pathlib import Path

from bam_merge.demo.synthetic import branched_values, random_values, write_checkpoint
from bam_merge.errors import OutputError
from bam_merge.publishing.replacing import delete_saved, opened, refusal
from bam_merge.text import printable

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


DEMO_TOKENS = 12
"""How many tokens the demo generates."""


RECIPE = """\
# Four dense models become one BAM mixture: each keeps its attention and its FFN as an expert, the rest is averaged.
method: bam
sources: {seed: seed, code: code, law: law, math: math}
attention: {kv: expert, routing: soft}
ffn: {top_k: 1}
router: {init: normal, std: 0.02}
output: {path: bam}
"""


NAMES = ("seed", "code", "law", "math")


def make_demo(folder: Path, force: bool = False) -> Path:
    """Write the four checkpoints and recipe.yaml into `folder`; returns the recipe's path. Raises OutputError."""
    recipe = folder / "recipe.yaml"
    if folder.exists() and any(folder.iterdir()):
        if not recipe.is_file() or recipe.read_bytes() != RECIPE.encode():
            raise OutputError(f"{printable(str(folder))} is not empty and holds no earlier demo. Choose another folder.")
        if not force:
            raise OutputError(f"{printable(str(folder))} holds an earlier demo. Choose another folder, or replace it with --force.")
        _delete_models([folder / name for name in NAMES if os.path.lexists(folder / name)])
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write_text(RECIPE)
    write_checkpoint(folder / "seed", CONFIG, random_values(0), "BF16")
    for branch, name in enumerate(NAMES[1:]):
        write_checkpoint(folder / name, CONFIG, branched_values(0, branch), "BF16")
    return recipe


def _delete_models(folders: list[Path]) -> None:
    """Delete earlier checkpoints, all or none. Raises OutputError when one holds anything else."""
    if problems := [problem for folder in folders if (problem := refusal(folder))]:
        raise OutputError(*problems)
    for folder in folders:
        with opened(folder) as descriptor:
            _, failure = delete_saved(descriptor, None)
        if failure is not None:
            raise OutputError(f"{printable(str(folder))}: {failure.strerror}.")


def continuation(folder: Path, ids: list[int], tokens: int) -> list[int]:
    """`ids` and the `tokens` likeliest ids after them, by the reference model of `folder`."""
    import torch

    from bam_merge.model.loading import load_model

    made: list[int] = load_model(folder).generate(torch.tensor([ids]), tokens)[0].tolist()
    return made
