"""The comparison with peers is fair and robust: same pixels, same versions, no server left behind."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest

from app.images import decode
from app.manifest import PixelRecipe
from benchmarks.peers.load import LoadError, read_figures
from benchmarks.peers.scenarios import IMAGES, SCENARIOS
from benchmarks.peers.servers import Launch, PeerError, first_label, serving
from tests.bundles import noise_image

ROOT = Path(__file__).parent.parent.parent
RUNNERS = ROOT / "benchmarks/peers/runners"
CLEAN = '{"requests": 800, "microseconds": 4000000, "refused": 0, "broken": 0, "p50_us": 1500, "p99_us": 9000}'

SERVER = """
import http.server, json, os, subprocess, sys
open(os.environ["NOTE"], "w").write(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"results": [{"top": [{"label": "cat"}]}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def classifier(monkeypatch):
    """The peers' module, which lives in their environment and finds its neighbour by being beside it."""
    monkeypatch.syspath_prepend(str(RUNNERS))
    spec = importlib.util.spec_from_file_location("peers_classifier", RUNNERS / "classifier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("task", None)


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        (PixelRecipe(height=32, width=32, resize_short_side=32), (32, 32)),
        (PixelRecipe(height=48, width=48, resize_short_side=64), (101, 83)),
        (PixelRecipe(height=48, width=48, resize_short_side=64), (40, 61)),
    ],
)
def test_the_plain_decoder_sees_the_same_picture(classifier, recipe, size):
    image = noise_image(3, "JPEG", size)
    plain = classifier.plain(recipe.model_dump())(image)
    ours = decode(image, recipe)
    assert plain.shape == ours.shape
    assert np.abs(plain.astype(int) - ours.astype(int)).max() <= 1
    assert np.array_equal(classifier.convoy(recipe.model_dump())(image), ours)


@pytest.mark.parametrize("package", ["onnxruntime", "pillow", "simplejpeg"])
def test_peers_run_what_convoy_runs(package):
    pins = [
        re.search(rf"^{package}==(\S+)$", (ROOT / file).read_text(), re.MULTILINE).group(1)
        for file in ("constraints.txt", "benchmarks/peers/requirements.txt")
    ]
    assert pins[0] == pins[1]


def test_convoys_decoder_finds_in_the_peers_environment_what_it_imports():
    """Whatever `app.images` loads is installed by name, or is needed by something that is."""
    program = (
        "import json, sys; from importlib.metadata import packages_distributions; import app.images, app.manifest; "
        "tops = {name.partition('.')[0] for name in sys.modules}; "
        "print(json.dumps([name for top, names in packages_distributions().items() if top in tops for name in names]))"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {plain_name(name) for name in json.loads(told)} - {"convoy-serve", "setuptools"}
    named = re.search(r"^\t\$\(PEERS_INSTALL\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    brought = {plain_name(re.match(r"[\w-]+", need)[0]) for name in named for need in requires(name) or ()}
    assert "simplejpeg" in loaded and loaded <= {*named, *brought}


def plain_name(name: str) -> str:
    """Return a distribution's name as all its spellings have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_scenario_can_be_run():
    for scenario in SCENARIOS:
        assert set(scenario.images) <= set(IMAGES)
        assert all((RUNNERS / f"serve_{peer}.py").is_file() for peer in scenario.peers)
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)


def test_figures_are_read():
    figures = read_figures(f"Running 8s test\n  many words\n\n{CLEAN}\n")
    assert (figures.per_s, figures.p50_ms, figures.p99_ms) == (200, 1.5, 9)


@pytest.mark.parametrize("fault", ["refused", "broken"])
def test_what_answers_wrongly_is_not_measured(fault):
    with pytest.raises(LoadError, match="800"):
        read_figures(CLEAN.replace(f'"{fault}": 0', f'"{fault}": 3'))


def test_labels_are_read_through_tritons_header():
    answer = b'{"results": [{"top": [{"label": "cat"}]}]}'
    assert first_label(answer) == "cat"
    assert first_label(b'{"outputs":[]}\x2a\x00\x00\x00' + answer) == "cat"
    assert first_label(b'{"model": "m", "results": [{"top": [{"label": "cat"}]}]}') == "cat"
    with pytest.raises(PeerError, match="no label"):
        first_label(b"{}")


@pytest.mark.parametrize("stubborn", [False, True], ids=["polite", "stubborn"])
def test_nothing_is_left_of_a_server(tmp_path, monkeypatch, stubborn):
    monkeypatch.setattr("benchmarks.peers.servers.STOP_S", 0.3)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    launch = Launch((sys.executable, "-c", deaf + SERVER.replace("{", "{{").replace("}", "}}"), "{port}"), {}, "/")
    note = tmp_path / "child"
    monkeypatch.setenv("NOTE", str(note))
    with serving(launch, [(b"image", "cat")]):
        child = int(note.read_text())
        assert state(child) not in ("", "Z")
    stop = time.monotonic() + 10
    while state(child) not in ("", "Z") and time.monotonic() < stop:
        time.sleep(0.02)
    assert state(child) in ("", "Z")


def state(pid: int) -> str:
    """Return the letter that the kernel gives a process's state, or nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def test_a_server_that_names_a_wrong_label_is_out(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTE", str(tmp_path / "child"))
    monkeypatch.setattr("benchmarks.peers.servers.STOP_S", 0.3)
    launch = Launch((sys.executable, "-c", SERVER.replace("{", "{{").replace("}", "}}"), "{port}"), {}, "/")
    with pytest.raises(PeerError, match="'cat' where 'dog'"), serving(launch, [(b"image", "dog")]):
        pytest.fail("it was taken for right")


def test_a_server_that_cannot_start_says_why():
    launch = Launch((sys.executable, "-c", "raise SystemExit('no such wheel here')"), {}, "/")
    with pytest.raises(PeerError, match="no such wheel here"), serving(launch, [(b"image", "cat")]):
        pytest.fail("it was taken for ready")


def test_a_driver_that_is_ended_ends_its_server(tmp_path):
    """SIGTERM unwinds: the server has a process group of its own and would outlive the driver."""
    program = (
        "import sys, time\n"
        "from benchmarks.peers.servers import end_servers_when_ended\n"
        "end_servers_when_ended()\n"
        "try:\n    print('up', flush=True); time.sleep(60)\n"
        "finally:\n    print('ended its server', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "up\n"
        driver.send_signal(signal.SIGTERM)
        assert driver.stdout.read() == "ended its server\n"
    assert driver.returncode == 128 + signal.SIGTERM
