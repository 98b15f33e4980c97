"""The GPU's benchmark survives what goes wrong where nobody is there to mend it."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from app.errors import SettingsError
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import device, load, memory, parts, served
from benchmarks.gpu.bench import Bench, Found, Task, reason_of
from benchmarks.peers.load import LoadError
from benchmarks.peers.servers import PeerError
from benchmarks.survival.rows import Row
from benchmarks.survival.service import Service
from tests.bundles import make_bundle

TASK = Task("cpu", 1, math.inf)
ROW = vars(Row("a", 1.0, "", "", None))


def found(**fields):
    return {"skipped": "", "rows": [ROW], "evidence": {}, **fields}


def measured(perform, names=tuple(parts.PARTS), budget_s=math.inf):
    return dict(gpu.measured(names, TASK, budget_s, perform))


def raises(bench):
    bench.finding.told("before", 1)
    raise SettingsError("device is cuda, but no such device is usable.")


def dies(bench):
    bench.finding.told("before", 1)
    os._exit(7)


def hangs(bench):
    bench.finding.told("before", 1)
    time.sleep(600)


def test_a_part_that_raises_leaves_the_others(tmp_path):
    def perform(part, name, task):
        if name == "ceiling":
            raise RuntimeError("a sticky error")
        return found()

    entries = measured(perform)
    assert list(entries) == ["ceiling", "answers", "photos", "tensors", "one", "options", "memory", "peers"]
    assert entries.pop("ceiling")["skipped"] == "RuntimeError: a sticky error"
    assert all(entry["rows"] == [ROW] and not entry["skipped"] for entry in entries.values())


@pytest.mark.parametrize(
    "error", [ValueError("x"), subprocess.TimeoutExpired("wrk", 3), SettingsError("y."), KeyError()]
)
def test_whatever_a_part_raises_is_what_it_found(tmp_path, error):
    def measure(bench):
        bench.finding.told("before", 2.5, "images/s")
        raise error

    parts.perform(parts.Part(measure, 0), "one", TASK, tmp_path / "found.json")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["skipped"] == reason_of(error)
    assert [row["figure"] for row in kept["rows"]] == ["before"]
    assert "in measure" in "".join(kept["evidence"]["where"]), "nobody can look at the machine again"


@pytest.mark.parametrize(
    ("measure", "why"), [(raises, "no such device is usable"), (dies, "Its process ended with 7.")]
)
def test_a_part_that_takes_its_process_along_keeps_what_it_had_found(measure, why):
    kept = parts.perform_apart(parts.Part(measure, 0), "one", replace(TASK, limit_s=60))
    assert why in kept["skipped"]
    assert [row["figure"] for row in kept["rows"]] == ["before"]


def test_a_part_that_hangs_is_ended():
    kept = parts.perform_apart(parts.Part(hangs, 0), "one", replace(TASK, limit_s=2))
    assert kept["skipped"] == "It was ended after 2 s."


def test_the_budget_skips_what_does_not_fit_and_says_so():
    done = {}

    def perform(part, name, task):
        done[name] = task.limit_s
        return found()

    budget_s = parts.PARTS["photos"].cost_s(1)
    entries = measured(perform, ("ceiling", "photos", "memory"), budget_s + 0.5)
    assert set(done) == {"bundles", "photos"}
    assert done["photos"] == pytest.approx(budget_s + 0.5, abs=0.4)
    assert f"about {parts.PARTS['ceiling'].cost_s(1):.0f} s" in entries["ceiling"]["skipped"]
    assert "budget" in entries["memory"]["skipped"] and not entries["photos"]["skipped"]


def test_what_hangs_does_not_take_the_time_of_others():
    cost = parts.PARTS["one"].cost_s(3)
    assert parts.limit_s("one", parts.PARTS["one"], 3, math.inf) == 3 * cost
    assert parts.limit_s("one", parts.PARTS["one"], 3, cost + 1) == cost + 1
    assert parts.limit_s("memory", parts.PARTS["memory"], 3, 200) == 200


def test_bundles_that_could_not_be_made_are_told_of_in_each_part():
    def perform(part, name, task):
        if name == "bundles":
            raise ModuleNotFoundError("No module named 'torch'")
        return found(evidence={}, skipped="No bundle could be made to measure with.")

    entries = measured(perform, ("ceiling", "one"))
    assert ["torch" in entry["evidence"]["bundles"]["skipped"] for entry in entries.values()] == [True, True]


def test_later_parts_know_the_bundles_and_the_ceiling():
    tasks = {}

    def perform(part, name, task):
        tasks[name] = task
        evidence = {"bundles": {"full": "/f", "half": "/h"}, "ceiling": {"best": {"resnet50": 9.0}}}
        return found(evidence=evidence.get(name, {}))

    measured(perform, ("ceiling", "photos"))
    assert (tasks["photos"].full, tasks["photos"].half) == (Path("/f"), Path("/h"))
    assert tasks["photos"].best == {"resnet50": 9.0}


def test_without_bundles_each_part_says_so(tmp_path):
    parts.perform(parts.PARTS["ceiling"], "ceiling", TASK, tmp_path / "found.json")
    assert "No bundle could be made" in json.loads((tmp_path / "found.json").read_text())["skipped"]


def test_one_part_leaves_the_others_figures(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text("{ half of it")
    gpu.keep(file, "one", found())
    gpu.keep(file, "ceiling", found())
    document = gpu.keep(file, "one", found(skipped="no such thing here"))
    assert list(document) == ["ceiling", "one"] == list(json.loads(file.read_text()))
    assert document["ceiling"]["rows"] == [ROW] and document["one"]["skipped"]


@pytest.mark.parametrize(
    "ceiling", [{}, {"ceiling": {**found(skipped="left out"), "device": "x"}}, {"ceiling": {**found(), "device": "x"}}]
)
def test_there_is_a_picture_without_a_ceiling(tmp_path, ceiling):
    served_row = vars(Row("requests a second", 5.0, "requests/s", "", None))
    gpu.picture({**ceiling, "photos": {**found(rows=[served_row]), "device": "x"}}, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_a_command_without_a_device_leaves_everything_out_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--budget", "0.01", "--output", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(gpu.measured, "__defaults__", (lambda part, name, task: found(),))
    monkeypatch.setattr(gpu, "end_servers_when_ended", lambda: None)
    assert gpu.main() == 1
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert list(kept) == list(parts.PARTS) and all("budget" in entry["skipped"] for entry in kept.values())
    assert "budget" in capsys.readouterr().out


@pytest.fixture
def bench(tmp_path):
    bundle = make_bundle(tmp_path / "models")
    return Bench(replace(TASK, full=bundle.directory), Found("part", tmp_path / "found.json"))


def test_a_size_and_a_provider_that_fail_leave_the_others(bench, monkeypatch):
    def resident(session, provider, rows, seconds):
        if rows == 4:
            raise RuntimeError("out of memory")
        return 10.0 * rows

    monkeypatch.setattr(device, "resident", resident)
    device.ceiling(bench)
    [rates] = bench.finding.evidence["images_per_s"].values()
    assert list(rates) == ["1", "2", "8", "16", "32", "64"]
    assert set(bench.finding.evidence["best"].values()) == {640.0}
    assert any("out of memory" in str(value) for value in bench.finding.evidence.values())


def test_a_case_that_fails_leaves_the_others(bench, monkeypatch):
    def case(bench, bundle, case):
        if case.gpu.graphs:
            raise NotImplementedError("a node is on the processor")
        return {str(rows): 10.0 * rows * case.sessions for rows in device.SIZES_OF_OPTIONS}, 1.0

    monkeypatch.setattr(device, "_case", case)
    device.options(bench)
    [recommended] = [value for key, value in bench.finding.evidence.items() if key.startswith("recommended")]
    assert recommended["sessions"].startswith("3 sessions (2 sessions ×2.00, 3 sessions ×3.00)")
    assert recommended["graphs"] == "off (not measured)" and recommended["search"].startswith("exhaustive")


def test_a_gain_at_one_size_that_is_a_loss_at_another_is_not_recommended():
    table = {"default": {"1": 100.0, "64": 100.0}, "NHWC": {"1": 90.0, "64": 200.0}, "TF32": {"1": 120.0, "64": 110.0}}
    recommended = device.recommended(table)
    assert recommended["nhwc"].startswith("off (NHWC ×1.34)")
    assert recommended["tf32"].startswith("TF32 (")
    assert "cannot" not in device.recommended({})["all"]


def test_real_sessions_run_on_threads_of_their_own(bench):
    bench.seconds = 0
    rates, _ = device._case(bench, bench.served, device.Case(2))
    assert set(rates) == {"1", "8"} and all(rate > 0 for rate in rates.values())


PEER_RUNTIME = """
__version__ = "1.31.1"
class SessionOptions: pass
def preload_dlls(): pass
class InferenceSession:
    def __init__(self, path, options, providers): pass
    def get_providers(self): return ["CPUExecutionProvider"]
    def run(self, names, fed): return [None]
"""


@pytest.mark.parametrize(("provider", "refused"), [("CUDAExecutionProvider", True), ("CPUExecutionProvider", False)])
def test_peers_that_silently_run_on_the_processor_are_left_out(bench, tmp_path, monkeypatch, provider, refused):
    """ONNX Runtime's wheel for processors takes any provider, and runs on the processor."""
    runner = tmp_path / "python"
    (tmp_path / "onnxruntime.py").write_text(PEER_RUNTIME)
    program = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, {str(served.RUNNERS)!r}); "
    runner.write_text(f"#!/bin/sh\nexec {sys.executable} -c \"{program}runpy.run_path('$1', run_name='__main__')\"\n")
    runner.chmod(0o755)
    with served.peers_told(provider):
        if refused:
            with pytest.raises(PeerError, match="gave a session in CPUExecutionProvider"):
                served.try_runner(runner, bench.served)
        else:
            served.try_runner(runner, bench.served)
    assert served.PROVIDER not in os.environ


def test_the_own_generator_says_what_was_wrong():
    good = load.Part(10.0, np.array([1.0, 3.0]), 0.4, "")
    assert load.joined([good, replace(good, busy_share=0.9)]) == load.Loaded(20.0, 1.0, 3.0, 0.9)
    with pytest.raises(LoadError, match="503"):
        load.joined([good, replace(good, fault="besides 2 right answers: {503: 1}")])
    with pytest.raises(LoadError, match="nothing was answered"):
        load.joined([replace(good, latency_ms=np.array([]))])


def test_a_load_that_ends_ends_the_watch(bench, monkeypatch):
    def refused(*_, **__):
        raise LoadError("of 9 answers 3 were not 200")

    monkeypatch.setattr(memory, "load", refused)
    with (
        pytest.raises(RuntimeError, match="3 were not 200"),
        memory.loaded(bench, SimpleNamespace(url="http://x")) as check,
    ):
        stop = time.monotonic() + 10
        while time.monotonic() < stop:
            check()
            time.sleep(0.01)


def looks(*sizes, calm=True):
    return [memory.Look((size, 10 * size), calm) for size in sizes]


def test_memory_is_compared_when_no_swap_is_under_way(bench):
    held = {0: looks(50, 60), 1: [*looks(300, calm=False), *looks(90, 100)], 2: [*looks(400, calm=False), *looks(103)]}
    memory._judge(bench, held, swaps=2, wanted=2, duration=60)
    rows = {row.figure: row for row in bench.finding.rows}
    assert rows["host: growth from swap 1 to swap 2"].value == 0.03
    assert rows["device: growth from swap 1 to swap 2"].value == 0.03
    assert rows["host: held at most, old and new"].value == 400 / 1e6


@pytest.mark.parametrize("swaps", [0, 1])
def test_swaps_that_were_not_made_are_a_miss_and_compare_nothing(bench, swaps):
    held = {0: looks(50), 1: looks(100, calm=bool(swaps))}
    memory._judge(bench, held, swaps, wanted=20, duration=600)
    assert [row.met for row in bench.finding.rows] == [None, False]
    assert "nothing to compare" in bench.finding.evidence["growth"]


def test_swaps_are_counted_by_what_the_service_says(tmp_path):
    log = tmp_path / "log"
    lines = [{"message": "model ready", "version": version} for version in ("1", "1", "2")]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"message": "listening"}]))
    assert memory.served_versions(Service(SimpleNamespace(pid=0), log)) == 2


def test_a_service_that_ends_while_it_is_asked_says_why(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text(json.dumps({"message": "listening", "url": "http://x"}) + "\nno CUDA here\n")
    ended = iter([None, 3])
    service = Service(SimpleNamespace(pid=0, poll=lambda: next(ended)), log)

    def ready():
        raise ConnectionResetError

    monkeypatch.setattr(service, "ready", ready)
    with pytest.raises(RuntimeError, match="no CUDA here"):
        service.wait_until_ready()


def test_a_service_whose_model_has_failed_is_not_waited_for(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text(json.dumps({"message": "listening", "url": "http://x"}) + "\n")
    service = Service(SimpleNamespace(pid=0, poll=lambda: None), log)
    monkeypatch.setattr(service, "ready", lambda: {"models": {"resnet50": "failed"}})
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="did not become ready"):
        service.wait_until_ready()
    assert time.monotonic() - started < 5
