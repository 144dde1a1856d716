"""Files that are made to do harm are refused in words: nothing of them runs, and nothing is left behind."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_sources
from damage import as_in_a_terminal, deadline, tree

from bam_merge.converting import child
from bam_merge.converting.child import Limits
from bam_merge.converting.convert import convert
from bam_merge.errors import CheckpointError

ROOT = Path(__file__).parents[2]


class Calls:
    """What is called when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def archive(data: bytes) -> bytes:
    """A file as torch writes it, with a pickle of somebody else's."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
    return stream.getvalue()


def saved(document: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(document, stream)
    return stream.getvalue()


def without_end() -> bytes:
    """A dictionary's key of 60 pairs in one another: its hash takes 2^60 steps."""
    nested = b"".join(b"h" + bytes([1 + n]) + b"\x86q" + bytes([2 + n]) for n in range(60))
    return archive(b"\x80\x02})q\x01" + nested + b"K\x01s.")


def scripted() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a command": (lambda mark: saved({"a": torch.ones(2), "b": Calls(os.system, f"touch {mark}")}), "asks to run posix.system, which is no part of a tensor. Nothing of it was run, and nothing was written."),
    "a command in a plain pickle": (lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}"), 2), "asks to run posix.system"),
    "a command in a newer pickle": (lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}"), 5), "Nothing of it was run"),
    "an expression": (lambda mark: saved({"a": Calls(eval, f"open({str(mark)!r}, 'w')")}), "Nothing of it was run"),
    "a program": (lambda mark: saved({"a": Calls(subprocess.Popen, ["touch", str(mark)])}), "asks to run commands.Popen"),
    "an import": (lambda mark: archive(b"\x80\x02cantigravity\nfly\n."), "asks to run antigravity.fly"),
    "all of memory": (lambda mark: saved({"a": torch.ones(2), "b": Calls(bytearray, 2**45)}), "to read it takes more than 1.07 GB of memory, and the file has 1.6"),
    "twice its limit": (lambda mark: saved({"b": [Calls(bytearray, 2**31)]}), "made to fill memory. It was stopped, and nothing was written."),
    "a view without end": (lambda mark: saved({"a": torch.ones(1).expand(2**40)}), "its tensors would take 4.398 TB, the file has"),
    "a program of torch": (lambda mark: scripted(), "a TorchScript archive, which is a program and not weights alone."),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_words(name: str, tmp_path: Path, run: Any) -> None:
    mark = tmp_path / "ran"
    data, message = HOSTILE[name]
    write_sources(tmp_path, CONFIGS["llama"], ("law",))
    (tmp_path / "law" / "model.safetensors").unlink()
    (tmp_path / "law" / "pytorch_model.bin").write_bytes(data(mark))
    before = tree(tmp_path)
    with deadline():
        result = run("convert", tmp_path / "law", tmp_path / "new")
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err and result.err.count("\n") == 1
    assert not mark.exists()
    assert tree(tmp_path) == before


def test_a_file_that_reads_without_end_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(without_end())
    with pytest.raises(CheckpointError, match=r"more than 2 seconds of processor time, .* made to read without end\. It was stopped"):
        convert(tmp_path, tmp_path.with_name("new"), limits=Limits(seconds=2))
    assert not tmp_path.with_name("new").exists()


# ---- the process that reads ------------------------------------------------------------------------------------------------

ATTEMPTS = {
    "socket": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "name": "import socket; socket.getaddrinfo('localhost', 80)",
    "system": "import os; os.system('true')",
    "program": "import subprocess; subprocess.run(['true'])",
    "fork": "import os; os.fork()",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "write": "open(place, 'w')",
    "create": "import os; os.open(place, os.O_CREAT | os.O_WRONLY)",
    "append": "open(place, 'ab')",
    "remove": "import os; os.remove(__file__)",
    "rename": "import os; os.rename(__file__, place)",
    "folder": "import os; os.mkdir(place)",
    "kill": "import os; os.kill(os.getppid(), 0)",
}
"""What a fault of the loader could be used for."""


def test_a_confined_process_can_do_nothing_but_read(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import json, sys
        from bam_merge.converting.confinement import Refused, confine, without_network
        import socket, subprocess
        without_network()
        place = sys.argv[1]
        confine(2**30, 60)
        said = {{}}
        for name, code in {ATTEMPTS!r}.items():
            try:
                exec(code)
                said[name] = "done"
            except Refused as error:
                said[name] = "refused"
            except BaseException as error:
                said[name] = type(error).__name__
        try:
            bytearray(2**31)
            said["memory"] = "done"
        except MemoryError:
            said["memory"] = "refused"
        print(json.dumps([said, open(__file__).read(6)]))
    """)
    )
    place = tmp_path / "written"
    done = subprocess.run([sys.executable, script, place], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, read = json.loads(done.stdout)
    assert said == dict.fromkeys((*ATTEMPTS, "memory"), "refused")
    assert read == "\nimpor" and not place.exists()


def test_the_process_gets_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is told of the environment what it needs to start, and is in a session of its own."""
    given: dict[str, Any] = {}

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            given.update(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setenv("HF_TOKEN", "secret")
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin")
    with open(tmp_path / "x.bin", "rb") as stream:
        found = child.read_pickle(tmp_path / "x.bin", stream.fileno(), ("a",))
    assert found.tensors["a"].shape == (3,) and found.tensors["a"].digest is not None
    assert "HF_TOKEN" not in given["env"] and given["start_new_session"] is True


def test_a_file_that_takes_no_bytes_is_named_as_that(tmp_path: Path) -> None:
    """The output's descriptor cannot be written to: it is the disk's fault, and not that of what is read."""
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin")
    (tmp_path / "out").touch()
    refused = pytest.raises(CheckpointError, match="what was read could not be written: Bad file descriptor")
    with open(tmp_path / "x.bin", "rb") as stream, open(tmp_path / "out", "rb") as closed, refused:
        child.read_pickle(tmp_path / "x.bin", stream.fileno(), write={"a": (closed.fileno(), 0)})


@pytest.mark.parametrize("answer", [b"", b"[]", b"{", b'{"tensors": {"a": ["F32", [-1], null, 0]}, "left_out": {}}', b'{"tensors": {"a": ["F33", [1], null, 0]}, "left_out": {}}', b'{"tensors": {"a": ["F32", [1]]}, "left_out": {}}', b'{"tensors": 3}'])  # fmt: skip
def test_an_answer_is_believed_in_nothing(answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    monkeypatch.setattr(child, "_ask", lambda *_: (answer, 0))
    with open(tmp_path / "x.bin", "rb") as stream, pytest.raises(CheckpointError, match=r"x\.bin: the process that"):
        child.read_pickle(tmp_path / "x.bin", stream.fileno())


@pytest.mark.parametrize(("status", "message"), [
    (None, "seconds of processor time"), (-signal.SIGXCPU, "seconds of processor time"), (-signal.SIGKILL, "was killed"),
    (-signal.SIGSEGV, "ended in a crash"), (-signal.SIGABRT, "ended in a crash"), (1, "Is torch complete"),
])  # fmt: skip
def test_every_end_of_the_process_has_words(status: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    monkeypatch.setattr(child, "_ask", lambda *_: (b"", status))
    with open(tmp_path / "x.bin", "rb") as stream, pytest.raises(CheckpointError, match=message):
        child.read_pickle(tmp_path / "x.bin", stream.fileno())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_stopped_half_way_it_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """While a file is read that never ends: nothing appears, and the process that reads does not outlive the one that asked."""
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "config.json").write_text("{}")
    (tmp_path / "law" / "pytorch_model.bin").write_bytes(without_end())
    command = [sys.executable, "-m", "bam_merge", "convert", str(tmp_path / "law"), str(tmp_path / "new")]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=as_in_a_terminal,
    )  # fmt: skip
    with deadline():
        try:
            while not (readers := children(process.pid)):
                time.sleep(0.05)
            time.sleep(3)
            process.send_signal(number)
            process.wait()
        finally:  # one that goes on would be another test's failure
            process.kill()
            process.wait()
        assert not (tmp_path / "new").exists()
        if number != signal.SIGKILL:
            assert [path.name for path in tmp_path.iterdir()] == ["law"]
        for reader in readers:  # after SIGKILL its own limit ends it, where the file holds Python's lock
            if number == signal.SIGKILL and alive(reader):
                os.kill(reader, signal.SIGKILL)
            assert not alive(reader) or number == signal.SIGKILL


def children(of: int) -> list[int]:
    text = Path(f"/proc/{of}/task/{of}/children")
    return [int(number) for number in text.read_text().split()] if text.exists() else []


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
