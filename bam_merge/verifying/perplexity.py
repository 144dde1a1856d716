"""Perplexity per text of the seed, every expert, their uniform average and the mixture, one block of all models at a time."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import HEAD_ROWS, StoredModel, stored_model
from bam_merge.model.model import head
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.paths import located
from bam_merge.planning.plan import Plan
from bam_merge.text import printable
from bam_merge.verifying.aligned import in_result_ids
from bam_merge.verifying.conversion import open_dense

M = TypeVar("M", bound=nn.Module)


WINDOW = 256
"""Tokens of one sequence; the first of each is not scored."""


WINDOWS = 8
"""Sequences per text: the first ones."""


HEAD_TOKENS = 512
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
def perplexities(checkpoint: Checkpoint, plan: Plan | None, ids: dict[Path, Tensor]) -> list[dict[str, Any]]:
    """One row per text of `read_texts`: {"text", "tokens", "perplexity": {model: value}}. Without sources the mixture alone."""
    mixture = stored_model(checkpoint)
    dense = {} if plan is None else in_result_ids(checkpoint.path, plan, open_dense(plan), mixture.config.vocab_size)
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
            del block, blocks  # before the next ones are read
    rows = []
    values = {name: dict(_scores(parts, {text: x[name, text] for text in ids}, ids)) for name, parts in models.items()}
    for text in ids:
        rows.append({"text": text.name, "tokens": ids[text].numel(), "perplexity": {name: values[name][text] for name in models}})
    return rows


def _mean(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total / len(tensors)


def _average(first: M, modules: list[M]) -> M:
    """`first` with the mean of all modules' parameters."""
    if len(modules) > 1:
        states = [module.state_dict() for module in modules]
        first.load_state_dict({key: _mean([state[key] for state in states]) for key in states[0]}, assign=True)
    return first


def _scores(parts: list[StoredModel], x: dict[Path, Tensor], ids: dict[Path, Tensor]) -> Iterator[tuple[Path, float]]:
    """Perplexity of each text from the last block's hidden states: exp of the mean of logsumexp(logits) - logit of the next token.

    HEAD_ROWS rows of the head are in memory at a time, and HEAD_TOKENS positions: logits [HEAD_TOKENS, HEAD_ROWS].
    """
    config = parts[0].config
    norm = _average(parts[0].final_norm(), [part.final_norm() for part in parts])
    hidden_MD = torch.cat([x_BTD[:, :-1].flatten(0, 1) for x_BTD in x.values()])
    wanted_M = torch.cat([ids[text][:, 1:].flatten() for text in x])
    total_M, logit_M = torch.full(wanted_M.shape, -torch.inf), torch.zeros(wanted_M.shape)
    for first in range(0, config.vocab_size, HEAD_ROWS):
        rows = range(first, min(first + HEAD_ROWS, config.vocab_size))
        weight_RD = _mean([part.read_rows(part.head_parameter, rows, torch.float32) for part in parts])
        for start in range(0, len(wanted_M), HEAD_TOKENS):
            chunk = torch.arange(start, min(start + HEAD_TOKENS, len(wanted_M)))
            logits_MR = head(config, norm, weight_RD, hidden_MD[chunk])
            total_M[chunk] = total_M[chunk].logaddexp(logits_MR.logsumexp(-1))
            here_M = chunk[(wanted_M[chunk] >= rows.start) & (wanted_M[chunk] < rows.stop)]
            logit_M[here_M] = logits_MR[here_M - start, wanted_M[here_M] - rows.start]
    end = 0
    for text in x:
        start, end = end, end + ids[text][:, 1:].numel()
        yield text, float((total_M - logit_M)[start:end].double().mean().exp())
