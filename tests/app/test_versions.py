"""What a models directory holds, which versions of it are wanted, and when a change in it has come to rest."""

import shutil
from pathlib import Path

import pytest

from app.versions import Selection, Shelf, Watcher, find_models, is_whole, read_folder
from tests.bundles import make_bundle


@pytest.mark.parametrize(
    ("text", "tried"),
    [("latest", ["10", "2", "1"]), ("latest:2", ["10", "2", "1"]), ("all", ["10", "2", "1"])],
)
def test_the_newest_is_tried_first(text, tried):
    selection = Selection.parse(text)
    assert selection.candidates(["1", "2", "10"]) == tried
    assert selection.latest == {"latest": 1, "latest:2": 2, "all": 0}[text]


@pytest.mark.parametrize("text", ["", "newest", "latest:", "latest:0", "latest:-1", "latest:x", "all:2", "latest:1 "])
def test_what_is_no_selection_is_refused(text):
    with pytest.raises(ValueError, match="is not latest, latest:N or all"):
        Selection.parse(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models/m"
    for version in ("1", "2", "10"):
        (path / version).mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("text", "latest", "listed", "pinned"),
    [
        ("", 3, (), []),
        ('serve = "latest"', 1, (), []),
        ('serve = "all"\nactive = "2"', 0, (), ["2"]),
        ('serve = ["1", "2"]\n[aliases]\nstable = "1"\nthe_next-one2 = "10"', 0, ("1", "2"), ["1", "10"]),
    ],
)
def test_a_policy_is_read(folder, text, latest, listed, pinned):
    (folder / "versions.toml").write_text(text)
    found = read_folder(folder)
    assert (found.versions, found.fault) == (("1", "2", "10"), "")
    assert found.policy.selection(Selection(latest=3)) == Selection(latest, listed)
    assert found.policy.pinned == pinned
    assert found.version == (found.policy.active or "10")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("serve = ", "is not TOML"),
        ("sreve = 'all'", "sreve: extra inputs are not permitted"),
        ("serve = 'newest'", "'newest' is not latest, latest:N or all"),
        ("serve = []", "serve lists no version"),
        ("serve = ['01']", "serve"),
        ("active = 2", "active: input should be a valid string"),
        ("active = '../2'", "active: string should match pattern"),
        ("[aliases]\n2 = '1'", "aliases"),
        ("[aliases]\n'../x' = '1'", "aliases"),
        ("[aliases]\nstable = '../1'", "aliases.stable"),
    ],
)
def test_a_wrong_policy_is_one_sentence_and_nothing_of_it_holds(folder, text, sentence):
    (folder / "versions.toml").write_text(text)
    found = read_folder(folder)
    assert found.fault.startswith(f"{folder / 'versions.toml'}")
    assert sentence in found.fault and found.fault.endswith(".") and "\n" not in found.fault
    assert found.policy.pinned == []


def test_what_is_no_version_is_passed_over(folder):
    for name in ("02", "latest", ".3", "0"):
        (folder / name).mkdir()
    (folder / "4").write_text("a file")
    assert read_folder(folder).versions == ("1", "2", "10")
    assert [found.directory.name for found in find_models(Shelf(folder.parent))] == ["10"]


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Watcher, Path]:
    root = tmp_path / "models"
    make_bundle(root, "m", "1")
    return Watcher(Shelf(root)), root / "m"


def test_a_model_whose_folder_came_and_went_between_two_looks_is_told(watched):
    watcher, _ = watched
    assert watcher.changed(["m", "loaded meanwhile"]) == ["loaded meanwhile"]
    assert watcher.changed(["m"]) == []


def test_a_folder_that_is_no_model_is_said_once_however_often_it_is_looked_at(tmp_path, caplog):
    shelf = Shelf(tmp_path / "models")
    make_bundle(shelf.root, "m", "1")
    (shelf.root / "lost+found").mkdir()
    assert [folder.name for folder in find_models(shelf)] == ["m"]
    watcher = Watcher(shelf)
    for _ in range(3):
        assert watcher.changed() == []
    assert [record.folder for record in caplog.records] == [repr(str(shelf.root / "lost+found"))]
    (shelf.root / "Other").mkdir()
    watcher.changed()
    (shelf.root / "Other").rmdir()
    watcher.changed()
    assert len(caplog.records) == 2
    (shelf.root / "Other").mkdir()
    watcher.changed()
    assert len(caplog.records) == 3


def test_a_version_that_is_moved_there_whole_is_told_at_the_first_look(watched):
    watcher, folder = watched
    assert watcher.changed() == []
    make_bundle(folder.parent, "m", "2")
    assert watcher.changed() == ["m"]
    assert watcher.changed() == []
    make_bundle(folder.parent, "m", "2", description="exchanged")
    assert watcher.changed() == ["m"]


def test_a_copy_is_told_when_its_last_byte_has_come_and_never_before(watched, tmp_path):
    watcher, folder = watched
    whole = make_bundle(tmp_path / "elsewhere", "m", "2").directory
    files = [whole / "model.json", *sorted(whole.glob("golden/*")), whole / "model.onnx"]
    (folder / "2/golden").mkdir(parents=True)
    for number, source in enumerate(files, 1):
        data = source.read_bytes()
        with (folder / "2" / source.relative_to(whole)).open("wb", buffering=0) as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(part)
                done = number == len(files) and file.tell() == len(data)
                assert is_whole(folder / "2") is done
                assert watcher.changed() == (["m"] if done else [])
    assert watcher.changed() == []


def test_a_copy_that_rests_unfinished_is_told_and_told_again_when_it_goes_on(watched, tmp_path):
    watcher, folder = watched
    whole = make_bundle(tmp_path / "elsewhere", "m", "2").directory
    (folder / "2").mkdir()
    assert watcher.changed() == []
    shutil.copy(whole / "model.json", folder / "2")
    assert watcher.changed() == []
    assert watcher.changed() == ["m"], "nothing changes any more: somebody should be told what is missing"
    assert watcher.changed() == []
    shutil.copytree(whole, folder / "2", dirs_exist_ok=True)
    assert watcher.changed() == ["m"]


def test_a_graph_without_a_manifest_is_told_when_it_rests(watched):
    watcher, folder = watched
    graph = (folder / "1/model.onnx").read_bytes()
    (folder.parent / "plain/1").mkdir(parents=True)
    target = folder.parent / "plain/1/model.onnx"
    for size in (1, 100, len(graph)):
        target.write_bytes(graph[:size])
        assert "plain" not in watcher.changed()
    assert watcher.changed() == ["plain"]


def test_what_is_taken_away_and_a_policy_are_told_when_they_rest(watched):
    watcher, folder = watched
    make_bundle(folder.parent, "m", "2")
    make_bundle(folder.parent, "n", "1")
    assert sorted(watcher.changed()) == ["m", "n"]
    (folder / "2/model.onnx").unlink()
    assert watcher.changed() == []
    shutil.rmtree(folder / "2")
    shutil.rmtree(folder.parent / "n")
    (folder / "versions.toml").write_text("active =")
    assert watcher.changed() == []
    (folder / "versions.toml").write_text("active = '1'")
    assert watcher.changed() == ["n"]
    assert watcher.changed() == ["m"]
    assert watcher.changed() == []


def test_a_directory_that_cannot_be_read_for_a_while_is_no_change(watched):
    watcher, folder = watched
    hidden = folder.parent.rename(folder.parent.with_name("hidden"))
    with pytest.raises(OSError, match="models"):
        watcher.changed()
    hidden.rename(folder.parent)
    assert watcher.changed() == []


def test_a_directory_may_be_one_model_with_its_versions_or_one_version(tmp_path):
    make_bundle(tmp_path, "colours", "3")
    make_bundle(tmp_path, "colours", "12")
    [versions] = find_models(Shelf(tmp_path / "colours", "pets"))
    assert (versions.name, versions.versions, versions.directory) == ("pets", ("3", "12"), tmp_path / "colours/12")
    [version] = find_models(Shelf(tmp_path / "colours/3", "pets"))
    assert (version.name, version.versions, version.directory) == ("pets", ("3",), tmp_path / "colours/3")
    assert Watcher(Shelf(tmp_path / "colours/3", "pets")).changed() == []
    (tmp_path / "graph").mkdir()
    shutil.copy(tmp_path / "colours/3/model.onnx", tmp_path / "graph")
    [graph] = find_models(Shelf(tmp_path / "graph", "pets"))
    assert (graph.versions, graph.directory) == (("1",), tmp_path / "graph")
    # Without a name it is a directory of models, as ever.
    assert [folder.name for folder in find_models(Shelf(tmp_path / "colours"))] == ["12", "3"]


def test_one_model_that_is_its_directory_is_seen_to_change(tmp_path):
    make_bundle(tmp_path, "colours", "3")
    watcher = Watcher(Shelf(tmp_path / "colours/3", "pets"))
    (tmp_path / "colours/3/model.onnx").write_bytes(b"other")
    assert watcher.changed() == []
    assert watcher.changed() == ["pets"]
