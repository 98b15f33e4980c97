"""What images weigh: of those that were not weighed again, the earlier figures stay."""

from benchmarks.image import upon


def test_another_image_s_figures_stay_and_stale_starts_go():
    earlier = {
        "date": "2026-11-01",
        "images": {"cpu": {"mb": 1.0}, "gpu": {"mb": 2.0}},
        "ready_after_s": {"1 worker": 9.0, "cpu": {"1 worker": 3.0}, "gpu": {"1 worker": 4.0}},
    }
    report = {
        "date": "2026-11-24",
        "images": {"gpu": {"mb": 5.0}, "train": {"mb": 7.0}},
        "ready_after_s": {"gpu": {"1 worker": 6.0}},
    }
    assert upon(earlier, report) == {
        "date": "2026-11-24",
        "images": {"cpu": {"mb": 1.0}, "gpu": {"mb": 5.0}, "train": {"mb": 7.0}},
        "ready_after_s": {"cpu": {"1 worker": 3.0}, "gpu": {"1 worker": 6.0}},
    }
