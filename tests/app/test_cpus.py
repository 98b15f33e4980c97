import subprocess
import sys
from pathlib import Path

import pytest

from app import cpus


def v1(root, group, quota, period="100000"):
    folder = root / "cpu" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


def v2(root, group, text):
    (root / group).mkdir(parents=True, exist_ok=True)
    (root / group / "cpu.max").write_text(f"{text}\n")


def own(tmp_path, *lines):
    file = tmp_path / "own-groups"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5), ("garbage", None)]
)
def test_quota_of_version_2(tmp_path, text, quota):
    v2(tmp_path, "", text)
    assert cpus.cgroup_quota(tmp_path, own(tmp_path, "0::/")) == quota


@pytest.mark.parametrize(("microseconds", "quota"), [("-1", None), ("250000", 2.5), ("garbage", None)])
def test_quota_of_version_1(tmp_path, microseconds, quota):
    v1(tmp_path, "", microseconds)
    assert cpus.cgroup_quota(tmp_path, own(tmp_path, "4:cpu,cpuacct:/")) == quota


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpus.cgroup_quota(tmp_path / "none", tmp_path / "neither") is None


def test_own_group_and_its_parents_all_count(tmp_path):
    v2(tmp_path, "system.slice", "150000 100000")
    v2(tmp_path, "system.slice/convoy.service", "max 100000")
    v2(tmp_path, "system.slice/other.service", "10000 100000")
    file = own(tmp_path, "0::/system.slice/convoy.service")
    assert cpus.cgroup_quota(tmp_path, file) == 1.5
    v2(tmp_path, "system.slice/convoy.service", "50000 100000")
    assert cpus.cgroup_quota(tmp_path, file) == 0.5


def test_own_group_of_version_1_is_the_cpu_controllers(tmp_path):
    v1(tmp_path, "", "-1")
    v1(tmp_path, "jobs", "300000")
    v1(tmp_path, "jobs/one", "120000", period="60000")
    v1(tmp_path, "memory-only", "1000")
    file = own(tmp_path, "9:cpuset:/memory-only", "4:memory:/memory-only", "2:cpuacct,cpu:/jobs/one", "0::/")
    assert cpus.cgroup_quota(tmp_path, file) == 2


@pytest.mark.parametrize("path", ["/", "/docker/0123abcd", "/../sibling"])
def test_in_a_container_the_mount_is_the_own_group(tmp_path, path):
    """Whether the kernel tells the path inside the namespace, the host's, or one outside of what is mounted."""
    root = tmp_path / "mount"
    v2(root, "", "50000 100000")
    v2(tmp_path, "sibling", "10000 100000")
    assert cpus.cgroup_quota(root, own(tmp_path, f"0::{path}")) == 0.5
    v1(root, "", "40000")
    assert cpus.cgroup_quota(root, own(tmp_path, f"1:cpu:{path}")) == 0.4


def test_a_path_may_have_colons(tmp_path):
    v2(tmp_path, "a:b", "70000 100000")
    assert cpus.cgroup_quota(tmp_path, own(tmp_path, "0::/a:b")) == 0.7


@pytest.mark.parametrize(("affinity", "quota", "usable"), [(8, "150000", 2), (8, "50000", 1), (2, "900000", 2)])
def test_usable_cpus_are_bounded_by_affinity_and_quota(tmp_path, monkeypatch, affinity, quota, usable):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(affinity)))
    v2(tmp_path, "", f"{quota} 100000")
    assert cpus.usable_cpus(tmp_path, own(tmp_path, "0::/")) == usable


@pytest.mark.parametrize(
    ("usable", "workers", "share"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (8, 0, 1), (2, 4, 1), (1, 0, 1), (1, 1, 1)]
)
def test_several_processes_share_the_processors(monkeypatch, usable, workers, share):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(usable)))
    monkeypatch.setattr(cpus, "cgroup_quota", lambda *_: None)
    assert cpus.share_of_cpus(workers) == share


def test_without_quota_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5})
    assert cpus.usable_cpus(tmp_path, own(tmp_path)) == 3


def test_a_real_group_of_this_machine(tmp_path):
    """A process in a group of its own sees that group's quota; only where groups can be made."""
    group = Path("/sys/fs/cgroup/cpu") / f"convoy-test-{tmp_path.name}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error}")
    try:
        (group / "cpu.cfs_quota_us").write_text("50000")
        enter = f"import os, pathlib; pathlib.Path({str(group)!r}, 'cgroup.procs').write_text(str(os.getpid())); "
        asked = enter + "from app.cpus import cgroup_quota, usable_cpus; print(cgroup_quota(), usable_cpus())"
        said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
        assert said == "0.5 1\n"
    finally:
        group.rmdir()
