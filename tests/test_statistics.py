import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kallm.results.statistics import (
    Variance,
    compare,
    decide,
    find_components,
    find_interval,
    find_score,
    find_wilson,
    flip_signs,
    holm,
    item_error,
)

ONE_STRATUM = np.zeros(60, dtype=np.int64)
ONES = np.ones(60)


def test_the_interval_over_seeds_is_students():
    values = [2.31, 2.35, 2.29, 2.40]
    found = find_interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_one_seed_has_a_mean_and_no_interval():
    found = find_interval([2.31])
    assert (found.mean, found.half, found.n) == (2.31, None, 1)


def test_the_score_is_tokens_weighted_within_a_stratum_and_plain_over_strata():
    values, weights = np.array([[1.0, 2.0, 10.0, 20.0]]), np.array([3.0, 1.0, 1.0, 1.0])
    assert find_score(values, weights, np.zeros(4, dtype=np.int64))[0] == pytest.approx((3 + 2 + 10 + 20) / 6)
    assert find_score(values, weights, np.array([0, 0, 1, 1]))[0] == pytest.approx((5 / 4 + 15) / 2)


def test_equal_weights_in_one_stratum_give_the_classical_standard_error():
    values = np.random.default_rng(1).normal(size=(1, 60))
    assert item_error(values, ONES, ONE_STRATUM) == pytest.approx(stats.sem(values[0]))


def test_weights_give_the_ratio_estimators_standard_error():
    random = np.random.default_rng(2)
    tokens, nll = random.integers(5, 90, 60).astype(float), random.normal(100, 20, 60)
    ratio = nll.sum() / tokens.sum()
    expected = math.sqrt(60 / 59 * ((nll - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert item_error((nll / tokens)[None], tokens, ONE_STRATUM) == pytest.approx(expected)


def test_the_two_parts_follow_from_the_analysis_of_variance():
    values = np.random.default_rng(3).normal(size=(4, 60))
    found = find_components(values, ONES, ONE_STRATUM)
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    rest_square = (rest**2).sum() / (3 * 59)
    item_square = 4 * values.mean(0).var(ddof=1)
    assert found.seeds == pytest.approx(values.mean(1).var(ddof=1) / 4)
    assert found.items == pytest.approx(max(item_square - rest_square, 0) / (4 * 60))
    assert (found.seed_df, found.item_df) == (3, 59)


@pytest.mark.parametrize(("part", "df"), [(Variance(0.04, 0.0, 2, 50), 2), (Variance(0.0, 0.04, 2, 50), 50)])
def test_with_one_part_the_quantile_is_students(part, df):
    assert part.quantile(0.975) == pytest.approx(stats.t.ppf(0.975, df))
    assert part.tail(1.7) == pytest.approx(stats.t.sf(1.7, df), rel=1e-9)
    assert part.tail(-1.7) == pytest.approx(stats.t.cdf(1.7, df), rel=1e-9)


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(1, 20), st.floats(0.55, 1 - 1e-9))
def test_the_tail_is_the_inverse_of_the_quantile(seeds, items, df, probability):
    variance = Variance(seeds, items, df, 500)
    assert variance.tail(variance.quantile(probability)) == pytest.approx(1 - probability, rel=1e-5)


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("seed_share", [0.0, 1.0, 5.0])
def test_the_95_percent_interval_covers_93_to_97_percent(num_seeds, seed_share):
    random = np.random.default_rng([num_seeds, int(10 * seed_share)])
    num_studies, num_items, true = 1000, 60, 0.3
    seeds = random.normal(0, math.sqrt(seed_share * num_seeds / num_items), (num_studies, num_seeds, 1))
    items = random.normal(size=(num_studies, 1, num_items))
    studies = true + seeds + items + random.normal(0, 1.5, (num_studies, num_seeds, num_items))
    covered = 0
    for values in studies:
        variance = find_components(values, ONES, ONE_STRATUM)
        covered += abs(values.mean() - true) <= variance.quantile(0.975) * variance.error
    assert 0.93 <= covered / num_studies <= 0.97


def test_the_interval_excludes_zero_exactly_when_p_is_below_five_percent():
    random = np.random.default_rng(5)
    for shift in np.linspace(0, 0.6, 40):
        found = compare(shift + random.normal(size=(3, 60)), np.zeros((3, 60)), ONES, ONE_STRATUM)
        assert (abs(found.difference) > found.half) == (found.p < 0.05)


def test_equivalence_holds_exactly_when_the_90_percent_interval_lies_inside_the_margin():
    random = np.random.default_rng(6)
    verdicts = set()
    for shift in np.linspace(0, 0.02, 30):
        values = shift + 0.01 * random.normal(size=(5, 60)) + 0.002 * random.normal(size=(5, 1))
        found = compare(values, np.zeros_like(values), ONES, ONE_STRATUM, margin=0.01)
        half = find_components(values, ONES, ONE_STRATUM).quantile(0.95) * found.error
        assert (found.p_equivalent < 0.05) == (abs(found.difference) + half < 0.01)
        verdicts.add(decide(found.p, found.p_equivalent))
    assert verdicts >= {"equivalent", "different"}


def test_a_difference_of_the_detectable_size_is_seen_four_times_in_five():
    random = np.random.default_rng(7)
    probe = 0.1 * np.sqrt(1 / 10 + 1 / 600)
    true = (stats.t.ppf(0.975, 9) + stats.t.ppf(0.8, 9)) * probe
    seen = 0
    for _ in range(1000):
        values = true + 0.1 * random.normal(size=(10, 1)) + 0.1 * random.normal(size=(10, 60))
        seen += compare(values, np.zeros_like(values), ONES, ONE_STRATUM).p < 0.05
    assert seen / 1000 == pytest.approx(0.8, abs=0.05)


def test_one_seed_distinguishes_nothing_unless_neither_side_has_a_seed():
    values = 0.5 + np.random.default_rng(8).normal(size=(1, 60))
    seeded = compare(values, np.zeros_like(values), ONES, ONE_STRATUM, margin=0.01)
    assert (seeded.half, seeded.p, decide(seeded.p, seeded.p_equivalent)) == (None, None, "not distinguished")
    fixed = compare(values, np.zeros_like(values), ONES, ONE_STRATUM, seeded=False)
    assert fixed.p == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue)


def test_sign_flips_agree_with_the_exact_test():
    differences = np.random.default_rng(9).normal(0.4, 1, 12)
    exact = stats.permutation_test(
        (differences,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    found = flip_signs(differences, np.ones(12), np.zeros(12, dtype=np.int64))
    assert found == pytest.approx(exact.pvalue, abs=0.015)
    assert found == flip_signs(differences, np.ones(12), np.zeros(12, dtype=np.int64))


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (125, 250), (250, 250)])
def test_wilson_is_scipys(count, n):
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert find_wilson(count / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_holm_gives_the_known_answer():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
