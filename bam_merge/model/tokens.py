"""Texts as token ids, by a folder's own tokenizer.json and the optional package tokenizers."""

from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import check_folder
from bam_merge.errors import CheckpointError
from bam_merge.text import printable


def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizers.Tokenizer. Raises CheckpointError when folder, file, or the package that reads it, is missing or unusable."""
    check_folder(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{printable(str(folder))}: no tokenizer.json, so a text cannot be read. Copy one there.")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CheckpointError("reading a text needs the package tokenizers: pip install tokenizers.") from None
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())  # from_file takes no name that is not UTF-8
        tokenizer.no_truncation()  # a text is to be read as it is, whatever a training program has left in the file
        tokenizer.no_padding()
        return tokenizer
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the package raises no narrower one, and a panic of its Rust code is no Exception
        raise CheckpointError(f"{printable(str(path))}: {printable(str(error))}.") from None


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The token ids of `text`, with whatever the tokenizer puts around it where `special`. Raises CheckpointError when it cannot."""
    ids: list[int] = _encoding(tokenizer, text, special).ids
    return ids


def pieces_of(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """`encode`, and for each token the part of `text` that it brings in; what stands between two tokens is the later one's.

    Of a character that several tokens make up the first has all; a token that is of no character has an empty piece.
    """
    found = _encoding(tokenizer, text)
    pieces, shown = [], 0
    for _, end in found.offsets:
        pieces.append(text[shown:end] if end > shown else "")
        shown = max(shown, end)
    return found.ids, pieces


def _encoding(tokenizer: Any, text: str, special: bool = True) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=special)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        why = printable(str(error))
        raise CheckpointError(f"the model's tokenizer.json cannot encode a text: {why}. Mend it, or use token ids.") from None
