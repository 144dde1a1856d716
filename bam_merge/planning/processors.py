"""The files by which images and videos become what a wrapper's towers take: copied from the source that gives these, where it gives any."""

from collections.abc import Iterator, Mapping

from bam_merge.errors import CheckpointError
from bam_merge.planning.wrapping import Frame
from bam_merge.sources.companions import companion, key_notes
from bam_merge.sources.dense import DenseModel
from bam_merge.text import listed, some


def processor_files(frame: Frame | None, models: Mapping[str, DenseModel]) -> dict[str, str]:
    """Which source gives each: the seed, whose towers the result has; where it has none, the first in a wrapper of the same kind."""
    if frame is None:
        return {}
    alike = (model for model in models.values() if model.wrapper is not None and model.wrapper.name == frame.written.of)
    given = ((model.name, model.checkpoint.processors()) for model in (frame.seed, *alike))
    return next((dict.fromkeys(names, name) for name, names in given if names), {})


def processor_problems(files: Mapping[str, str], models: Mapping[str, DenseModel]) -> Iterator[str]:
    """Why such a file cannot be copied."""
    for name, source in files.items():
        if _is_here(models[source], name):
            try:
                companion(models[source].checkpoint.path / name)
            except CheckpointError as error:
                yield from (f"sources.{source}: {problem}" for problem in error.problems)


def processor_notes(frame: Frame | None, files: Mapping[str, str], models: Mapping[str, DenseModel]) -> Iterator[str]:
    """What a plan says of them: which are copied, and not wholly; where sources have others; and which stay behind."""
    for name, source in files.items():
        if _is_here(models[source], name):
            yield from (f"sources.{source}: {note}" for note in key_notes(models[source].checkpoint.path, [name]))
    giver = next(iter(files.values()), "")
    if frame is not None and giver:
        also = "" if giver == frame.seed.name else f", since {frame.seed.name}, whose towers the result has, has none"
        yield f"{some(files, 3)} copied from {giver}, for images{also}."
    for model in models.values() if files else ():
        others = [name for name, source in files.items() if name in model.checkpoint.processors() and _differs(model, models[source], name)]
        if others:
            yield f"sources.{model.name}: {some(others)} is not {giver}'s, which the result takes: its towers are the seed's, too."
    left = [model.name for model in models.values() if not files and model.checkpoint.processors()]
    if left:
        names = dict.fromkeys(name for source in left for name in models[source].checkpoint.processors())
        yield f"{some(names)} of {listed(left)} not copied: the result is the text model alone."


def _is_here(model: DenseModel, name: str) -> bool:
    """Whether it can be read yet: of a model of the hub headers alone may be at hand."""
    return (model.checkpoint.path / name).is_file()


def _differs(one: DenseModel, other: DenseModel, name: str) -> bool:
    """Whether two sources' files would be copied as other ones."""
    if one.name == other.name or not (_is_here(one, name) and _is_here(other, name)):
        return False
    try:
        return companion(one.checkpoint.path / name) != companion(other.checkpoint.path / name)
    except CheckpointError:  # of the one that is not taken
        return True
