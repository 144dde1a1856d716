"""The commands about a result that is made: push, refresh, chat."""

import click

from bam_merge.arguments import UserPath
from bam_merge.commands import downloads, tell_note
from bam_merge.process import print_result, progress_console
from bam_merge.text import printable


@click.command()
@click.argument("folder", type=UserPath(exists=False))
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
@click.argument("folder", type=UserPath())
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
