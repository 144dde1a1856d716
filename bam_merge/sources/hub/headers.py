"""A model of the hub by its headers: config.json, index and small files are downloaded, of the weights only the headers, by ranges."""

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from bam_merge.architectures.opening import tied_heads
from bam_merge.checkpoints.adapter_folder import AdapterFolder
from bam_merge.checkpoints.folder import CONFIG, INDEX, Checkpoint, Remote, assembled, read_config, read_index
from bam_merge.checkpoints.header import Header, header_of
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.errors import CheckpointError
from bam_merge.sources.hub.cache import ADAPTER, Snapshot
from bam_merge.sources.hub.client import Hub, hub
from bam_merge.sources.hub.download import bytes_missing, download

MOST_SMALL = 2**18
"""Bytes of the largest file beside config.json and the index that is read with the headers. Most tokenizers take 2 to 20 MB."""


AT_ONCE = 8
"""Headers that are read at the same time."""


def open_headers(snapshot: Snapshot, tokenizers: bool = False) -> Checkpoint:
    """The checkpoint by its headers; with `tokenizers`, with every file beside the weights too. Raises CheckpointError."""
    files = snapshot.files
    assert files is not None, "else it is opened from the cache"
    if snapshot.config not in files:
        raise CheckpointError(f"{snapshot.id}: {snapshot.config} is missing on the hub: {_instead(snapshot)}")
    small = [name for name in snapshot.small_files() if name not in (CONFIG, INDEX)]
    first = [name for name in snapshot.small_files() if name not in small]
    read = [name for name in small if files[name].size <= MOST_SMALL or (tokenizers and name != MANIFEST)]
    download((snapshot, name) for name in (*first, *read))
    problems: list[str] = []
    config = read_config(snapshot.folder, problems, snapshot.config)
    names = snapshot.weights()
    connection = hub()

    def header(name: str) -> Header | CheckpointError:
        try:
            return _header(connection, snapshot, name)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {name: pool.submit(copy_context().run, header, name) for name in names}
    found = {name: job.result() for name, job in jobs.items()}
    headers = {name: item for name, item in found.items() if isinstance(item, Header)}
    problems += dict.fromkeys(problem for item in found.values() if isinstance(item, CheckpointError) for problem in item.problems)
    index = read_index(snapshot.folder) if INDEX in first and len(headers) == len(names) else (None, None)
    checkpoint = assembled(snapshot.folder, config, headers, index, tied_heads, problems)
    wanted = snapshot.wanted()
    remote = Remote(
        str(snapshot.id),
        sum(files[name].size for name in wanted),
        bytes_missing((snapshot, name) for name in wanted),
        {name: files[name].digest for name in small if name != MANIFEST and not snapshot.is_here(name)},
    )
    return (AdapterFolder if snapshot.adapter else Checkpoint)(**{**vars(checkpoint), "remote": remote})


def _instead(snapshot: Snapshot) -> str:
    """What a repository without the file that says what it is seems to be, and what to write for it."""
    if not snapshot.adapter and snapshot.has(ADAPTER[0]):
        return f"this is an adapter ({ADAPTER[0]}). Write {{base: MODEL, adapter: {snapshot.asked}}} for a source."
    if snapshot.adapter and snapshot.has(CONFIG):
        return f"this is a model of its own ({CONFIG}), to be written as a plain source."
    return "this is no model's repository."


def _header(connection: Hub, snapshot: Snapshot, name: str) -> Header:
    assert snapshot.files is not None
    size = snapshot.files[name].size
    return header_of(
        f"{snapshot.id}/{name}", name, size, lambda first, count: connection.span(snapshot.id, name, first, count, size) if count else b""
    )
