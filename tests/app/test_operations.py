"""Versions, aliases, load, unload, hot swap, the watched directory: a real service, watched from outside."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from app.board import MOST_ASKED, Board
from app.keys import Access, make_key
from app.operations import Operations
from app.pages import WriterState, create_shared, open_common, open_shared, private_page
from app.versions import Shelf
from tests.app import test_lifecycle
from tests.app.watching import is_running, logged_with, messages, wait_for, worker_pids
from tests.bundles import make_bundle, plain_image
from tests.servers import ConvoyProcess, convoy

RED = plain_image("red")
PREDICT = "/models/colours/predict"


def make_version(models: Path, version: str, name: str = "colours", **options: object) -> Path:
    """Write a version whose labels tell its number."""
    directory = make_bundle(models, name, version, **options).directory
    path = directory / "model.json"
    manifest = json.loads(path.read_text())
    manifest["labels"] = [f"{label} {version}" for label in manifest["labels"]]
    for image in manifest["golden"]["images"]:
        image["label"] = f"{image['label']} {version}"
    path.write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    make_version(root, "1")
    return root


@contextmanager
def operated(models: Path, **settings: object) -> Iterator[ConvoyProcess]:
    """Run a server whose client has a key for everything."""
    file = models.parent / "keys.txt"
    key, line = make_key("operator", frozenset(Access))
    file.write_text(line + "\n")
    with convoy(models, models.parent / "log", loaded=False, keys=file, **settings) as server:
        server.client.headers["X-API-Key"] = key
        server.wait_until_loaded()
        yield server


def answer_of(client: httpx.Client, path: str = PREDICT) -> str:
    """Return the version that answered; its labels must be those of that version."""
    response = client.post(path, content=RED)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["results"][0]["top"][0]["label"] == f"red {answer['version']}"
    return str(answer["version"])


def states(server: ConvoyProcess, name: str = "colours") -> dict[str, str]:
    versions = server.client.get(f"/models/{name}").json()["versions"]
    return {version["version"]: version["state"] for version in versions}


def ask(server: ConvoyProcess, what: str, status: int = 200) -> dict:
    response = server.client.post(what)
    assert response.status_code == status, response.text
    content: dict = response.json()
    return content


class Stream:
    """Clients that ask without a pause, each on one connection, and what they got."""

    def __init__(self, server: ConvoyProcess, clients: int) -> None:
        self._stop = threading.Event()
        self.answers: list[list[str]] = [[] for _ in range(clients)]
        self.failures: list[str] = []
        self.unready: list[str] = []
        self._server = server
        works = [lambda answers=answers: self._ask(answers) for answers in self.answers]
        self._threads = [threading.Thread(target=work) for work in [*works, self._probe]]

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self._server.url, timeout=30, headers=self._server.client.headers)

    def _ask(self, answers: list[str]) -> None:
        with self._client() as client:
            while not self._stop.is_set():
                try:
                    answers.append(answer_of(client))
                except (AssertionError, httpx.TransportError) as error:
                    self.failures.append(repr(error))

    def _probe(self) -> None:
        with self._client() as client:
            while not self._stop.wait(0.01):
                response = client.get("/readyz")
                if response.status_code != 200:
                    self.unready.append(response.text)

    def __enter__(self) -> "Stream":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def all_have(self, version: str) -> bool:
        return all(answers and answers[-1] == version for answers in self.answers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_swap_under_load_fails_nobody_and_every_connection_sees_it_once(models, workers):
    with operated(models, workers=workers) as server, Stream(server, 8) as stream:
        wait_for(lambda: stream.all_have("1"))
        for version in ("2", "3"):
            make_version(models, version)
            ask(server, "/models/colours/load")
            with httpx.Client(base_url=server.url, headers=server.client.headers) as fresh:
                assert answer_of(fresh) == version, "it was told before it had happened everywhere"
            wait_for(lambda version=version: stream.all_have(version))
    assert stream.failures == [] and stream.unready == []
    for answers in stream.answers:
        assert [version for version, _ in groupby(answers)] == ["1", "2", "3"]


DAMAGE = {
    damage: sentence.replace("version 1", "version 2")
    for damage, sentence in test_lifecycle.DAMAGE.items()
    if damage.__name__ != "no_version"
}


DAMAGE = {
    damage: sentence.replace("version 1", "version 2")
    for damage, sentence in test_lifecycle.DAMAGE.items()
    if damage is not test_lifecycle.no_version
}


def test_a_version_with_any_damage_changes_nothing_and_says_why(models):
    with operated(models) as server, Stream(server, 2) as stream:
        for damage, sentence in DAMAGE.items():
            directory = make_bundle(models, "colours", "2").directory
            damage(directory)
            refusal = ask(server, "/models/colours/load", 409)
            assert refusal["code"] == "load_failed"
            assert re.search(sentence, refusal["error"]), refusal["error"]
            model = server.client.get("/models/colours").json()
            assert (model["version"], model["state"]) == ("1", "ready")
            assert re.search(sentence, model["reason"]), model["reason"]
            assert states(server) == {"2": "failed", "1": "ready"}
            info = [key for key in server.metrics() if key.startswith("convoy_model_info")]
            shown = sorted(re.findall(r'(?:state|version)="(\w+)"', key) for key in info)
            assert shown == [["failed", "2"], ["ready", "1"]]
            shutil.rmtree(directory)
        assert ask(server, "/models/colours/load")["reason"] == ""
        assert states(server) == {"1": "ready"}
    assert stream.failures == [] and stream.unready == []
    assert {version for answers in stream.answers for version in answers} == {"1"}


def test_a_version_whose_files_are_exchanged_is_swapped_and_a_broken_exchange_is_not(models):
    with operated(models) as server:
        before = server.client.get("/models/colours").json()["versions"][0]["load_seconds"]
        assert ask(server, "/models/colours/load")["versions"][0]["load_seconds"] == before, "loaded without a reason"
        directory = models / "colours/1"
        test_lifecycle.edit_manifest(directory, lambda manifest: manifest.update(description="Another one."))
        assert ask(server, "/models/colours/load")["description"] == "Another one."
        test_lifecycle.truncate_golden(directory)
        ask(server, "/models/colours/load", 409)
        model = server.client.get("/models/colours").json()
        assert (model["state"], model["versions"][0]["state"]) == ("ready", "ready")
        assert "golden/noise.jpg is not the file that was exported" in model["versions"][0]["reason"]
        assert answer_of(server.client) == "1"


def test_versions_and_aliases_are_asked_for_by_path(models):
    make_version(models, "2")
    make_version(models, "10")
    (models / "colours/versions.toml").write_text('active = "1"\n[aliases]\nstable = "1"\ncanary = "2"\n')
    with operated(models) as server:
        assert answer_of(server.client) == answer_of(server.client, "/predict") == "1"
        for asked, version in {"1": "1", "2": "2", "10": "10", "stable": "1", "canary": "2"}.items():
            path = f"/models/colours/versions/{asked}/predict"
            assert answer_of(server.client, path) == version
        for asked in ("3", "nightly", "01", "%2e%2e"):
            path = f"/models/colours/versions/{asked}/predict"
            response = server.client.post(path, content=RED)
            assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
        routes = {key for key in server.metrics() if key.startswith("convoy_requests_total") and '"200"' in key}
        assert any('route="/models/{model}/versions/{version}/predict",version="10"' in key for key in routes)
        model = server.client.get("/models/colours").json()
        assert model["aliases"] == {"stable": "1", "canary": "2"}
        assert [(v["version"], v["active"], v["aliases"]) for v in model["versions"]] == [
            ("10", False, []),
            ("2", False, ["canary"]),
            ("1", True, ["stable"]),
        ]
        assert model["versions"][0]["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]
        assert model["versions"][0]["max_batch"] == 16


def test_an_alias_is_moved_and_stays_where_it_was_if_its_new_version_is_broken(models):
    make_version(models, "2")
    test_lifecycle.alter_model(make_version(models, "3"))
    policy = models / "colours/versions.toml"
    policy.write_text('serve = ["1"]\naliases = {canary = "1"}\n')
    canary = "/models/colours/versions/canary/predict"
    with operated(models) as server:
        assert states(server) == {"3": "unloaded", "2": "unloaded", "1": "ready"}
        policy.write_text('serve = ["1"]\naliases = {canary = "2"}\n')
        ask(server, "/models/colours/load")
        assert (answer_of(server.client, canary), answer_of(server.client)) == ("2", "1")
        policy.write_text('serve = ["1"]\naliases = {canary = "3"}\n')
        assert "Version 3 is not served" not in ask(server, "/models/colours/load", 409)["error"]
        assert (answer_of(server.client, canary), answer_of(server.client)) == ("2", "1")
        policy.write_text('serve = ["1"]\naliases = {canary = 3}\n')
        assert "versions.toml: aliases.canary" in ask(server, "/models/colours/load", 409)["error"]
        assert answer_of(server.client, canary) == "2"
        policy.unlink()
        assert "is not the file" in ask(server, "/models/colours/load", 409)["error"]
        assert answer_of(server.client) == "2", "of the latest, the newest that loads"


def test_a_version_whose_directory_is_taken_away_goes_unless_it_is_named(models):
    make_version(models, "2")
    policy = models / "colours/versions.toml"
    policy.write_text("aliases = {stable = '1'}\n")
    with operated(models) as server:
        ask(server, "/models/colours/versions/1/load")
        shutil.rmtree(models / "colours/1")
        assert "colours/1 is not there any more." in ask(server, "/models/colours/versions/2/load", 409)["error"]
        assert answer_of(server.client, "/models/colours/versions/stable/predict") == "1"
        policy.unlink()
        assert ask(server, "/models/colours/versions/2/load")["reason"] == ""
        assert server.client.post("/models/colours/versions/1/predict", content=RED).status_code == 404
        assert answer_of(server.client) == "2"
        wait_for(lambda: states(server) == {"2": "ready"})


@pytest.mark.parametrize("workers", [1, 2])
def test_unload_and_load_of_the_default_model(models, workers):
    make_version(models, "1", "other")
    with operated(models, workers=workers, default_model="colours") as server:
        assert ask(server, "/models/colours/unload")["state"] == "unloaded"
        for path in ("/predict", PREDICT):
            refusal = server.client.post(path, content=RED)
            assert (refusal.status_code, refusal.json()["code"]) == (503, "unloaded")
        assert server.client.post("/models/other/predict", content=RED).status_code == 200

        def unready() -> bool:
            ready = server.client.get("/readyz")  # each worker tells its own state, a heartbeat apart
            return (ready.status_code, ready.json().get("reason")) == (503, "The default model 'colours' is unloaded.")

        wait_for(unready)
        wait_for(lambda: states(server) == {"1": "unloaded"})
        assert not [key for key in server.metrics() if key.startswith("convoy_model_info") and "colours" in key]
        assert ask(server, "/models/colours/load")["state"] == "ready"
        assert answer_of(server.client, "/predict") == "1"
        wait_for(lambda: server.client.get("/readyz").status_code == 200)


def test_one_version_is_loaded_and_unloaded_beside_the_policy(models):
    make_version(models, "2")
    with operated(models) as server:
        assert (answer_of(server.client), states(server)) == ("2", {"2": "ready", "1": "unloaded"})
        ask(server, "/models/colours/versions/1/load")
        assert (answer_of(server.client), states(server)) == ("2", {"2": "ready", "1": "ready"})
        ask(server, "/models/colours/versions/2/unload")
        assert answer_of(server.client) == "1", "the next one takes its place"
        ask(server, "/models/colours/load")
        assert answer_of(server.client) == "2"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/models/nobody/load", 404),
        ("/models/nobody/unload", 404),
        ("/models/colours/versions/7/load", 404),
        ("/models/colours/versions/7/unload", 404),
        ("/models/colours/versions/nightly/load", 404),
        ("/models/..%2f..%2fetc/load", 404),
        ("/models/%2e%2e/load", 400),
        ("/models/.hidden/load", 400),
        ("/models/UPPER/load", 400),
        ("/models/colours/versions/%2e%2e/load", 400),
        ("/models/colours/versions/..%2f1/load", 404),
        ("/models/colours/versions/01/load", 400),
        ("/models/colours%00/load", 400),
        ("/models/colours%0a/load", 400),
    ],
)
def test_names_that_are_none_are_refused(operated_server, path, status):
    refusal = ask(operated_server, path, status)
    assert refusal["error"].endswith(".")


@pytest.fixture(scope="module")
def operated_server(tmp_path_factory) -> Iterator[ConvoyProcess]:
    models = tmp_path_factory.mktemp("operated") / "models"
    make_version(models, "1")
    (models / ".hidden/1").mkdir(parents=True)
    with operated(models) as server:
        yield server


def test_operations_need_a_key_with_the_scope(operated_server):
    for path in ("/models/colours/load", "/models/colours/unload", "/models/colours/versions/1/unload"):
        assert httpx.post(operated_server.url + path).status_code == 401
    assert answer_of(operated_server.client) == "1"


def test_links_that_lead_out_of_the_directory_are_not_followed(models, tmp_path):
    elsewhere = make_version(tmp_path / "elsewhere", "2")
    (models / "colours/2").symlink_to(elsewhere)
    with operated(models) as server:
        assert answer_of(server.client) == "1"
        assert "is a link that leads out of" in server.client.get("/models/colours").json()["reason"]
        (models / "colours/2").unlink()
        (models / "colours/2").symlink_to("3")
        make_version(models, "3")
        ask(server, "/models/colours/load")
        assert answer_of(server.client) == "3"


def test_hang_up_looks_at_the_directory_again(models):
    with operated(models) as server:
        make_version(models, "2")
        make_version(models, "1", "new")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: messages(server, "reloaded"))
        assert answer_of(server.client) == "2"
        assert server.client.post("/models/new/predict", content=RED).status_code == 200
        shutil.rmtree(models / "new")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: len(messages(server, "reloaded")) == 2)
        assert server.client.post("/models/new/predict", content=RED).status_code == 404


def test_a_watched_directory_is_followed(models, tmp_path):
    whole = make_version(tmp_path / "elsewhere", "2")  # which is written twice
    with operated(models, watch_s=0.1) as server:
        whole.rename(models / "colours/2")
        wait_for(lambda: answer_of(server.client) == "2")
        shutil.rmtree(models / "colours/2")
        wait_for(lambda: answer_of(server.client) == "1")
        wait_for(lambda: states(server) == {"1": "ready"})
        make_version(models, "1", "new")
        wait_for(lambda: server.client.post("/models/new/predict", content=RED).status_code == 200)
        (models / "colours/versions.toml").write_text("aliases = {stable = '1'}\n")
        wait_for(lambda: server.client.get("/models/colours").json()["aliases"] == {"stable": "1"})
        shutil.rmtree(models / "new")
        wait_for(lambda: server.client.get("/models/new").status_code == 404)
        assert server.client.get("/readyz").status_code == 200


def test_a_model_that_is_loaded_and_deleted_between_two_looks_goes(models):
    with operated(models, watch_s=1) as server:
        make_version(models, "1", "other")
        ask(server, "/models/other/load")
        shutil.rmtree(models / "other")
        wait_for(lambda: "other" not in server.client.get("/readyz").json()["models"])


def test_a_worker_that_is_behind_what_the_board_keeps_looks_at_all(models):
    looked_at = []
    repository = SimpleNamespace(
        shelf=Shelf(models),
        entries={},
        default="colours",
        call_when_retired=lambda _: None,
        expect=lambda _: None,
        refresh=lambda name, *_: looked_at.append(name) or {},
    )
    board, page = Board(), private_page()
    operations = Operations(repository, board, page, [page])
    operations.start(board.join("colours"))
    for number in range(MOST_ASKED + 1):
        board.ask([f"gone{number}"])
    operations._catch_up()
    assert looked_at[0] == "colours", "in the models directory, and maybe among what is forgotten"
    assert len(looked_at) == MOST_ASKED + 1
    operations._catch_up()
    assert len(looked_at) == MOST_ASKED + 1


def test_a_version_that_is_copied_file_by_file_is_taken_when_it_is_whole(models, tmp_path):
    whole = make_version(tmp_path / "elsewhere", "2")
    with operated(models, watch_s=0.02) as server, Stream(server, 1) as stream:
        wait_for(lambda: stream.all_have("1"))
        (models / "colours/2/golden").mkdir(parents=True)
        for source in [whole / "model.json", whole / "model.onnx", *whole.glob("golden/*")]:
            shutil.copy(source, models / "colours/2" / source.relative_to(whole))
            answers = len(stream.answers[0])
            wait_for(lambda answers=answers: len(stream.answers[0]) > answers + 5)
        wait_for(lambda: stream.all_have("2"))
    assert stream.failures == [] and stream.unready == []
    assert [version for version, _ in groupby(stream.answers[0])] == ["1", "2"]


def test_a_copy_that_never_ends_is_told_and_taken_when_it_is_mended(models, tmp_path):
    whole = make_version(tmp_path / "elsewhere", "2")
    target = models / "colours/2"
    with operated(models, watch_s=0.05) as server:
        shutil.copytree(whole, target, ignore=shutil.ignore_patterns("noise.jpg"))
        wait_for(lambda: states(server).get("2") == "failed")
        assert "noise.jpg is missing" in server.client.get("/models/colours").json()["reason"]
        assert answer_of(server.client) == "1"
        shutil.copy(whole / "golden/noise.jpg", target / "golden")
        wait_for(lambda: answer_of(server.client) == "2")
        assert server.client.get("/models/colours").json()["reason"] == ""


def test_a_replaced_worker_comes_up_in_the_same_state(models):
    make_version(models, "2")
    make_version(models, "1", "other")
    with operated(models, workers=2, default_model="other") as server:
        ask(server, "/models/colours/versions/2/unload")
        (models / "colours/versions.toml").write_text('active = "3"\n')
        test_lifecycle.alter_model(make_version(models, "3"))
        ask(server, "/models/colours/load", 409)
        assert answer_of(server.client) == "1"
        pids = worker_pids(server)
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: not is_running(pid))
        wait_for(lambda: set(worker_pids(server).values()).isdisjoint(pids.values()) and len(worker_pids(server)) == 2)
        server.client.close()
        server.client = httpx.Client(base_url=server.url, timeout=30, headers=server.client.headers)
        server.wait_until_loaded()
        for _ in range(8):
            with httpx.Client(base_url=server.url, headers=server.client.headers) as fresh:
                assert answer_of(fresh) == "1"
        assert ask(server, "/models/colours/unload")["state"] == "unloaded"


def test_what_one_worker_found_broken_no_other_tries(models):
    with operated(models, workers=2) as server:
        test_lifecycle.alter_model(make_version(models, "2"))
        assert "is not the file" in ask(server, "/models/colours/load", 409)["error"]
        for _ in range(8):
            with httpx.Client(base_url=server.url, headers=server.client.headers) as fresh:
                assert answer_of(fresh) == "1"
                assert states(server) == {"2": "failed", "1": "ready"}


def test_a_slow_request_that_holds_the_old_version_is_answered_by_it(models):
    with operated(models) as server:
        started, go_on = threading.Event(), threading.Event()

        def slowly() -> Iterator[bytes]:
            yield RED[:10]
            started.set()
            go_on.wait(20)
            yield RED[10:]

        with ThreadPoolExecutor(1) as pool:
            headers = {"Content-Length": str(len(RED)), "X-Request-Id": "slow"}
            slow = pool.submit(server.client.post, PREDICT, content=slowly(), headers=headers)
            assert started.wait(10)
            make_version(models, "2")
            with httpx.Client(base_url=server.url, headers=server.client.headers) as other:
                wait_for(lambda: 'inflight_requests{model="colours"} 1' in other.get("/metrics").text)
                other.post("/models/colours/load")
                assert answer_of(other) == "2"
                assert {v["version"]: v["state"] for v in other.get("/models/colours").json()["versions"]} == {
                    "2": "ready",
                    "1": "unloading",
                }
            go_on.set()
            assert slow.result().json()["version"] == "1"
        wait_for(lambda: states(server) == {"2": "ready", "1": "unloaded"})
        assert logged_with(server, "slow")


def test_swaps_leave_no_threads_descriptors_or_series_behind(models):
    with operated(models) as server:
        process = Path(f"/proc/{server.process.pid}")

        def swap(version: int) -> tuple[int, int, int]:
            make_version(models, str(version))
            ask(server, "/models/colours/load")
            assert answer_of(server.client) == str(version)
            wait_for(lambda: list(states(server).values()).count("unloading") == 0)
            wait_for(lambda: "retire" not in "".join(p.read_text() for p in process.glob("task/*/comm")))
            shutil.rmtree(models / "colours" / str(version - 1))
            return len(list(process.glob("task/*"))), len(list(process.glob("fd/*"))), len(server.metrics())

        for version in range(2, 10):
            swap(version)
        early = swap(10)
        for version in range(11, 15):
            late = swap(version)
        assert late == early


@pytest.mark.parametrize("workers", [1, 2])
def test_models_that_come_and_go_leave_no_series_behind(models, workers):
    def shown(server: ConvoyProcess) -> set[str]:
        return {key.split('model="')[1].split('"')[0] for key in server.metrics() if 'model="' in key} - {""}

    def come(server: ConvoyProcess, name: str) -> float:
        make_version(models.parent / "elsewhere", "1", name)
        (models.parent / "elsewhere" / name).rename(models / name)
        wait_for(lambda: server.client.get(f"/models/{name}").status_code == 200)
        ask(server, "/models/colours/load")  # answered when every worker has done all that was asked for before
        answer_of(server.client, f"/models/{name}/predict")
        return server.metrics()[f'convoy_images_total{{model="{name}",version="1"}}']

    def go(server: ConvoyProcess, name: str) -> None:
        shutil.rmtree(models / name)
        wait_for(lambda: server.client.get(f"/models/{name}").status_code == 404)
        ask(server, "/models/colours/load")

    with operated(models, default_model="colours", watch_s=0.1, workers=workers) as server:
        assert come(server, "passing-0") == 1
        go(server, "passing-0")
        assert come(server, "passing-0") == 2, "it came back while it was shown"
        go(server, "passing-0")
        for number in range(1, 8):
            come(server, f"passing-{number}")
            go(server, f"passing-{number}")
        last = {f"passing-{number}" for number in range(3, 8)}
        wait_for(lambda: shown(server) == {"colours", *last})
        assert answer_of(server.client) == "1"


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ("latest", {"4": "failed", "3": "ready", "2": "unloaded", "1": "unloaded"}),
        ("latest:2", {"4": "failed", "3": "ready", "2": "ready", "1": "unloaded"}),
        ("all", {"4": "failed", "3": "ready", "2": "ready", "1": "ready"}),
    ],
)
def test_a_version_that_fails_makes_room_for_the_next_older_one(models, versions, expected):
    for version in ("2", "3", "4"):
        make_version(models, version)
    test_lifecycle.alter_model(models / "colours/4")
    with operated(models, versions=versions) as server:
        assert states(server) == expected
        assert answer_of(server.client) == "3"
        assert server.client.post("/models/colours/versions/4/predict", content=RED).json()["code"] == "model_failed"
        assert "Version 4 is not served" in server.client.get("/models/colours").json()["reason"]
        make_version(models, "4")
        ask(server, "/models/colours/load")
        assert answer_of(server.client) == "4"
        served = [version for version, state in states(server).items() if state == "ready"]
        assert served == {"latest": ["4"], "latest:2": ["4", "3"], "all": ["4", "3", "2", "1"]}[versions]


def test_a_broken_policy_at_the_start_serves_nothing_that_nobody_meant(models):
    make_version(models, "2")
    policy = models / "colours/versions.toml"
    policy.write_text("active = 1\n")
    with operated(models) as server:
        refusal = server.client.post(PREDICT, content=RED)
        assert (refusal.status_code, refusal.json()["code"]) == (503, "model_failed")
        assert "versions.toml: active: input should be a valid string." in refusal.json()["error"]
        policy.write_text("active = '1'\n")
        assert ask(server, "/models/colours/load")["reason"] == ""
        assert answer_of(server.client) == "1"


def test_a_worker_that_takes_over_the_watch_asks_for_nothing_that_was_asked_for_long_ago(models):
    repository = SimpleNamespace(
        shelf=Shelf(models),
        entries={},
        default="colours",
        call_when_retired=lambda _: None,
        expect=lambda _: None,
        refresh=lambda *_: {},
    )
    descriptor = create_shared(2)
    first, second = open_shared(descriptor)
    board = Board(open_common(descriptor), descriptor)
    operations = Operations(repository, board, second, [first, second], watch_s=0.001)
    operations.start(board.join("colours"))
    first.take_over(1)
    first.tell(WriterState.READY, {})
    names = [f"m{number}" for number in range(MOST_ASKED + 100)]
    for name in names:
        (models / name).mkdir()
    for _ in range(2):  # they rest
        time.sleep(0.002)
        operations._watch()
    board.ask(names)  # the first worker does
    first.release()
    before = board.read().generation
    time.sleep(0.002)
    operations._watch()
    assert board.read().generation == before
