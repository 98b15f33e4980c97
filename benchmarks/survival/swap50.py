"""Fifty hot swaps under full load: what the service holds after the last is what it held after the fifth."""

from benchmarks.survival.material import PHOTO
from benchmarks.survival.rows import Finding
from benchmarks.survival.swap import CLIENTS, EVERY, MANY, judge_answers, swapped

RSS_GROWTH = 0.05


def run(seconds: float = 2.0) -> Finding:
    """Load the service for `seconds`, then swap fifty times."""
    finding = Finding()
    load = swapped(seconds, swaps=MANY)
    judge_answers(finding, load)
    (early, threads, descriptors), (late, late_threads, late_descriptors) = load.held[EVERY], load.held[MANY]
    finding.told(f"memory after {EVERY} swaps", early / 1e6, "MB")
    finding.told("memory at most, old and new side by side", load.peak_bytes / 1e6, "MB")
    finding.at_most(f"growth of memory from swap {EVERY} to swap {MANY}", late / early - 1, RSS_GROWTH)
    finding.at_most("growth of threads", late_threads - threads, 0)
    finding.at_most("growth of file descriptors", late_descriptors - descriptors, 0)
    finding.evidence = {
        "model": PHOTO,
        "clients": CLIENTS,
        "rss_mb_by_swaps": {count: round(size / 1e6, 1) for count, (size, _, _) in load.held.items()},
    }
    return finding
