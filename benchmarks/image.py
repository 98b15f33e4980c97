"""What the images weigh, layer by layer, and how long a container takes to be ready.

make image-check IMAGE_DIR=DIRECTORY    # TARGET=gpu, TARGET=train
python -m benchmarks.image DIRECTORY    # a table, and benchmarks/results/image.json

Reads what these have left there: archives, bills of materials, and the starts that the check has timed. What was
measured before of images that are not there stays, since few disks hold all at once.
"""

import argparse
import json
import re
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import IO, Any

from app.cpus import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/image.json"
STARTS = "starts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    archives = sorted(directory.glob("convoy-*.tar"))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "images": {archive.stem.removeprefix("convoy-"): weighed(archive) for archive in archives},
        "ready_after_s": json.loads((directory / STARTS).read_text()) if (directory / STARTS).exists() else {},
    }
    if RESULTS.exists():
        report = upon(json.loads(RESULTS.read_text()), report)
    RESULTS.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(table(report))


def upon(earlier: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with what an earlier one knows of other images; starts of none of them go."""
    images = earlier["images"] | report["images"]
    starts = earlier["ready_after_s"] | report["ready_after_s"]
    return report | {"images": images, "ready_after_s": {name: starts[name] for name in images if name in starts}}


def weighed(archive: Path) -> dict[str, Any]:
    """Return what an image and its layers weigh, as they are and as a registry holds them, and how much is listed."""
    with tarfile.open(archive) as whole:
        [manifest] = json.load(whole.extractfile("manifest.json"))
        made = json.load(whole.extractfile(manifest["Config"]))
        steps = made["history"]
        names = [_name(step["created_by"]) for step in steps if not step.get("empty_layer")]
        layers = [
            {"of": name, "mb": _mb(whole.getmember(layer).size), "gzip_mb": _mb(_gzipped(whole.extractfile(layer)))}
            for name, layer in zip(names, manifest["Layers"], strict=True)
        ]
    bill = json.loads(archive.with_suffix(".sbom.json").read_text())
    kinds = Counter(part.get("purl", "").partition("/")[0] for part in bill["components"])
    return {
        "revision": made["config"]["Labels"]["org.opencontainers.image.revision"],
        "mb": round(sum(layer["mb"] for layer in layers), 1),
        "gzip_mb": round(sum(layer["gzip_mb"] for layer in layers), 1),
        "layers": layers,
        "packages": {"python": kinds["pkg:pypi"], "debian": kinds["pkg:deb"]},
    }


def _name(step: str) -> str:
    """Return where a layer goes, or what made it."""
    copied = re.search(r"#\(nop\) (?:COPY|ADD) \S+ in (\S+)", step)
    return copied[1] if copied else step.removeprefix("/bin/sh -c ")[:40].strip()


def _gzipped(layer: IO[bytes]) -> int:
    compressor = zlib.compressobj(wbits=31)
    pieces = sum(len(compressor.compress(piece)) for piece in iter(lambda: layer.read(1 << 20), b""))
    return pieces + len(compressor.flush())


def _mb(octets: int) -> float:
    return round(octets / 1e6, 1)


def table(report: dict[str, Any]) -> str:
    lines = ["| image | MB | gzip, MB | layers, MB (gzip) | packages of Python, Debian |", "|---|---|---|---|---|"]
    for name, image in report["images"].items():
        layers = ", ".join(f"{layer['of']} {layer['mb']} ({layer['gzip_mb']})" for layer in image["layers"])
        counts = image["packages"]
        lines.append(
            f"| {name} | {image['mb']} | {image['gzip_mb']} | {layers} | {counts['python']}, {counts['debian']} |"
        )
    return "\n".join([*lines, f"ready after, in seconds: {report['ready_after_s']}"])


if __name__ == "__main__":
    main()
