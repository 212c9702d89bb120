"""The scaling law of rounding errors: fits recover, agree with a general minimizer, and refuse what has no answer."""
from itertools import product
import numpy as np, pytest
from paretolab.quantizers.scaling import Law, bootstrap, fit

N, D, G = map(np.array, zip(*product((1e4, 3e4, 2e5), (1e5, 4e5, 1e6), (4, 16, 64))))


@pytest.mark.parametrize("seed", range(6))
def test_exact_errors_give_the_law(seed):
    r = np.random.default_rng(seed)
    law = Law(float(10**r.uniform(-3, 3)), *map(float, r.uniform(-1, 1, 3)))
    at = r.permutation(len(N))[:12]
    found = fit(N[at], D[at], G[at], law(N[at], D[at], G[at]))
    assert [found.k, found.γ_N, found.γ_D, found.γ_G] == pytest.approx([law.k, law.γ_N, law.γ_D, law.γ_G], rel=1e-6, abs=1e-9)


def test_a_general_minimizer_ends_at_the_same():
    optimize = pytest.importorskip("scipy.optimize")
    δ = Law(2., .4, .2, .7)(N, D, G)*np.exp(.3*np.random.default_rng(1).standard_normal(len(N)))
    square = lambda c: np.square(np.log(δ) - np.log(Law(np.exp(c[0]), *c[1:])(N, D, G))).sum()
    c = optimize.minimize(square, [0, .1, .1, .1], method="Nelder-Mead", options=dict(maxiter=20000, maxfev=20000, xatol=1e-9, fatol=1e-13)).x
    l = fit(N, D, G, δ)
    assert [np.log(l.k), l.γ_N, l.γ_D, l.γ_G] == pytest.approx(c, abs=1e-4)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    law, hits = Law(2., .4, .2, .7), 0
    for seed in range(40):
        δ = law(N, D, G)*np.exp(.2*np.random.default_rng(seed).standard_normal(len(N)))
        low, high = np.quantile(bootstrap(N, D, G, δ, 100, seed), (.05, .95), axis=0)
        hits += sum(l <= t <= h for l, t, h in zip(low[1:], (.4, .2, .7), high[1:]))
    assert 90 <= hits <= 118                                         # of 120; 90 % would be 108, resampling 27 runs is a little too sure


def test_draws_are_repeatable_and_differ():
    δ = Law(2., .4, .2, .7)(N, D, G)*np.exp(.2*np.random.default_rng(0).standard_normal(len(N)))
    a, b, c = (bootstrap(N, D, G, δ, 10, s) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and len(np.unique(a, axis=0)) == 10


@pytest.mark.parametrize("δ, sentence", [(np.r_[np.ones(26), 0.], "got 1 of 27, the least 0"), (np.full(27, np.nan), "got 27 of 27"), (np.ones(5), "27, 27, 27 and 5")])
def test_what_is_refused(δ, sentence):
    with pytest.raises(ValueError, match=sentence): fit(N, D, G, δ)
