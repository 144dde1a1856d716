"""Other systems, as far as they can be tried on this one: calls that macOS lacks are taken away, and every use of one has its place."""

import ast
import ctypes
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Stop, folder_bytes, interrupted, options, plan, stop_after

import bam_merge
from bam_merge import MergeOptions, paths, system
from bam_merge.errors import OutputError, SyncFailed, VerificationFailed
from bam_merge.planning.plan import Plan
from bam_merge.publishing import destination
from bam_merge.publishing.publish import publish
from bam_merge.publishing.staging import Staging
from bam_merge.showing import page
from bam_merge.sources import companions

__all__ = ["plan"]

PACKAGE = Path(bam_merge.__file__).parent

# ---- what the package uses ---------------------------------------------------------------------------------------------------

NOT_ON_MACOS = {
    "os": """copy_file_range eventfd eventfd_read eventfd_write fdatasync getrandom getxattr listxattr removexattr setxattr memfd_create
        pidfd_open pipe2 plock posix_fadvise posix_fallocate process_cpu_count getresuid getresgid setresuid setresgid
        sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_getscheduler sched_setscheduler sched_rr_get_interval
        setns unshare splice timerfd_create timerfd_settime timerfd_gettime O_DIRECT O_NOATIME O_PATH O_TMPFILE O_LARGEFILE O_RSYNC
        O_BINARY O_TEMPORARY P_PIDFD startfile add_dll_directory posix_openpt""",
    "fcntl": """F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW F_ADD_SEALS F_GET_SEALS F_SETPIPE_SZ F_GETPIPE_SZ F_SETLEASE F_GETLEASE F_NOTIFY
        FICLONE FICLONERANGE""",
    "signal": "SIGPWR SIGSTKFLT SIGPOLL SIGCLD SIGRTMIN SIGRTMAX SIGBREAK sigwaitinfo sigtimedwait pidfd_send_signal",
    "resource": "prlimit RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING",
    "select": "epoll devpoll",
    "mmap": "MAP_POPULATE MAP_DENYWRITE MAP_EXECUTABLE MAP_HUGETLB",
    "time": "clock_getcpuclockid pthread_getcpuclockid CLOCK_BOOTTIME CLOCK_TAI",
}
"""Python's own names that the documentation ("Availability") does not give for macOS. os.preadv has been there since macOS 11."""

NOT_ON_LINUX = {"fcntl": "F_FULLFSYNC F_BARRIERFSYNC F_GETPATH F_NOCACHE F_RDAHEAD", "os": "O_EXLOCK O_SHLOCK chflags lchflags lchmod"}

SEPARATE = {module: set(f"{NOT_ON_MACOS.get(module, '')} {NOT_ON_LINUX.get(module, '')}".split()) for module in NOT_ON_MACOS}
SEPARATE["fcntl"] |= {"flock"}  # not on every Unix, nor on every file system


def uses(tree: ast.Module) -> list[tuple[str, str, bool]]:
    """(module, name, whether it is guarded) of what the code uses and not every system has: guarded by hasattr in the same function."""
    found = []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in SEPARATE.get(node.value.id, ()):
            around = [f for f in functions if any(inner is node for inner in ast.walk(f))]
            found.append((node.value.id, node.attr, any(asks(f, node.value.id, node.attr) for f in around)))
        if isinstance(node, ast.ImportFrom) and node.module in SEPARATE:
            found += [(node.module, name.name, False) for name in node.names if name.name in SEPARATE[node.module]]
    return found


def asks(function: ast.FunctionDef, module: str, name: str) -> bool:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return any(ast.unparse(call) in (f"hasattr({module}, '{name}')", f"getattr({module}, '{name}', None)") for call in calls)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_what_not_every_system_has_is_in_one_place_and_guarded(file: Path) -> None:
    text = file.read_text()
    found = uses(ast.parse(text))
    if file.name == "system.py":
        assert {name for _, name, guarded in found if guarded} >= {"fdatasync", "posix_fallocate", "sched_getaffinity", "flock"}
        assert all(guarded for *_, guarded in found)
    else:
        assert found == []
        for word in ("ctypes", "/proc/", "/dev/fd", "renameat", "fsync("):
            assert word not in text, f"{word}: goes to system.py"


@pytest.mark.parametrize(
    ("code", "guarded"),
    [
        ("def f(d):\n    os.fdatasync(d)", False),
        ("os.fdatasync(0)", False),
        ("from os import fdatasync", False),
        ("def f(d):\n    if hasattr(os, 'fsync'):\n        os.fdatasync(d)", False),
        ("def g():\n    hasattr(os, 'fdatasync')\ndef f(d):\n    os.fdatasync(d)", False),
        ("def f(d):\n    if hasattr(os, 'fdatasync'):\n        os.fdatasync(d)", True),
        ("def f(d):\n    return hasattr(fcntl, 'F_GETPATH') and fcntl.F_GETPATH", True),
    ],
)
def test_the_test_above_sees(code: str, guarded: bool) -> None:
    assert [found for *_, found in uses(ast.parse(code))] == [guarded]


# ---- calls taken away --------------------------------------------------------------------------------------------------------

GETPATH, FULLFSYNC = 50, 51


class Mac:
    """The calls of macOS, on top of those of this system: what was fully synced, and what the file system cannot do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.refusal: int | None = None
        take_away_all(monkeypatch)
        self.renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        self.fcntl, self.readlink = fcntl.fcntl, os.readlink
        monkeypatch.setattr(fcntl, "F_GETPATH", GETPATH, raising=False)
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULLFSYNC, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", self.control)
        monkeypatch.setattr(os, "readlink", self.no_proc)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: self)

    def control(self, descriptor: int, command: int, argument: Any = 0) -> Any:
        if command == GETPATH:
            return os.fsencode(self.readlink(f"/proc/self/fd/{descriptor}")).ljust(len(argument), b"\0")
        if command == FULLFSYNC:
            if self.refusal:
                raise OSError(self.refusal, os.strerror(self.refusal))
            self.synced.append(Path(self.readlink(f"/proc/self/fd/{descriptor}")).name)
            return 0
        return self.fcntl(descriptor, command, argument)

    def no_proc(self, path: Any, **folder: Any) -> str:
        return lacking() if str(path).startswith("/proc") else self.readlink(path, **folder)

    def renameatx_np(self, old: int, name: bytes, new: int, new_name: bytes, flags: int) -> int:
        return self.renameat2(old, name, new, new_name, {2: 2, 4: 1}[flags])  # RENAME_SWAP, RENAME_EXCL


def lacking(*args: Any, **options: Any) -> Any:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def not_supported(*args: Any, **options: Any) -> Any:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def take_away_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NOT_ON_MACOS["os"].split():
        monkeypatch.delattr(os, name, raising=False)


def no_renames_with_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: object())


def no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path, **o: lacking() if str(path).startswith("/proc") else real(path, **o))


def posix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for take in (take_away_all, no_renames_with_flags, no_proc):
        take(monkeypatch)


SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "macOS": Mac,
    "POSIX alone": posix_alone,
    "no posix_fallocate": lambda patch: patch.delattr(os, "posix_fallocate"),
    "posix_fallocate not on this file system": lambda patch: patch.setattr(os, "posix_fallocate", not_supported),
    "no fdatasync": lambda patch: patch.delattr(os, "fdatasync"),
    "no sched_getaffinity": lambda patch: patch.delattr(os, "sched_getaffinity"),
    "no renames with flags": no_renames_with_flags,
    "no /proc": no_proc,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_model_merged_resumed_replaced_and_verified(
    name: str, plan: Plan, llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way with what the system lacks taken away gives the bytes that it gives here, and says when it does less."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    with monkeypatch.context() as patch:
        SYSTEMS[name](patch)
        interrupted(plan, llamas)
        settings, said = options(resume=True, workers=2, verify=True)
        target = publish(plan, None, settings)
        assert folder_bytes(target) == whole
        assert any(text.startswith("resuming") for text in said)
        assert run("verify", target).status == 0
        (target / "pytorch_model.bin").write_text("old")
        replacing, also_said = options(force=True)
        publish(plan, None, replacing)
        assert folder_bytes(target) == whole
    assert sorted(os.listdir(llamas)) == ["code", "law", "out", "recipe.yaml", "seed", "whole"]
    plain = [text for text in (*said, *also_said) if "so a plain rename" in text]
    assert len(plain) == (2 if name in ("POSIX alone", "no renames with flags") else 0)


def test_macos_replaces_nothing_by_chance(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Mac(monkeypatch)
    with pytest.raises(OutputError, match=r"appeared while the merge ran"):
        publish(plan, None, MergeOptions(verify=False, progress=lambda count: (llamas / "out").mkdir(exist_ok=True)))
    assert list((llamas / "out").iterdir()) == []


def test_macos_is_asked_to_bring_everything_to_the_medium(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mac = Mac(monkeypatch)
    target = publish(plan, None, MergeOptions(verify=False))
    assert set(mac.synced) == {*os.listdir(target), "output", ".out.bam-merge", llamas.name}
    assert mac.synced[-2:] == [llamas.name, ".out.bam-merge"]


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOTTY, errno.EINVAL])
def test_a_file_system_without_full_syncs_gets_plain_ones(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    Mac(monkeypatch).refusal = code
    plain, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: plain.append(real(descriptor)))
    monkeypatch.setattr("bam_merge.merging.outputs.FLUSH_SECONDS", 60)
    assert len(os.listdir(publish(plan, None, MergeOptions(verify=False)))) + 3 == len(plain)


def test_a_full_sync_that_fails_is_not_passed_over(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Mac(monkeypatch).refusal = errno.EIO
    with pytest.raises(SyncFailed, match="Input/output error"):
        publish(plan, None, MergeOptions(verify=False))
    assert not (llamas / "out").exists()


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EIO, errno.EACCES])
def test_a_rename_that_fails_is_no_rename_that_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class Failing:
        def renameatx_np(self, *args: Any) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Failing())
    with pytest.raises(OSError, match=os.strerror(code)):
        system.rename((0, "a"), (0, "b"), exchange=False)


# ---- locks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [True, False], ids=["no flock", "flock not on this file system"])
def test_without_locks_a_staging_folder_is_its_makers(
    absent: bool, plan: Plan, llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    if absent:
        monkeypatch.delattr(fcntl, "flock")
    else:
        monkeypatch.setattr(fcntl, "flock", not_supported)
    target = publish(plan, None, MergeOptions())
    assert folder_bytes(target) == whole and run("verify", target).status == 0
    assert folder_bytes(publish(plan, None, MergeOptions(force=True))) == whole
    assert publish(plan, None, MergeOptions(resume=True)) == target
    shutil.rmtree(target)
    staging = interrupted(plan, llamas)
    for settings in (MergeOptions(resume=True), MergeOptions()):
        with pytest.raises(OutputError, match=r"\.out\.bam-merge is there \(process \d+\), and this file system has no locks to tell"):
            publish(plan, None, settings)
    shutil.rmtree(staging)
    assert folder_bytes(publish(plan, None, MergeOptions(verify=False))) == whole


def test_another_run_is_seen_without_locks(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", not_supported)
    first = Staging.open(llamas / "out")
    with pytest.raises(OutputError, match=r"When none does, delete that folder"):
        publish(plan, None, MergeOptions())
    first.close()
    assert publish(plan, None, MergeOptions(verify=False)).is_dir()


# ---- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_page_where_there_are_no_hard_links(code: int, llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    before = set(os.listdir(llamas))
    assert run("diff", llamas / "seed", llamas / "law", "--html", llamas / "page.html").status == 1
    assert (llamas / "page.html").read_text().startswith("<!doctype html>")
    monkeypatch.setattr(page, "check_free", lambda path, force: None)  # it appeared after that
    result = run("diff", llamas / "seed", llamas / "law", "--html", llamas / "page.html")
    assert result.status == 2 and "page.html: File exists." in result.err
    assert set(os.listdir(llamas)) == before | {"page.html"}


def test_what_is_told_of_an_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    descriptor = os.open(tmp_path / "link", os.O_RDONLY)
    try:
        assert system.path_of(descriptor) == os.path.realpath(tmp_path / "file")
        assert Path(system.name_of(descriptor)).read_text() == "text"
        with monkeypatch.context() as patch:
            Mac(patch)
            assert system.path_of(descriptor) == os.path.realpath(tmp_path / "file")
        posix_alone(monkeypatch)
        monkeypatch.setattr(os.path, "lexists", lambda path: not str(path).startswith("/proc"))
        assert system.path_of(descriptor) is None
        assert system.name_of(descriptor) == f"/dev/fd/{descriptor}" and Path(system.name_of(descriptor)).read_text() == "text"
    finally:
        os.close(descriptor)


def test_processors_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = system.available_processors()
    assert allowed == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert system.available_processors() == os.cpu_count() >= allowed
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.available_processors() == 1


def test_more_bytes_than_one_call_takes(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS refuses a write of 2 GiB that Linux cuts short."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if len(data) > 1000:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr("bam_merge.merging.outputs.MOST_BYTES", 1000)
    assert folder_bytes(publish(plan, None, MergeOptions(verify=False))) == whole


# ---- names -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["n" * 255, "n" * 245, "é" * 127, "x" + "漢" * 84], ids=["255", "245", "two bytes each", "three bytes each"]
)
def test_a_target_whose_name_leaves_no_room_for_another(name: str, plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, whole = llamas / name, folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    with pytest.raises(Stop):
        publish(plan, target, MergeOptions(workers=1, progress=stop_after(20)))
    settings, said = options(resume=True)
    assert folder_bytes(publish(plan, target, settings)) == whole
    assert any(text.startswith("resuming") for text in said)
    assert folder_bytes(publish(plan, target, MergeOptions(force=True, verify=False))) == whole
    monkeypatch.setattr("bam_merge.verifying.report.Report.ok", property(lambda report: False))
    for _ in range(2):
        with pytest.raises(VerificationFailed):
            publish(plan, target, MergeOptions(force=True))
    failed = [entry for entry in os.listdir(llamas) if ".failed" in entry]
    assert sorted(entry[entry.index(".failed") :] for entry in failed) == [".failed", ".failed-2"]
    assert folder_bytes(target) == whole
    assert not [entry for entry in os.listdir(llamas) if entry.startswith(".")]


def test_long_names_that_begin_alike_stay_apart() -> None:
    names = [paths.beside("n" * 250 + end, ".", ".bam-merge") for end in ("a", "b", "")]
    assert len(set(names)) == 3 and all(len(name) == 255 and name.endswith(".bam-merge") for name in names)
    assert paths.beside("n" * 244, ".", ".bam-merge") == f".{'n' * 244}.bam-merge"


@pytest.mark.parametrize("parent", ["", "new"])
def test_a_target_with_too_long_a_name_is_told_before_anything_is_made(parent: str, plan: Plan, llamas: Path) -> None:
    written: list[int] = []
    with pytest.raises(OutputError, match="File name too long"):
        publish(plan, llamas / parent / ("n" * 256), MergeOptions(progress=written.append))
    assert written == [] and not [entry for entry in os.listdir(llamas / parent) if entry.startswith((".", "n" * 9))]


# ---- file systems that do not tell case apart --------------------------------------------------------------------------------


@pytest.fixture
def caseless(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`SEED` and `se\u0301ed` find `seed` and `séed`, as another spelling finds a folder on macOS; they are not listed, and have identities of their own."""
    (llamas / "seed").rename(llamas / "s\u00e9ed")
    (llamas / "seed").symlink_to("s\u00e9ed")
    aliases = {"S\u00c9ED", "se\u0301ed"}
    for alias in aliases:
        shutil.copytree(llamas / "s\u00e9ed", llamas / alias)
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *where: [name for name in real(*where) if name not in aliases])
    return llamas


@pytest.mark.parametrize("alias", ["S\u00c9ED", "se\u0301ed"], ids=["case", "normal form"])
@pytest.mark.parametrize("below", ["", "out"])
def test_a_source_by_another_spelling_is_no_target(alias: str, below: str, plan: Plan, caseless: Path) -> None:
    problems = destination.preflight(plan, caseless / alias / below, force=True)
    what = "is inside" if below else "is, or holds,"
    assert len(problems) == 1 and f"{what} sources.seed" in problems[0]


def test_folders_that_differ_in_case_are_two_where_case_counts(plan: Plan, llamas: Path) -> None:
    (llamas / "Seed").mkdir()
    assert destination.preflight(plan, llamas / "Seed", force=True) == []
    assert destination.preflight(plan, llamas / "SEED", force=True) == []
    for name in ("out", "OUT"):
        publish(plan, llamas / name, MergeOptions(verify=False))
    assert folder_bytes(llamas / "out") == folder_bytes(llamas / "OUT")


def test_a_companion_of_a_folder_that_is_spelled_otherwise_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS tells the path of an open file as it is on the disk, whatever the user typed."""
    (tmp_path / "Model").mkdir()
    (tmp_path / "Model" / "vocab.txt").write_text("a\n")
    (tmp_path / "other.txt").write_text("b\n")
    (tmp_path / "Model" / "merges.txt").symlink_to("../other.txt")
    (tmp_path / "MODEL").symlink_to("Model")
    real = system.path_of
    monkeypatch.setattr(companions, "path_of", lambda descriptor: (real(descriptor) or "").replace("/Model", "/MODEL"))
    monkeypatch.setattr(os.path, "realpath", lambda path, **options: os.path.abspath(path))  # which knows nothing of spelling
    assert companions.read_companion(tmp_path / "Model" / "vocab.txt") == b"a\n"
    with pytest.raises(bam_merge.BamMergeError, match="leads out of the model's folder"):
        companions.read_companion(tmp_path / "Model" / "merges.txt")


# ---- memory ------------------------------------------------------------------------------------------------------------------

HOLES = """
import sys
from bam_merge import system
asked = system.give_back_from(2**21) if sys.argv[1] == "asked" else None
large = [bytearray(2**22) for _ in range(4)]
del large  # from now on glibc cuts such pieces out of what it holds
large, between = [], []
for _ in range(32):
    large.append(bytearray(2**22))
    between.append([bytearray(2**16) for _ in range(4)])
del large
with open("/proc/self/status") as stream:
    kilobytes = next(int(line.split()[1]) for line in stream if line.startswith("RssAnon"))
print(asked, kilobytes * 1024)
"""


def held_after(how: str) -> tuple[str, int]:
    """What the call said, and the bytes of a process that has freed 32 pieces of 4 MiB, between which it holds small ones."""
    child = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True)
    asked, held = child.stdout.split()
    return asked, int(held)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library cannot be asked")
def test_memory_that_is_free_goes_back() -> None:
    asked, kept = held_after("asked")
    assert asked == "True"
    assert kept < held_after("not asked")[1] - 32 * 2**21


def test_a_library_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: object())
    assert system.give_back_from(2**20) is False
