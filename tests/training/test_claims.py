"""Recipes with a claim: their docstrings, the verdict's arithmetic, and the command that trains again."""

import json
import re
from pathlib import Path

import pytest

from training import claims, cli
from training.claims import CLAIMED, MODULES, named_recipe
from training.claims.claim import Claim, Trial, judge
from training.commands.flags import recipe_of
from training.errors import RecipeError
from training.recipes import Recipe


def claim(
    accuracy: float, *, deviation: float | None = None, runs: int = 1, images: tuple[int, int] = (60, 30)
) -> Claim:
    return Claim("insects", *images, accuracy, deviation, runs, seconds=2.0, hardware="a machine")


def trials(*accuracies: float) -> list[Trial]:
    return [Trial(seed, accuracy, 3.0 + seed, 100.0) for seed, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_docstring_states_the_claim_that_is_held(module):
    told, stated = module.__doc__, module.CLAIM
    assert f"{stated.accuracy * 100:.2f} %" in told
    assert f"{stated.seconds:g} s" in told
    assert re.search(rf"\bn={stated.runs}\b", told)
    assert f"{stated.test_images:,}" in told and f"{stated.train_images:,}" in told
    assert (stated.deviation is None) == (stated.runs == 1)
    assert Recipe.model_validate(module.RECIPE.model_dump()) == module.RECIPE


def test_chance_is_three_standard_errors_of_the_difference():
    stated = claim(0.80, deviation=0.01, runs=4)
    verdict = judge(trials(0.79, 0.79, 0.79, 0.79), stated)
    assert verdict.allowed == pytest.approx(3 * 0.01 * (1 / 4 + 1 / 4) ** 0.5)
    assert verdict.held and verdict.deviation == 0
    assert not judge(trials(0.77, 0.78, 0.78, 0.78), stated).held
    assert judge(trials(0.95), stated).held


def test_a_single_run_is_judged_by_half_a_point_where_nobody_knows_more():
    stated = claim(0.80)
    assert judge(trials(0.7789), stated).held
    assert not judge(trials(0.7787), stated).held
    assert judge(trials(0.80, 0.84), stated).deviation == pytest.approx(0.0283, abs=1e-4)


def test_a_recipe_is_found_by_name_and_flags_win_over_it():
    assert named_recipe("article") == Recipe()
    with pytest.raises(RecipeError, match="no recipe 'nobody': there are article"):
        named_recipe("nobody")


def test_train_begins_from_a_named_recipe(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CLAIMED, "quick", (Recipe(epochs=2, learning_rate=0.01), claim(0.5)))
    options = cli._parse(["train", "--data", "x", "--recipe", "quick", "--epochs", "3"])
    assert recipe_of(options, None) == Recipe(epochs=3, learning_rate=0.01)
    assert recipe_of(cli._parse(["train", "--data", "x"]), None) == Recipe()


def bench(tree: Path, folder: Path, *more: str) -> int:
    out, cache = str(folder / "bench.json"), str(folder / "cache")
    return cli.main(["bench", "quick", "--data", str(tree), "--out", out, "--cache-dir", cache, *more])


def test_a_claim_is_held_or_not_by_training_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(claims.CLAIMED, "quick", (Recipe(epochs=1, seed=5), claim(0.1)))
    assert bench(tree, tmp_path, "--runs", "2") == 0
    told = capsys.readouterr().out
    assert "run 2/2  seed 6" in told and "Held: " in told
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [trial["seed"] for trial in record["here"]["trials"]] == [5, 6]
    assert record["here"]["held"] is True and record["claim"]["accuracy"] == 0.1
    assert record["knobs"]["epochs"] == 1

    monkeypatch.setitem(claims.CLAIMED, "quick", (Recipe(epochs=1, seed=5), claim(0.999)))
    assert bench(tree, tmp_path) == 2
    assert re.search(r"The claim of quick is not held: [\d.]+% is [\d.]+ points below 99.90%", capsys.readouterr().err)
    assert json.loads((tmp_path / "bench.json").read_text())["here"]["held"] is False


def test_other_data_are_no_test_of_a_claim(tree: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(claims.CLAIMED, "quick", (Recipe(epochs=1), claim(0.1, images=(50_000, 10_000))))
    assert bench(tree, tmp_path) == 2
    assert "has 60 training and 30 test images, and the claim is about insects" in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()
