import json
import os
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.bench import search, trials
from app.bench.report import Strain, report_of
from app.bench.samples import Samples
from app.bench.search import Dimension, Search, Trial, candidates
from app.bench.server import serving
from app.bench.trials import Trials
from app.bench.tune import sentences, settings_file, table
from app.errors import SettingsError
from app.manifest import read_bundle
from app.settings import Settings
from tests.bundles import make_bundle, plain_image

LIMIT_MS = 100.0


class Simulated:
    """A service whose capacity (requests/s) is a function of its settings: within it p99 is 20 ms, beyond it 1 s."""

    def __init__(self, capacity, start_s=2.0):
        self.capacity = capacity
        self.start_s = start_s
        self.now = 0.0
        self.at = None

    def _spend(self, *service, seconds):
        self.now += seconds + self.start_s * (service != self.at)
        self.at = service

    def closed(self, candidate, connections, seconds):
        self._spend(candidate, "closed", seconds=seconds)
        return Trial(candidate, "closed", connections, self.capacity(candidate), 10.0, 20.0, 1.0)

    def open(self, candidate, rate, seconds):
        self._spend(candidate, "open", seconds=seconds)
        fits = rate <= 0.9 * self.capacity(candidate)
        return Trial(candidate, "open", rate, rate, 10.0, 20.0 if fits else 1000.0, 1.0 if fits else 0.5)


def found(measure, tried, budget_s=600.0):
    result = Search(tried, measure, LIMIT_MS, budget_s, clock=lambda: measure.now)
    result.run()
    return result


def by_batch(candidate):
    return 100.0 + 5 * candidate["max_batch"] + 10 * candidate["sessions"] - candidate["linger_ms"]


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 64])
def test_candidates_keep_the_processors_busy_and_begin_with_the_defaults(cpus):
    tried = candidates(cpus)
    assert tried[0] == {"sessions": cpus, "workers": 1, "threads_per_session": 1, "max_batch": 16, "linger_ms": 0.0}
    for candidate in tried:
        busy = candidate["workers"] * candidate["sessions"] * candidate["threads_per_session"]
        assert max(cpus - 1, 1) <= busy <= cpus
        assert candidate["max_batch"] > 1 or not candidate["linger_ms"]
        Settings(**candidate)
    assert len({tuple(candidate.values()) for candidate in tried}) == len(tried) >= 7


def test_every_default_is_the_services_own():
    tried = candidates(2)[0]
    own = {name: Settings.model_fields[name].default for name in tried}
    assert tried == own | {"sessions": 2}, "sessions 0 means one per usable processor"


def test_another_dimension_is_one_line():
    decoders = Dimension("decode_threads", lambda cpus: (0, cpus))
    tried = candidates(4, (*search.DIMENSIONS, decoders))
    assert {candidate["decode_threads"] for candidate in tried} == {0, 4}


def test_several_workers_share_the_processors():
    assert {candidate["workers"] for candidate in candidates(4)} == {1, 4}
    assert all(candidate["sessions"] == 1 for candidate in candidates(4) if candidate["workers"] == 4)


def test_the_best_settings_and_their_rate_are_found():
    tried = candidates(2)
    result = found(Simulated(by_batch), tried)
    best = max(tried, key=by_batch)
    assert result.best == best and result.winner.confirmed and result.untried == 0
    limit = 0.9 * by_batch(best)
    assert limit * (1 - 2 * search.PRECISION) <= result.winner.rate <= limit
    assert result.concurrency.rate == pytest.approx(0.8 * result.winner.rate)
    assert result.concurrency.in_flight == pytest.approx(result.concurrency.rate * 0.010)


def test_halving_measures_fewer_candidates_longer():
    measure = Simulated(by_batch)
    lasted = []
    closed = measure.closed
    measure.closed = lambda *arguments: lasted.append(arguments[2]) or closed(*arguments)
    tried = candidates(2)
    found(measure, tried)
    assert lasted.count(1.5) == len(tried) + 1 and 2 <= lasted.count(3.0) < len(tried) / 2


def test_ranking_is_at_the_load_that_just_meets_the_limit():
    result = found(Simulated(lambda _: 200.0), candidates(2))
    assert {trial.asked for trial in result.trials[1:] if trial.loop == "closed"} == {200 * LIMIT_MS / 1000}


def test_the_budget_holds_and_what_it_left_out_is_told():
    measure = Simulated(by_batch)
    result = found(measure, candidates(8), budget_s=60.0)
    assert measure.now < 60 + 15, "the last runs may end a little late"
    assert result.untried > 0 and result.best is not None
    assert "were not tried" in sentences(result)[-1]


def test_a_round_that_is_cut_short_forgets_nobody():
    """The budget ends while the survivors are measured again: all finalists are there all the same."""
    measure = Simulated(by_batch, start_s=3.0)
    result = found(measure, candidates(2), budget_s=200.0)
    probed = {tuple(trial.candidate.values()) for trial in result.trials if trial.loop == "open"}
    assert len(probed) == search.FINALISTS


def test_a_machine_too_slow_for_a_ranking_gets_the_rate_of_its_defaults():
    measure = Simulated(by_batch, start_s=30.0)
    result = found(measure, candidates(2), budget_s=60.0)
    assert result.best == candidates(2)[0] and result.untried == len(candidates(2)) - 1


def test_few_candidates_need_no_ranking():
    tried = candidates(2)[:2]
    result = found(Simulated(by_batch), tried)
    assert result.untried == 0 and result.best == max(tried, key=by_batch)


def test_a_limit_that_nothing_keeps():
    measure = Simulated(by_batch)
    measure.open = lambda candidate, rate, seconds: Trial(candidate, "open", rate, rate, 900.0, 990.0, 0.0)
    result = found(measure, candidates(2))
    assert (result.winner, result.best, result.concurrency) == (None, None, None)
    assert "the limit is too tight" in sentences(result)[0]


def test_a_rate_that_was_luck_is_not_confirmed():
    """The first time at any rate goes well up to 190/s; a rate that is asked again only up to 170/s."""
    measure = Simulated(lambda _: 200.0)
    seen = set()

    def lucky(candidate, rate, seconds):
        fits = rate <= (170 if rate in seen else 190)
        seen.add(rate)
        return Trial(candidate, "open", rate, rate, 10.0, 20.0, 1.0 if fits else 0.0)

    measure.open = lucky
    result = found(measure, candidates(2))
    assert result.winner.confirmed and result.winner.rate < 185
    assert any(trial.asked > result.winner.rate and trial.holds for trial in result.trials)


def test_a_finalist_that_was_lucky_falls_behind_the_others():
    """Of three finalists the first keeps any rate at first, and 100/s in truth: the second one's 170/s are the most."""
    ranking, truth = {16: 185.0, 4: 180.0, 1: 175.0}, {16: 100, 4: 170, 1: 150}
    measure = Simulated(lambda candidate: ranking[candidate["max_batch"]])
    tried = candidates(2)[:1] + [candidates(2)[0] | {"max_batch": batch} for batch in (1, 4)]
    seen = set()

    def lucky(candidate, rate, seconds):
        measure.now += seconds
        seen.add(candidate["max_batch"])
        fits = rate <= truth[candidate["max_batch"]] or seen == {16}
        return Trial(candidate, "open", rate, rate, 10.0, 20.0, 1.0 if fits else 0.0)

    measure.open = lucky
    result = found(measure, tried)
    assert [finalist.candidate["max_batch"] for finalist in result.finalists] == [16, 4, 1]
    assert result.best["max_batch"] == 4 and result.winner.confirmed
    assert 170 * (1 - 2 * search.PRECISION) <= result.winner.rate <= 170
    assert [finalist.confirmed for finalist in result.finalists] == [False, True, False]


def test_a_rate_that_there_was_no_time_to_confirm_is_told_as_such():
    measure = Simulated(by_batch)
    honest = measure.open

    def slow(candidate, rate, seconds):
        measure.now += 500.0
        return honest(candidate, rate, seconds)

    measure.open = slow
    result = found(measure, candidates(2))
    assert result.winner is not None and not result.winner.confirmed
    assert "take less" in sentences(result)[1]


def test_impossible_settings_do_not_end_the_search():
    measure = Simulated(by_batch)
    closed = measure.closed

    def refuses(candidate, connections, seconds):
        if candidate["max_batch"] == 64:
            raise SettingsError("No memory for that.")
        return closed(candidate, connections, seconds)

    measure.closed = refuses
    result = found(measure, candidates(2))
    assert result.best["max_batch"] == 16
    assert {trial.fault for trial in result.trials if trial.candidate["max_batch"] == 64} == {"No memory for that."}
    assert table(result).row_count == len(candidates(2))


def test_the_settings_file_is_what_serve_reads(models, tmp_path):
    result = found(Simulated(by_batch), candidates(2))
    file = tmp_path / "convoy.toml"
    file.write_text(settings_file(result, read_bundle(models / "colours/1")))
    assert tomllib.loads(file.read_text()) == {**result.best, "queue_target_ms": LIMIT_MS}
    settings = Settings.from_sources({}, {"settings": str(file)})
    assert {name: getattr(settings, name) for name in result.best} == result.best
    assert settings.queue_target_ms == LIMIT_MS
    assert "# Sustainable: " in file.read_text() and "Little's law" in file.read_text()


def test_rates_are_measured_with_the_queue_target_that_is_written(models, monkeypatch):
    """Ranking is at the edge of the limit, where the target would turn the slower candidates' clients away."""
    started = []

    @contextmanager
    def noted(directory, settings):
        started.append(settings)
        yield SimpleNamespace(url="http://127.0.0.1:1")

    async def nothing(_):
        strain = Strain(busy_share=0.0, lag_p99_ms=0.0)
        return report_of(
            Samples(),
            begin=0,
            end=1,
            interrupted=False,
            images_per_request=1,
            held_back=0,
            connections=1,
            strain=strain,
        )

    monkeypatch.setattr(trials, "serving", noted)
    monkeypatch.setattr(trials, "run_load", nothing)
    with Trials(read_bundle(models / "colours/1"), [b"image"], LIMIT_MS) as real:
        for _ in range(2):
            real.closed({"max_batch": 4}, 8, 1.0)
        for _ in range(2):
            real.open({"max_batch": 4}, 100.0, 1.0)
    common = {"default_model": "colours", "max_batch": 4}
    assert started == [common | {"queue_target_ms": 0.0}, common | {"queue_target_ms": LIMIT_MS}]


def test_a_service_that_cannot_be_measured_says_why(models, tmp_path):
    with (
        pytest.raises(SettingsError, match="did not start: --max-batch cannot be '0'"),
        serving(models, {"max_batch": 0}),
    ):
        pass
    broken = make_bundle(tmp_path / "models").directory
    (broken / "model.onnx").write_bytes(b"")
    with pytest.raises(SettingsError, match="did not become ready: "), serving(tmp_path / "models"):
        pass


def test_a_service_of_ones_own_ends_with_its_block(models):
    with serving(models, {"access_log": False, "default_model": "other"}) as server:
        assert Path(f"/proc/{server.pid}").exists() and server.url.startswith("http://127.0.0.1:")
    assert not Path(f"/proc/{server.pid}").exists()


def tune(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", "tune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "150"})


def test_a_real_search(tmp_path):
    """A budget that is spent after a few candidates: the way through processes, load, table and files is the same."""
    models = tmp_path / "models"
    make_bundle(models)
    picture = tmp_path / "red.png"
    picture.write_bytes(plain_image("red"))
    written, plot, figures = tmp_path / "convoy.toml", tmp_path / "tune.svg", tmp_path / "tune.json"
    result = tune(
        "--p99", 5000, "--images", picture, "--models", models, "--budget-s", 6,
        "--write", written, "--plot", plot, "--json", figures,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Sustainable: " in result.stdout and "Little's law" in result.stdout
    document = json.loads(figures.read_text())
    assert document["sustainable_per_s"] > 0 and document["model"] == {"name": "colours", "version": "1"}
    assert {trial["loop"] for trial in document["trials"]} == {"closed", "open"}
    assert tomllib.loads(written.read_text()) == document["best"] | {"queue_target_ms": 5000}
    assert document["sustainable_per_s"] == max(finalist["rate"] for finalist in document["finalists"])
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--images", "nothing.jpg"), "There is no file nothing.jpg."),
        (("--images", "{notes}"), "The data is not a JPEG, PNG or WebP image."),
        (("--images", "{notes}", "--model", "nobody"), "There is no model 'nobody'"),
        (("--images", "{notes}", "--write", "nowhere/convoy.toml"), "there is no folder nowhere"),
    ],
)
def test_a_fault_is_one_sentence_and_status_2(models, tmp_path, arguments, sentence):
    notes = tmp_path / "notes.txt"
    notes.write_text("not an image")
    words = (argument.format(notes=notes) for argument in arguments)
    result = tune("--p99", 100, "--models", models, *([] if "--model" in arguments else ["--model", "colours"]), *words)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.startswith("convoy: ") and result.stderr.count("\n") == 1
