"""Perplexity per text of the seed, every expert, their uniform average and the mixture, one block of all models at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bam_merge.errors import CheckpointError, printable
from bam_merge.loading import StoredModel, open_model
from bam_merge.model import head
from bam_merge.plan import Plan

M = TypeVar("M", bound=nn.Module)

WINDOW = 256
"""Tokens of one sequence; the first of each is not scored."""

WINDOWS = 8
"""Sequences per text: the first ones."""

HEAD_TOKENS = 128
"""Positions whose logits are held at a time."""


@torch.no_grad()
def perplexities(folder: Path, plan: Plan | None, texts: list[Path]) -> list[dict[str, Any]]:
    """One row per text: {"text", "tokens", "perplexity": {model: value}}. Without sources the mixture alone.

    Raises CheckpointError when a text cannot be read or the folder has no tokenizer.
    """
    ids = {text: _windows(folder, text) for text in texts}
    mixture = open_model(folder)
    dense = {} if plan is None else {name: open_model(model.checkpoint.path) for name, model in plan.models.items()}
    averaged = [dense[name] for name in plan.recipe.distinct] if plan is not None else []
    models: dict[str, list[StoredModel]] = {name: [model] for name, model in dense.items()}
    if len(averaged) > 1:
        models["average"] = averaged
    models["merged"] = [mixture]
    x = {(name, text): _mean([model.embed(ids_BT) for model in parts]) for name, parts in models.items() for text, ids_BT in ids.items()}
    for layer in range(mixture.config.num_hidden_layers):
        for name, parts in models.items():
            blocks = [part.block(layer) for part in parts]
            block = _average(blocks[0], blocks)
            for text, ids_BT in ids.items():
                positions = torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)
                x[name, text] = torch.cat([block(row[None], positions[:1]).hidden for row in x[name, text]])
    rows = []
    values = {name: dict(_scores(parts, {text: x[name, text] for text in texts}, ids)) for name, parts in models.items()}
    for text in texts:
        rows.append({"text": text.name, "tokens": ids[text].numel(), "perplexity": {name: values[name][text] for name in models}})
    return rows


def _windows(folder: Path, text: Path) -> Tensor:
    from bam_merge.verification import tokenize

    try:
        content = text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{printable(str(text))}: {error.strerror}.") from None
    ids = tokenize(folder, content)
    if ids is None:
        raise CheckpointError(
            f"{printable(str(folder))}: perplexity needs tokenizer.json and the package tokenizers (pip install tokenizers)."
        )
    count = min(WINDOWS, len(ids) // WINDOW)
    if count == 0:
        raise CheckpointError(f"{printable(str(text))}: {len(ids)} tokens, at least {WINDOW} are needed.")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def _mean(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)


def _average(first: M, modules: list[M]) -> M:
    """`first` with the mean of all modules' parameters."""
    if len(modules) > 1:
        states = [module.state_dict() for module in modules]
        first.load_state_dict({key: _mean([state[key] for state in states]) for key in states[0]})
    return first


def _scores(parts: list[StoredModel], x: dict[Path, Tensor], ids: dict[Path, Tensor]) -> Iterator[tuple[Path, float]]:
    """Perplexity of each text from the last block's hidden states, HEAD_TOKENS positions at a time."""
    norm = _average(parts[0].final_norm(), [part.final_norm() for part in parts])
    weight = _mean([part.read(part.head_parameter, torch.float32) for part in parts])
    for text, x_BTD in x.items():
        hidden_MD, wanted_M = x_BTD[:, :-1].flatten(0, 1), ids[text][:, 1:].flatten()
        loss = 0.0
        for start in range(0, len(wanted_M), HEAD_TOKENS):
            logits_MV = head(parts[0].config, norm, weight, hidden_MD[start : start + HEAD_TOKENS])
            loss += float(torch.nn.functional.cross_entropy(logits_MV, wanted_M[start : start + HEAD_TOKENS], reduction="sum"))
        yield text, float(torch.tensor(loss / len(wanted_M), dtype=torch.float64).exp())
