"""Perplexity per text of the seed, every expert, their uniform average and the mixture, one block of all models at a time."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.model.streaming import Computing, streamed_block, streamed_embeddings, streamed_head
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.paths import located
from bam_merge.planning.plan import Plan
from bam_merge.text import printable
from bam_merge.verifying.aligned import in_result_ids
from bam_merge.verifying.conversion import open_dense

WINDOW = 256
"""Tokens of one sequence; the first of each is not scored."""


WINDOWS = 8
"""Sequences per text: the first ones."""


HEAD_TOKENS = 128
"""Positions whose logits are held at a time."""


def read_texts(folder: Path, texts: Sequence[str | os.PathLike[str]]) -> dict[Path, Tensor]:
    """The first WINDOWS x WINDOW token ids of every text [<= WINDOWS, WINDOW], by the folder's tokenizer. Raises CheckpointError."""
    ids: dict[Path, Tensor] = {}
    problems: list[str] = []
    tokenizer = None
    try:
        tokenizer = open_tokenizer(folder) if texts else None
    except CheckpointError as error:
        problems += error.problems
    for given in texts:
        try:
            text = located(given)
            content = text.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            problems.append(f"{printable(str(text))}: {error.strerror}.")
            continue
        except CheckpointError as error:
            problems += error.problems
            continue
        found = encode(tokenizer, content) if tokenizer else []
        count = min(WINDOWS, len(found) // WINDOW)
        if tokenizer and count == 0:
            problems.append(f"{printable(str(text))}: {len(found)} tokens, at least {WINDOW} are needed for a perplexity.")
        ids[text] = torch.tensor(found[: count * WINDOW]).view(count, WINDOW)
    if problems:
        raise CheckpointError(*problems)
    return ids


@torch.no_grad()
def perplexities(checkpoint: Checkpoint, plan: Plan | None, ids: dict[Path, Tensor], computing: Computing) -> list[dict[str, Any]]:
    """One row per text of `read_texts`: {"text", "tokens", "perplexity": {model: value}}. Without sources the mixture alone."""
    mixture = stored_model(checkpoint)
    dense = {} if plan is None else in_result_ids(checkpoint.path, plan, open_dense(plan), mixture.config.vocab_size)
    averaged = [dense[name] for name in plan.recipe.distinct] if plan is not None and plan.recipe.output.layers is None else []
    models: dict[str, StoredModel] = dict(dense)
    if len(averaged) > 1:
        models["average"] = Average(averaged[0].checkpoint, averaged[0].config, averaged[0].leaves, tuple(averaged))
    models["merged"] = mixture
    x = {(name, text): streamed_embeddings(model, ids_BT, computing) for name, model in models.items() for text, ids_BT in ids.items()}
    for layer in range(max(model.config.num_hidden_layers for model in models.values())):
        for name, model in models.items():
            if layer >= model.config.num_hidden_layers:  # the sources of a stack have fewer layers, or more
                continue
            block = streamed_block(model, layer, computing)
            for text, ids_BT in ids.items():
                positions = torch.arange(ids_BT.shape[1], device=computing.device)[None]
                x[name, text] = torch.cat([block(row[None], positions).hidden for row in x[name, text]])
    rows = []
    values = {name: dict(_scores(model, {text: x[name, text] for text in ids}, ids, computing)) for name, model in models.items()}
    for text in ids:
        rows.append({"text": text.name, "tokens": ids[text].numel(), "perplexity": {name: values[name][text] for name in models}})
    return rows


@dataclass(frozen=True)
class Average(StoredModel):
    """The model whose every parameter is the mean of those of `models`, in float32."""

    models: tuple[StoredModel, ...] = ()

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        return _mean(model.read(parameter, torch.float32) for model in self.models).to(dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return _mean(model.read_rows(parameter, rows, torch.float32) for model in self.models).to(dtype)


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    parts = list(tensors)
    total = parts[0].clone()
    for tensor in parts[1:]:
        total += tensor
    return total / len(parts)


def _scores(model: StoredModel, x: dict[Path, Tensor], ids: dict[Path, Tensor], computing: Computing) -> Iterator[tuple[Path, float]]:
    """Perplexity of each text from the last block's hidden states: exp of the mean of logsumexp(logits) - logit of the next token.

    HEAD_TOKENS positions' logits are in memory at a time [HEAD_TOKENS, V].
    """
    for text, x_BTD in x.items():
        hidden_MD, wanted_M = x_BTD[:, :-1].flatten(0, 1), ids[text][:, 1:].flatten().to(computing.device)
        pieces = zip(torch.split(hidden_MD, HEAD_TOKENS), torch.split(wanted_M, HEAD_TOKENS), strict=True)
        lost = [cross_entropy(streamed_head(model, hidden, computing), wanted, reduction="sum") for hidden, wanted in pieces]
        yield text, float((torch.stack(lost).double().sum() / len(wanted_M)).exp())
