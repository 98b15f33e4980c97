import pytest

from app import cli, logs, runtime
from app.errors import RuntimeMissingError


def test_one_wheel_is_right():
    runtime.check_wheels({"onnxruntime": "1.31.1"})
    runtime.check_wheels({"onnxruntime-gpu": "1.31.1"})


def test_no_wheel_says_what_to_install():
    with pytest.raises(RuntimeMissingError, match=r"install convoy-serve\[cpu\]"):
        runtime.check_wheels({})


def test_both_wheels_are_refused():
    with pytest.raises(RuntimeMissingError, match=r"onnxruntime 1\.31\.1 and onnxruntime-gpu 1\.31\.1"):
        runtime.check_wheels({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})


def test_a_start_without_runtime_is_one_sentence(monkeypatch, capsys, models):
    monkeypatch.setattr(runtime, "installed_wheels", dict)
    monkeypatch.setattr(logs, "configure", lambda *_: None)  # it would outlive this test
    monkeypatch.delenv("CONVOY_MODELS", raising=False)
    assert cli.main(["serve", "--models", str(models), "--port", "0"]) == 2
    assert "ONNX Runtime is not installed" in capsys.readouterr().err
