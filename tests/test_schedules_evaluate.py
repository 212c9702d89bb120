"""Schedules over grids of lengths, and bits per byte against counting by hand."""
import math

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.data.tokens import token_bytes, tokenizer
from paretolab.engine.evaluate import bits_per_byte, macro, windows
from paretolab.engine.schedules import cosine, wsd
from paretolab.models.mobilellm import MobileLLM, Shape

# Schedules

GRID = dict(steps=st.integers(1, 2000), share=st.floats(0, .99), floor=st.floats(0, 1))

@settings(max_examples=200, deadline=None)
@given(**GRID)
def test_cosine_rises_then_falls_to_its_floor(steps, share, floor):
    w = int(share*steps)
    y = [cosine(steps, w, floor)(t) for t in range(steps + 3)]
    assert all(floor - 1e-12 <= v <= 1 for v in y[w:]) and all(math.isclose(v, (t + 1)/w) for t,v in enumerate(y[:w]))
    assert y[w] == 1 and all(a >= b for a,b in zip(y[w:], y[w+1:])) and y[steps:] == pytest.approx([floor]*3)
    assert y[w:steps] == pytest.approx([floor + (1 - floor)*math.cos(math.pi/2*(t - w)/(steps - w))**2 for t in range(w, steps)])
    if w < steps: assert y[(w + steps)//2] == pytest.approx(floor + (1 - floor)/2, abs=.5*(1 - floor)*math.pi/(steps - w))

@settings(max_examples=200, deadline=None)
@given(**GRID, decay=st.floats(.01, 1))
def test_wsd_rises_stays_and_falls(steps, share, floor, decay):
    w = int(share*steps)
    y = [wsd(steps, w, decay, floor)(t) for t in range(steps + 3)]
    for t,v in enumerate(y):
        assert v == pytest.approx(min((t + 1)/max(w, 1), 1, floor + (1 - floor)*max(steps - t, 0)/(decay*steps)))
        if w <= t <= steps*(1 - decay) - 1: assert v == 1
    assert y[steps:] == pytest.approx([min(floor, 1)]*3) and max(y) <= 1

@pytest.mark.parametrize("make", [cosine, wsd])
@pytest.mark.parametrize("args, words", [((0,), "steps=0"), ((-3,), "steps=-3"), ((10, 10), "warmup=10"), ((10, -1), "warmup=-1")])
def test_schedules_that_cannot_be_are_refused(make, args, words):
    with pytest.raises(ValueError, match=words): make(*args)

@pytest.mark.parametrize("decay", [0, -.1, 1.01, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"): wsd(10, 0, decay)

# Windows

class Count:
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def read(self, start, n):
        assert 0 <= start and start + n <= self.n
        return np.arange(start, start + n)

@settings(max_examples=200, deadline=None)
@given(n=st.integers(2, 2000), length=st.integers(1, 100), want=st.integers(1, 40))
def test_windows_are_spread_evenly_and_score_no_token_twice(n, length, want):
    if n < length + 1:
        with pytest.raises(ValueError, match=f"'a' holds {n} held-out tokens"): windows({"a": Count(n)}, length, want)
        return
    x = windows({"a": Count(n)}, length, want)["a"]
    starts = x[:,0].numpy()
    assert x.shape == (max(1, min(want, (n - 1)//length)), length + 1) and (x.diff(dim=1) == 1).all() and starts[0] == 0
    if len(starts) > 1:
        gaps = np.diff(starts)
        assert x[-1,-1] == n - 1 and gaps.min() >= length and gaps.max() - gaps.min() <= 1

# Bits per byte

class Fixed(torch.nn.Module):
    "The same distribution whatever came before."
    def __init__(self, p): super().__init__(); self.p = torch.as_tensor(p)
    def forward(self, x): return self.p.log().expand(*x.shape, len(self.p))

def test_by_hand():
    x, β = torch.tensor([[3, 0, 1, 2], [0, 2, 2, 1]]), torch.tensor([0, 1, 3, 100])    # first tokens are context only
    assert bits_per_byte(Fixed([.5, .25, .125, .125]), {"a": x}, β)["a"] == pytest.approx((1 + 2 + 3 + 3 + 3 + 2)/(0 + 1 + 3 + 3 + 3 + 1))

@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_batch_gives_the_same_and_the_model_is_left_as_it_was(batch, dtype):
    torch.manual_seed(0)
    m = MobileLLM(Shape(vocab=64, dim=16, ff=16, layers=2, heads=2, kv_heads=1, context=16)).to(dtype)
    x, β = {d: torch.randint(64, (n, 17)) for d,n in dict(a=7, b=1).items()}, torch.randint(1, 5, (64,))
    before = [p.clone() for p in m.parameters()]
    for training in (True, False):
        m.train(training)
        got = bits_per_byte(m, x, β, batch)
        assert got == pytest.approx(bits_per_byte(m, x, β, 8), rel=1e-5 if dtype == torch.float32 else 1e-2) and m.training == training
    assert all(torch.equal(a, b) and b.grad is None for a,b in zip(before, m.parameters())) and list(got) == ["a", "b"]

def test_a_coder_of_the_text_would_need_that_many_bits():
    "With a token's own frequency as its probability, bits per byte is the entropy of the text over its bytes."
    tok, text = tokenizer(), "to be, or not to be, that is the question: whether 'tis nobler é to be\n"*3
    ids = torch.tensor([0] + tok.encode(text, add_special_tokens=False).ids)
    β, n = torch.from_numpy(token_bytes(tok)), torch.bincount(ids[1:], minlength=4096).double()
    p = n/n.sum()
    entropy = -(n*p.clamp_min(1e-30).log2()).sum().item()
    assert bits_per_byte(Fixed(p.clamp_min(1e-30)), {"a": ids[None]}, β)["a"] == pytest.approx(entropy/len(text.encode()))

def test_the_average_counts_each_domain_once():
    assert macro(dict(a=1., b=2., c=6.)) == 3

def test_windows_without_text_are_refused():
    with pytest.raises(ValueError, match="domain 'a' stand for no bytes"): bits_per_byte(Fixed([.5, .5]), {"a": torch.zeros(2, 5, dtype=torch.long)}, torch.tensor([0, 1]))
