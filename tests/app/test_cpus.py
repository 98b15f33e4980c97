import pytest

from app import cpus


def cgroup(root, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu_max": "max 100000\n"}, None),
        ({"cpu_max": "150000 100000\n"}, 1.5),
        ({"cpu_max": "50000 100000\n"}, 0.5),
        ({"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}, None),
        ({"cpu__cfs_quota_us": "250000\n", "cpu__cfs_period_us": "100000\n"}, 2.5),
        ({"cpu_max": "garbage"}, None),
    ],
)
def test_quota_of_both_cgroup_versions(tmp_path, files, quota):
    assert cpus.cgroup_quota(cgroup(tmp_path, **files)) == quota


@pytest.mark.parametrize(("affinity", "quota", "usable"), [(8, "150000", 2), (8, "50000", 1), (2, "900000", 2)])
def test_usable_cpus_are_bounded_by_affinity_and_quota(tmp_path, monkeypatch, affinity, quota, usable):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(affinity)))
    assert cpus.usable_cpus(cgroup(tmp_path, cpu_max=f"{quota} 100000")) == usable


def test_without_quota_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5})
    assert cpus.usable_cpus(tmp_path) == 3
