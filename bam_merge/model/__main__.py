"""`python -m bam_merge.model FOLDER --prompt TEXT`: run a checkpoint on its own, by the reference model."""

from pathlib import Path

import click
import torch

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.model.loading import load_model
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.process import print_result, run_command
from bam_merge.text import printable


def token_ids(text: str) -> list[int]:
    """The numbers in '1 15 27'. Raises click.BadParameter."""
    if not text.split() or not all(word.isdecimal() for word in text.split()):
        raise click.BadParameter(f"{printable(text)!r} is not a list of token ids such as '1 15 27'.")
    return [int(word) for word in text.split()]


@click.command(help="Continue a text with the model in FOLDER, by the reference model (slow and exact).")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text; needs tokenizer.json in FOLDER and the package tokenizers (else give --ids).")
@click.option("--ids", type=token_ids, help="Token ids instead of a text, as in '1 15 27'.")
@click.option("--tokens", type=click.IntRange(min=0), default=40, show_default=True, help="How many to add.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest token each time.")
@click.option("--seed", default=0, show_default=True, help="Of the generator, where the temperature is above 0.")
def run(folder: Path, prompt: str | None, ids: list[int] | None, tokens: int, temperature: float, seed: int) -> None:
    if (prompt is None) == (ids is None):
        raise click.UsageError("Give --prompt or --ids.")
    try:
        tokenizer = None if prompt is None else open_tokenizer(folder)
        model = load_model(folder)
        given = encode(tokenizer, prompt or "") if tokenizer else ids or []
        if not given or max(given) >= model.config.vocab_size:
            raise CheckpointError(f"the prompt must be token ids below {model.config.vocab_size} (the vocabulary), found {given}.")
    except BamMergeError as error:
        raise click.UsageError(str(error)) from None
    made = model.generate(torch.tensor([given]), tokens, temperature, seed)[0].tolist()
    print_result(tokenizer.decode(made) if tokenizer else " ".join(map(str, made)))


def main() -> None:
    run_command(run, "python -m bam_merge.model", reads_only=True)


if __name__ == "__main__":
    main()
