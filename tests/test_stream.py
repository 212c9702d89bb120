"""The stream as a pure function of its seed and the weights set, under hypothesis and adversaries."""
import json, threading
from collections import Counter

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.data.stream import ONE, MixedStream, deal, shuffled, simplex

class Numbers:
    "Tokens that say where they come from."
    def __init__(self, start, n): self.t, self.reads = np.arange(start, start + n), 0
    def __len__(self): return len(self.t)
    def read(self, start, n):
        self.reads += 1
        assert 0 <= start and start + n <= len(self.t)
        return self.t[start:start+n]

TEXT = dict(a=Numbers(0, 400), b=Numbers(10_000, 901), c=Numbers(20_000, 60))
def stream(weights=(.5, .3, .2), seed=0, batch=4, length=8, text=TEXT): return MixedStream(text, dict(zip(text, weights)), batch, length, seed)
def same(a, b): return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

# Weights

BAD = st.sampled_from([float("nan"), float("inf"), float("-inf"), -1e-12, -0.5, -1.])

@settings(max_examples=500, deadline=None)
@given(data=st.data(), D=st.integers(1, 8))
def test_a_bad_weight_is_refused_with_its_domain(data, D):
    names = [f"d{i}" for i in range(D)]
    p = dict(zip(names, data.draw(st.lists(st.floats(0, 1), min_size=D, max_size=D))))
    bad = data.draw(st.sampled_from(names))
    p[bad] = data.draw(BAD)
    with pytest.raises(ValueError, match=f"the weight of domain '{bad}' has to be a finite number of at least 0 .got"): simplex(p, names)

@settings(max_examples=500, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_weights_are_rounded_and_never_normalised(p):
    names, total = list(range(len(p))), float(np.sum(p))
    if abs(total - 1) > 1e-6:
        with pytest.raises(ValueError, match="have to sum to 1 within 1e-6"): simplex(dict(enumerate(p)), names)
    q = [x/total for x in p] if total > 1e-3 else [1/len(p)]*len(p)
    w = simplex(dict(enumerate(q)), names)
    assert w.sum() == ONE and (w >= 0).all() and np.abs(w/ONE - q).max() <= len(p)/ONE + 1e-15
    assert not w[[i for i,x in enumerate(q) if x == 0]].any()

@pytest.mark.parametrize("p", [{}, {"a": 1.}, {"a": .5, "b": .3, "d": .2}, {"a": .5, "b": .3, "c": .1, "d": .1}])
def test_weights_for_other_domains_are_refused_by_name(p):
    s = stream()
    with pytest.raises(ValueError, match=r"the domains are \['a', 'b', 'c'\]"): s.weights = p
    assert s.weights == stream().weights

# Apportionment

@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.integers(0, 10**6), min_size=2, max_size=20).filter(any))
def test_constant_weights_stay_within_one_sequence(parts):
    w = simplex({i: x/sum(parts) for i,x in enumerate(parts)}, list(range(len(parts))))
    c, count = np.zeros(len(w), np.int64), np.zeros(len(w), int)
    for n in range(1, 400):
        count[deal(c, w)] += 1
        assert (np.abs(c) < ONE).all() and (c == n*w - count*ONE).all()

@settings(max_examples=100, deadline=None)
@given(data=st.data(), D=st.integers(2, 12))
def test_no_adversary_leaves_the_bound(data, D):
    c, greedy = np.zeros(D, np.int64), data.draw(st.integers(0, 3))
    for _ in range(150):
        if greedy == 0: p = np.eye(D)[c.argmax()]                        # to whoever is owed most
        elif greedy == 1: p = (c >= np.median(c))/(c >= np.median(c)).sum()
        elif greedy == 2: p = np.random.default_rng(int(abs(c).sum()) % 2**32).dirichlet([.2]*D)
        else: p = np.eye(D)[data.draw(st.integers(0, D - 1))]
        i = deal(c, simplex(dict(enumerate(p)), list(range(D))))
        assert c.sum() == 0 and c.min() > -ONE and c.max() < (D - 1)*ONE and 0 <= i < D

@settings(max_examples=60, deadline=None)
@given(N=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_an_order_is_a_permutation(N, key): assert sorted(shuffled(i, N, key) for i in range(N)) == list(range(N))

# The stream

@settings(max_examples=25, deadline=None)
@given(n=st.integers(30, 300), length=st.integers(1, 20), batch=st.integers(1, 5), seed=st.integers(0, 100))
def test_an_epoch_takes_every_window_once(n, length, batch, seed):
    text, epochs = dict(a=Numbers(0, n)), {}
    s = stream([1.], seed, 1, length, text)
    while (e := s.state["epoch"][0]) < 3: epochs.setdefault(e, []).append(int(next(s)[0][0,0]))
    for starts in epochs.values():
        assert Counter(starts) == Counter(range(min(starts), max(starts) + 1, length)) and min(starts) < length and max(starts) + 2*length > n - 1
    one, many = sum(epochs.values(), []), stream([1.], seed, batch, length, text)
    assert sum((next(many)[0][:,0].tolist() for _ in range(len(one)//batch)), []) == one[:len(one)//batch*batch]

def plain(steps, changes, **kw):
    "Without a thread: from state to state."
    s, out = stream(**kw), []
    for t in range(steps):
        if t in changes: s.weights = dict(zip(TEXT, changes[t]))
        batch, s.state = s._batch(s.state)
        out.append(batch)
    return out

CHANGES = {5: (1., 0., 0.), 11: (0., .5, .5), 12: (.2, .2, .6), 30: (.5, .3, .2)}

def test_with_and_without_prefetch_and_after_any_resume_the_batches_are_the_same():
    want = plain(60, CHANGES)
    for stop in sorted(np.random.default_rng(0).choice(59, 20, replace=False) + 1):
        s = stream()
        for t in range(60):
            if t == stop:
                saved = json.loads(json.dumps(s.state_dict()))
                s.close()
                s = stream((1., 0., 0.))
                s.load_state_dict(saved)
                assert s.state_dict() == saved
            if t in CHANGES: s.weights = dict(zip(TEXT, CHANGES[t]))
            assert same(next(s), want[t]), (stop, t)
        s.close()

def test_other_seeds_give_other_orders():
    assert not same(next(stream(seed=0)), next(stream(seed=1)))
    assert same(next(stream(seed=7)), next(stream(seed=7)))

def test_weights_apply_to_the_next_batch_and_prefetched_windows_are_not_spent():
    s = stream((1., 0., 0.))
    for _ in range(3): assert next(s)[1].tolist() == [0]*4
    s.ahead.result()
    s.weights = dict(a=0., b=1., c=0.)
    assert s.state["at"] == [12, 0, 0] and next(s)[1].tolist() == [1]*4
    with pytest.raises(ValueError): s.weights = dict(a=1., b=1., c=0.)   # a refused change changes nothing
    assert next(s)[1].tolist() == [1]*4 and s.state["at"] == [12, 8, 0]

@pytest.mark.parametrize("key, other", [("seed", 5), ("batch", 8), ("length", 4), ("domains", ["a", "c", "b"]), ("tokens", [1, 2, 3])])
def test_the_state_of_another_stream_is_refused_unchanged(key, other):
    s = stream()
    next(s)
    before = json.dumps(s.state_dict())
    with pytest.raises(ValueError, match=f"the saved stream has {key}="): s.load_state_dict({**stream().state_dict(), key: other})
    assert json.dumps(s.state_dict()) == before

def test_a_failed_read_arrives_in_next():
    class Torn(Numbers):
        def read(self, start, n):
            if self.reads >= 6: raise OSError("the disk is gone")
            return super().read(start, n)
    s = stream([1.], text=dict(a=Torn(0, 500)))
    next(s)
    state = json.dumps(s.state_dict())
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone") as e: next(s)
    assert e.value.__notes__[0].startswith("in domain 'a', at tokens ") and "window 6 of epoch 0" in e.value.__notes__[0]
    assert json.dumps(s.state_dict()) == state
    s.close()

def test_domains_of_one_length_are_read_in_different_orders():
    s = stream([.5, .5], text=dict(a=Numbers(0, 900), b=Numbers(0, 900)))
    firsts = {0: [], 1: []}
    for _ in range(20):
        x, d = next(s)
        for i,t in zip(d.tolist(), x[:,0].tolist()): firsts[i].append(t)
    assert firsts[0] != firsts[1]
    s.close()

@pytest.mark.parametrize("wrong, words", [(dict(carry=[10*ONE, -10*ONE, 0]), "carries to 0 and lie between"), (dict(carry=[1, 0, 0]), "carries to 0"), (dict(step=-5), "step is a whole"), (dict(step=None), "step is a whole"),
    (dict(at=[10**6, 0, 0]), "'a' of the saved stream is at window 1000000"), (dict(at=[0, -1, 0]), "window -1"), (dict(epoch=[-1, 0, 0]), "of epoch -1")])
def test_a_state_no_stream_can_be_in_is_refused_unchanged(wrong, words):
    s = stream(); before = json.dumps(s.state_dict())
    with pytest.raises(ValueError, match=words): s.load_state_dict({**s.state_dict(), **wrong})
    assert json.dumps(s.state_dict()) == before
    s.close()

def test_close_ends_the_thread():
    s = stream()
    next(s)
    mine = set(s.thread._threads)
    assert mine and all(t.is_alive() for t in mine) and mine <= set(threading.enumerate())
    s.close()
    assert not any(t.is_alive() for t in mine)

def test_a_closed_stream_gives_nothing_and_keeps_its_place():
    s, want = stream(), plain(4, {})
    for _ in range(3): next(s)
    s.close(); s.close(); saved = json.dumps(s.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match="it was closed after step 3"): next(s)
    assert json.dumps(s.state_dict()) == saved
    again = stream(); again.load_state_dict(json.loads(saved))
    assert same(next(again), want[3]); again.close()

@pytest.mark.parametrize("kw, words", [(dict(batch=0), "batch=0"), (dict(length=0), "length=0"), (dict(length=60), "domain 'c' holds 60 tokens"), (dict(weights=(1., 0.)), "one weight for each")])
def test_a_stream_that_cannot_be_is_refused(kw, words):
    with pytest.raises(ValueError, match=words): stream(**kw)
