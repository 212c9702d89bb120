"""Objectives and curricula: every token accounted for, the same in parts, after a resume, and from a log."""
from collections import Counter

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import fit
from paretolab.engine.schedules import cosine
from paretolab.engine.steer import Replay
from paretolab.mixers.curricula import Conditioned, Stages, replay
from paretolab.mixers.objectives import UL2, Denoiser, Objective, denoise, meap
from paretolab.mixers.spans import Picked
from paretolab.models.mobilellm import MobileLLM, Shape
from small_runs import Text

torch.set_num_threads(1)
V = 40

def model(vocab=V + 3 + 4): torch.manual_seed(0); return MobileLLM(Shape(vocab=vocab, dim=16, ff=16, layers=1, heads=2, kv_heads=1, context=32))
def stream(domains="ab", batch=6): return MixedStream({d: Text(np.random.default_rng(i).integers(0, V, 2000)) for i,d in enumerate(domains)}, {d: 1/len(domains) for d in domains}, batch, 32)
def run(folder, hooks, steps=4, accumulate=1, s=None):
    m, s = model(), s or stream(); log = fit(m, s, torch.optim.AdamW(m.parameters(), lr=1e-3), cosine(4), hooks(s) if callable(hooks) else hooks, steps=steps, run=folder, accumulate=accumulate); return m, log
same = lambda a, b: all(torch.equal(x, y) for x,y in zip(a.parameters(), b.parameters()))
mixture = lambda seed=0: Objective([lambda x, rng, d=d: denoise(x, d, V, rng) for d in UL2], seed)

# Objectives

@settings(max_examples=200, deadline=None)
@given(st.integers(12, 300), st.sampled_from(UL2 + (Denoiser(0, .3, 2), Denoiser(2, .1, 5.5))), st.integers(0, 10**6))
def test_a_denoiser_keeps_every_token_and_every_count(L, d, seed):
    rng = np.random.default_rng(seed); x = rng.integers(0, V, L + 1); u, y, w = denoise(x, d, V, rng); n, m, k = d.counts(L); z = np.r_[u, y[-1]]
    assert len(u) == len(y) == len(w) == L and np.array_equal(u[1:], y[:-1]) and u[0] == V + d.mode
    seen = Counter(z[z < V].tolist()); assert seen == Counter(x[:n].tolist())                       # each token once: given or asked for
    assert (z >= V + 3).sum() == 2*k and sorted(z[z >= V + 3].tolist()) == sorted(2*list(range(V + 3, V + 3 + k)))
    if k: assert w.sum() == m + k and n + 2*k == L and (y[w > 0] < V).sum() == m
    else: assert n == L and 1 <= w.sum() <= m
    assert (np.diff(w) >= 0).all()                                                                  # the targets are the end

@given(st.integers(1, 200), st.floats(0, .99), st.integers(0, 99))
def test_meap_hides_exactly_its_share(L, share, seed):
    x = np.random.default_rng(seed).integers(0, V, L + 1); kept = x.copy(); u, y, w = meap(V, share)(x, np.random.default_rng(seed))
    assert (u == V).sum() == round(share*L) and np.array_equal(u[u != V], x[:-1][u != V]) and np.array_equal(y, x[1:]) and w.sum() == L and np.array_equal(x, kept)

def test_denoisers_and_positions_are_drawn_evenly():
    o = mixture(); x = torch.from_numpy(np.random.default_rng(0).integers(0, V, (1400, 33))); u, y, w = o.batch(0, x)
    modes = Counter((u[:,0] - V).tolist()); assert all(abs(modes[m] - n) < 4*np.sqrt(n*(1 - n/1400)) for m,n in {0: 400, 1: 200, 2: 800}.items())
    hidden = np.mean([meap(V, .25)(np.zeros(33, int), np.random.default_rng(i))[0] == V for i in range(2000)], 0); assert abs(hidden - .25).max() < 5*np.sqrt(.25*.75/2000)

@pytest.mark.parametrize("make", [mixture, lambda: Objective([meap(V)])])
def test_an_objective_is_the_same_in_parts_and_after_a_resume(make, tmp_path):
    whole, log = run(tmp_path/"a", [make()]); parts, _ = run(tmp_path/"b", [make()], accumulate=3)
    for a,b in zip(whole.parameters(), parts.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=2e-5)         # sums in another order, 4 steps of 1e-3
    run(tmp_path/"c", [make()], steps=2); assert same(whole, run(tmp_path/"c", [make()])[0])
    assert [r["tokens"] for r in log] == [6*32*(i + 1) for i in range(4)]                           # the budget of the ordinary loop

def test_another_seed_is_another_choice_and_is_refused_on_resume(tmp_path):
    x = next(stream())[0]; a = mixture(0).batch(0, x)[0]; assert not torch.equal(a, mixture(1).batch(0, x)[0]) and not torch.equal(a, mixture(0).batch(1, x)[0]); run(tmp_path, [mixture(0)], steps=2)
    with pytest.raises(ValueError, match="pass the same objective"): run(tmp_path, [mixture(1)])

# Curricula

@settings(max_examples=8, deadline=None)
@given(st.data())
def test_stages_survive_any_stop_and_replay_from_the_log(data):
    import tempfile
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 3), max_size=3)))]; shares = [data.draw(st.sampled_from([0., .25, .5, 1.])) for _ in starts]; stop = data.draw(st.integers(1, 4))
    make = lambda s: [Stages(s, {t: dict(a=p, b=1 - p) for t,p in zip(starts, shares)})]
    whole, log = run(tempfile.mkdtemp(), make); f = tempfile.mkdtemp(); run(f, make, steps=stop); assert same(whole, run(f, make)[0])
    assert [r["weights"]["a"] for r in log] == [[p for t,p in zip(starts, shares) if t <= i][-1] for i in range(4)]
    assert same(whole, run(tempfile.mkdtemp(), lambda s: [Replay(s, log)])[0])

def test_replay_is_a_mixture():
    p = replay(dict(a=.25, b=.75), dict(b=.5, c=.5), .2); assert sum(p.values()) == pytest.approx(1) and p == pytest.approx(dict(a=.05, b=.55, c=.4))

def test_metadata_has_no_gradient_and_plain_text_is_as_ever():
    m, h, seen = model(V), Conditioned(V), []; x = torch.from_numpy(Picked(Text(np.arange(60) % V), [[0, 20], [20, 60]], [np.array([1, 2, 3]) + V]*2).read(1, 33))[None]
    def watched(t): z = m(t); z.retain_grad(); seen.append(z); return z
    h.losses(0, watched, x).sum().backward(); assert torch.equal(seen[0].grad.abs().sum(-1) > 0, x[:,1:] < V) and (x >= V).sum() == 5
    assert h.losses(0, m, torch.full((2, 9), V + 1)).tolist() == [0., 0.]                            # nothing but metadata
