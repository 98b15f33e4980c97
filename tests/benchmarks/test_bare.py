"""Served beside bare: the figures are medians of ratios of one turn, and each is held against its own bar."""

import json
import os
import sys
import time
import urllib.request
from contextlib import nullcontext

import pytest

from benchmarks import bare, others
from benchmarks.bare import CASES, Case, Turn, finding_of
from benchmarks.peers.load import Figures, LoadError
from tests.bundles import make_bundle, plain_image


def rows_of(case, *turns):
    return {row.figure: row for row in finding_of(case, turns, None).rows}


def test_a_ratio_is_of_one_turn():
    """The machine is twice as fast in the second turn: medians of the parts would say 1.5 and 0.75."""
    rows = rows_of(
        CASES["photo"],
        Turn(bare_ms=20, one_p50_ms=22, served_per_s=90, served_p99_ms=200, ceiling_per_s=100),
        Turn(bare_ms=10, one_p50_ms=11, served_per_s=180, served_p99_ms=100, ceiling_per_s=200),
    )
    assert (rows["one connection ÷ bare"].value, rows["one connection ÷ bare"].met) == (1.1, True)
    assert (rows["served ÷ ceiling"].value, rows["served ÷ ceiling"].met) == (0.9, False)


def test_what_others_took_is_of_neither_this_process_nor_its_children(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    tick = os.sysconf("SC_CLK_TCK")
    clock = iter([100.0, 110.0])
    times = [os.times_result((1, 1, 0, 0, 0)), os.times_result((2, 1, 3, 0, 0))]
    monkeypatch.setattr(others, "STAT", stat)
    monkeypatch.setattr(others.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(others.os, "times", lambda: times.pop(0))
    stat.write_text(f"cpu  {50 * tick} 0 {10 * tick} 999 0\n")
    with others.Others() as watch:
        stat.write_text(f"cpu  {55 * tick} {4 * tick} {10 * tick} 999 0\n")
    assert watch.cpus == 0.5, "9 s were busy, 4 of them here, in 10 s"


def test_where_nobody_counts_processor_time_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(others, "STAT", tmp_path / "stat")
    with others.Others() as watch:
        pass
    assert watch.cpus is None


def test_a_case_without_a_bar_shows_its_figure():
    rows = rows_of(CASES["resnet50"], Turn(80, 160, 96, 500, 100))
    assert (rows["one connection ÷ bare"].value, rows["one connection ÷ bare"].met) == (2.0, None)
    assert rows["served ÷ ceiling"].met is True


def test_a_turn_with_refusals_is_taken_again(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise LoadError("of 2 answers 1 were not 200, and 0 connections failed")

    outcomes = iter([refused, lambda: Turn(10, 11, 95, 100, 100)])
    monkeypatch.setattr(bare, "stage", lambda *_: nullcontext(lambda _: next(outcomes)()))
    output = run(tmp_path, monkeypatch, status=0)
    assert (output["refused_turns"], len(output["turns"])) == (1, 1)
    assert "of 2 answers 1 were not 200" in capsys.readouterr().out
    monkeypatch.setattr(bare, "stage", lambda *_: nullcontext(refused))
    with pytest.raises(SystemExit, match="too busy"):
        run(tmp_path, monkeypatch, status=0)


def post_a_few(url, images, connections, seconds):
    """Stand in for wrk, whose output is read in test_peers.py, and which wants whole seconds."""
    began = time.perf_counter()
    for _ in range(3):
        with urllib.request.urlopen(url, images[0].read_bytes()) as answer:
            assert answer.status == 200
    passed = time.perf_counter() - began
    return Figures(3 / passed, passed / 3 * 1000, passed / 3 * 1000)


def run(tmp_path, monkeypatch, status, case=CASES["photo"]):
    """Run the command for one case, with a tiny model and tenths of seconds, and return what it wrote."""
    bundle = make_bundle(tmp_path / "models")
    monkeypatch.setattr(bare, "CASES", {"tiny": case})
    monkeypatch.setattr(bare, "IMAGES", {bare.IMAGE: lambda: plain_image("red")})
    monkeypatch.setattr(bare, "bundle_of", lambda model: bundle)
    monkeypatch.setattr(bare, "WARM_UP_S", 0.1)
    monkeypatch.setattr(bare, "measure", post_a_few)
    monkeypatch.setattr(bare, "require_wrk", lambda: "none")
    output = tmp_path / "bare.json"
    arguments = ["--turns", "1", "--seconds", "0.2", "--output", output, "--lock", tmp_path / "lock"]
    monkeypatch.setattr(sys, "argv", ["bare", *map(str, arguments)])
    assert bare.main() == status
    return json.loads(output.read_text())["tiny"]


def test_a_real_turn(tmp_path, monkeypatch, capsys):
    """Service, clients, bare loops, table and file; nothing is served a thousand times as fast as its ceiling."""
    written = run(tmp_path, monkeypatch, 1, Case("colours", "one colour", 2, 1000.0, 1000.0))
    assert min(written["turns"][0].values()) > 0
    assert [row["met"] for row in written["rows"] if row["met"] is not None] == [True, False]
    assert "served ÷ ceiling" in capsys.readouterr().out
