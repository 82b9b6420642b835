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


def coverage(share, draw, num_runs=300):
    """How often the interval of what `draw` (from a generator) gives holds `share`."""
    hits = 0
    for seed in range(num_runs):
        interval = bootstrap(draw(np.random.default_rng(seed)), num_resamples=200, seed=seed)
        hits += interval.low <= share <= interval.high
    return hits / num_runs


def pictures(rng, num_prompts, share, correlation=0.5, size=4):
    """`size` pictures of each prompt, whose prompts differ in difficulty (beta-binomial)."""
    a = (1 - correlation) / correlation
    right = rng.binomial(size, rng.beta(share * a, (1 - share) * a, num_prompts))
    clusters = [prompt for prompt in range(num_prompts) for _ in range(size)]
    return Task([float(picture < number) for number in right for picture in range(size)], clusters)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    assert 0.91 <= coverage(0.6, lambda rng: Task((rng.random(100) < 0.6).astype(float))) <= 0.99


@pytest.mark.parametrize("share", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [20, 30, 80])
def test_it_covers_the_truth_near_one_too(n, share):
    assert coverage(share, lambda rng: Task((rng.random(n) < share).astype(float))) >= 0.93
    assert coverage(share, lambda rng: pictures(rng, n, share)) >= 0.93
    assert coverage(share, lambda rng: {str(task): pictures(rng, n, share) for task in range(3)}, 150) >= 0.93


def test_mixed_tasks_cover_the_mean_of_their_truths():
    shares = (0.5, 0.99, 0.99, 0.99)

    def drawn(rng):
        return {str(task): Task((rng.random(40) < share).astype(float)) for task, share in enumerate(shares)}

    assert coverage(np.mean(shares), drawn) >= 0.93


def test_all_right_is_as_wide_as_wilson_says():
    """Closed form: of n right ones of n the lower bound is n / (n + z^2); clusters count, not their pictures."""
    bound = 80 / (80 + 1.959964**2)
    for task in (Task([1.0] * 80), Task([1.0] * 320, [n // 4 for n in range(320)]), {n: Task([1.0] * 20) for n in "abcd"}):
        found = bootstrap(task)
        assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(bound)
    none = bootstrap(Task([0.0] * 80))
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(1 - bound)


def test_one_wrong_of_eighty_is_wilson_and_a_maximum_scales_it():
    found = bootstrap(Task([1.0] * 79 + [0.0]))
    assert (found.low, found.high) == pytest.approx((0.9325, 1.0), abs=1e-4), "no narrower than the percentiles either"
    scores = bootstrap(Task([200.0] * 79 + [0.0], maximum=200.0))
    assert (scores.low, scores.high) == pytest.approx((200 * found.low, 200 * found.high))


def test_values_that_are_no_shares_keep_their_percentiles():
    db = np.random.default_rng(0).normal(25, 2, 40)
    found, half = bootstrap(Task(db)), 1.96 * db.std() / math.sqrt(40)
    assert (found.low, found.high) == pytest.approx((db.mean() - half, db.mean() + half), abs=0.1)
    similar = np.clip(np.random.default_rng(0).normal(0.8, 0.02, 40), 0, 1)
    found = bootstrap(Task(similar))
    assert found.high - found.low == pytest.approx(2 * 1.96 * similar.std() / math.sqrt(40), rel=0.1), "not widened to 0s and 1s"


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
    assert (overall.value, overall.n, overall.scaled(2).value) == (0.5, 250, 1.0)
    assert 0.46 < overall.low < 0.49 and 0.5 < overall.high < 0.51, "it is the small task that may have hidden errors"
    varied = bootstrap({"coin": Task(coin(100, 0.5)), "easy": Task([1.0] * 100)})
    alone = bootstrap(Task(coin(100, 0.5)))
    assert 0.5 * (alone.high - alone.low) <= varied.high - varied.low <= 0.6 * (alone.high - alone.low)


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


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([0, 0, 0], 1.0),
        ([1, 0, 0], 1.0),
        ([1, 1, 0, 0], 0.5),
        ([1, -1], 1.0),
        ([1, 1, 1], 0.25),
        ([1, 1, 1, -1], 0.625),  # of 16 sums five are 2 or 4, five are -2 or -4
        ([1] * 10, 2 / 1024),
        ([3, 1, 1], 0.25),  # only all plus and all minus reach 5
        ([3, -1, -1], 1.0),  # all sums are 1, 3 or 5 away
    ],
)
def test_p_value_of_few_differences_counts_the_sign_flips(differences, p_value):
    a, b = [float(max(d, 0)) for d in differences], [float(max(-d, 0)) for d in differences]
    assert paired_bootstrap(Task(a), Task(b), num_resamples=50).p_value == pytest.approx(p_value)


def test_p_value_flips_prompts_not_pictures():
    a, b, prompts = [1.0] * 8, [0.0] * 8, ["x"] * 4 + ["y"] * 4
    assert paired_bootstrap(Task(a, prompts), Task(b, prompts), num_resamples=50).p_value == 0.5
    tasks = [{"s": Task(side[:4], prompts[:4]), "t": Task(side, prompts)} for side in (a, b)]
    assert paired_bootstrap(*tasks, num_resamples=50).p_value == 0.25, "three clusters, those of a task apart"


def test_drawn_flips_agree_with_the_binomial():
    a = np.array([1.0] * 14 + [0.0] * 6 + [0.5] * 30)
    exact = 2 * sum(math.comb(20, k) for k in range(14, 21)) / 2**20
    found = paired_bootstrap(Task(a), Task(1 - a))
    assert found.p_value == pytest.approx(exact, abs=0.01) and found == paired_bootstrap(Task(a), Task(1 - a))
    assert paired_bootstrap(Task([1.0] * 40), Task([0.0] * 40)).p_value == 1 / 10_001


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
