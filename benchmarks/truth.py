"""Does the service say what PyTorch says? Every image of a data set over HTTP, label for label.

    python -m benchmarks.truth cifar10-article --data data/cifar10 --weights runs/cifar10-article
    python -m benchmarks.truth imagenet --data data/imagenet-sample --weights efficientnet-lite0-57934424.pth

Starts a service over `models/`, posts the test images (all images, where the data has no test part) over many
connections, and compares with the PyTorch network on the same files. The figures go to
`benchmarks/results/truth-<model>.json`.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import torch

from app.manifest import Bundle, read_bundle
from app.versions import Shelf, find_models
from benchmarks.server import serving
from training.classifiers import open_classifier, torch_run
from training.data.arrays import decode_picture, read_listing
from training.data.listing import Picture
from training.published import read_network
from training.recipes import make_recipe
from training.servable import Servable

ROOT = Path(__file__).parent.parent
CLIENTS = 32
BATCH = 100


def main() -> None:
    options = parse()
    entry = next(entry for entry in find_models(Shelf(ROOT / "models")) if entry.name == options.model)
    bundle = read_bundle(entry.directory)
    listing = read_listing(options.data).relabelled(bundle.manifest.labels)
    pictures = listing.part("test") or listing.part("all")
    labels = np.array([picture.label for picture in pictures])
    served, seconds = ask_service(bundle, pictures)
    expected = ask_torch(bundle, options.weights, pictures)
    report = {
        "model": f"{options.model}/{entry.version}",
        "data": str(options.data),
        "images": len(pictures),
        "served_accuracy": accuracy(served, labels, 1),
        "torch_accuracy": accuracy(expected, labels, 1),
        "served_top5": accuracy(served, labels, 5),
        "torch_top5": accuracy(expected, labels, 5),
        "labels_that_differ": int((served.argmax(1) != expected.argmax(1)).sum()),
        "largest_difference_of_a_probability": float(np.abs(served - expected).max()),
        "images_per_s": round(len(pictures) / seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
    }
    (ROOT / f"benchmarks/results/truth-{options.model}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="run directory, or published state dict")
    return parser.parse_args()


def ask_service(bundle: Bundle, pictures: tuple[Picture, ...]) -> tuple[np.ndarray, float]:
    """Return the probabilities that the service gives, float32 `[n, classes]`, and the seconds it took."""
    classes = len(bundle.manifest.labels)
    path = f"/models/{bundle.manifest.name}/predict?top_k={classes}"
    with serving() as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(picture: Picture) -> np.ndarray:
            response = client.post(path, content=picture.encoded())
            response.raise_for_status()
            row = np.empty(classes, np.float32)
            for score in response.json()["results"][0]["top"]:
                row[score["index"]] = score["probability"]
            return row

        started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            rows = list(pool.map(ask, pictures))
        return np.stack(rows), time.monotonic() - started


def ask_torch(bundle: Bundle, weights: Path, pictures: tuple[Picture, ...]) -> np.ndarray:
    """Return the probabilities that the PyTorch network gives, float32 `[n, classes]`."""
    cpu = torch.device("cpu")
    if weights.is_dir():
        run = open_classifier(weights, cpu).run
    else:
        recipe = make_recipe(**bundle.manifest.training["recipe"])
        run = torch_run(Servable(read_network(weights, recipe, len(bundle.manifest.labels)), recipe), cpu)
    pixels = np.stack([decode_picture(picture, bundle.manifest.pixels) for picture in pictures])
    return np.concatenate([run(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])


def accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return round(float((best == labels[:, None]).any(axis=1).mean()), 4)


if __name__ == "__main__":
    main()
