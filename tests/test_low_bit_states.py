"""Moments of 8 bits: codes by an independent definition, three instruction sets and torch to the bit, any number of processes, resume, hostile numbers, ledger, mutants."""
import functools, io, math, types
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from processes import run
from mutants import noticed
from paretolab.engine.settings import member
from paretolab.kernels import native, state_steps, steps
from paretolab.optimizers import low_bit_states, state_codes
from paretolab.optimizers.state_codes import Expanded, Log, Tree

NAMES = ["AdamW8", "AdamTree", "AdamFP8", "Lion8", "LionTree", "LionFP8", "APOLLO8", "APOLLOFP8", "Mini8", "MiniFP8", "GaLore8", "GaLoreFP8"]
FORMS = [Tree(), Expanded(), Log()]
every = pytest.mark.parametrize("name", NAMES)
formats = pytest.mark.parametrize("form", FORMS, ids=["tree", "expanded", "logarithm"])
SHAPES = {"embed.weight": (7, 300), "blocks.0.q.weight": (48, 70), "blocks.0.up.weight": (300, 40), "head.weight": (4, 600), "norm.weight": (64,), "conv": (5, 3, 12), "conv4": (2, 2, 4, 8), "narrow": (70, 3, 2), "scale": ()}
rng = lambda *seed: torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    for n in NAMES: monkeypatch.setattr(getattr(low_bit_states, n).states, "least", 64)

def start(dtype=torch.float32, shapes=SHAPES): return {n: torch.randn(s, generator=rng(0, i)).to(dtype).requires_grad_() for i,(n,s) in enumerate(shapes.items())}
@functools.cache
def _drawn(shape, *seed): return torch.randn(shape, generator=rng(*seed))
def gradient(n, t, shapes=SHAPES): return _drawn(shapes[n], 7, t, list(shapes).index(n)).clone()
def make(name, P, **more): return member("optimizers", f"low_bit_states.{name}")(P.items(), **(dict(gap=3) if name[:4] in ("APOL", "Mini", "GaLo") else {}) | (dict(rank=33) if name[:4] in ("APOL", "GaLo") else {}) | more)
def train(P, o, at, steps, of=gradient):
    for t in range(at, at + steps):
        for n,p in P.items(): p.grad = of(n, t).to(p.dtype)
        o.step()
def same(P, Q): return all(torch.equal(P[n], Q[n]) for n in P)
def bits(o): return sum(v.nbytes for s in o.state.values() for v in s.values())
def whole(name): return next(k for k in getattr(low_bit_states, name).__mro__ if k.__module__ != low_bit_states.__name__)      # the method, with moments of 32 bits
def alike(a, b): return all(torch.equal(*(t.nan_to_num(-1.) if t.is_floating_point() else t for t in p)) for p in zip(a, b))

# Formats against definitions of their own

def levels(signed):
    "From the words of the paper: a decimal exponent in unary, then a fraction of the bits that are left."
    Q = [0., 1.]
    for zeros in range(7):
        N = 2**(6 - zeros + (not signed))
        Q += [10.**-zeros*(.1 + .9*(j + .5)/N) for j in range(N)]
    return np.sort(np.array(Q))

def tree(x, signed):
    "Codes and scales, entry by entry."
    Q, codes, scales = levels(signed), np.zeros(x.shape, np.uint8), []
    for r in range(len(x)):
        for i in range(0, x.shape[1], 256):
            block = x[r,i:i+256]; s = np.abs(block).max(); scales.append(s)
            if not np.isfinite(s) or s < 2.**-126: scales[-1] = 0. if np.isfinite(s) else np.nan; continue
            for j,v in enumerate(block):
                p = int(np.abs(np.float64(np.float32(abs(v))*np.float32(1/np.float32(s))) - Q).argmin())
                codes[r,i+j] = (-min(p, 127) if v < 0 else p) % 256 if signed else max(p, int(v > 0))
    return codes, np.array(scales, np.float32).reshape(len(x), -1)

def steps_of(x, signed, most, near):
    "And for steps of the logarithm; `near` are the codes to be judged: the inverse of the step has 15 bits, so of two levels that a number is as near to as a 256th of a place, either is right."
    codes, scales, steps, N = np.zeros(x.shape, np.uint8), [], [], most
    place = lambda a: np.floor(128*(np.frexp(a)[1] + 126 + 2*np.frexp(a)[0] - 1)) if a > 0 else 0.       # 2^e m, 1 ≤ m < 2, is at 128 (e + 127 + m - 1)
    for r in range(len(x)):
        for i in range(0, x.shape[1], 256):
            block = x[r,i:i+256].astype(np.float64); a = np.abs(block); s = a.max(); scales.append(s); steps.append(1)
            if not np.isfinite(s) or s < 2.**-125: scales[-1] = 0. if np.isfinite(s) else np.nan; continue
            T = place(s); p = steps[-1] = int(max(min(np.ceil((T - place(a[a >= 2.**-126].min()))/(N - 1)), 32, T//256), 1))
            for j,v in enumerate(block):
                minus = 128*(signed and np.signbit(v)); codes[r,i+j] = minus
                if v == 0 or (not signed and v < 2.**-126): continue
                lie = N - (T - place(a[j]))/p; c = max(round(lie), 1)
                if abs(lie - np.floor(lie) - .5) < p/256 and lie > 1: c = int(np.clip(near[r,i+j] & 127 if signed else near[r,i+j], np.floor(lie), np.ceil(lie)))
                if signed and round(lie) < 1 - 128//p: c = 0                                             # below half of the lowest level
                codes[r,i+j] = c | minus
    return codes, np.array(scales, np.float32).reshape(len(x), -1), np.array(steps, np.uint8).reshape(len(x), -1)

def defined(form, x, signed, near): return tree(x, signed) if form.kind == 0 else steps_of(x, signed, 126 if signed or form.kind == 1 else 255, near)

def numbers(seed, rows, cols, spread=2.): return torch.randn(rows, cols, generator=rng(seed))*torch.exp2(spread*torch.randn(rows, cols, generator=rng(seed, 1)))
HOSTILE = torch.tensor([[1, math.nan, 2, 3], [math.inf, 0, 1, 1], [1e-40, 0, -1e-39, 0], [1e38, 1e-38, -1e-30, 0], [-1, -1, -1, -1], [0, 0, 0, 0], [-2, 1e-9, 3e-7, 1], [1, -1e-5, 0, -0.], [1e-37, -3e-38, 1e-36, 9e-37], [5e-35, 1e-36, -2e-37, 0], [3e-38, -2e-38, 1.3e-38, 0], [1.6e-38, -1.5e-38, 1.3e-38, 0]])

@formats
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_definition(form, signed):
    for x in (numbers(1, 3, 300), numbers(2, 2, 129, .1), HOSTILE, numbers(3, 5, 1), numbers(6, 2, 600, 12.)):
        x = x if signed else x.abs() if x is HOSTILE else x*x
        got = [t.numpy() for t in form.encode(x, signed)]; want = defined(form, x.numpy(), signed, got[0])
        for a,b in zip(got, want): assert a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype == np.float32), np.argwhere(a != b)[:3]

def test_levels_are_the_published_ones():
    for signed in (True, False): np.testing.assert_allclose(state_codes.levels(signed).numpy(), levels(signed), rtol=2e-6)

@pytest.mark.parametrize("signed", [True, False])
def test_values_come_back_within_the_bound(signed):
    x = numbers(4, 6, 512); x = x if signed else x*x
    worst = torch.tensor([[8.0625, 6.1989e-5, 5.0664e-6] if signed else [8.0625, 7.4506e-9, 6.1107e-13]])      # near the bound
    for z,form in ((x, Log()), (worst, Log()), (x if signed else x.sqrt(), Expanded())):               # 126 codes for wide second moments would be 0 or clipped
        y, p = form.decode(*(parts := form.encode(z, signed)), signed), parts[2].float().repeat_interleave(256, 1)[:,:z.shape[1]]
        assert ((z - y).abs() <= (p/2 + p*p/256 + 1)/128*z.abs()).all() and p.max() < 32            # half a step, what the quotient is off, and a place for the bits cut off
    if not signed:
        for form in FORMS: assert (form.decode(*form.encode(x, False), False) > 0).all()           # nothing above 0 becomes 0

# C++ on three instruction sets, and torch: to the bit

paths = pytest.mark.parametrize("path", [0, 1, 2])
def possible(path):
    lib = native.load("state_steps.cpp")
    if lib is None: pytest.skip("no C++ compiler")
    if path > lib.best_path(): pytest.skip("this processor has no AVX-512 or no AVX2")

@paths
@formats
@pytest.mark.parametrize("signed", [True, False])
def test_every_instruction_set_makes_the_same_codes(path, form, signed):
    possible(path)
    Q = Tree.Q[signed]; mid = (Q[1:] + Q[:-1])/2
    ties = torch.cat([mid, Q, torch.nextafter(mid, torch.tensor(9.)), torch.nextafter(mid, torch.tensor(-9.)), torch.exp2(-torch.arange(200)/16)]); ties = torch.cat([ties[torch.randperm(len(ties), generator=rng(1))][:500].view(2, 250), torch.ones(2, 1)], 1)
    for x in (numbers(1, 40, 700, 4.), numbers(4, 6, 700, 14.), numbers(2, 3, 1), numbers(3, 2, 257), torch.zeros(2, 300), HOSTILE, HOSTILE.repeat(1, 70), ties*torch.where(torch.rand(ties.shape, generator=rng(2)) < .5, -1, 1), torch.zeros(0, 5)):
        x = x if signed else x.abs()
        a = form.encode(x, signed); b = state_steps.encode(form, x, signed, path)
        assert alike(a, b) and alike([form.decode(*a, signed)], [state_steps.decode(form, b, signed, path)])

@paths
@formats
@pytest.mark.parametrize("signed", [True, False])
def test_any_bytes_decode_as_they_are_defined_to(path, form, signed):
    possible(path)
    parts = [torch.randint(256, (9, 300), generator=rng(1)).to(torch.uint8), torch.randn(9, -(-300//form.block), generator=rng(2))]
    parts[1][0] = math.nan; parts[1][1] = math.inf; parts[1][2] = 0; parts[1][3] = 1e-40; parts[1][4] = -3e38
    if len(form.parts) > 2: parts.append(torch.randint(256, parts[1].shape, generator=rng(3)).to(torch.uint8))
    assert alike([form.decode(*parts, signed)], [state_steps.decode(form, tuple(parts), signed, path)])

NUMBERS = dict(beta1=.9, fresh1=1 - .9, beta2=.95, fresh2=1 - .95, keep=1 - 1e-4, step=1e-3)
@paths
@formats
@pytest.mark.parametrize("shape", [(7, 300), (3, 5), (1, 256), (20, 1024), (1, 1), (0, 9)])
def test_a_step_is_that_of_torch(path, form, shape):
    possible(path)
    w = torch.randn(shape, generator=rng(5)); A = [w.clone(), form.encode(torch.zeros(shape), True), form.encode(torch.zeros(shape), False), w.clone(), form.encode(torch.zeros(shape), True)]
    B = [x.clone() if torch.is_tensor(x) else tuple(t.clone() for t in x) for x in A]
    for t in range(4):
        g = numbers(t, *shape)
        if shape[1] > 8: g[:,::3] = 0; g[0 if len(g) else slice(0),7] = math.nan if t == 2 else 1.
        state_steps._adamw(form, A[0], g, *A[1:3], **NUMBERS, eps=1e-8); state_steps.adamw(form, B[:1], [g], B[1:2], B[2:3], path=path, **NUMBERS, eps=1e-8)
        state_steps._lion(form, A[3], g, A[4], **NUMBERS); state_steps.lion(form, B[3:4], [g], B[4:], path=path, **NUMBERS)
    for a,b in zip(A, B): assert alike([a] if torch.is_tensor(a) else a, [b] if torch.is_tensor(b) else b)

@formats
def test_threads_change_nothing(form, monkeypatch):
    w, g = numbers(1, 600, 300), numbers(2, 600, 300); ends = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        m, v, θ = form.encode(torch.zeros(600, 300), True), form.encode(torch.zeros(600, 300), False), w.clone()
        for _ in range(2): state_steps.adamw(form, [θ], [g], [m], [v], **NUMBERS, eps=1e-8)
        ends.append((θ, *m, *v))
    assert alike(*ends)

@formats
def test_many_in_one_call_are_as_each_alone(form):
    shapes, ends = [(7, 300), (1, 256), (0, 9), (5, 3, 20)], []
    W, G = ([numbers(k, s[0], math.prod(s[1:])).view(s) for k,s in enumerate(shapes, d)] for d in (1, 9)); zeros = lambda signed: [form.encode(torch.zeros(s[0], math.prod(s[1:])), signed) for s in shapes]
    for parts in ([slice(0, 4)], [slice(k, k + 1) for k in range(4)]):
        w, w2, M, V, M2 = [x.clone() for x in W], [x.clone() for x in W], *([(c.view(s), *rest) for (c,*rest),s in zip(zeros(signed), shapes)] for signed in (True, False, True))
        for k in parts: state_steps.adamw(form, w[k], G[k], M[k], V[k], **NUMBERS, eps=1e-8); state_steps.lion(form, w2[k], G[k], M2[k], **NUMBERS)
        ends.append([*w, *w2, *(t for x in (*M, *V, *M2) for t in x)])
    assert alike(*ends) and not torch.equal(ends[0][0], W[0])
    with pytest.raises(ValueError, match="argument"): state_steps.lion(form, w, G[:3], M, **NUMBERS)

# Optimizers: the contract

@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_bit_at_every_step(name, dtype):
    P, files = start(dtype), []; o = make(name, P, lr=.01)
    for t in range(5):
        torch.save(dict(P={n: p.detach() for n,p in P.items()}, o=o.state_dict()), f := io.BytesIO()); files.append(f)
        train(P, o, t, 1)
    assert all(torch.is_tensor(v) for s in o.state.values() for v in s.values()) and any(v.dtype == torch.uint8 for s in o.state.values() for v in s.values())
    for at,f in enumerate(files):
        f.seek(0); saved = torch.load(f, weights_only=True); Q = {n: p.requires_grad_() for n,p in saved["P"].items()}
        again = make(name, Q, lr=.5); again.load_state_dict(saved["o"]); train(Q, again, at, 5 - at)
        assert same(P, Q), at

@every
def test_follows_the_moments_of_32_bits(name):
    P, Q = start(), start(); was = start()
    kw = dict(lr=1e-3); a, b = make(name, P, **kw), whole(name)(Q.items(), **kw, **{k: v for k,v in a_kw(name).items()}); train(P, a, 0, 8); train(Q, b, 0, 8)
    for n in P:
        off = (P[n] - Q[n]).norm()/(Q[n] - was[n]).norm().clamp_min(1e-3)
        assert off < (.25 if "Lion" in name else .12), (n, off)                       # a sign near 0 may turn; a code is off by a few percent
def a_kw(name): return (dict(gap=3) if name[:4] in ("APOL", "Mini", "GaLo") else {}) | (dict(rank=33) if name[:4] in ("APOL", "GaLo") else {})

@pytest.mark.parametrize("name", NAMES[:6])
def test_without_a_compiler_it_is_the_same_to_the_bit(name, monkeypatch):
    monkeypatch.setattr(steps, "_library", lambda *_: None)                       # moments that stay whole have a pass of their own, which rounds otherwise
    P, Q = start(), start(); train(P, a := make(name, P, lr=.01), 0, 3)
    monkeypatch.setattr(state_steps.native, "load", lambda _: None)
    train(Q, b := make(name, Q, lr=.01), 0, 3)
    assert same(P, Q) and all(alike(a.state[P[n]].values(), b.state[Q[n]].values()) for n in P)

@pytest.mark.parametrize("name", ["AdamW8", "Lion8", "GaLore8", "AdamFP8"])
def test_where_parameters_lie_on_a_gpu_the_triton_kernel_steps(name, monkeypatch):
    from paretolab.kernels import states
    from paretolab.kernels.interpreter import interpret
    few = {"embed.weight": (2, 300), "q.weight": (9, 40), "norm.weight": (8,)}; of = lambda n, t: gradient(n, t, few)
    P, Q, called, log = start(shapes=few), start(shapes=few), [], states.log; train(P, a := make(name, P, lr=.01, **dict(rank=3) if name == "GaLore8" else {}), 0, 2, of)
    monkeypatch.setattr(state_steps, "_elsewhere", lambda *_: True); monkeypatch.setattr(states, "log", lambda *x, **k: (called.append(1), log(*x, **k)))
    with interpret(): train(Q, b := make(name, Q, lr=.01, **dict(rank=3) if name == "GaLore8" else {}), 0, 2, of)
    assert called and same(P, Q) and all(alike(a.state[P[n]].values(), b.state[Q[n]].values()) for n in P)

def test_trees_are_for_the_processor():
    there = types.SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"for parameters on the processor \(got cuda\); take those in logarithms"): state_steps._elsewhere(Tree(), [there])
    assert state_steps._elsewhere(Log(), [there]) and state_steps._elsewhere(Expanded(), [there]) and not state_steps._elsewhere(Log(), [torch.zeros(1), torch.zeros(1, device="meta")])

@every
def test_a_bad_number_stays_in_its_block(name):
    P, Q = start(), start()
    def spoilt(n, t):
        g = gradient(n, t)
        if n == "embed.weight" and t == 1: g[2,10] = math.nan
        return g
    train(P, make(name, P, lr=.01), 0, 4, spoilt); train(Q, make(name, Q, lr=.01), 0, 4)
    for n in P:
        same_ = torch.isclose(P[n], Q[n], rtol=1e-5, atol=1e-6)
        if n == "embed.weight": assert P[n][2,:256].isnan().all(); same_[2,:256] = True       # the weight at once, its block a step later
        assert same_.all(), n

@every
def test_zero_gradients_move_nothing_and_a_late_start_is_not_frozen(name):
    P, was = start(), start(); o = make(name, P, lr=.01, weight_decay=0.)
    train(P, o, 0, 2, lambda n, t: torch.zeros(SHAPES[n])); assert same(P, was)
    train(P, o, 2, 8)
    for n in P: assert (P[n] - was[n]).abs().max() > 1e-3 and not P[n].isnan().any(), n

@pytest.mark.parametrize("name", ["AdamW8", "LionFP8", "GaLore8"])
def test_frozen_unused_transposed_and_empty_parameters(name):
    P = {"q.weight": torch.randn(70, 60, generator=rng(5)).mT, "up.weight": torch.randn(100, 40, generator=rng(6))[::2], "unused": torch.randn(40, 40), "empty": torch.zeros(0, 40)}
    P = {n: p.requires_grad_() for n,p in P.items()}; Q = {n: p.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for n,p in P.items()}
    kw = dict(rank=33) if name == "GaLore8" else {}; a, b = (member("optimizers", f"low_bit_states.{name}")(X.items(), lr=.01, **kw) for X in (P, Q))
    for t in range(4):
        for n in P:
            if n == "unused": continue
            g = torch.randn(tuple(P[n].shape)[::-1], generator=rng(8, t)); P[n].grad = g.mT; Q[n].grad = P[n].grad.clone(memory_format=torch.contiguous_format)
        a.step(); b.step()
    for n in P: assert torch.allclose(P[n], Q[n], rtol=1e-5, atol=1e-6) and not P[n].isnan().any(), n
    assert not a.state.get(P["unused"]) and not a.state.get(P["empty"])

@every
@given(st.lists(st.lists(st.integers(0, 70), max_size=3), min_size=1, max_size=3), st.booleans())
@settings(max_examples=5, deadline=None)
def test_the_ledger_is_exact(name, sizes, half):
    shapes = {("embed" if i == 1 else "q") + f"{i}.weight": tuple(s) for i,s in enumerate([*sizes, [40, 50]])}
    P = {n: torch.zeros(s, dtype=torch.bfloat16 if half else torch.float32).requires_grad_() for n,s in shapes.items()}; o = member("optimizers", f"low_bit_states.{name}")(P.items())
    for t,p in enumerate(P.values()): p.grad = torch.randn(p.shape, generator=rng(t)).to(p.dtype)
    o.step()
    assert type(o).state_bytes(shapes) == bits(o)

def test_a_byte_and_its_block_by_hand():
    for n,codes in (("AdamW8", 2*(1 + 5/256)), ("AdamTree", 2*(1 + 4/256)), ("AdamFP8", 2*(1 + 5/256)), ("Lion8", 1 + 5/256)):
        assert getattr(low_bit_states, n).state_bytes({"w": (1024, 512)}) == int(1024*512*codes) + 4

@every
def test_the_planner_knows_it(name):
    from paretolab.frontier import budget
    from paretolab.models.shape import Shape
    shape, O = Shape(vocab=99, dim=48, ff=80, layers=2, heads=3, kv_heads=1, context=8), member("optimizers", f"low_bit_states.{name}")
    p, more = budget.plan(shape, O, 4, 1, 8), budget.plan(shape, whole(name), 4, 1, 8)
    assert p["optimizer"] == O.state_bytes(budget._shapes(shape)) < more["optimizer"] and 0 <= budget.workspace(O, shape) < 8*4*shape.parameters

def test_a_step_takes_nothing_beside_its_state():
    from paretolab.frontier import budget
    if native.load("state_steps.cpp") is None: pytest.skip("no C++ compiler")
    assert budget._rehearse(low_bit_states.AdamW8, {"w": (64, 256), "u": (3, 512)}) < 64           # a counter of steps

SPOILT = [("exp_avg", lambda v: v.float(), "torch.float32"), ("exp_avg", lambda v: v[:-1], r"\(47, 70\)"), ("exp_avg_scale", lambda v: v.double(), "torch.float64"), ("exp_avg_scale", lambda v: v[:,:0], r"\(48, 0\)"), ("exp_avg_sq_scale", None, "missing"), ("exp_avg_step", None, "missing"), ("exp_avg_step", lambda v: v.int(), "torch.int32"), ("exp_avg_step", lambda v: v*0, "what no step"), ("exp_avg_step", lambda v: v*0 + 33, "what no step"), ("exp_avg", lambda v: v*0 + 127, "what no step"), ("exp_avg_sq_scale", lambda v: -v, "what no step"), ("exp_avg_scale", lambda v: v + math.inf, "what no step"), ("exp_avg_scale", lambda v: v*0, "what no step"), ("exp_avg_sq_scale", lambda v: v*0 + 2.**-130, "what no step"), ("step", lambda v: v.view(1), r"\(1,\)")]
@pytest.mark.parametrize("key, change, says", SPOILT)
def test_a_damaged_state_is_refused(key, change, says):
    P = start(); o = make("AdamW8", P); train(P, o, 0, 1); saved = o.state_dict()
    i = next(j for g,h in zip(saved["param_groups"], o.param_groups) for j,n in zip(g["params"], h["param_names"]) if n == "blocks.0.q.weight")
    held = dict(saved["state"][i]); held.pop(key) if change is None else held.update({key: change(held[key])})
    with pytest.raises(ValueError, match=f"the saved {key} of 'blocks.0.q.weight' (is|holds) .*{says}"): make("AdamW8", start()).load_state_dict(saved | dict(state=saved["state"] | {i: held}))

def test_the_state_of_another_format_is_refused():
    from paretolab.optimizers.adamw import AdamW
    P = start(); kinds = [AdamW, low_bit_states.AdamW8, low_bit_states.AdamTree, low_bit_states.AdamFP8]
    for a in kinds:
        o = a(P.items()); train(P, o, 0, 1)
        for b in kinds:
            if a is b: continue
            with pytest.raises(ValueError, match="where .* (is|are) needed"): b(start().items()).load_state_dict(o.state_dict())

def test_doubles_are_refused():
    with pytest.raises(ValueError, match="32 or 16 bits.*'q'"): low_bit_states.AdamW8([("q", torch.zeros(80, 80, dtype=torch.float64))])
    low_bit_states.AdamW8([("norm", torch.zeros(8, dtype=torch.float64))])

# Processes

CHILD = r'''
import os, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from paretolab.optimizers import low_bit_states as L
world = int(os.environ["WORLD_SIZE"]); torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (world,))
SHAPES = {"embed.weight": (11, 300), "up.weight": (97, 48), "odd.weight": (50, 333), "conv": (7, 3, 30), "tiny.weight": (2, 40), "norm.weight": (33,)}
def gradients(t): g = torch.Generator().manual_seed(t); return {n: torch.randn(s, generator=g) for n,s in SHAPES.items()}
whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t
for kind in (L.AdamW8, L.AdamTree, L.AdamFP8, L.Lion8, L.LionFP8, L.APOLLO8, L.GaLore8, L.MiniFP8):
    kind.states.least = 64; low = kind.__mro__[1].__name__ in ("APOLLO", "Mini", "GaLore"); kw = dict(rank=40, gap=3) if kind in (L.APOLLO8, L.GaLore8) else {}
    shapes = {n: s for n,s in SHAPES.items() if not low or min(s) > 39 or len(s) != 2 or n.startswith("embed")}
    ends = []
    for spread in (lambda w: w, lambda w: distribute_tensor(w, mesh, [Shard(0)])):
        P = {n: nn.Parameter(spread(g.clone())) for n,g in gradients(99).items() if n in shapes}; o = kind(P.items(), lr=0.1, **kw)
        if kind is L.GaLore8: o.basis = lambda gram, r, start: torch.linalg.qr(start)[0][:,:r]
        for t in range(5):
            for n,g in gradients(t).items():
                if n in shapes: P[n].grad = spread(g)
            o.step()
        ends.append({n: (whole(p.detach()), {k: whole(v) for k,v in o.state[p].items()}) for n,p in P.items()})
    for n in shapes:
        (a, s), (b, t) = ends[0][n], ends[1][n]
        exact = not low or n.startswith("embed") or len(shapes[n]) > 2
        if len(shapes[n]) > 1 and exact: assert torch.equal(a, b) and s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s), (kind, n)     # codes, scales and weights
        else: assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 if n == "norm.weight" else 2e-2), (kind, n, (a - b).abs().max())
        for k in s:
            if s[k].dtype == torch.uint8: assert (s[k] != t[k]).float().mean() <= (0 if exact else .01), (kind, n, k)
try: L.AdamW8([("w", nn.Parameter(distribute_tensor(torch.zeros(96, 48), mesh, [Shard(1)])))])
except ValueError as e: assert "along its first dimension" in str(e)
else: raise AssertionError
def model(): torch.manual_seed(0); return nn.Sequential(nn.Linear(40, 90, bias=False), nn.RMSNorm(90), nn.Linear(90, 40, bias=False))
def train(m, o, at, steps):
    for t in range(at, at + steps):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(t)); o.zero_grad(); m(x).pow(2).mean().backward(); o.step()
m = fully_shard(model()); o = L.AdamFP8(m.named_parameters(), lr=1e-2); train(m, o, 0, 3); ms, os_ = get_state_dict(m, o)
again = fully_shard(model()); o2 = L.AdamFP8(again.named_parameters(), lr=1e-2); set_state_dict(again, o2, model_state_dict=ms, optim_state_dict=os_)
train(again, o2, 3, 3); train(m, o, 3, 3)
assert any(v.dtype == torch.uint8 for s in o2.state.values() for v in s.values())
for p,q in zip(m.parameters(), again.parameters()): assert torch.equal(p.full_tensor(), q.full_tensor())
'''

@pytest.mark.parametrize("world", [1, 2, 3])
def test_codes_are_the_same_at_every_number_of_processes(world): run(CHILD, world)

# Mutants of our own text: each has to be noticed

def codes_are_right(m):
    for form in (m.Tree(), m.Expanded(), m.Log()):
        for signed in (True, False):
            for x in (numbers(1, 3, 300), HOSTILE, numbers(6, 2, 600, 12.), torch.tensor([[1, 0, 2.6e-7, 2.9e-7, 5.2e-7, 5.8e-7, 0, 1e-7]])):
                x = x if signed else x.abs(); got = form.encode(x, signed)
                for a,b in zip(got, defined(form, x.numpy(), signed, got[0].numpy())): assert a.shape == b.shape and np.array_equal(a.numpy(), b, equal_nan=b.dtype == np.float32)
                y = form.decode(*got, signed)
                assert (y[(x == 0) & y.isfinite()] == 0).all() and y[~x.isfinite().all(1)].isnan().all()
                if form.kind and len(x) == 3: assert ((y - x).abs() <= .6*x.abs()).all()
                if len(x) == 2: continue                                       # steps as wide as these numbers' are off by more
                ok = (x.abs() > .2*x.abs().amax(1, keepdim=True)) & (x.abs() > 1e-37)
                assert ((y - x).abs()[ok & x.isfinite()] <= .05*x.abs()[ok & x.isfinite()]).all() and (y.sign() == x.sign())[ok & x.isfinite()].all()

def optimizers_are_right(m):
    for kind in (m.AdamW8, m.LionFP8, m.GaLore8): kind.states.least = 64
    shapes = {"embed.weight": (7, 300), "conv": (5, 3, 12), "narrow": (70, 3, 2), "q.weight": (70, 48), "norm.weight": (64,)}
    for kind,whole in ((m.AdamW8, m.AdamW), (m.LionFP8, m.Lion), (m.GaLore8, m.GaLore)):
        P, Q, was = (start(shapes=shapes) for _ in range(3)); a, b = (k(X.items(), lr=1e-3, weight_decay=.5, **dict(rank=33, alpha=2.) if whole is m.GaLore else {}) for k,X in ((kind, P), (whole, Q)))
        for t in range(6):
            for n in P: P[n].grad = gradient(n, t, shapes); Q[n].grad = P[n].grad.clone()
            a.step(); b.step()
        for n in P: assert (P[n] - Q[n]).norm()/(Q[n] - was[n]).norm() < .25, n
        assert kind.state_bytes(shapes, 33) == bits(a) < .6*bits(b)
    w = torch.full((40, 40), 1.).bfloat16().requires_grad_(); o = m.AdamW8([("w", w)], lr=.1, weight_decay=0.); w.grad = torch.ones_like(w); o.step()
    assert torch.allclose(w.float(), torch.tensor(.9), rtol=4e-3) and [m.Small(m.Tree()).small(s) for s in ((64, 64), (64, 63), (200, 31), (8192,))] == [True, False, False, False]
    with pytest.raises(ValueError): m.AdamW8([("q", torch.zeros(80, 80, dtype=torch.float64))])

def native_is_right(path):
    lib = native.load(path); old, native.load = native.load, lambda _: lib
    try:
        for k in range(lib.best_path() + 1):
            for form in FORMS:
                for signed in (True, False): test_every_instruction_set_makes_the_same_codes(k, form, signed)
                test_a_step_is_that_of_torch(k, form, (7, 300)); test_any_bytes_decode_as_they_are_defined_to(k, form, True); test_any_bytes_decode_as_they_are_defined_to(k, form, False)
        for form in FORMS:
            with pytest.MonkeyPatch.context() as patch: test_threads_change_nothing(form, patch)
    finally: native.load = old

MUTANTS = [(codes_are_right, "state_codes", old, new) for old,new in (("A, top = 1/(.9*D)", "A, top = 1/D"), ("(6 if signed else 7)", "6"), ("A[0] = 1/9/.275e-6", "A[0] = 1/9/.55e-6"), ("+ 8/9)", "+ 7/9)"), (".clamp_max(2 - 2**-23)", ""), ("q[i] + q[i-1]", "2*q[i]"), ("p.clamp_max(127)", "p"), ("torch.where(v > 0, p - 1, 0)", "p - 1"), ("clamp_min(2**-23 if signed else 1.2e-7)", "clamp_min(0.)"), ("torch.where(p > 0, v, 0*s)", "v"), ("s.isfinite() & (s >= _TINY)", "s >= _TINY"),
    ("x.amax(-1)", "x.mean(-1)"), ("c > 128, -v", "c > 127, -v"), ("T - least + N - 2", "T - least"), (".minimum(T >> 8)", ""), (".clamp(1, 32)", ".clamp(1, 64)"), ("T >= 256", "T >= 128"), ("a >= 128, a, 0x7fff", "a >= 0, a, 0x7fff"), ("+ 2**14 >> 15", ">> 15"), ("n < 1 - 128//p[...,None]", "n < 1"), ("c | h >> 8 & 128", "c"), ("n)*p << 16", "n)*p << 15"), ("n.clamp_min(1)", "n.clamp_min(0)"), ("h < 128, 0,", "h < 1, 0,"), ("n == 0, 0.", "n == 0, s"), ("times + 0*s", "times"), ("c & 127 if signed", "c if signed"), ("{True: 126, False: 126}", "{True: 127, False: 126}"), ("{True: 126, False: 126}", "{True: 126, False: 127}"), ("{True: 126, False: 255}", "{True: 126, False: 254}"), ("c > 127, -v, v) if signed", "c > 127, v, v) if signed"))] + [
    (optimizers_are_right, "low_bit_states", old, new) for old,new in (("exp_avg=p, exp_avg_sq=p", "exp_avg=p"), ("(1 - β2**t)**0.5", "(1 - β2**t)**-0.5"), ('step=g["lr"]*ρ/(1 - β1**t)', 'step=g["lr"]*ρ'), ('1 - g["lr"]*g["weight_decay"]', "1"), ("fresh1=1 - β1", "fresh1=1"), ('encode(self.form, value, key == "exp_avg")', 'encode(self.form, value, False)'),
    ("o.put(p, w)", "pass"), (">= 32", ">= 31"), (">= self.least", "> self.least"), ("p.dtype == torch.float64", "False"), ("self.form.block)", "self.form.block + 1)"), ('key == "exp_avg")', 'key == "exp_avg_sq")'))]
ROOT = Path(state_codes.__file__).parent

@pytest.mark.parametrize("check, module, old, new", MUTANTS, ids=[f"{m}: {o} → {n}"[:70] for _,m,o,n in MUTANTS])
def test_a_mutant_is_noticed(check, module, old, new):
    text = (ROOT/f"{module}.py").read_text()
    assert old in text, "the mutant's line is gone: write it anew"
    m = types.ModuleType(f"paretolab.optimizers.{module}"); m.__package__ = "paretolab.optimizers"
    with pytest.raises((Exception, pytest.fail.Exception)): exec(compile(text.replace(old, new), module, "exec"), vars(m)); check(m)

@pytest.mark.parametrize("check, module", [(codes_are_right, "state_codes"), (optimizers_are_right, "low_bit_states")])
def test_an_unchanged_module_passes(check, module):
    m = types.ModuleType(f"paretolab.optimizers.{module}"); m.__package__ = "paretolab.optimizers"
    exec(compile((ROOT/f"{module}.py").read_text(), module, "exec"), vars(m)); check(m)

NATIVE = [("size_above(x * r, least)", "size_above(x * r, .125f)"), ("size_above(*(const F*)(x + k) * r, least)", "size_above(*(const F*)(x + k) * r, .125f)"), ("larger(times_sign(p, bits(x)), every(-127))", "times_sign(p, bits(x))"), ("larger(times_sign(c, *(const I*)(x + k)), every(-127))", "times_sign(c, *(const I*)(x + k))"), ("times_sign(p - 1, bits(x))", "(p - 1)"), ("times_sign(c - 1, *(const I*)(x + k))", "(c - 1)"),
    ("I n = every(!S);", "I n = every(0);"), ("0x7f000000 | !S;", "0x7f000000;"), ("* 154 >> 16 & 7", "* 153 >> 16 & 7"), ("bits(e) - (I)(y > e)", "bits(e)"), ("8.f / 9, all(0x1.fffffep0f)", "8.f / 9, all(0x1p9f)"), ("(S ? .5f : 1.5f)", "(S ? .5f : .5f)"), ("times_sign(every(0x40000000), c)", "every(0x40000000)"), ("fl(times_sign(bits(14.4f * g - 12.8f), c))", "(14.4f * g - 12.8f)"),
    ("top >= 0x7f800000) s = NAN", "false) s = NAN"), ("smaller(leasts, a - 0x800000)", "smaller(leasts, a)"), ("if (k < n) f(k, int(n - k));", ""), ("y += fresh2 * d * d", "y += fresh2 * d"), ("(root(y) + j.eps)", "root(y)"), ("root(*(const F*)(y + k)) + eps", "root(*(const F*)(y + k))"),
    ("m.scales[i] * times", "m.scales[i]"), ("M, 0);", "M, 1);"), ("u.top[1][b] = ev.top();", "u.top[1][b] = em.top();"),
    ("c = 0, row++;", "c = 0;"), ("SET::encode(vc + done, ev, y + done, n[k] - done);", ""), ("for (int i = done; i < n[k]; i += WIDTH) move", "for (int i = done; i + WIDTH <= n[k]; i += WIDTH) move"),
    ("int((least + 0x800000) >> 16)", "int(least >> 16)"), ("top < 0x7f800000 ? top >> 16 : 0", "top >> 16"), ("(N - 1), T >> 8, 32", "(N - 1), T, 32"), ("base -= N * p << 16", "base -= N * p << 15"), ("(const __m128i*)codes), 0xd8)", "(const __m128i*)codes), 0xe4)"), ("h = _mm256_andnot_si256(none, h);", ""), ("_mm256_andnot_si256(none, low16)", "low16"), ("return T < 256;", "return T < 128;"), ("+ 16384) >> 15", ") >> 15"), ("(c & (k >= half))", "c"), ("| (h >> 8 & 128)", ""), ("const I n = S ? c & 127 : c;", "const I n = c;"), ("n = S ? _mm256_and_si256(c, _mm256_set1_epi16(127)) : c", "n = c"), ("_mm256_packs_epi16(a, b), _mm256_set1_epi8(-128)", "_mm256_packs_epi16(b, a), _mm256_set1_epi8(-128)"), ("S ? 126 : 255", "255"), ("using Expanded = Even<S, 126>", "using Expanded = Even<S, 127>"), ("half[p] = 1 - 128 / p", "half[p] = 1 - 64 / p"), ("int16_t(half)), k)", "-128), k)"), ("c & (h > 127)", "c & (h > 0)"), ("int64_t i = first * ((j.columns + 255) / 256);", "int64_t i = 0;"), ("for (int64_t row = first; row < last; row++)", "for (int64_t row = 0; row < last - first; row++)"), ("_mm256_sign_epi16(c, _mm256_subs_epi16(h, _mm256_set1_epi16(127)))", "c"), ("_mm256_subs_epi16(h, _mm256_set1_epi16(127))", "h"),
    ("0, 2, 4, 6, 1, 3, 5, 7, 8", "0, 1, 2, 3, 4, 5, 6, 7, 8"), ("if (cv.zero()) memset(v.codes + at, 0, n);", ""), ("if (cm.zero()) memset(m.codes + at, 0, n);", ""), ("each(n, move, whole);", ""), ("}, whole);", "}, n);"), ("lion ? 1 : beta1); const typename", "1); const typename"), ("give(D + k, root(y) + eps, WIDTH);", "give(D + k, root(y), WIDTH);"), ("* times; y[1]", "; y[1]"), ("(65536 / p + 1) / 2", "65536 / p / 2"), ("row * j.columns + column", "row * 256 + column"), ("all(times + 0 * m.scales[i])", "all(times)"), ("left < 256 ? block(at, int(left)) : block", "block")]
WIDE = [("return byte(0, c);", "return byte(1, c);"), ("else below = (e & 15) + 1;", "else below = e & 15;")] # of the text that only processors with AVX-512 run
@pytest.mark.soak
@pytest.mark.parametrize("old, new", NATIVE + WIDE)
def test_a_mutant_of_the_native_pass_is_noticed(old, new, tmp_path):
    if (old, new) in WIDE: possible(2)
    text = (ROOT.parent/"kernels"/"csrc"/"state_steps.cpp").read_text()
    assert old in text, "the mutant's line is gone: write it anew"
    (tmp_path/"state_steps.cpp").write_text(text.replace(old, new))
    assert noticed(lambda: native_is_right(tmp_path/"state_steps.cpp"))

@pytest.mark.soak
def test_the_native_pass_itself_is_right(tmp_path):
    (tmp_path/"state_steps.cpp").write_text((ROOT.parent/"kernels"/"csrc"/"state_steps.cpp").read_text())
    assert not noticed(lambda: native_is_right(tmp_path/"state_steps.cpp"))

def test_other_types_never_reach_c():
    form = state_codes.Tree(); x = torch.randn(4, 64); m, v = form.encode(x, True), form.encode(x.abs(), False)
    numbers = dict(beta1=.9, fresh1=.1, beta2=.99, fresh2=.01, keep=1., step=.1, eps=1e-8)
    for w, g in ((x.half(), x), (x, x.double())):
        with pytest.raises(TypeError, match="float32"): state_steps.adamw(form, [x.clone(), w.clone()], [x, g], [m, m], [v, v], **numbers)
    with pytest.raises(TypeError, match="float32"): state_steps.encode(form, x.half(), True)
