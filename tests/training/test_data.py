import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.images import decode
from app.manifest import PixelRecipe
from tests.training.conftest import CLASSES
from training.data import arrays
from training.data.arrays import load_split, read_listing
from training.data.listing import Listing, Origin, Picture, choose_part, kept_from_training, labels_of, validation_of
from training.data.trees import read_tree
from training.errors import DataError

PIXELS = PixelRecipe(height=32, width=32, resize_short_side=32)
DrawTree = Callable[..., Path]


def test_a_split_tree_is_listed_in_the_order_of_its_folders(tree: Path):
    listing = read_listing(tree)
    assert listing.classes == CLASSES
    assert (len(listing.train), len(listing.test or ())) == (60, 30)
    assert listing.train[0].name == "train/ant/000.jpg"
    assert [picture.label for picture in listing.train] == [0] * 20 + [1] * 20 + [2] * 20


def test_a_single_tree_is_split_by_class_and_seed(draw_tree: DrawTree, tmp_path: Path):
    listing = read_listing(draw_tree(tmp_path / "single", parts=(("", 10),)))
    first, again, other = listing.split(0.2, seed=1), listing.split(0.2, seed=1), listing.split(0.2, seed=2)
    assert first == again
    assert first.test != other.test
    for part, count in ((first.train, 8), (first.test or (), 2)):
        assert np.bincount([picture.label for picture in part]).tolist() == [count] * 3
    assert {picture.name for picture in first.part("all")} == {picture.name for picture in listing.train}


def test_hidden_files_are_ignored_and_suffixes_may_be_capitals(draw_tree: DrawTree, tmp_path: Path):
    root = draw_tree(tmp_path / "single", parts=(("", 2),))
    (root / ".DS_Store").touch()
    (root / "ant" / ".thumbs").touch()
    (root / "ant" / "000.jpg").rename(root / "ant" / "000.JPEG")
    assert len(read_listing(root).train) == 6


def test_a_split_is_decoded_as_the_service_decodes(tree: Path, tmp_path: Path):
    pictures = read_listing(tree).part("test")
    split = load_split(pictures, PIXELS, tmp_path)
    assert split.images.shape == (30, 32, 32, 3)
    assert split.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    np.testing.assert_array_equal(split.images[12], decode(pictures[12].encoded(), PIXELS))


def test_the_second_start_decodes_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures = read_listing(tree).part("test")
    first = load_split(pictures, PIXELS, tmp_path)
    monkeypatch.setattr(arrays, "decode", None)
    np.testing.assert_array_equal(load_split(pictures, PIXELS, tmp_path).images, first.images)


def test_a_changed_file_or_recipe_is_decoded_anew(draw_tree: DrawTree, tmp_path: Path):
    root = draw_tree(tmp_path / "single", parts=(("", 2),))
    cache = tmp_path / "cache"
    load_split(read_listing(root).train, PIXELS, cache)
    load_split(read_listing(root).train, PIXELS.model_copy(update={"interpolation": "bicubic"}), cache)
    shutil.copyfile(root / "bee" / "000.jpg", root / "ant" / "000.jpg")
    os.utime(root / "ant" / "000.jpg", ns=(1, 1))
    changed = load_split(read_listing(root).train, PIXELS, cache)
    assert len(list(cache.iterdir())) == 3
    np.testing.assert_array_equal(changed.images[0], changed.images[2])


def missing(root: Path) -> None:
    shutil.rmtree(root)


def no_test_part(root: Path) -> None:
    shutil.rmtree(root / "test")


def class_only_in_test(root: Path) -> None:
    shutil.copytree(root / "test" / "ant", root / "test" / "Ant2")


def class_only_in_train(root: Path) -> None:
    shutil.rmtree(root / "test" / "bee")


def empty_class(root: Path) -> None:
    for file in (root / "train" / "bee").iterdir():
        file.unlink()


def empty_part(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def one_class(root: Path) -> None:
    for name in ("bee", "cow"):
        shutil.rmtree(root / "train" / name)


def stray_file(root: Path) -> None:
    (root / "train" / "stray.jpg").touch()


def other_file(root: Path) -> None:
    (root / "train" / "ant" / "notes.txt").touch()


def nested_folder(root: Path) -> None:
    (root / "train" / "ant" / "more").mkdir()


def plain_file(root: Path) -> None:
    shutil.rmtree(root)
    root.touch()


def broken_image(root: Path) -> None:
    file = root / "train" / "cow" / "007.jpg"
    file.write_bytes(file.read_bytes()[:-200])


def text_as_image(root: Path) -> None:
    (root / "train" / "cow" / "007.jpg").write_text("not an image")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (missing, "{root} does not exist: give --data a folder of class folders or a CIFAR-10 archive."),
        (plain_file, "{root} is neither a folder of class folders nor a CIFAR-10 archive (.tar.gz)."),
        (no_test_part, "{root} has train/ but no test/: add test/<class>/, or give {root}/train as the data to"),
        (class_only_in_test, "{root}/test/Ant2 has no counterpart {root}/train/Ant2: train and test need the same"),
        (class_only_in_train, "{root}/train/bee has no counterpart {root}/test/bee: train and test need the same"),
        (empty_class, "{root}/train/bee holds no images: add some, or remove the folder."),
        (empty_part, "{root}/train is empty: it needs one folder of images per class."),
        (one_class, "{root}/train has the single class 'ant': a classifier needs two or more class folders."),
        (stray_file, "{root}/train/stray.jpg is not in a class folder: move it into {root}/train/<class>/."),
        (other_file, "{root}/train/ant/notes.txt is not a .jpg, .jpeg, .png or .webp image: remove it"),
        (nested_folder, "{root}/train/ant/more is a folder inside a class folder: move its images up"),
        (broken_image, "{root}/train/cow/007.jpg: The JPEG image is damaged or incomplete"),
        (text_as_image, "{root}/train/cow/007.jpg: The data is not a JPEG, PNG or WebP image. Replace or remove it."),
    ],
)
def test_what_breaks_the_layout_is_named(
    draw_tree: DrawTree, tmp_path: Path, spoil: Callable[[Path], None], sentence: str
):
    root = draw_tree(tmp_path / "insects", parts=(("train", 8), ("test", 2)))
    spoil(root)
    with pytest.raises(DataError) as caught:
        load_split(read_listing(root).part("train"), PIXELS, tmp_path / "cache")
    assert caught.value.message.startswith(sentence.format(root=root))
    assert not list((tmp_path / "cache").glob("*"))


def test_a_class_of_one_image_cannot_be_split(draw_tree: DrawTree, tmp_path: Path):
    root = draw_tree(tmp_path / "single", parts=(("", 2),))
    (root / "bee" / "000.jpg").unlink()
    with pytest.raises(DataError, match="The class 'bee' has one image, and needs two"):
        read_listing(root).split(0.2, seed=0)


def test_a_class_that_the_model_does_not_know_is_named(tree: Path):
    with pytest.raises(DataError, match="no label 'cow'"):
        read_listing(tree).relabelled(("ant", "bee", "dog"))


def test_data_may_hold_some_of_a_models_labels(tree: Path):
    listing = read_listing(tree).relabelled(("zebra", "cow", "bee", "ant"))
    assert sorted({picture.label for picture in listing.train}) == [1, 2, 3]
    assert listing.train[0].label == 3


def test_a_cache_that_cannot_be_written_is_named(tree: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written .*--cache-dir"):
        load_split(read_listing(tree).part("test"), PIXELS, tmp_path / "file" / "cache")


def test_a_name_that_is_not_utf8_is_refused(draw_tree: DrawTree, tmp_path: Path):
    root = draw_tree(tmp_path / "single", parts=(("", 2),))
    odd = root / "ant" / os.fsdecode(b"caf\xe9.jpg")
    (root / "ant" / "000.jpg").rename(odd)
    with pytest.raises(DataError, match=r"single/ant holds 'caf\\udce9\.jpg', whose name is not UTF-8: rename it\."):
        read_listing(root)
    odd.rename(root / "ant" / "000.jpg")
    (root / "ant").rename(root / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match="whose name is not UTF-8"):
        read_listing(root)


def origin_of(root: Path, seed: int = 0) -> Origin:
    return Origin(str(root), read_listing(root).split(0.2, seed).digest, 0.2, seed)


def test_the_data_of_the_training_is_measured_on_what_was_held_out(draw_tree: DrawTree, tmp_path: Path):
    root = draw_tree(tmp_path / "single", parts=(("", 10),))
    listing, origin = read_listing(root), origin_of(root, seed=3)
    held_out = listing.split(0.2, 3).test
    assert choose_part(listing, root, origin) == ("test", held_out, "a held-out 20%: 6 of 30 images")
    assert choose_part(listing, tmp_path / "moved", origin)[0] == "test"
    assert choose_part(listing, root, origin, "train")[2] == "all but a held-out 20%: 24 of 30 images"
    assert choose_part(listing, root, origin, "all")[2] == "all images"


def test_data_that_has_grown_since_the_training_is_not_taken_for_unseen(draw_tree: DrawTree, tmp_path: Path):
    root = draw_tree(tmp_path / "single", parts=(("", 10),))
    origin = origin_of(root)
    shutil.copyfile(root / "ant" / "000.jpg", root / "ant" / "more.jpg")
    listing = read_listing(root)
    for choose in (lambda: choose_part(listing, root, origin), lambda: kept_from_training(listing, tmp_path, origin)):
        with pytest.raises(DataError, match=r"does not hold the very images .*: restore it, train anew, or"):
            choose()
    assert choose_part(listing, root, origin, "all")[2] == "all images"


def test_data_of_another_origin_is_measured_whole(draw_tree: DrawTree, tmp_path: Path, tree: Path):
    root, other = (draw_tree(tmp_path / name, parts=(("", count),)) for name, count in (("single", 10), ("other", 1)))
    listing = read_listing(other)
    for origin in (origin_of(root), Origin()):
        assert choose_part(listing, other, origin) == ("all", listing.train, "all images")
    assert choose_part(read_listing(root), root, Origin(), "test")[2] == "a held-out 20%: 6 of 30 images"
    assert choose_part(read_listing(tree), tree, Origin())[2] == "the test part: 30 of 90 images"


def test_decoding_takes_the_processors_that_it_may_use(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(arrays, "usable_cpus", lambda: asked.append(1) or 1)
    load_split(read_listing(tree).part("test"), PIXELS, tmp_path)
    assert asked


def listing_of(*counts: int) -> Listing:
    """A listing with so many train pictures of each class, and one test picture."""
    pixels = np.zeros((1, 1, 3), np.uint8)
    train = [Picture(f"{label}/{n}", label, "", pixels) for label, count in enumerate(counts) for n in range(count)]
    return Listing(tuple("abcdefg"[: len(counts)]), tuple(train), test=(Picture("t", 0, "", pixels),))


def test_a_validation_part_is_cut_from_train_class_by_class_and_the_same_every_time():
    listing = listing_of(40, 10, 3, 1)
    rest, held_out = listing.hold_out(0.2, seed=5)
    assert np.bincount(labels_of(held_out), minlength=4).tolist() == [8, 2, 1, 0]
    assert sorted(p.name for p in (*rest.train, *held_out)) == sorted(p.name for p in listing.train)
    assert rest.test == listing.test
    assert listing.hold_out(0.2, seed=5) == (rest, held_out)
    assert listing.hold_out(0.2, seed=6)[1] != held_out
    assert listing.hold_out(0, seed=5) == (listing, ())
    assert np.bincount(labels_of(listing.hold_out(0.99, seed=5)[0].train)).tolist() == [1, 1, 1, 1]


def test_where_nothing_can_be_held_out_nothing_is_validated_in_silence():
    with pytest.raises(DataError, match="No class has two images to train on, so none can be held out"):
        listing_of(1, 1).hold_out(0.2, seed=5)


def test_a_link_to_nothing_is_a_fault_of_the_data(tmp_path: Path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").symlink_to("nowhere.jpg")
    faults: list[DataError] = []
    read_tree(tmp_path, faults)
    link = tmp_path / "ant" / "1.jpg"
    assert faults[0].message == f"{link} cannot be read (No such file or directory): mend or remove it."


def test_what_was_held_out_is_told_from_the_data_of_the_training_alone():
    listing = listing_of(20, 20)
    origin = Origin("data", listing.digest, validation_fraction=0.25, seed=3)
    assert validation_of(listing, Path("data"), origin) == listing.hold_out(0.25, 3)[1]
    assert validation_of(listing, Path("data"), replace(origin, validation_fraction=0.0)) == ()
    with pytest.raises(DataError, match="data does not hold the very images that the model was trained on"):
        validation_of(listing_of(20, 21), Path("data"), origin)
