"""The benchmark suite: every contender is right, a wrong one gets no figure, the whole runs and writes its report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import errors, limits, measure, memory, peers, report, workloads  # noqa: E402
from benchmarks.contender import OURS, SCALE, Contender, Prepared  # noqa: E402
from benchmarks.measure import Comparison  # noqa: E402
from benchmarks.problems import balanced_problems, plan_error, token_problems  # noqa: E402
from benchmarks.work import iteration_work  # noqa: E402
from benchmarks.workloads import BY_NAME, WORKLOADS, Workload  # noqa: E402
from pisces_kernels import sinkhorn  # noqa: E402


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile does nothing here: compiling takes minutes and is the compiler's business."""
    monkeypatch.setattr(peers, "compiled", lambda function: function)


def without_optional(workload: Workload) -> tuple[str, ...]:
    """Contenders that the test extra is enough for."""
    words = ("OTT", "KeOps")
    return tuple(c.name for c in workload.contenders if not any(word in c.name for word in words))


def worse(value: Any, amount: float) -> Any:
    """A result with one entry of every floating tensor in it off by a share of the largest."""
    if isinstance(value, tuple):
        return tuple(worse(part, amount) for part in value)
    broken = value.clone()
    broken.view(-1)[broken.numel() // 2] += amount * broken.abs().max()
    return broken


def breaking(contender: Contender, spoil: Any) -> Contender:
    """The contender with a spoilt result."""

    def prepare(problem: Any) -> Prepared:
        inner = contender.prepare(problem)
        return Prepared(inner.call, lambda value: spoil(inner.result(value)))

    return dataclasses.replace(contender, prepare=prepare)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_every_contender_is_right_and_has_a_figure(workload: Workload) -> None:
    comparison = Comparison(workload, smoke=True, only=without_optional(workload))
    comparison.run(1)
    record = comparison.finish()
    assert record["contenders"][0]["family"] == OURS
    for contender in record["contenders"]:
        if contender["name"] == "geomloss":  # anneals: 100 of its iterations are not 100 iterations at epsilon
            assert contender["status"] in ("ok", "wrong")
            continue
        assert contender["status"] == "ok", contender
        assert contender["median"] > 0
        assert contender["family"] == SCALE or contender["error"] <= record["tolerance"] * 1.01


NAN = ("official_100", "cloud_4096", "cost", "cost_backward", "attention_backward", "backward_implicit")


@pytest.mark.parametrize(
    ("name", "amount"), [*((w.name, 0.5) for w in WORKLOADS), *((name, math.nan) for name in NAN)], ids=str
)
def test_a_broken_kernel_gets_no_figure(name: str, amount: float) -> None:
    workload = BY_NAME[name]
    ours, *others = workload.contenders
    torch_peer = next(c for c in others if c.name in without_optional(workload))
    broken = dataclasses.replace(workload, contenders=(breaking(ours, lambda v: worse(v, amount)), torch_peer))
    comparison = Comparison(broken, smoke=True)
    comparison.run(1)
    record = comparison.finish()
    got, peer = record["contenders"]
    assert got["status"] == "wrong"
    assert "median" not in got
    assert "seconds" not in got
    assert peer["status"] == "ok"
    text = "\n".join([*report.summary({"workloads": [record], "smoke": False}), *report.details(record)])
    assert f"wrong (error {got['error']:.1e})" in text
    first_row = next(line for line in report.details(record) if line.startswith(f"| {ours.name} "))
    assert " ms" not in first_row
    assert " us" not in first_row
    assert "met" not in text.replace("method", "")


def test_a_kernel_that_breaks_during_the_run_loses_its_figures() -> None:
    calls = 0

    def spoil(plan: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return plan if calls == 1 else worse(plan, 0.5)

    workload = BY_NAME["official_100"]
    ours = breaking(workload.contenders[0], spoil)
    comparison = Comparison(dataclasses.replace(workload, contenders=(ours,)), smoke=True)
    comparison.run(2)
    assert len(comparison.entries[0].seconds) == 2
    (got,) = comparison.finish()["contenders"]
    assert got["status"] == "wrong"
    assert "median" not in got


def test_a_broken_peer_is_never_the_best_one() -> None:
    def contender(name: str, status: str, median: float) -> dict[str, Any]:
        family = OURS if name == "ours" else "torch"
        out = {"name": name, "family": family, "status": status, "reason": "", "error": 1.0, "log_domain": False}
        return out | ({"median": median} if status == "ok" else {})

    record = {
        "name": "video_128",
        "contenders": [contender("ours", "ok", 1.0), contender("fast", "wrong", 0.1), contender("slow", "ok", 9.0)],
    }
    assert report.best(record)["name"] == "slow"
    assert report.verdicts(record) == ["9x best peer (slow); target 3.5x (stretch 5x): met"]
    record["contenders"][2]["median"] = 1.75
    assert report.verdicts(record) == ["1.75x best peer (slow); target 3.5x (stretch 5x): missed by 50 %"]
    record["threads"] = {"one": 2e-3, "two": 1e-3, "speedup": 2.0}
    assert report.verdicts(record)[1] == "two threads 2.00x; target 1.8x: met"
    record["contenders"].pop()
    assert "none of them ran" in report.verdicts(record)[0]


def test_memory_targets_are_judged() -> None:
    def contender(name: str, memory: float) -> dict[str, Any]:
        return {
            "name": name, "family": OURS if name.startswith("ours") else "torch", "status": "ok", "reason": "",
            "error": 0.0, "log_domain": False, "median": 1e-4, "memory": memory,
        }  # fmt: skip

    record = {"name": "backward_implicit", "contenders": [contender("ours, implicit", 2e6)]}
    record["contenders"].append(contender("autograd, torch", 5e8))
    assert report.other_verdicts(record) == ["memory 250x less than autograd, torch; target 100x: met"]
    record = {"name": "attention_backward", "result_bytes": 10, "contenders": [contender("ours", 14.0)]}
    assert report.other_verdicts(record) == ["memory 1.40x of the result; target 1.3x: missed"]


def test_a_missing_library_is_skipped_with_its_reason() -> None:
    def prepare(problem: Any) -> Prepared:
        import a_library_that_nobody_has  # noqa: F401

        raise AssertionError

    workload = BY_NAME["official_100"]
    contenders = (workload.contenders[0], Contender("absent", "library", prepare))
    record = Comparison(dataclasses.replace(workload, contenders=contenders), smoke=True).finish()
    assert record["contenders"][1]["status"] == "skipped"
    assert "a_library_that_nobody_has" in report.figure(record["contenders"][1])


def test_truths_agree_with_pot_in_float64(seed: int) -> None:
    for problem in (
        token_problems(2, 9, 2, dim=16, patches=16, seed=seed),
        balanced_problems(2, 23, epsilon=0.05, seed=seed),
    ):
        assert problem.agreement_with_pot() < 1e-7, seed
        shifted = problem.truth() * 1.001
        assert plan_error(shifted, problem.truth()) == pytest.approx(5e-4, rel=1e-6)


def test_exact_iterations_are_those_of_the_reference() -> None:
    for problem in (workloads.official(True), workloads.square(True, 0.01)):
        options = {"epsilon": problem.epsilon, "tau": problem.tau, "backend": "reference"}
        for stop in ({"max_iters": 7, "tol": 0.0}, {"max_iters": 1000, "tol": 1e-3}):
            want = sinkhorn(problem.cost.double(), **options, **stop)
            got = errors.plain_iteration(problem, stop["max_iters"], stop["tol"])
            if stop["tol"]:  # all problems go on until the last has stopped
                want = sinkhorn(problem.cost.double(), **options, max_iters=int(want.n_iters.max()), tol=0.0)
            assert plan_error(got, problem.plan_from(want.f, want.g)) < 1e-11


def test_turns_rotate_and_slow_contenders_run_at_least_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0.0)
    workload = BY_NAME["official_100"]
    comparison = Comparison(workload, smoke=True, only=("ours", "torch exp-free, mv", "POT kernel", "official loop"))
    firsts = [comparison.others()[0].contender.name for _ in range(3)]
    assert sorted(firsts) == sorted(("torch exp-free, mv", "POT kernel", "official loop"))
    comparison.run(5)
    assert [len(entry.seconds) for entry in comparison.entries] == [5, 3, 3, 3]


def test_fitted_iterations_are_the_fewest() -> None:
    comparison = Comparison(BY_NAME["official_tenth"], smoke=True, only=("ours", "torch exp-free, mv", "official loop"))
    for entry in comparison.entries[1:]:
        count = int(entry.effort.split()[0])
        fewer = entry.contender.prepare(dataclasses.replace(comparison.problem, n_iters=count - 1, tol=0.0))
        assert entry.error <= comparison.tolerance * 1.01
        assert comparison._error(fewer, fewer.call()) > comparison.tolerance


def test_limits_are_plausible() -> None:
    found = limits.measure()
    assert 1e9 < found["flops"] < 1e12
    assert 1e7 < found["exps"] < found["flops"]
    assert found["loads"]["L1"] > found["loads"]["RAM"] > 1e8
    assert found["how"]


def test_limits_without_a_compiler_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    found = limits.measure()
    assert "no C++ compiler" in found["how"]
    assert all(rate > 0 for rate in (found["flops"], found["exps"], *found["loads"].values()))


def test_shares_are_counted_from_the_formulas() -> None:
    problem = workloads.official(True)
    work = vars(iteration_work(problem, 10))
    assert work["flops"] == 40 * problem.cost.numel()
    rates = {"flops": 4e9, "exps": 1e9, "loads": {"L1": 8e9, "L2": 2e9, "L3": 1e9, "RAM": 1e9}}
    times = report.bound_times(work, rates)
    assert times["multiply-add"] == pytest.approx(10 * problem.cost.numel() / 1e9)
    assert max(times, key=times.__getitem__) == "loads from L2"


def test_memory_sees_what_a_call_allocates_and_not_its_inputs() -> None:
    if not memory.CLEAR.exists():
        assert memory.in_fresh_process("official_100", "ours")[0] is None
        return
    code = """
import json, torch
from benchmarks import memory
from benchmarks.contender import Contender, Prepared
class Work:
    make = staticmethod(lambda smoke: torch.ones(100 if smoke else 4_000_000))
def prepare(problem):
    return Prepared(lambda: torch.cat([problem, problem]).sum())
print(json.dumps(memory.peak(Work, Contender("x", "torch", prepare))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 31e6 < json.loads(done.stdout.splitlines()[-1]) < 40e6


def test_the_suite_runs_and_reports(tmp_path: Path, offline_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--no-memory", "--no-threads", "--output", str(tmp_path)]
    only = ["official_100", "attention_backward"]
    environment = {**offline_environment, "PYTHONPATH": os.pathsep.join([offline_environment["PYTHONPATH"], str(ROOT)])}
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark would measure nothing
    done = subprocess.run([*command, "--only", *only], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "benchmarks" / "results.json").read_text())
    assert [record["name"] for record in results["workloads"]] == only
    assert results["limits"]["flops"] > 0
    assert results["machine"]["cores"] >= 1
    text = (tmp_path / "benchmarks.md").read_text()
    assert "A smoke run" in text
    for record in results["workloads"]:
        assert record["title"] in text
        for contender in record["contenders"]:
            assert contender["status"] in ("ok", "skipped") or contender["name"] == "geomloss", contender
            assert contender["status"] != "ok" or contender["seconds"]
    for picture in ("m.svg", "b.svg", "frames.svg", "roofline.svg"):
        assert f"benchmarks/{picture}" in text
        assert (tmp_path / "benchmarks" / picture).read_text().startswith("<?xml")
