"""The commands about a result that is made: push, refresh, chat, export."""

import click

from bam_merge.arguments import PathHere, Tolerance, UserPath
from bam_merge.commands import downloads, tell_note
from bam_merge.process import lines_asked, print_piece, print_result, progress_console
from bam_merge.text import printable


@click.command()
@click.argument("folder", type=PathHere(exists=False))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--public", is_flag=True, help="Anybody may see it. Default: private.")
@click.option("--revision", metavar="BRANCH", help="Onto this branch, made where it is not there. Default: main.")
@click.option("--message", metavar="TEXT", help="The commit's message.")
def push(folder: str, repo: str, public: bool, revision: str | None, message: str | None) -> None:
    """Upload the merged FOLDER to the Hugging Face hub as ORG/NAME, in one commit.

    Refused where verify finds a fault in the folder, by the checks that need no source. A push that broke off goes on when it is run again.
    """
    from bam_merge.publishing.push import push as run

    with downloads():
        done = run(folder, repo, public, revision, message, tell_note, progress_console().is_terminal)
    seen = "private" if done.private else "public"
    print_result(f"{done.place}: {len(done.files)} files, {seen}, on branch {printable(done.revision)}")


@click.command()
@click.argument("folder", type=PathHere())
@click.option("--recipe", type=UserPath(), metavar="RECIPE", help="The recipe, when the sources are not found from the manifest.")
def refresh(folder: str, recipe: str | None) -> None:
    """Renew model code and card of the merged FOLDER, as this version writes them. Its weights are not touched.

    The new folder takes the place of the old one in one step, and its manifest says which version wrote what.
    """
    from bam_merge.planning.make import plan_file
    from bam_merge.publishing.refresh import refresh as run

    with downloads():
        files = run(folder, plan_file(recipe) if recipe else None, tell_note)
    shown = printable(folder, 1000)
    print_result(f"{shown}: {', '.join(files)} renewed" if files else f"{shown}: code and card are as this version writes them")


@click.command()
@click.argument("folder", type=UserPath())
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--plain", is_flag=True, help="Every prompt is a text to go on with, whatever chat template there is.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="The most tokens of a reply.")
@click.option(
    "--temperature", type=Tolerance(), default=0.0, show_default=True, metavar="X", help="0: the likeliest token each time; above: drawn."
)
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, metavar="N", help="Of what is drawn.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="What is computed on: cpu, cuda, cuda:1, mps.")
@click.option(
    "--engine", type=click.Choice(("auto", "transformers", "reference")), default="auto", show_default=True,
    help="What computes: auto is transformers where it is installed.",
)  # fmt: skip
def chat(folder: str, system: str | None, plain: bool, max_tokens: int, temperature: float, seed: int, device: str, engine: str) -> None:
    """Talk with the model in FOLDER, line by line, by its chat template; without one, it goes on with each line as a text.

    In a terminal, Ctrl-D or Ctrl-C ends. Piped in, every line is a prompt, and each reply ends with a line break.
    """
    from bam_merge.chatting.conversation import Conversation, end_tokens
    from bam_merge.chatting.speaker import open_speaker
    from bam_merge.chatting.template import read_template
    from bam_merge.errors import CheckpointError
    from bam_merge.model.tokens import open_tokenizer
    from bam_merge.sources.places import local
    from bam_merge.verifying.devices import open_device

    on = open_device(device)
    with downloads():
        path, _ = local(folder, CheckpointError, "config.json")
    tokenizer, found = open_tokenizer(path), read_template(path)
    template = None if plain else found
    if system is not None and template is None:
        raise click.UsageError("--system needs a chat template, and " + ("--plain uses none." if found else "this model has none."))
    if template is not None:
        template.render([{"role": "user", "content": "?"}])  # what is missing for it is said before the model is loaded
    speaker = open_speaker(path, engine, on, tell_note)
    how = "by its chat template" if template else "as a text to go on with"
    tell_note(f"{speaker.name} on {on}; each line goes to the model {how}.")
    ends = end_tokens(path, tokenizer, found)
    talk = Conversation(speaker, tokenizer, template, ends, max_tokens, temperature, seed, system, tell_note)
    for line in lines_asked("> "):
        if line.strip():
            try:
                for piece in talk.reply(line):
                    print_piece(piece)
            finally:
                print_piece("\n")


@click.group()
def export() -> None:
    """Write a merged folder in another form."""


@export.command()
@click.argument("folder", type=UserPath())
@click.argument("file", type=UserPath())
@click.option(
    "--dtype", type=click.Choice(("source", "float32", "float16", "bfloat16")), default="source", show_default=True,
    help="Of the matrices; source: as most of FOLDER is stored.",
)  # fmt: skip
@click.option(
    "--converter", type=UserPath(), metavar="PATH", help="llama.cpp's convert_hf_to_gguf.py, or its folder. Default: on the PATH."
)
@click.option("--force", is_flag=True, help="Replace an existing FILE.")
def gguf(folder: str, file: str, dtype: str, converter: str | None, force: bool) -> None:
    """Write the mixture in FOLDER as the GGUF file FILE, for llama.cpp, by llama.cpp's converter.

    Refused where llama.cpp would compute something else. FILE appears when every tensor, the metadata and the vocabulary in it were
    read back and compared with FOLDER.
    """
    from bam_merge.errors import CheckpointError
    from bam_merge.exporting.gguf import export_gguf
    from bam_merge.sources.places import local
    from bam_merge.text import human_bytes

    with downloads():
        path, _ = local(folder, CheckpointError, "config.json")
    made = export_gguf(path, file, dtype=dtype, converter=converter, force=force, notify=tell_note)
    print_result(
        f"{printable(file, 1000)}: {made.tensors} tensors, {human_bytes(made.nbytes)} in {made.dtype}, "
        f"equal to {printable(folder, 1000)}; {made.keys} keys of metadata and the vocabulary compared"
    )
