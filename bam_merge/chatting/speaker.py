"""What computes a model's next token: transformers where it is installed, or the reference model; and the loop that draws tokens.

No code of the folder is run: of layout bam transformers gets the model code of this package.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_merge.architectures.opening import open_folder
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.text import printable

ENGINES = ("auto", "transformers", "reference")


Step = Callable[[Sequence[int]], Tensor]
"""Given the tokens that are new since the last call, the logits [V] of the next one."""


@dataclass(frozen=True)
class Speaker:
    """A model that continues token ids. `begin` starts afresh, without what was said before; `context`: positions that it was made for."""

    name: str
    begin: Callable[[], Step]
    vocab_size: int
    context: int | None
    device: torch.device

    def stream(self, ids: Sequence[int], count: int, temperature: float, seed: int, ends: Collection[int]) -> Iterator[int]:
        """At most `count` tokens after `ids`, until one of `ends`: the likeliest at temperature 0, else drawn by a generator of its own."""
        if wrong := [number for number in ids if number >= self.vocab_size]:
            raise CheckpointError(f"the tokenizer gives token {wrong[0]}, and the model has {self.vocab_size:,} tokens.")
        generator = torch.Generator("cpu").manual_seed(seed)
        step, new = self.begin(), list(ids)
        for _ in range(count):
            with torch.inference_mode():  # not while whoever is given a token works with it
                logits_V = step(new).float().cpu()
                if temperature == 0:
                    token = int(logits_V.argmax())
                else:
                    token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
            if token in ends:
                return
            yield token
            new = [token]


def open_speaker(folder: Path, engine: str, device: torch.device, notify: Callable[[str], None]) -> Speaker:
    """The model in `folder`. Raises CheckpointError for one that cannot be opened."""
    checkpoint = open_folder(folder)
    installed = find_spec("transformers") is not None
    if engine == "transformers" and not installed:
        raise CheckpointError("--engine transformers: it is not installed: pip install 'bam-merge[hf]'. --engine reference needs nothing.")
    if engine == "reference" or not installed:
        return _reference(checkpoint, device)
    try:
        return _transformers(checkpoint, device)
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        why = printable(f"{type(error).__name__}: {error}")
        if engine == "transformers":
            raise CheckpointError(f"{printable(str(folder))}: transformers does not load it ({why}). --engine reference may.") from None
        notify(f"transformers does not load it ({why}), so the reference model does.")
        return _reference(checkpoint, device)


def _reference(checkpoint: Checkpoint, device: torch.device) -> Speaker:
    from bam_merge.model.loading import stored_model
    from bam_merge.model.positions import Cache

    model = stored_model(checkpoint).model(torch.float32).to(device)

    def begin() -> Step:
        cache = Cache()
        return lambda new: model(torch.tensor([list(new)], device=device), cache)[0, -1]

    return Speaker("the reference model", begin, model.config.vocab_size, _context(checkpoint), device)


def _transformers(checkpoint: Checkpoint, device: torch.device) -> Speaker:
    import transformers

    of: Any = transformers.AutoModelForCausalLM
    logs: Any = transformers.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    if "auto_map" in checkpoint.config:
        from bam_merge.exported.modeling_bam import BamForCausalLM

        of = BamForCausalLM
    model = of.from_pretrained(str(checkpoint.path), local_files_only=True).to(device).eval()

    def begin() -> Step:
        past: Any = None

        def step(new: Sequence[int]) -> Tensor:
            nonlocal past
            output = model(torch.tensor([list(new)], device=device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits: Tensor = output.logits[0, -1]
            return logits

        return step

    name = f"transformers {transformers.__version__}"
    return Speaker(name, begin, int(model.config.get_text_config().vocab_size), _context(checkpoint), device)


def _context(checkpoint: Checkpoint) -> int | None:
    found = checkpoint.config.get("max_position_embeddings")
    return found if type(found) is int and found > 0 else None
