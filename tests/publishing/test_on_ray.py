"""What the driver of --ray does with its tasks, by a stand-in for Ray that runs each where it is asked for. The real one: tests/scale."""

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import write_recipe
from runs import folder_bytes, options
from test_part_proofs import METHODS, SMALL, count_of_compared, document, finished, flip, victims, wrong_byte

from bam_merge.errors import OutputError, VerificationFailed
from bam_merge.merging.tensor import TensorWriter
from bam_merge.planning.make import plan_file
from bam_merge.planning.parts import parts_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing.on_ray import OnRay, merge_on_ray
from bam_merge.publishing.parts import make_part
from bam_merge.publishing.publish import publish
from bam_merge.publishing.ray_tasks import orders, prove
from bam_merge.verifying import computed, stored
from bam_merge.verifying.report import Report

TWO = OnRay(parts=2, workers=1)


class RayError(Exception):
    """What Ray raises of a task."""


class StandIn(ModuleType):
    """As much of Ray as a merge asks for. Orders and answers are pickled; `before` hears of each task before it runs."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.before: Callable[[str, Any], None] = lambda body, order: None
        self.ran: list[tuple[str, str]] = []
        self.here = False

    def init(self, **settings: Any) -> None:
        self.here = True

    def shutdown(self) -> None:
        self.here = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0, "memory": 2e9}}] * 2

    def remote(self, body: Callable[[Any], Any]) -> Any:
        assert self.here

        def run(order: Any) -> list[Any]:
            order = pickle.loads(pickle.dumps(order))
            self.ran.append((body.__name__, str(order)))
            try:
                self.before(body.__name__, order)
                return [pickle.dumps(body(order))]
            except RayError as error:
                return [error]

        reference = lambda order: Reference(run(order))  # noqa: E731
        return SimpleNamespace(options=lambda **needs: SimpleNamespace(remote=reference))

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        if isinstance(reference.answer, Exception):
            raise reference.answer
        return pickle.loads(reference.answer)

    def cancel(self, reference: Any) -> None:
        pass


class Reference:
    def __init__(self, answers: list[Any]) -> None:
        self.answer = answers[0]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setitem(sys.modules, "ray", found)
    return found


@pytest.fixture
def plan(llamas: Path) -> Plan:
    return plan_file(write_recipe(llamas, "", "btx", output=SMALL))


def on_ray(plan: Plan, level: str = "quick", **settings: Any) -> tuple[Report, list[str]]:
    found: list[Report] = []
    said: list[str] = []
    merge_on_ray(plan, None, replace(options()[0], verify=level, on_report=found.append, notify=said.append, **settings), TWO)  # type: ignore[arg-type]
    return found[0], said


@pytest.mark.parametrize(("method", "level"), [*((name, "quick") for name in METHODS), ("btx", "full")])
def test_the_report_is_that_of_one_process(method: str, level: str, ray: StandIn, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, sources and layers are looked at by tasks, and by nobody else."""
    keys, name = METHODS[method]
    plan = plan_file(write_recipe(llamas, keys, name, output=SMALL))
    reports: list[Report] = []
    publish(plan, None, replace(options()[0], verify=level, on_report=reports.append))  # type: ignore[arg-type]
    whole = (llamas / "out").rename(llamas / "whole")
    seen = count_of_compared(monkeypatch)
    layers: list[int] = []
    measured = computed._Layer.found

    def counted(self: Any, *arguments: Any) -> Any:
        layers.append(self.layer)
        return measured(self, *arguments)

    monkeypatch.setattr(computed._Layer, "found", counted)
    read: list[str] = []
    digest = stored.digest_range

    def digested(path: Path, *where: Any) -> str:
        read.append(path.name)
        return digest(path, *where)

    monkeypatch.setattr(stored, "digest_range", digested)
    told: list[tuple[int, int]] = []
    report, _ = on_ray(plan, level, on_verify=lambda done, total: told.append((done, total)))
    assert document(report) == document(reports[0])
    assert folder_bytes(llamas / "out") == folder_bytes(whole)
    assert sorted(seen) == sorted(step.name for step in plan.steps)
    assert read == []  # all digests are the tasks'
    kinds = [body for body, _ in ray.ran]
    assert kinds.count("run_part") == 2
    alone = 2 if plan.layout.kind == "mixture" and level == "quick" else 0
    assert kinds.count("prove") == 2 + alone
    assert sorted(layers) == ([0, 1] if plan.layout.kind == "mixture" else [])
    shares = [done / total for done, total in told]
    assert shares == sorted(shares) and shares[-1] == 1


def test_a_wrong_byte_on_the_disk_is_caught_by_a_task_in_the_words_of_one_process(ray: StandIn, plan: Plan, llamas: Path) -> None:
    name = victims(plan)[0]

    def before(body: str, order: Any) -> None:
        if body == "prove" and len([one for one, _ in ray.ran if one == "prove"]) == 1:
            flip(plan, name, 1)

    ray.before = before
    with pytest.raises(VerificationFailed) as error:
        on_ray(plan)
    assert not (llamas / "out").exists()
    for number in (1, 2):
        make_part(plan, None, number, 2, options()[0])
    flip(plan, name, 1)
    expected = [f"{check.name}: {check.detail}" for check in finished(plan).failures]
    assert expected and list(error.value.problems[:-1]) == expected


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_sabotage_in_a_task_is_caught_in_the_words_of_one_process(
    kind: int, ray: StandIn, plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorWriter, "_emit", wrong_byte(victims(plan)[kind]))
    with pytest.raises(VerificationFailed) as whole:
        publish(plan, llamas / "whole", options(verify=True)[0])
    with pytest.raises(VerificationFailed) as error:
        on_ray(plan)
    assert error.value.problems[:-1] == whole.value.problems[:-1]
    assert not (llamas / "out").exists()


def test_what_a_task_cannot_prove_the_driver_does(ray: StandIn, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(body: str, order: Any) -> None:
        if body == "prove" and (order.layers or order.number == 2):
            raise RayError("the node died\nand more")

    ray.before = before
    seen = count_of_compared(monkeypatch)
    report, said = on_ray(plan)
    assert report.ok
    assert sorted(seen) == sorted(step.name for step in plan.steps)
    assert "part 2/2: verified here, since its task was not: part 2/2: Ray could not run it: the node died" in "\n".join(said)
    assert "layers 0: verified here" in "\n".join(said)


def test_a_host_that_sees_other_sources_proves_nothing(plan: Plan, llamas: Path) -> None:
    for number in (1, 2):
        make_part(plan, None, number, 2, options()[0])
    first, second = orders(plan, llamas / "out", parts_of(plan, 2), options()[0], "quick")
    sources = second.header["sources"]
    other = replace(second, header={**second.header, "sources": {**sources, "law": {**sources["law"], "model.safetensors": [1, 2, "3"]}}})
    assert set(prove(first)["found"].compared) == {step.name for step in plan.steps if step.file in parts_of(plan, 2)[0].files}
    for order in (other, replace(other, layers=(0,))):
        found = prove(order)
        assert found["error"] == "OutputError" and "found" not in found
        assert "does not see what the driver sees, whose plan was made of other source files: sources.law: " in found["problems"][0]


def test_other_sources_of_a_task_end_the_run(ray: StandIn, plan: Plan, llamas: Path) -> None:
    path = llamas / "law" / "model.safetensors"
    ray.before = lambda body, order: os.utime(path, ns=(1, 10**18))
    with pytest.raises(
        OutputError, match=r"part 1/2: host .* does not see what the driver sees, whose plan was made of other source files"
    ):
        on_ray(plan)
    assert not (llamas / "out").exists()


def test_parts_made_by_part_are_taken_over_and_proved_by_tasks(ray: StandIn, plan: Plan, llamas: Path) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    made = make_part(plan, None, 1, 2, options(verify=True)[0])
    assert made is not None
    written: list[int] = []
    report, _ = on_ray(plan, progress=written.append)
    assert report.ok and folder_bytes(llamas / "out") == whole
    assert [body for body, _ in ray.ran].count("prove") == 2 + 2
    assert sum(written) <= sum(part.nbytes for part in parts_of(plan, 2))
    assert not (llamas / ".out.bam-merge").exists()


def test_without_verification_no_task_proves(ray: StandIn, llamas: Path) -> None:
    plan = plan_file(write_recipe(llamas, "", "btx", output=SMALL))
    merge_on_ray(plan, None, options()[0], TWO)
    assert {body for body, _ in ray.ran} == {"run_part"}
