"""Folders of images: `train/<class>/*` with `test/<class>/*`, or `<class>/*` to be split.

Owns every rule of the layout, and names the file or folder that breaks one. Decodes nothing.
"""

import os
from pathlib import Path

from training.data.listing import TEST, TRAIN, Listing, Picture
from training.errors import DataError
from training.names import is_text

NO_LABEL = -1
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_tree(root: Path, faults: list[DataError] | None = None) -> Listing:
    """List a tree; classes are the folders' names in sorted order. Hidden files and folders are ignored.

    Args:
        root: the folder that holds the classes, or train/ and test/.
        faults: takes what single files and folders have against them, which are then left out; without it the first
            such fault is raised.

    Raises:
        DataError: the tree breaks a rule of the layout.
    """
    folders = {entry.name for entry in _entries(root) if entry.is_dir()}
    if not folders & {TRAIN, TEST}:
        classes = _classes(root, faults)
        return Listing(classes, _pictures(root, root, classes, faults), test=None)
    for missing in {TRAIN, TEST} - folders:
        present = TRAIN if missing == TEST else TEST
        raise DataError(
            f"{root} has {present}/ but no {missing}/: add {missing}/<class>/, "
            f"or give {root / present} as the data to have it split."
        )
    classes = _classes(root / TRAIN, faults)
    tested = _classes(root / TEST, faults)
    _check_same_classes(root, classes, tested, faults)
    return Listing(
        classes,
        _pictures(root, root / TRAIN, classes, faults),
        test=_pictures(root, root / TEST, classes, faults, present=tested),
    )


def read_photos(folder: Path) -> tuple[Picture, ...]:
    """List the images that lie in one folder, without classes; other files are passed over.

    Raises:
        DataError: there is no image, or no such folder.
    """
    found = [entry for entry in _entries(folder) if entry.is_file() and entry.name.lower().endswith(SUFFIXES)]
    if not found:
        raise DataError(f"{folder} holds no .jpg, .jpeg, .png or .webp image.")
    return tuple(_picture(folder, folder, entry, NO_LABEL) for entry in found)


def read_photos_below(folder: Path) -> tuple[Picture, ...]:
    """List the images in a folder and in all folders below it, without classes; other files are passed over.

    Raises:
        DataError: there is no image, or no such folder.
    """
    found: list[Picture] = []
    pending = [folder]
    while pending:
        here = pending.pop()
        entries = _entries(here)
        images = [entry for entry in entries if entry.is_file() and entry.name.lower().endswith(SUFFIXES)]
        found += [_picture(folder, here, entry, NO_LABEL) for entry in images]
        pending += [Path(entry.path) for entry in reversed(entries) if entry.is_dir()]
    if not found:
        raise DataError(f"{folder} holds no .jpg, .jpeg, .png or .webp image.")
    return tuple(found)


def _tell(faults: list[DataError] | None, sentence: str) -> None:
    if faults is None:
        raise DataError(sentence)
    faults.append(DataError(sentence))


def _classes(folder: Path, faults: list[DataError] | None) -> tuple[str, ...]:
    entries = _entries(folder)
    for entry in entries:
        if not entry.is_dir():
            _tell(faults, f"{folder / entry.name} is not in a class folder: move it into {folder}/<class>/.")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise DataError(f"{folder} is empty: it needs one folder of images per class.")
    if len(names) == 1:
        raise DataError(f"{folder} has the single class '{names[0]}': a classifier needs two or more class folders.")
    return tuple(names)


def _check_same_classes(
    root: Path, train: tuple[str, ...], test: tuple[str, ...], faults: list[DataError] | None
) -> None:
    for name in sorted(set(test) ^ set(train)):
        has, lacks = (TEST, TRAIN) if name in test else (TRAIN, TEST)
        _tell(
            faults,
            f"{root / has / name} has no counterpart {root / lacks / name}: train and test need the same classes, "
            "spelt alike.",
        )


def _pictures(
    root: Path,
    folder: Path,
    classes: tuple[str, ...],
    faults: list[DataError] | None,
    present: tuple[str, ...] | None = None,
) -> tuple[Picture, ...]:
    pictures: list[Picture] = []
    for label, name in enumerate(classes):
        if present is not None and name not in present:
            continue
        found = []
        for entry in _entries(folder / name):
            try:
                found.append(_picture(root, folder / name, entry, label))
            except DataError as error:
                if faults is None:
                    raise
                faults.append(error)
        if not found:
            _tell(faults, f"{folder / name} holds no images: add some, or remove the folder.")
        pictures += found
    return tuple(pictures)


def _picture(root: Path, folder: Path, entry: os.DirEntry[str], label: int) -> Picture:
    path = folder / entry.name
    if entry.is_dir():
        raise DataError(f"{path} is a folder inside a class folder: move its images up, or make it a class.")
    if not entry.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path} is not a .jpg, .jpeg, .png or .webp image: remove it from the class folder.")
    try:
        status = entry.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): mend or remove it.") from error
    return Picture(path.relative_to(root).as_posix(), label, f"{status.st_size}.{status.st_mtime_ns}", path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is visible in a folder, in sorted order.

    Raises:
        DataError: it cannot be read, or a name in it cannot be printed or written into a manifest.
    """
    try:
        with os.scandir(folder) as found:
            visible = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read as a folder of images: {error.strerror}.") from error
    for entry in visible:
        if not is_text(entry.name):
            raise DataError(f"{folder} holds {entry.name!a}, whose name is not UTF-8: rename it.")
    return visible
