"""Whether a repository is ready whose models are in engines, by what there is of them."""

from types import SimpleNamespace

import pytest

from app.repository import Repository, State


def repository(default: str = "", **models: str) -> Repository:
    """Return one of models that are `up`, `down` (loaded, and no engine has it), `loading` or `failed`."""
    found = Repository.__new__(Repository)
    found.default, found.started = default, True
    found.entries = {}
    for name, how in models.items():
        loaded = how in ("up", "down")
        model = SimpleNamespace(batcher=SimpleNamespace(is_up=how == "up")) if loaded else None
        state = State.READY if loaded else State(how)
        found.entries[name] = SimpleNamespace(name=name, model=model, state=state)
    return found


@pytest.mark.parametrize(
    ("models", "require_all", "reason"),
    [
        ({"a": "up", "b": "up"}, True, ""),
        ({"a": "down", "b": "up"}, False, ""),
        ({"a": "down", "b": "up"}, True, "No engine has these at the moment: a."),
        ({"a": "down", "b": "down"}, False, "No engine has these at the moment: a, b."),
        ({"a": "down", "b": "failed"}, False, "No engine has these at the moment: a."),
        ({"a": "down", "default": "a"}, False, "No engine has the default model 'a' at the moment."),
        ({"a": "up", "b": "down", "default": "a"}, False, ""),
        ({"a": "failed"}, False, "Failed to load: a."),
        ({}, False, "No model is loaded."),
    ],
)
def test_a_model_that_no_engine_has_is_not_there(models, require_all, reason):
    assert repository(**models).why_not_ready(require_all) == reason


@pytest.mark.parametrize(
    ("models", "coming"),
    [({"a": "down"}, True), ({"a": "loading"}, True), ({"a": "failed"}, False), ({"a": "up"}, False)],
)
def test_what_waits_for_an_engine_has_not_failed(models, coming):
    assert repository(**models).is_coming is coming
