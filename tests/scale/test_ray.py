"""Parts as tasks of Ray: the bytes of one process, though a node or the driver is killed. `make test-scale`; what is "sampled" needs under two
minutes in all, and `make check` runs it.
"""

import filecmp
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from damage import as_in_a_terminal, edit_tensors
from runs import RECIPES, folder_bytes, small_scene
from web_server import serving_web

from bam_merge import MergeOptions, merge
from bam_merge.recipe.load import load_recipe

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'bam-merge[ray]'")
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "0",  # servers of the tests are asked, and a hub that is not there
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
ENVIRONMENT["PYTHONPATH"] = str(Path(__file__).parents[2])
SLOW = {**CONFIGS["llama"], "num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 160, "vocab_size": 512}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of which a TIES merge takes some seconds."""
    folder = tmp_path_factory.mktemp("scene")
    write_sources(folder, SLOW)
    return folder


class Cluster:
    """Nodes of one processor each, started by two_nodes.py."""

    def __init__(self, nodes: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("two_nodes.py")), str(nodes)]
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.address = next((line.strip() for line in self.process.stdout if line.startswith("127.0.0.1:")), "")
        assert self.address, "the cluster did not start on 127.0.0.1"

    def kill(self, node: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"kill {node}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "killed\n"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def cluster(nodes: int = 2) -> Iterator[Cluster]:
    found = Cluster(nodes)
    try:
        yield found
    finally:
        found.end()


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with cluster() as found:
        yield found


def driver(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bam_merge", *map(str, arguments), "--progress", "json"]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    )


def run(*arguments: object) -> tuple[int, str, str]:
    child = driver(*arguments)
    out, err = child.communicate(timeout=300)
    assert "Traceback" not in err, err
    return child.returncode, out, err


def whole(recipe: Path) -> dict[str, bytes]:
    return folder_bytes(merge(load_recipe(recipe), recipe.parent / "whole", MergeOptions(force=True, verify=False)))


def ties(folder: Path, name: str) -> Path:
    recipe = write_recipe(
        folder, "shared: {make: ties, base: seed, density: 0.5}", "merge", output=f"{{path: {name}, max_shard_size: 400kB}}"
    )
    return recipe.rename(folder / f"{name}.yaml")


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until and child.poll() is None, child.communicate()
        time.sleep(0.02)


def running(title: str) -> list[str]:
    """Processes whose command begins so, as a worker of Ray calls itself by its task; idle ones do not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().startswith(title.encode()):
                found.append(path.parent.name)
    return found


def tensors_done(folder: Path, name: str) -> int:
    return sum(path.read_bytes().count(b'"digest"') for path in (folder / f".{name}.bam-merge" / "parts").glob("*.journal"))


# ---- in words ----------------------------------------------------------------------------------------------------------------


def test_where_ray_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    call = request.getfixturevalue("run")
    write_sources(tmp_path, CONFIGS["llama"])
    monkeypatch.setitem(sys.modules, "ray", None)
    result = call(write_recipe(tmp_path), "--ray")
    assert result.status == 2
    assert "--ray needs Ray, which could not be imported" in result.err and "pip install 'bam-merge[ray]'" in result.err
    assert not (tmp_path / ".out.bam-merge").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ray", "--part", "1/2"], "--part makes one part, and --ray all of them"),
        (["--parts", "2"], "--parts is how many parts --ray makes"),
        (["--ray", "other.yaml"], "that is a recipe, and no address of a cluster"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], said: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue("run")("merge", tmp_path / "recipe.yaml", *arguments)
    assert result.status == 2 and said in result.err


def test_an_address_where_nothing_answers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Said at once: Ray would try for many minutes."""
    write_sources(tmp_path, CONFIGS["llama"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    result = request.getfixturevalue("run")(write_recipe(tmp_path), "--ray", f"127.0.0.1:{port}")
    assert result.status == 2 and f"--ray: nothing answers at 127.0.0.1:{port}: Connection refused" in result.err
    assert time.monotonic() - began < 30


# ---- on two nodes ------------------------------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.scale
@pytest.mark.sampled
def test_a_cluster_of_this_machine(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    recipe = write_recipe(tmp_path, output="{path: out, max_shard_size: 60kB}")
    status, out, err = run(recipe, "--ray", "--parts", 3, "--workers", 1)
    assert status == 0, err
    assert "3 parts on Ray" in err and "verified: " in out
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    merging = [line for line in lines if line["stage"] == "merging"]
    assert merging[-1]["done"] == merging[-1]["total"] > 0
    assert folder_bytes(tmp_path / "out") == whole(recipe)
    again, _, err = run(recipe, "--ray")
    assert again == 0 and "is already finished" in err


@needs_ray
@pytest.mark.scale
@pytest.mark.parametrize("method", [pytest.param("bam", marks=pytest.mark.sampled), "btx", "ties"])
def test_two_nodes(two_nodes: Cluster, scene: Path, method: str) -> None:
    name = f"two_{method}"
    if method == "ties":
        recipe = ties(scene, name)
    else:
        recipe = write_recipe(scene, "", method, output=f"{{path: {name}, max_shard_size: 400kB}}").rename(scene / f"{name}.yaml")
    status, out, err = run(recipe, "--ray", two_nodes.address)
    assert status == 0, err
    assert "4 parts on Ray, 2 at once, 1 worker each" in err and "verified: " in out
    assert folder_bytes(scene / name) == whole(recipe)


@needs_ray
@pytest.mark.scale
def test_a_task_that_sees_other_sources_or_is_refused_is_said_once(two_nodes: Cluster, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    recipe = write_recipe(tmp_path, output="{path: out, max_shard_size: 60kB}")
    for part in ("1/3", "2/3"):
        assert run(recipe, "--part", part)[0] == 0
    os.utime(tmp_path / "code" / "model.safetensors", ns=(1, 10**18))
    status, _, err = run(recipe, "--ray", two_nodes.address)
    assert status == 2
    assert "sources.code: model.safetensors was changed at another time" in err
    assert not (tmp_path / "out").exists()


@needs_ray
@pytest.mark.scale
def test_sources_of_the_web(two_nodes: Cluster, tmp_path: Path) -> None:
    """Each task asks for the ranges that it needs; a part of another state of a source is refused, whichever task begins first."""
    write_sources(tmp_path, CONFIGS["llama"])
    with serving_web() as web:
        places = {name: web.put(name, tmp_path / name) for name in SOURCES}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({"method": "bam", "sources": places, "output": {"path": "out", "max_shard_size": "60kB"}}))
        assert run(recipe, "--output", tmp_path / "whole")[0] == 0
        status, out, err = run(recipe, "--output", tmp_path / "on_ray", "--ray", two_nodes.address, "--parts", 3)
        assert status == 0, err
        assert "3 parts on Ray" in err and "verified: " in out and "verified here" not in err
        assert folder_bytes(tmp_path / "on_ray") == folder_bytes(tmp_path / "whole")
        assert run(recipe, "--part", "1/3")[0] == 0
        edit_tensors(tmp_path / "law", lambda tensors: tensors["model.norm.weight"].add_(1))
        web.put("law", tmp_path / "law")
        status, _, err = run(recipe, "--ray", two_nodes.address)
        assert status == 2 and err.count("error: ") == 1, err
        assert "part 1/3 in " in err and "was made of other source files: sources.law: model.safetensors had 74,416 bytes" in err, err
        assert not (tmp_path / "out").exists()


@needs_ray
@pytest.mark.scale
def test_more_than_a_node_has(two_nodes: Cluster, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    status, _, err = run(write_recipe(tmp_path), "--ray", two_nodes.address, "--workers", 3)
    assert status == 2 and "the largest node of the cluster has 1 processor, and a part is to have 3" in err


@needs_ray
@pytest.mark.scale
@pytest.mark.sampled
def test_a_node_killed_in_mid_run(scene: Path) -> None:
    recipe = ties(scene, "node")
    with cluster() as nodes:
        child = driver(recipe, "--ray", nodes.address, "--parts", 6)
        wait_for(lambda: tensors_done(scene, "node") >= 5, child)
        nodes.kill(1)
        out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert "verified: " in out
    assert folder_bytes(scene / "node") == whole(recipe)
    assert not (scene / ".node.bam-merge").exists()


@needs_ray
@pytest.mark.scale
@pytest.mark.parametrize("after", [pytest.param(5, marks=pytest.mark.sampled), 1, 8, 12, 20])
@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.sampled), signal.SIGTERM, signal.SIGINT])
def test_the_driver_killed_in_mid_run_and_run_again(two_nodes: Cluster, scene: Path, number: signal.Signals, after: int) -> None:
    """At several moments: Ray itself fails where it is asked to stop a task just as that ends."""
    name = f"driver{number.value}after{after}"
    recipe = ties(scene, name)
    child = driver(recipe, "--ray", two_nodes.address, "--parts", 6)
    wait_for(lambda: tensors_done(scene, name) >= after, child)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
    assert "Traceback" not in err, err
    assert not (scene / name).exists()
    until = time.monotonic() + 30
    while running("ray::run_part"):
        assert time.monotonic() < until, "the tasks of a driver that is gone go on"
        time.sleep(0.1)
    status, _, err = run(recipe, "--ray", two_nodes.address, "--resume")
    assert status == 0, err
    assert "6 parts on Ray" in err and "resuming: " in err
    assert folder_bytes(scene / name) == whole(recipe)


@needs_ray
@pytest.mark.scale
def test_a_node_killed_while_it_is_verified(scene: Path) -> None:
    """Its tasks go to the other one, or to the driver; the answer is the same."""
    recipe = ties(scene, "proof")
    with cluster() as nodes:
        child = driver(recipe, "--ray", nodes.address, "--parts", 6)
        wait_for(lambda: (scene / ".proof.bam-merge" / "output" / "bam_merge.json").exists(), child)
        nodes.kill(0)
        out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert "verified: " in out
    assert folder_bytes(scene / "proof") == whole(recipe)


@needs_ray
@pytest.mark.scale
def test_a_part_by_hand_at_once_with_its_task(two_nodes: Cluster, scene: Path) -> None:
    recipe = ties(scene, "hand")
    child = driver(recipe, "--ray", two_nodes.address, "--parts", 4)
    wait_for(lambda: tensors_done(scene, "hand") >= 1, child)
    for number in (1, 2, 3, 4):
        status, _, err = run(recipe, "--part", f"{number}/4", "--no-verify")
        assert status in (0, 4), err
        assert status == 0 or "is being written by " in err or "is being finished by " in err, err
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert "verified: " in out and folder_bytes(scene / "hand") == whole(recipe)


@needs_ray
@pytest.mark.scale
def test_parts_made_by_hand_and_one_forgotten(two_nodes: Cluster, scene: Path) -> None:
    recipe = ties(scene, "forgotten")
    for number in (1, 3):
        assert run(recipe, "--part", f"{number}/3")[0] == 0
    status, _, err = run("finish", recipe)
    assert status == 4 and f"It is made by: bam-merge {recipe} --part 2/3" in err
    status, _, err = run(recipe, "--ray", two_nodes.address)
    assert status == 0, err
    assert "3 parts on Ray" in err
    assert folder_bytes(scene / "forgotten") == whole(recipe)


@needs_ray
@pytest.mark.scale
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_on_two_nodes(two_nodes: Cluster, path: Path, tmp_path: Path) -> None:
    copy = small_scene(path, tmp_path)
    output = load_recipe(copy).output.path
    expected = folder_bytes(merge(load_recipe(copy), tmp_path / "whole", MergeOptions(verify=False)))
    status, out, err = run(copy, "--ray", two_nodes.address, "--parts", 2)
    assert status == 0, err
    assert "verified: " in out and "verified here" not in err
    assert folder_bytes((copy.parent / output).resolve()) == expected


# ---- at the size of a billion parameters ---------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.scale
def test_four_models_of_a_billion_parameters_a_node_killed_and_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight files: the bytes of one process. The models are smaller where disk and memory have no room for 1.1 billion (26 GB)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from workload import NAMES, btx_recipe, default_scale, scaled, write_models

    scale = default_scale(tmp_path)
    sources = write_models(tmp_path / "models", scaled(scale), NAMES, sparse=False)
    size = {1.0: "900MB"}.get(scale, f"{int(900 * scale)}MB")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**btx_recipe(sources), "output": {"path": "out", "layout": "mixtral", "max_shard_size": size}}))
    with cluster() as nodes:
        child = driver(recipe, "--ray", nodes.address, "--parts", 8)
        wait_for(lambda: tensors_done(tmp_path, "out") >= 20, child)
        child.kill()
        child.communicate()
        assert not (tmp_path / "out").exists()
        child = driver(recipe, "--ray", nodes.address, "--resume")
        wait_for(lambda: tensors_done(tmp_path, "out") >= 60, child)
        nodes.kill(1)
        out, err = child.communicate(timeout=1200)
    assert child.returncode == 0, err
    assert "8 parts on Ray" in err and "verified: " in out
    assert not (tmp_path / ".out.bam-merge").exists()
    merge(load_recipe(recipe), tmp_path / "whole", MergeOptions(verify=False))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all(filecmp.cmp(tmp_path / "out" / name, tmp_path / "whole" / name, shallow=False) for name in names)
    shutil.rmtree(tmp_path)


@needs_ray
@pytest.mark.scale
def test_nothing_listens_but_on_127_0_0_1(two_nodes: Cluster) -> None:
    assert listening(two_nodes.process.pid) <= {"127.0.0.1"}


def listening(parent: int) -> set[str]:
    """The addresses on which a process and its descendants listen, as /proc has them."""
    of: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            of[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {parent}
    while more := {child for child, above in of.items() if above in family} - family:
        family |= more
    inodes = set()
    for process in family:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    found: set[Any] = set()
    for table, family_of in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = b"".join(raw[place : place + 4][::-1] for place in range(0, len(raw), 4))
                found.add(socket.inet_ntop(family_of, words).removeprefix("::ffff:"))
    assert found, "nothing listens at all"
    return found
