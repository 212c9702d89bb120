"""ParetoQ: values and gradients against the table written out weight by weight; files; training and resuming by `fit`."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.optimizers.adamw import AdamW
from paretolab.quantizers import lowbit, paretoq, plan
from paretolab.quantizers.paretoq import convert, fake, pack, quantize, scale

SMALL = Shape(vocab=48, dim=32, ff=64, layers=2, heads=2, kv_heads=1, context=16)
PART = {1: 1, 1.58: 1.5, 2: 4}


def table(w, α, bits):
    "Level in units of α, dŵ/dw and dŵ/dα of one weight, by the table of the page."
    x = w/α
    c = min(max(x, -.99), .99)
    n = 2**(int(bits) - 1)
    if bits == 1: return (1. if x >= 0 else -1.), float(abs(x) <= 1), (1. if x >= 0 else -1.)
    if bits == 1.58: v, inside, end = round(1.5*c)/1.5, abs(x) <= .99, 1.
    elif bits == 2: v, inside, end = (round(2*c - .5) + .5)/2, abs(x) <= .99, .75
    else: v, inside, end = float(min(max(round(x), -n), n - 1)), -n <= x <= n - 1, (n - 1. if x > 0 else n)
    return v, float(inside), v - x if inside else end*(1 if x > 0 else -1)


@given(st.sampled_from([1, 1.58, 2, 3, 4, 6, 8]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.floats(.2, 1.5), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_values_and_gradients(bits, rows, groups, group, factor, seed):
    g = torch.Generator().manual_seed(seed)
    w, up = torch.randn(rows, groups*group, generator=g), torch.randn(rows, groups*group, generator=g)
    p = PART.get(bits, 1)
    α = (scale(w, bits, group)*factor/p).clamp_min(1e-3).half().float()*p                  # what a file can hold
    W, A = w.clone().requires_grad_(), α.clone().requires_grad_()
    ŵ = fake(W, A, bits); ŵ.backward(up)
    dα = torch.zeros(rows, groups)
    for r in range(rows):
        for j in range(groups*group):
            a = α[r, j//group, 0].item()
            x = w[r, j].item()/a
            if min(abs(abs(x) - e) for e in (.99, 1., 2**(int(bits)-1), 2**(int(bits)-1) - 1)) < 1e-5 or abs((x*(p if bits != 2 else 2)) % 1 - .5*(bits != 2)) < 1e-5: up[r, j] = 0; continue
            v, dw, d = table(w[r, j].item(), a, bits)
            assert ŵ[r, j].item() == pytest.approx(v*a, rel=1e-6, abs=1e-7) and W.grad[r, j].item() == pytest.approx(dw*up[r, j].item())
            dα[r, j//group] += d*up[r, j]
    if not (up == 0).any():
        Q = 2**(int(bits)-1) - 1 if bits >= 3 else 1
        assert torch.allclose(A.grad[..., 0]*(w.numel()*Q)**.5, dα, rtol=1e-4, atol=1e-4*(1 + 2**bits))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_is_what_is_stored(bits, dtype, tmp_path):
    w = (torch.randn(48, 6)/3).to(dtype).T
    w[1] = 0
    for group in (0, 8, 1):
        α = scale(w, bits, group)*torch.rand(1) + 1e-6
        lowbit.save(tmp_path/"m", {"w": quantize(w, bits, group, α)})
        assert torch.equal(lowbit.load(tmp_path/"m")[0]["w"].dequantize(dtype), fake(w, α, bits))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 6, 8])
def test_odd_inputs(bits):
    "All zero, constant, one row, not contiguous, 16-bit floats, half-way ties, and numbers that are none."
    top = {1: 1., 1.58: 2/3, 2: .75}.get(bits, 1.)
    assert quantize(torch.zeros(2, 6), bits).dequantize().abs().max() < 1.01e-5 and quantize(torch.full((1, 5), -2.), bits).dequantize().allclose(torch.tensor(-2*top), rtol=1e-3)
    w = torch.randn(12, 10)[::2, ::2]
    for t in (w, w.T, w[:1], w.bfloat16()): assert torch.equal(quantize(t, bits).dequantize(t.dtype), fake(t, scale(t, bits), bits)) and torch.equal(quantize(t, bits).codes(), quantize(t.contiguous(), bits).codes())
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="1 of 30 weights are NaN or infinite"): quantize(w.contiguous().view(-1).index_fill(0, torch.tensor(7), bad).view(6, 5), bits)
    if bits >= 3:
        ties = torch.tensor([[.5, 1.5, -.5, -1.5, 2.**(bits - 1)]])                        # to the even neighbour
        assert fake(ties, torch.ones(1, 1, 1), bits).tolist() == [[0., 2., -0., -2., 2.**(bits - 1) - 1]]


class Stream:
    "Two sequences a step, the same for the same step."
    domains, weights, length = ["a"], {"a": 1.}, 15
    def __init__(self): self.step = 0
    def __next__(self):
        self.step += 1
        return torch.randint(48, (2, 16), generator=torch.Generator().manual_seed(self.step % 3)), torch.zeros(2, dtype=torch.long)
    def state_dict(self): return dict(step=self.step)
    def load_state_dict(self, s): self.step = s["step"]


@pytest.mark.parametrize("bits, group", [(1, 0), (1.58, 16), (2, 16), (4, 0)])
def test_fit_trains_resumes_and_packs(bits, group, tmp_path):
    from paretolab.engine.fit import fit
    def made():
        torch.manual_seed(0)
        m = MobileLLM(SMALL)
        return convert(m, {n: (4 if n == "embed" else bits, group, "paretoq.quantize") for n in plan.uniform(m, 4)})
    def go(m, steps, run): return fit(m, Stream(), AdamW(m.named_parameters(), lr=3e-3, weight_decay=0), lambda t: 1., steps=steps, run=tmp_path/run, every=6)
    m = made(); before = {n: p.clone() for n, p in m.named_parameters()}
    log = go(m, 12, "a")
    assert log[-1]["loss"] < log[0]["loss"] - .2 and all(not torch.equal(p, before[n]) for n, p in m.named_parameters())
    go(made(), 6, "b"); again = made(); go(again, 12, "b")
    for n in m.state_dict(): assert torch.equal(m.state_dict()[n], again.state_dict()[n]), n
    state, plain = pack(m), MobileLLM(SMALL)
    plan.restore(plain, state)
    for n, p in plain.named_parameters():
        if p.ndim == 2: assert torch.equal(p, m.get_submodule(n.removesuffix(".weight")).weight)
    x = torch.arange(16)[None]
    with torch.no_grad():
        for n, q in m.named_parameters():
            if q.ndim == 1: q.copy_(q.half())                       # the norms as the file has them
        assert torch.equal(plain(x), m(x))


def test_scales_have_no_decay_and_are_no_matrices():
    m = convert(MobileLLM(SMALL), {"blocks.0.attn.q": (2, 0, "paretoq.quantize")})
    o = AdamW(m.named_parameters(), lr=1., weight_decay=.5)
    α = m.blocks[0].attn.q.parametrizations.weight[0].scale
    assert α.ndim == 3 and [g["weight_decay"] for g in o.param_groups if any(p is α for p in g["params"])] == [0.]


def test_other_entries_stay_as_they_are():
    p = {"blocks.0.attn.q": (16, 0, "paretoq.quantize"), "blocks.0.attn.k": (4, 0, "absmax.quantize")}
    m = convert(MobileLLM(SMALL), p)
    assert not any(isinstance(x, paretoq._Learned) for x in m.modules())
    with pytest.raises(ValueError, match="'nothing'"): convert(m, {"nothing": (2, 0, "paretoq.quantize")})
    with pytest.raises(ValueError, match="bits=5"): quantize(torch.ones(2, 2), 5)
    with pytest.raises(ValueError, match="matrix of floats"): scale(torch.ones(2), 2)
    assert quantize(nn.Linear(8, 3).weight, 2).shape == (3, 8)
