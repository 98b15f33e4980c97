"""Data checks: what is planted in a small folder is found, all of it, and nothing else."""

import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.bundles import make_bundle
from tests.training.conftest import CLASSES, COLOURS, jpeg
from training import cli
from training.checks.check import check
from training.checks.duplicates import near, same_files, same_pixels
from training.checks.findings import KINDS, Checked, merged
from training.checks.looks import Survey, survey
from training.checks.suspects import confident_joint, find_suspects, groups_of, out_of_fold
from training.data.listing import Picture


def blocks(label: int, number: int, side: int = 32) -> np.ndarray:
    """Draw picture `number` of a class, unlike every other: 8×8 random colours around the class' tint."""
    random = np.random.default_rng([label, number])
    colours = np.array(COLOURS[label]) + random.uniform(-90, 90, (8, 8, 3))
    places = np.arange(side) * 8 // side
    return colours[places][:, places].clip(0, 255).astype(np.uint8)


def draw(root: Path, *parts: tuple[str, int]) -> Path:
    """Write `<root>/<part>/<class>/N.jpg`, as many of each class as a part says."""
    for offset, (part, count) in enumerate(parts):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:03d}.jpg").write_bytes(jpeg(blocks(label, 1000 * (offset + 1) + number)))
    return root


def encoded(image: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def names(checked: Checked, kind: str) -> list[list[str]]:
    return [[checked.survey.pictures[place].name for place in finding.places] for finding in checked.of_kind(kind)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything that can be wrong with a file."""
    root = tmp_path_factory.mktemp("data") / "a <b>insects</b>"
    draw(root, ("train", 24), ("test", 6))
    ant, bee, tested = root / "train/ant", root / "train/bee", root / "test/ant"
    shutil.copy(ant / "000.jpg", ant / "same.jpg")
    shutil.copy(ant / "001.jpg", tested / "leak.jpg")
    shutil.copy(ant / "002.jpg", bee / "contradiction.jpg")
    (ant / "picture.png").write_bytes(encoded(blocks(0, 500), "PNG"))
    (ant / "pixels.webp").write_bytes(encoded(blocks(0, 500), "WEBP", lossless=True))
    mirrored = np.asarray(Image.open(ant / "003.jpg"))[:, ::-1]
    (tested / "mirrored.jpg").write_bytes(encoded(mirrored, "JPEG", quality=90))
    whole = (ant / "004.jpg").read_bytes()
    (ant / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (bee / "empty.jpg").write_bytes(b"")
    (bee / "text.png").write_text("no image")
    (bee / "<script>.jpg").write_bytes(encoded(blocks(1, 501), "PNG"))
    frames = [Image.fromarray(blocks(1, 502 + number)) for number in range(2)]
    frames[0].save(bee / "animated.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(blocks(1, 505)).convert("CMYK").save(bee / "cmyk.jpg")
    Image.fromarray(blocks(1, 506)).convert("RGBA").save(bee / "transparent.png")
    Image.fromarray(blocks(1, 507, 128)[:32]).save(bee / "wide.png")
    Image.fromarray(blocks(1, 508, 8)).save(bee / "tiny.png")
    Image.new("RGB", (32, 32), (9, 9, 9)).save(bee / "blank.png")
    middle = len(whole) * 2 // 3
    (ant / "guessed.jpg").write_bytes(whole[:middle] + bytes(20) + b"\xff\xd9")
    (bee / "notes.txt").write_text("no image either")
    (root / "train/stray.jpg").write_bytes(whole)
    return root


@pytest.fixture(scope="module")
def checked(data: Path) -> Checked:
    return check(data, model=None, test_fraction=0.2, seed=0)


def test_every_planted_fault_is_found_and_no_other(checked: Checked):
    assert {kind: names(checked, kind) for kind in KINDS if checked.of_kind(kind)} == {
        "layout": [[], []],
        "broken": [["train/ant/cut.jpg"], ["train/bee/empty.jpg"], ["train/bee/text.png"]],
        "leak": [["train/ant/001.jpg", "test/ant/leak.jpg"]],
        "contradiction": [["train/ant/002.jpg", "train/bee/contradiction.jpg"]],
        "near-leak": [["train/ant/003.jpg", "test/ant/mirrored.jpg"]],
        "guessed": [["train/ant/guessed.jpg"]],
        "suffix": [["train/bee/<script>.jpg"]],
        "animated": [["train/bee/animated.webp"]],
        "blank": [["train/bee/blank.png"]],
        "tiny": [["train/bee/tiny.png"]],
        "duplicate": [["train/ant/000.jpg", "train/ant/same.jpg"], ["train/ant/picture.png", "train/ant/pixels.webp"]],
        "cmyk": [["train/bee/cmyk.jpg"]],
        "transparent": [["train/bee/transparent.png"]],
        "aspect": [["train/bee/wide.png"]],
    }
    assert not checked.is_fit
    assert [finding.sentence.partition("train")[2] for finding in checked.of_kind("layout")] == [
        f"/stray.jpg is not in a class folder: move it into {checked.data}/train/<class>/.",
        "/bee/notes.txt is not a .jpg, .jpeg, .png or .webp image: remove it from the class folder.",
    ]


def test_strict_ends_with_one_and_the_report_is_whole_and_safe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["check", "--data", str(data), "--strict", "--no-near", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "do not train on them before the errors are mended" in told
    assert all(f"train/{name}" in told for name in ("ant/cut.jpg", "bee/empty.jpg", "bee/text.png", "stray.jpg"))
    record = json.loads((tmp_path / "out/check.json").read_text())
    page = (tmp_path / "out/report.html").read_text()
    assert not record["fit_to_train_on"]
    assert record["counts"]["test"] == {"ant": 8, "bee": 6, "cow": 6}
    assert {entry["kind"]: entry["count"] for entry in record["findings"]}["broken"] == 3
    assert "<script>" not in page and "<b>insects" not in page
    assert "train/bee/&lt;script&gt;.jpg" in page
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,|#)', page)
    shown = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(shown) == len(set(re.findall(r"<figure><img", page))) * page.count("<figure><img")


def test_sound_data_is_fit_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = draw(tmp_path / "sound", ("", 30))
    assert cli.main(["check", "--data", str(root), "--strict", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fit_to_train_on"] and record["findings"] == []
    assert record["division"] == "drawn as training draws it: 20% of every class held out, seed 0"
    assert record["counts"] == {"train": dict.fromkeys(("ant", "bee", "cow"), 24)} | {
        "test": dict.fromkeys(("ant", "bee", "cow"), 6)
    }


def test_small_and_skewed_classes_are_told(tmp_path: Path):
    root = draw(tmp_path / "skewed", ("", 32))
    for number in range(1, 32):
        (root / f"cow/{number:03d}.jpg").unlink()
    found = check(root, None, 0.2, 0, with_near=False)
    assert found.division == "not divided"
    assert [finding.sentence for finding in found.findings] == [
        "The class 'cow' has one image, and needs two to be split into train and test: add images, or give the data a "
        "train/ and a test/ folder.",
        "cow: 1 to train on.",
        "ant has 32 images to train on, cow has 1.",
    ]


def test_an_archives_pixels_are_compared_too():
    pictures = [Picture(f"p/{number}", 0, "", blocks(0, number % 3)) for number in range(5)]
    surveyed = survey(pictures)
    assert same_files(surveyed) == [(0, 3), (1, 4)]
    assert same_pixels(surveyed) == []


def test_groups_of_the_same_pixels_take_in_the_copies_of_their_files():
    assert merged([(0, 4), (2, 6), (3, 5)], [(0, 2)]) == [(0, 2, 4, 6), (3, 5)]


def test_near_duplicates_do_not_depend_on_the_order_of_rows_and_columns(monkeypatch: pytest.MonkeyPatch):
    """Every pair is compared, whatever the tiles; and shortened vectors lose none."""
    random = np.random.default_rng(0)
    originals = random.integers(0, 256, (40, 16, 16, 3))
    altered = (originals * 0.8 + random.normal(0, 12, originals.shape) + 20).clip(0, 255)
    altered[::2] = altered[::2, :, ::-1]
    thumbs = np.concatenate([originals, altered]).astype(np.uint8)[random.permutation(80)]
    surveyed = Survey((), (), thumbs)
    found = sorted(group.places for group in near(surveyed, range(80)))
    monkeypatch.setattr("training.checks.duplicates.ROWS", 7)
    monkeypatch.setattr("training.checks.duplicates.COLUMNS", 11)
    assert sorted(group.places for group in near(surveyed, range(80))) == found
    assert len(found) == 40 and all(len(group) == 2 for group in found)


# ---------------------------------------------------------------- labels


def test_the_confident_joint_is_that_of_the_papers_definition():
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.1, 0.9], [0.9, 0.1], [0.4, 0.6]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    # Thresholds: (0.9 + 0.5 + 0.2) / 3 = 0.53 for label 0, (0.9 + 0.1 + 0.6) / 3 = 0.53 for label 1.
    joint, probable = confident_joint(probabilities, labels)
    assert probable.tolist() == [0, -1, 1, 1, 0, 1]
    assert joint.tolist() == [[1, 1], [1, 2]]
    found = find_suspects(probabilities, labels)
    assert [(suspect.place, suspect.suggested) for suspect in found] == [(4, 0), (2, 1)]


def test_flipped_labels_are_found_on_features_that_tell_the_classes_apart():
    random = np.random.default_rng(3)
    truth = np.repeat(np.arange(4), 60)
    features = (np.eye(4)[truth] * 4 + random.normal(0, 0.7, (240, 4))).astype(np.float32)
    flipped = random.choice(240, 8, replace=False)
    labels = truth.copy()
    labels[flipped] = (labels[flipped] + 1) % 4
    found = find_suspects(out_of_fold(features, labels, np.arange(240), 4), labels)
    # One whose true label is less probable than on average among that label's pictures is not suspected.
    assert len(found) >= 6 and {suspect.place for suspect in found} <= set(flipped.tolist())
    assert all(suspect.suggested == truth[suspect.place] for suspect in found)


def test_copies_of_a_picture_do_not_vouch_for_its_wrong_label():
    """They are left out of the fit together."""
    random = np.random.default_rng(4)
    truth = np.repeat(np.arange(2), 40)
    features = np.hstack([np.eye(2)[truth] * 4, random.normal(0, 1, (80, 60))]).astype(np.float32)
    features[1:5] = features[0]
    labels = truth.copy()
    labels[:5] = 1
    together = groups_of(80, [(0, 1, 2, 3, 4)])
    found = find_suspects(out_of_fold(features, labels, together, 2), labels)
    assert {suspect.place for suspect in found} >= set(range(5))


def test_labels_are_judged_by_a_bundles_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = flat_bundle(tmp_path / "models")
    root = draw(tmp_path / "flipped", ("", 30))
    (root / "ant/007.jpg").rename(root / "bee/ant-007.jpg")
    assert cli.main(["check", "--data", str(root), "--model", str(model), "--json", "--strict"]) == 0
    record = json.loads(capsys.readouterr().out)
    (entry,) = (entry for entry in record["findings"] if entry["kind"] == "suspect")
    assert [item["pictures"][0]["name"] for item in entry["items"]] == ["bee/ant-007.jpg"]
    assert entry["items"][0]["suggested"] == "ant"
    assert record["settings"]["labels"]["judged"] == 90


def test_a_class_too_small_to_judge_is_left_out_and_too_few_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = flat_bundle(tmp_path / "models")
    root = draw(tmp_path / "few", ("", 4))
    assert cli.main(["check", "--data", str(root), "--model", str(model)]) == 2
    assert "classes of at least 5 images, and the data has 0" in capsys.readouterr().err


def flat_bundle(models: Path) -> Path:
    """A bundle whose features are colours: classes of the tiny data sets are tints."""
    return make_bundle(models).directory


def test_a_near_copy_of_another_size_is_found(tmp_path: Path):
    image = Image.fromarray(blocks(0, 1, 64))
    small, large = tmp_path / "small.jpg", tmp_path / "large.jpg"
    small.write_bytes(jpeg(np.asarray(image.resize((40, 40)))))
    large.write_bytes(jpeg(np.asarray(image.resize((200, 200)))))
    surveyed = survey([Picture(path.name, 0, "", path) for path in (small, large)])
    assert [group.places for group in near(surveyed, range(2))] == [(0, 1)]
