"""Bootstrap intervals against closed forms, and the pairing rules."""

import math

import numpy as np
import pytest

from eval.statistics import Task, bootstrap, holm, paired_bootstrap


def coin(n, p, seed=0):
    return (np.random.default_rng(seed).random(n) < p).astype(float)


def test_interval_has_the_width_of_the_normal_approximation():
    interval = bootstrap(Task(coin(400, 0.5)))
    half = 1.96 * math.sqrt(interval.value * (1 - interval.value) / 400)
    assert interval.value - interval.low == pytest.approx(half, rel=0.08)
    assert interval.high - interval.value == pytest.approx(half, rel=0.08)
    assert interval.n == interval.num_clusters == 400


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        interval = bootstrap(Task(coin(100, 0.6, seed)), num_resamples=500, seed=seed)
        hits += interval.low <= 0.6 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_identical_values_within_clusters_widen_it_by_sqrt_of_their_size():
    prompts = coin(150, 0.5)
    repeated, clusters = np.repeat(prompts, 4), np.repeat(np.arange(150), 4)
    single = bootstrap(Task(prompts))
    clustered = bootstrap(Task(repeated, clusters.tolist()))
    naive = bootstrap(Task(repeated))
    assert clustered.value == single.value and clustered.n == 600 and clustered.num_clusters == 150
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.05)
    assert clustered.high - clustered.low == pytest.approx(2 * (naive.high - naive.low), rel=0.1)


def test_overall_is_stratified():
    tasks = {"easy": Task([1.0] * 50), "hard": Task([0.0] * 200)}
    overall = bootstrap(tasks)
    assert (overall.value, overall.low, overall.high, overall.n) == (0.5, 0.5, 0.5, 250)
    assert overall.scaled(2).value == 1.0


def test_same_seed_same_interval():
    assert bootstrap(Task(coin(60, 0.3)), seed=3) == bootstrap(Task(coin(60, 0.3)), seed=3)


def test_pairing_narrows_the_interval_and_finds_a_small_gain():
    a = coin(600, 0.5)
    b = a.copy()
    b[np.flatnonzero(a)[:30]] = 0.0
    paired = paired_bootstrap({"t": Task(a)}, {"t": Task(b)})
    assert paired.interval.value == pytest.approx(0.05) and paired.interval.low > 0 and paired.p_value < 0.01
    unpaired = math.hypot(*(i.high - i.low for i in (bootstrap(Task(a)), bootstrap(Task(b)))))
    assert paired.interval.high - paired.interval.low < unpaired / 2
    assert paired_bootstrap(Task(a), Task(a)).p_value == 1.0


def test_refusals():
    with pytest.raises(ValueError, match="0 items"):
        bootstrap(Task([]))
    with pytest.raises(ValueError, match="give one for each"):
        bootstrap(Task([1.0, 0.0], ["a"]))
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap(Task([1.0]), Task([1.0, 0.0]))
    with pytest.raises(ValueError, match="same benchmark"):
        paired_bootstrap({"a": Task([1.0])}, {"b": Task([1.0])})
    with pytest.raises(ValueError, match="level 95"):
        bootstrap(Task([1.0]), level=95)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
