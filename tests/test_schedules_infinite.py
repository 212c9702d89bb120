"""Infinite and re-warmed schedules over grids of lengths."""
import math

import pytest
from hypothesis import given, settings, strategies as st
from paretolab.engine.schedules import cosine, infinite, rewarmed

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 200), st.integers(1, 100), st.floats(.05, 1), st.floats(.01, 1))
def test_infinite_comes_down_stays_and_ends(w, c, stable, a, keep, share):
    floor, T = keep*share, w + c + stable + a
    η, endless = infinite(w, c, keep, T, a, floor), infinite(w, c, keep)if keep >= .01 else None
    y = [η(t) for t in range(T + 3)]
    assert all(math.isclose(v, (t + 1)/w) for t,v in enumerate(y[:w])) and math.isclose(y[w], 1)
    assert all(b <= x + 1e-12 for x,b in zip(y[w:], y[w+1:])) and y[w+c:T-a+1] == pytest.approx([keep]*(stable + 1)) and y[T:] == pytest.approx([floor]*3)
    assert [endless(t) for t in range(T - a)] == y[:T-a] and endless(10*T) == pytest.approx(keep)
    ratios = [b/x for x,b in zip(y[T-a:T], y[T-a+1:T+1])]
    assert ratios == pytest.approx([ratios[0]]*a)                                # exponential: equal ratios

@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(20, 200), min_size=1, max_size=4), st.integers(0, 19), st.floats(0, 1))
def test_each_stage_is_a_cosine_from_the_floor(stages, w, floor):
    η, at = rewarmed(tuple(stages), w, floor), 0
    for i,n in enumerate(stages):
        y = [η(at + t) for t in range(n)]
        assert y[w:] == pytest.approx([cosine(n, w, floor)(t) for t in range(w, n)]) and y[w] == pytest.approx(1)
        if i: assert y[:w] == pytest.approx([floor + (1 - floor)*(t + 1)/w for t in range(w)])
        at += n
    assert η(at + 100) == pytest.approx(floor)

@pytest.mark.parametrize("kw, says", [(dict(floor=0), "floor=0,"), (dict(keep=1.1), "keep=1.1"), (dict(keep=.001), "floor=0.01, keep=0.001"), (dict(cooldown=0), "cooldown=0"), (dict(warmup=-1), "warmup=-1"), (dict(steps=100), "end=0"), (dict(end=5), "steps=None, end=5"), (dict(steps=100, end=90), "steps=100, end=90")])
def test_infinite_schedules_that_cannot_be_are_refused(kw, says):
    with pytest.raises(ValueError, match=says): infinite(**{**dict(warmup=10, cooldown=20), **kw})
