"""Perplexity per text of the seed, every expert, their uniform average and the mixture, one block of one model at a time."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bam_merge.calibrating.texts import first_tokens
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.model.routes import Choices, run_texts
from bam_merge.model.streaming import Computing, streamed_head
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.paths import located
from bam_merge.planning.plan import Plan
from bam_merge.text import printable
from bam_merge.verifying.aligned import in_result_ids
from bam_merge.verifying.conversion import open_dense
from bam_merge.verifying.heldout import HeldOut
from bam_merge.verifying.report import AVERAGE, FORCED, MERGED

WINDOW = 256
"""Tokens of one sequence; the first of each is not scored."""


WINDOWS = 8
"""Sequences per text: the first ones."""


BATCH = 4
"""Sequences that are computed at a time."""


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
            if text.is_dir():
                raise CheckpointError(f"{printable(str(text))}: Is a directory.")
            found, _ = first_tokens(text, WINDOWS * WINDOW, lambda content: encode(tokenizer, content) if tokenizer else [])
        except CheckpointError as error:
            problems += error.problems
            continue
        count = min(WINDOWS, len(found) // WINDOW)
        if tokenizer and count == 0:
            problems.append(f"{printable(str(text))}: {len(found)} tokens, at least {WINDOW} are needed for a perplexity.")
        ids[text] = torch.tensor(found[: count * WINDOW]).view(count, WINDOW)
    if problems:
        raise CheckpointError(*problems)
    return ids


def unnamed(ids: Mapping[Path, Tensor]) -> list[HeldOut]:
    """The texts of `read_texts`, of which no expert is known, in batches of BATCH sequences."""
    return [HeldOut(text.name, torch.split(ids_WT, BATCH)) for text, ids_WT in ids.items()]


Advancing = Callable[[int], Callable[[int], None]]
"""Given a whole, what is to be called with amounts that sum up to it."""


@torch.no_grad()
def perplexities(
    checkpoint: Checkpoint,
    plan: Plan | None,
    texts: Sequence[HeldOut],
    computing: Computing,
    own_alone: bool = False,
    advancing: Advancing = lambda whole: lambda amount: None,
) -> tuple[list[dict[str, Any]], list[list[Choices]]]:
    """One row per text: {"text", "tokens", "perplexity": {model: value}}, without sources of the mixture alone; and what its routers did
    with each text whose expert is known. Such a text has "domain", and the mixture with its expert forced among the models.

    With `own_alone` sources are tried on no text but those that are for them. What `advancing` returns for the whole hears of tokens.
    """
    mixture = stored_model(checkpoint)
    models = _models(checkpoint, plan, mixture)
    of = {name: [i for i, text in enumerate(texts) if not own_alone or name in (text.domain, AVERAGE, MERGED)] for name in models}
    known = [index for index, text in enumerate(texts) if text.experts]
    advance = advancing(sum(texts[i].tokens for some in (*of.values(), known) for i in some))
    scores: list[dict[str, float]] = [{} for _ in texts]
    choices: list[list[Choices]] = []
    for name, model in models.items():
        tried = of[name]
        for index, (x, did) in zip(tried, run_texts(model, [texts[i].batches for i in tried], computing), strict=True):
            scores[index][name] = _score(model, x, texts[index], computing)
            if model is mixture and texts[index].experts:
                choices.append(did)
        advance(sum(texts[i].tokens for i in tried))
    experts = [texts[index].experts[0] for index in known]
    forced = run_texts(mixture, [texts[index].batches for index in known], computing, experts=experts)
    for index, (x, _) in zip(known, forced, strict=True):
        scores[index][FORCED] = _score(mixture, x, texts[index], computing)
    advance(sum(texts[i].tokens for i in known))
    rows = []
    for text, found in zip(texts, scores, strict=True):
        domain = {} if text.domain is None else {"domain": text.domain}
        rows.append({"text": text.name, **domain, "tokens": text.tokens, "perplexity": found})
    return rows, choices


def _models(checkpoint: Checkpoint, plan: Plan | None, mixture: StoredModel) -> dict[str, StoredModel]:
    """The dense models, where there is a plan, their average where there are several, and the mixture."""
    dense = {} if plan is None else in_result_ids(checkpoint.path, plan, open_dense(plan), mixture.config.vocab_size)
    averaged = [dense[name] for name in plan.recipe.distinct] if plan is not None and plan.recipe.output.layers is None else []
    models: dict[str, StoredModel] = dict(dense)
    if len(averaged) > 1:
        models[AVERAGE] = Average(averaged[0].checkpoint, averaged[0].config, averaged[0].leaves, tuple(averaged))
    models[MERGED] = mixture
    return models


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


def _score(model: StoredModel, x: Sequence[Tensor], text: HeldOut, computing: Computing) -> float:
    """Perplexity of a text from the last block's hidden states: exp of the mean of logsumexp(logits) - logit of the next token.

    HEAD_TOKENS positions' logits are in memory at a time [HEAD_TOKENS, V].
    """
    hidden_MD = torch.cat([x_BTD[:, :-1].flatten(0, 1) for x_BTD in x])
    wanted_M = torch.cat([ids_BT[:, 1:].flatten() for ids_BT in text.batches]).to(computing.device)
    pieces = zip(torch.split(hidden_MD, HEAD_TOKENS), torch.split(wanted_M, HEAD_TOKENS), strict=True)
    lost = [cross_entropy(streamed_head(model, hidden, computing), wanted, reduction="sum") for hidden, wanted in pieces]
    return float((torch.stack(lost).double().sum() / len(wanted_M)).exp())
