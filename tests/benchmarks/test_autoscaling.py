"""The autoscaler's algorithm, held against what Kubernetes documents, and the closed loop on made-up pods."""

import itertools
import json
import random
import re

import pytest

from benchmarks.autoscaling import manifests
from benchmarks.autoscaling.hpa import Autoscaler, Direction, by_pods, by_total
from benchmarks.autoscaling.manifests import Fallback, Scaler
from benchmarks.autoscaling.pods import Level, Moment, Pod, Sample, rates, read_levels
from benchmarks.autoscaling.scenarios import BEARABLE, RECORDING, RESULTS, TURNS
from benchmarks.autoscaling.simulate import World, count_turns, simulate

ANY = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Percent", "value": 10_000, "periodSeconds": 15}]}


@pytest.mark.parametrize(
    ("current", "average", "wanted"),
    [
        (2, 0.2, 4),  # "if the current metric value is 200m, and the desired value is 100m, … will be doubled"
        (2, 0.05, 1),  # "if the current value is instead 50m, you'll halve the number of replicas"
        (7, 0.11, 7),  # "skips any scaling action if the ratio is sufficiently close to 1.0 (… by default 0.1)"
        (7, 0.09, 7),
        (10, 0.112, 12),
        (3, 0.12, 4),
    ],
)
def test_documented_ratios(current, average, wanted):
    assert by_pods(current, [average] * current, 0.1) == wanted
    assert by_total(current, average * current, 0.1) == wanted


def test_a_starting_pod_does_nothing_on_the_way_up():
    # Three of six have 8, the target is 4: twice as many of three is what there is by now.
    assert by_pods(6, [8, 8, 8], 4) == 6
    assert by_pods(4, [12, 12, 12], 4) == 9
    assert by_pods(6, [9, 9, 9, 9, 9], 4) == 12
    # KEDA's metric is a sum, which knows no pods.
    assert by_total(6, 3 * 8, 4) == 6


def test_a_starting_pod_does_its_part_on_the_way_down():
    assert by_pods(4, [1, 1], 4) == 3
    assert by_pods(4, [3.5, 3.5, 3.5], 4) == 4


def test_no_pod_has_a_figure_so_nothing_changes():
    assert by_pods(5, [], 4) == 5


def test_the_policy_that_changes_most_counts():
    # The documentation's: 80 replicas to 10, by 10 % or 4 pods a minute; 72 after the first step, 64 after the second.
    behavior = {
        "scaleDown": {
            "stabilizationWindowSeconds": 0,
            "policies": [
                {"type": "Pods", "value": 4, "periodSeconds": 60},
                {"type": "Percent", "value": 10, "periodSeconds": 60},
            ],
        }
    }
    autoscaler, replicas, seen = Autoscaler(1, 100, behavior), 80, []
    for minute in range(9):
        replicas = autoscaler.decide(60.0 * minute, replicas, 10)
        seen.append(replicas)
    # "When the number of replicas falls below 40 the first policy is applied and 4 replicas will be reduced at a time."
    assert seen == [72, 64, 57, 51, 45, 40, 36, 32, 28]


def test_what_was_done_within_the_period_counts():
    behavior = {"scaleDown": {**ANY, "policies": [{"type": "Pods", "value": 4, "periodSeconds": 60}]}}
    autoscaler = Autoscaler(1, 100, behavior)
    assert autoscaler.decide(0, 20, 1) == 16
    assert [autoscaler.decide(15.0 * sync, 16, 1) for sync in (1, 2, 3)] == [16, 16, 16]
    assert autoscaler.decide(60, 16, 1) == 12


def test_the_least_change_can_be_selected_and_a_direction_switched_off():
    policies = [{"type": kind, "value": value, "periodSeconds": 60} for kind, value in (("Pods", 1), ("Percent", 50))]
    down = {"stabilizationWindowSeconds": 0, "policies": policies}
    assert Autoscaler(1, 100, {"scaleDown": down}).decide(0, 20, 1) == 10
    assert Autoscaler(1, 100, {"scaleDown": down | {"selectPolicy": "Min"}}).decide(0, 20, 1) == 19
    assert Autoscaler(1, 100, {"scaleDown": down | {"selectPolicy": "Disabled"}}).decide(0, 20, 1) == 20


def test_down_goes_to_the_most_that_was_recommended_within_the_window():
    autoscaler = Autoscaler(1, 100, {"scaleUp": ANY, "scaleDown": {"stabilizationWindowSeconds": 300}})
    replicas, seen = 8, []
    for sync, wanted in enumerate([8, 5, 6, 4] + [2] * 20):
        replicas = autoscaler.decide(15.0 * sync, replicas, wanted)
        seen.append(replicas)
    # The 8 counts for five minutes, then the 6, then the 4, then the 2.
    assert seen == [8] * 20 + [6, 6, 4, 2]


def test_up_waits_for_the_least_within_its_window():
    autoscaler = Autoscaler(1, 100, {"scaleUp": ANY | {"stabilizationWindowSeconds": 60}})
    assert [autoscaler.decide(15.0 * sync, 2, 2 if sync == 0 else 9) for sync in range(5)] == [2, 2, 2, 2, 9]


def test_defaults_of_the_api_double_or_add_four_within_fifteen_seconds():
    autoscaler = Autoscaler(1, 100, {})
    assert [autoscaler.decide(0, 1, 100), autoscaler.decide(15, 5, 100), autoscaler.decide(30, 10, 100)] == [5, 10, 20]


def test_bounds_hold():
    assert Autoscaler(2, 10, {"scaleUp": ANY}).decide(0, 5, 50) == 10
    assert Autoscaler(2, 10, {"scaleDown": ANY}).decide(0, 5, 0) == 2


def test_what_a_manifest_does_not_say_is_the_default():
    default = Direction(300, (), "Max")
    assert Direction.read(None, default) == default
    assert Direction.read({"selectPolicy": "Min"}, default) == Direction(300, (), "Min")


def test_turns_are_changes_of_direction():
    assert count_turns([2, 2, 4, 4, 6, 6]) == 0
    assert count_turns([2, 4, 4, 3, 3, 5, 5, 2]) == 3


def test_manifests_are_read_as_they_are_written():
    assert (manifests.hpa().least, manifests.hpa().most) == (2, 10)
    assert manifests.hpa().behavior == manifests.keda().behavior
    assert manifests.hpa().target == manifests.keda().target
    assert manifests.keda().fallback == Fallback(3, 4, keeps_more=True)
    assert manifests.scrape_interval_s() == 15


# A pod with room for ten requests a second: one is inside at ten, none are refused; beyond it half of twenty are.
LEVELS = [
    Level(1.0, (Moment(0, 0.1, 1, 0),) * 20),
    Level(10.0, (Moment(1, 1.0, 10, 0),) * 20),
    Level(20.0, (Moment(1, 1.0, 20, 10),) * 20),
]
WORLD = World(LEVELS, scrape_s=15, start_s=30)
HPA = Scaler(1, 10, 0.8, {"scaleDown": {"stabilizationWindowSeconds": 300}}, None)
KEDA = Scaler(1, 10, 0.8, {"scaleDown": {"stabilizationWindowSeconds": 300}}, Fallback(3, 4, keeps_more=True))


def test_rates_are_those_of_the_window():
    samples = [
        Sample(at, 1.0, busy_s=at * 0.5, ran=at * 2.0, refused=0.0) for at in (0.0, 15.0, 30.0, 45.0, 60.0, 75.0)
    ]
    found = rates(samples, 80.0)
    assert found is not None
    assert (found.busy_s, found.ran, found.refused, found.inflight) == (0.5, 2.0, 0.0, 1.0)
    assert rates(samples[:1], 10.0) is None
    assert rates(samples, 130.0) is None


def test_a_pod_refuses_what_a_real_one_did_and_all_beyond_that():
    pod = Pod(LEVELS, random.Random(0), scrape_s=15)
    shares = []
    for rate in (10.0, 20.0, 40.0):
        pod.live(0.0, rate)
        shares.append(pod.refused / rate)
    assert shares == [0.0, 0.5, 0.75]


@pytest.mark.parametrize("scaler", [HPA, KEDA], ids=["HPA", "KEDA"])
def test_replicas_follow_demand_up_and_down(scaler):
    run = simulate(
        [8.0] * 300 + [48.0] * 600 + [8.0] * 900, scaler, WORLD, signal="request seconds", target=0.8, seed=0
    )
    assert run.replicas[290] in (1, 2)
    assert run.replicas[890] in (6, 7)
    assert run.replicas[-1] in (1, 2)
    assert run.turns <= 3
    # Refused while there were too few, and never after.
    assert sum(run.refused[300:450]) > 0 and sum(run.refused[600:]) == 0


def test_refusals_make_the_demand_known_though_no_more_is_inside():
    # Each of two pods has one request inside, at ten a second as at twenty: only the refused tell them apart.
    run = simulate([40.0] * 300, Scaler(2, 10, 0.8, {}, None), WORLD, signal="request seconds", target=0.8, seed=0)
    assert max(run.replicas) >= 5


def test_where_prometheus_is_silent_the_hpa_waits_and_keda_falls_back():
    world = World(LEVELS, scrape_s=15, start_s=30, outage=(60, 600))
    demand = [8.0] * 60 + [48.0] * 540
    waited = simulate(demand, HPA, world, signal="request seconds", target=0.8, seed=0)
    fell_back = simulate(demand, KEDA, world, signal="request seconds", target=0.8, seed=0)
    assert max(waited.replicas[90:]) <= 2
    assert fell_back.replicas[-1] == 4


def test_what_is_kept_is_of_these_manifests_and_they_do_not_flap():
    recording, kept = json.loads(RECORDING.read_text()), json.loads(RESULTS.read_text())
    queries = {"keda": manifests.keda_query(), "adapter": manifests.adapter_query(namespace="convoy", pod="convoy-0")}
    # The figure of pods that nobody has asked yet came after the recording, which is of pods that are asked.
    asked = {name: re.sub(r"^\((.+?) or .+?\) \* \(1 \+", r"\1 * (1 +", query) for name, query in queries.items()}
    assert asked.items() <= recording["queries"].items(), "python -m benchmarks.autoscaling --record"
    assert kept["queries"] == asked
    assert kept["behavior"] == manifests.hpa().behavior, "python -m benchmarks.autoscaling"
    for name in ("HPA", "KEDA"):
        assert kept["scenarios"][name]["turns"] <= TURNS
        assert kept["scenarios"][name]["refused_percent_but_for_burst"] <= 100 * BEARABLE


def test_the_kept_recording_is_a_stair():
    levels = read_levels(json.loads(RECORDING.read_text()))
    assert all(below.rate < above.rate for below, above in itertools.pairwise(levels))
    assert levels[0].refused == 0 < levels[-1].refused
