"""All optimizers under one contract: independent definitions, resume at every step, metamorphic properties, hostile gradients, ledgers, mutants."""
import copy, functools, importlib, io, json, math, sys, types
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.engine.settings import member
from paretolab.optimizers.lowrank import Sparse
from paretolab.optimizers.stochastic_rounding import round_to_bfloat16, stochastic

NAMES = ["adamw.AdamW", "muon.Muon", "apollo.APOLLO", "apollo.Mini", "galore.GaLore", "lion.Lion", "sophia.Sophia", "scale.SCALE", "baselines.NAdamW", "baselines.Adafactor", "baselines.SOAP", "baselines.ScheduleFree"]
LOWRANK = ["apollo.APOLLO", "apollo.Mini", "galore.GaLore"]
GAP = 4
def kw(name): return dict(gap=GAP) if name in [*LOWRANK, "sophia.Sophia", "baselines.SOAP"] else {}
every = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore:an estimate of the curvature was due")

SHAPES = {"embed.weight": (7, 4), "blocks.0.q.weight": (6, 5), "blocks.0.up.weight": (5, 8), "blocks.0.sq.weight": (4, 4), "blocks.0.row.weight": (1, 3), "head.weight": (7, 4), "norm.weight": (4,), "conv": (2, 3, 2), "conv4": (2, 1, 2, 2), "scale": ()}
def rng(*seed): return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
def start(dtype=torch.float32, shapes=SHAPES, seed=0): return {n: torch.randn(s, generator=rng(seed, i)).to(dtype).requires_grad_() for i,(n,s) in enumerate(shapes.items())}
@functools.cache
def _drawn(shape, *seed): return torch.randn(shape, generator=rng(*seed))
def gradient(n, t, shapes=SHAPES): return _drawn(shapes[n], 7, t, list(shapes).index(n)).clone()
def make(name, P, **more): return member("optimizers", name)(P.items(), **{**kw(name), **more})
def train(P, o, at, steps, of=gradient):
    for t in range(at, at + steps):
        for n,p in P.items(): p.grad = of(n, t).to(p.dtype)
        o.step()
def bits(o): return sum(v.nbytes for s in o.state.values() for v in s.values())
def same(P, Q): return all(torch.equal(P[n], Q[n]) for n in P)

# Definitions in NumPy, written from the papers, of one tensor in double precision

def norm(x): return math.sqrt((x*x).sum())
def adam(W, Gs, η, β, ϵ, λ):
    m = v = 0
    for t,g in enumerate(Gs, 1):
        m, v = β[0]*m + (1 - β[0])*g, β[1]*v + (1 - β[1])*g*g
        W = (1 - η*λ)*W - η*m/(1 - β[0]**t)/(np.sqrt(v/(1 - β[1]**t)) + ϵ)
    return W
def apollo(W, Gs, name, r, α, mini, η=.02, β=(.9, .99), ϵ=1e-6, λ=.1, γ=1.01):
    tall = W.shape[0] >= W.shape[1]
    if not tall: W, Gs = W.T, [g.T for g in Gs]
    m = v = last = 0
    for t,g in enumerate(Gs, 1):
        P = Sparse()(name, (t - 1)//GAP, r, W.shape[1]).to_dense().double().numpy()
        R = np.einsum("nm,rm->nr", g, P)
        m, v = β[0]*m + (1 - β[0])*R, β[1]*v + (1 - β[1])*R*R
        N = m/(np.sqrt(v) + ϵ)
        s = np.full(len(W), norm(N)/norm(R)) if mini else np.array([norm(a)/norm(b) for a,b in zip(N, R)])
        U = s[:,None]*g
        if last and norm(U) > γ*last: U = U*γ*last/norm(U)
        last = norm(U) or last
        W = W - η*λ*W - η*α*math.sqrt(1 - β[1]**t)/(1 - β[0]**t)*U
    return W if tall else W.T
def galore(W, Gs, r, α, η=.02, β=(.9, .99), ϵ=1e-6, λ=.1):
    tall = W.shape[0] >= W.shape[1]
    if not tall: W, Gs = W.T, [g.T for g in Gs]
    m = v = 0
    for t,g in enumerate(Gs, 1):
        if (t - 1) % GAP == 0:
            Q = np.linalg.svd(g, full_matrices=False)[2][:r].T
            Q = Q*np.sign(Q[np.abs(Q).argmax(0), range(r)])
        R = g @ Q
        m, v = β[0]*m + (1 - β[0])*R, β[1]*v + (1 - β[1])*R*R
        W = W - η*λ*W - η*α*math.sqrt(1 - β[1]**t)/(1 - β[0]**t)*m/(np.sqrt(v) + ϵ) @ Q.T
    return W if tall else W.T
def lion(W, Gs, η=.02, λ=.1):
    m = 0
    for g in Gs: W = (1 - η*λ)*W - η*np.sign(.9*m + .1*g); m = .99*m + .01*g
    return W
def scale(W, Gs, rule, η=.02, λ=.1):
    m = 0
    for g in Gs:
        m = .9*m + .1*g
        x = m if rule == "head" else g
        W = (1 - η*λ)*W - η*x/np.sqrt((x*x).mean(0 if rule == "embedding" else 1, keepdims=True))
    return W
def sophia(W, Gs, Hs, η=.02, λ=.1):
    m = h = 0
    for t,g in enumerate(Gs):
        if t % GAP == 0: h = .99*h + .01*Hs[t]
        m = .965*m + .035*g
        W = (1 - η*λ)*W - η*np.clip(m/np.maximum(.04*h, 1e-12), -1, 1)
    return W
def nadamw(W, Gs, η=.02, β=(.9, .99), ϵ=1e-8, λ=.1):
    m = v = 0; product = 1
    μ = lambda t: β[0]*(1 - .5*.96**(t*4e-3))
    for t,g in enumerate(Gs, 1):
        product *= μ(t)
        m, v = β[0]*m + (1 - β[0])*g, β[1]*v + (1 - β[1])*g*g
        W = (1 - η*λ)*W - η*((1 - μ(t))*g/(1 - product) + μ(t + 1)*m/(1 - product*μ(t + 1)))/(np.sqrt(v/(1 - β[1]**t)) + ϵ)
    return W

def against(name, steps=10):
    "Largest difference of any parameter from its NumPy definition."
    P, M = start(torch.float64), importlib.import_module
    more = dict(lr=.02, weight_decay=.1) | ({} if name in ("lion.Lion", "sophia.Sophia", "scale.SCALE") else dict(betas=(.9, .99))) | (dict(rank=1) if name in ("apollo.APOLLO", "galore.GaLore") else {})
    o, was = make(name, P, **more), {n: p.detach().numpy().copy() for n,p in P.items()}
    if name == "galore.GaLore": o.basis = M("paretolab.optimizers.galore").exact
    curvature = {n: [30*torch.rand(p.shape, generator=rng(9, t), dtype=torch.float64) for t in range(steps)] for n,p in P.items()}
    for t in range(steps):
        if name == "sophia.Sophia" and o.due: o.observe([curvature[n][t] for g in o.param_groups for n in g["param_names"]])
        train(P, o, t, 1)
    Gs, worst = {n: [gradient(n, t).double().numpy() for t in range(steps)] for n in P}, 0.
    for n,p in P.items():
        λ, W, G, ends = .1*(p.ndim == 2), was[n], Gs[n], n.startswith(("embed", "head"))
        plain = lambda ϵ=1e-8, β=(.9, .99): adam(W, G, .02, β, ϵ, λ)
        if name == "adamw.AdamW": want = plain()
        elif name in LOWRANK and (ends or p.ndim != 2): want = plain(1e-6)
        elif name == "apollo.APOLLO": want = apollo(W, G, n, 1, 1., False)
        elif name == "apollo.Mini": want = apollo(W, G, n, 1, 128**.5, True)
        elif name == "galore.GaLore": want = galore(W, G, 1, .25)
        elif name == "lion.Lion": want = lion(W, G, λ=λ)
        elif name == "sophia.Sophia": want = sophia(W, G, [x.numpy() for x in curvature[n]], λ=λ)
        elif name == "scale.SCALE": want = plain(β=(.9, .999)) if p.ndim != 2 else scale(W, G, "embedding" if n.startswith("embed") else "head" if ends else "scale")
        elif name == "baselines.NAdamW": want = nadamw(W, G, λ=λ)
        worst = max(worst, np.abs(p.detach().numpy() - want).max())
    return worst

@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("muon.Muon", "baselines.Adafactor", "baselines.SOAP", "baselines.ScheduleFree")])   # these: against their libraries, on their pages
def test_equals_an_independent_definition(name): assert against(name) < (1e-6 if name == "baselines.NAdamW" else 1e-10)          # torch keeps a product of NAdam in 32 bits

# Saved and resumed

@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_bit_at_every_step(name, dtype):
    steps, files = 2*GAP + 2, []
    build = lambda P, **more: stochastic(make(name, P, **more), seed=3) if dtype == torch.bfloat16 else make(name, P, **more)
    P = start(dtype); o = build(P, lr=.01)
    for t in range(steps):
        torch.save(dict(P={n: p.detach() for n,p in P.items()}, o=o.state_dict()), f := io.BytesIO()); files.append(f)
        train(P, o, t, 1)
    for at,f in enumerate(files):
        f.seek(0); saved = torch.load(f, weights_only=True)
        Q = {n: p.requires_grad_() for n,p in saved["P"].items()}; again = build(Q, lr=.5); again.load_state_dict(saved["o"])
        train(Q, again, at, steps - at)
        assert same(P, Q), at
    assert all(v.dtype in (torch.float32,) for s in o.state.values() for v in s.values())

@every
def test_state_is_tensors_and_groups_are_plain(name):
    P = start(); o = make(name, P); train(P, o, 0, 1)
    assert all(torch.is_tensor(v) for s in o.state.values() for v in s.values())
    groups = o.state_dict()["param_groups"]
    assert json.loads(json.dumps(groups)) == [{k: list(v) if isinstance(v, tuple) else v for k,v in g.items()} for g in groups]

@every
def test_a_state_of_other_parameters_is_refused(name):
    P, Q = start(), dict(reversed(start().items()))
    saved = make(name, P).state_dict(); o = make(name, Q)
    with pytest.raises(ValueError, match="the saved state has"): o.load_state_dict(saved)

@every
def test_goes_through_the_training_loop(name, tmp_path):
    from paretolab.data.stream import MixedStream
    from paretolab.engine.fit import fit
    from paretolab.models.mobilellm import MobileLLM, Shape
    class Text:
        def __len__(self): return 4000
        def read(self, start, n): return (np.arange(start, start + n)*7 % 61).astype(np.uint16)
    def go(run, *stops):
        for steps in stops:
            torch.manual_seed(0); m = MobileLLM(Shape(vocab=64, dim=16, ff=24, layers=1, heads=2, kv_heads=1, context=16))
            o = make(name, dict(m.named_parameters()), lr=1e-3, weight_decay=.1); s = MixedStream(dict(a=Text()), dict(a=1.), 2, 16, 0)
            fit(m, s, o, lambda t: 1., steps=steps, run=tmp_path/run, every=2)
        return dict(m.named_parameters())
    assert same(go("whole", 6), go("parts", 3, 6))

# Metamorphic properties

@every
def test_maximising_is_minimising_the_negative(name):
    P, Q = start(), start()
    train(P, make(name, P, lr=.01, maximize=True), 0, 5); train(Q, make(name, Q, lr=.01), 0, 5, lambda n, t: -gradient(n, t))
    assert same(P, Q)

@every
def test_order_of_parameters_does_not_matter(name):
    P, Q = start(), start(); Q = dict(reversed(Q.items()))
    train(P, make(name, P, lr=.01), 0, 6); train(Q, make(name, Q, lr=.01), 0, 6)
    for n in P: assert torch.allclose(P[n], Q[n], rtol=1e-5, atol=1e-6), n               # Muon stacks matrices of one shape in their order

@every
def test_names_given_by_wrappers_do_not_matter(name):
    P, Q = start(), start()
    train(P, make(name, P, lr=.01), 0, 6)
    wrapped = {"module._orig_mod." + n: p for n,p in Q.items()}; o = member("optimizers", name)(wrapped.items(), lr=.01, **kw(name))
    for t in range(6):
        for n,p in Q.items(): p.grad = gradient(n, t)
        o.step()
    assert same(P, Q)

@every
def test_a_schedule_s_numbers_are_refused_or_saved(name):
    P = start(); o = make(name, P); train(P, o, 0, 1); was = {n: p.detach().clone() for n,p in P.items()}
    for lr in (-1e-3, math.nan, math.inf):
        o.param_groups[-1]["lr"] = lr
        with pytest.raises(ValueError, match="learning rate of a step"): train(P, o, 1, 1)
        assert same(P, was)
    for g in o.param_groups: g["lr"] = np.float64(.01)
    torch.save(o.state_dict(), f := io.BytesIO()); f.seek(0); assert torch.load(f, weights_only=True)["param_groups"][0]["lr"] == .01
    with pytest.raises(TypeError, match="neither copied nor pickled"): copy.deepcopy(o)

@every
def test_torch_s_defaults_change_nothing(name, request):
    request.addfinalizer(lambda: (torch.set_default_dtype(torch.float32), torch.set_default_device("cpu"))); ends = []
    for dtype,device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        P = start(); G = [{n: gradient(n, t) for n in P} for t in range(4)]
        torch.set_default_dtype(dtype); torch.set_default_device(device)
        train(P, o := make(name, P), 0, 4, lambda n, t: G[t][n]); ends.append([*P.values(), *(v for s in o.state.values() for v in s.values())])
        torch.set_default_dtype(torch.float32); torch.set_default_device("cpu")
    for other in ends[1:]: assert all(a.dtype == b.dtype and torch.equal(a, b) for a,b in zip(ends[0], other, strict=True))

@pytest.mark.parametrize("name", LOWRANK)
def test_a_transposed_matrix_is_treated_alike(name):
    P = {"q": torch.randn(9, 5, generator=rng(1)).double().requires_grad_()}; Q = {"q": P["q"].detach().mT.contiguous().requires_grad_()}
    a, b = make(name, P, lr=.01), make(name, Q, lr=.01)
    for t in range(9):
        P["q"].grad = torch.randn(9, 5, generator=rng(2, t)).double(); Q["q"].grad = P["q"].grad.mT.contiguous()
        a.step(); b.step()
    assert torch.allclose(P["q"], Q["q"].mT, rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize("name", ["apollo.APOLLO", "apollo.Mini"])
def test_channels_may_be_permuted(name):
    P = {"q": torch.randn(9, 5, generator=rng(1)).double().requires_grad_()}; i = torch.randperm(9, generator=rng(3)); Q = {"q": P["q"].detach()[i].clone().requires_grad_()}
    a, b = make(name, P, lr=.01), make(name, Q, lr=.01)
    for t in range(9):
        P["q"].grad = torch.randn(9, 5, generator=rng(2, t)).double(); Q["q"].grad = P["q"].grad[i]
        a.step(); b.step()
    assert torch.allclose(P["q"][i], Q["q"], rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize("name", ["adamw.AdamW", *LOWRANK, "scale.SCALE", "lion.Lion"])
def test_the_scale_of_gradients_does_not_matter(name):
    P, Q = start(torch.float64), start(torch.float64); more = {} if name == "lion.Lion" else dict(eps=0.)
    train(P, make(name, P, lr=.01, **more), 0, 6); train(Q, make(name, Q, lr=.01, **more), 0, 6, lambda n, t: 2.**40*gradient(n, t).double())
    for n in P: assert torch.allclose(P[n], Q[n], rtol=1e-9, atol=1e-10), n

def test_with_full_rank_and_no_projection_apollo_scales_by_full_moments():
    P = {"q": torch.randn(6, 4, generator=rng(1)).double().requires_grad_()}; o = make("apollo.APOLLO", P, lr=.01, rank=4)
    o.projection, o.growth, W, m, v = (lambda name, k, r, m: torch.eye(r)), math.inf, P["q"].detach().clone(), 0, 0
    for t in range(1, 8):
        G = P["q"].grad = torch.randn(6, 4, generator=rng(2, t)).double(); o.step()
        m, v = .9*m + .1*G, .999*v + .001*G*G
        W -= .01*(1 - .999**t)**.5/(1 - .9**t)*G*((m/(v.sqrt() + 1e-6)).norm(dim=1)/G.norm(dim=1))[:,None]
    assert torch.allclose(P["q"], W, rtol=1e-12)

def test_galore_of_full_rank_without_rotation_is_adamw():
    P, Q = ({"q": torch.randn(6, 4, generator=rng(1)).double().requires_grad_()} for _ in "12")
    a, b = make("galore.GaLore", P, lr=.04, rank=4, alpha=.25), member("optimizers", "adamw.AdamW")(Q.items(), lr=.01, betas=(.9, .999), eps=0., weight_decay=0.)
    a.basis, a.param_groups[0]["eps"] = (lambda gram, r, start: torch.eye(len(start), r, dtype=start.dtype)), 0.
    for t in range(9):
        P["q"].grad = Q["q"].grad = torch.randn(6, 4, generator=rng(2, t)).double(); a.step(); b.step()
    assert torch.allclose(P["q"], Q["q"], rtol=1e-10)

@every
def test_gradients_added_up_are_the_gradient(name):
    P, Q = start(), start(); a, b = make(name, P, lr=.01), make(name, Q, lr=.01)
    for t in range(4):
        for n in P:
            g = gradient(n, t); P[n].grad = g.clone(); Q[n].grad = (g*.25).clone()
            for _ in range(3): Q[n].grad += g*.25
        a.step(); b.step()
    for n in P: assert torch.allclose(P[n], Q[n], rtol=1e-4, atol=1e-5), n

# Hostile gradients and parameters

@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_number_stays_in_its_tensor(name, value):
    P, Q = start(), start(); bad = "blocks.0.q.weight"
    def spoilt(n, t):
        g = gradient(n, t)
        if n == bad and t in (1, GAP): g[0,0] = value
        return g
    if name == "baselines.SOAP": spoilt = lambda n, t: gradient(n, t)*(value if n == "conv" and t == 1 else 1); bad = "conv"     # its library's decompositions raise
    train(P, o := make(name, P, lr=.01), 0, 2, spoilt); at = (0,)*P[bad].ndim
    assert P[bad][at].isnan() or value == math.inf and any(not v.isfinite().all() for v in o.state[P[bad]].values())
    train(P, o, 2, 4, spoilt); train(Q, make(name, Q, lr=.01), 0, 6)
    for n in P: assert n == bad or torch.allclose(P[n], Q[n], rtol=1e-6, atol=1e-7), n
    reach = {"adamw.AdamW": 1, "lion.Lion": 1, "distributed_lion.DistributedLion": 1, "sophia.Sophia": 1, "baselines.NAdamW": 1, "baselines.ScheduleFree": 1, "scale.SCALE": 5, "galore.GaLore": 5, "baselines.SOAP": 12}      # entries: itself, its row, its tensor
    if value != value: assert P[bad].isnan().sum() == reach.get(name, P[bad].numel())

@pytest.mark.parametrize("lines", ["C++", "torch"])
def test_a_head_s_and_lion_s_bad_number_is_no_rest(lines, monkeypatch):
    from paretolab.kernels import steps
    if lines == "torch": monkeypatch.setattr(steps, "_library", lambda *_: None)
    for name,bad in (("lion.Lion", 1), ("scale.SCALE", 40)):                                                              # a whole vector and more, the tail
        for at in ((0, 3), (2, 37)):
            P = {"lm_head.weight": torch.randn(3, 40, generator=rng(1)).requires_grad_()}; o = make(name, P, lr=.01)
            for t in range(4):
                was = P["lm_head.weight"].detach().clone(); P["lm_head.weight"].grad = torch.randn(3, 40, generator=rng(2, t))
                if t == 1: P["lm_head.weight"].grad[at] = math.nan
                o.step(); w = P["lm_head.weight"]
                assert w.isnan().sum() == (bad if t else 0) and (not t or w[at].isnan()) and not (w == was).any(), (name, t)

@every
def test_zero_gradients_move_nothing_and_a_late_start_is_not_frozen(name):
    P = start(); was = {n: p.detach().clone() for n,p in P.items()}; o = make(name, P, lr=.01, weight_decay=0.)
    train(P, o, 0, 2, lambda n, t: torch.zeros(SHAPES[n])); assert same(P, was)
    train(P, o, 2, 8)
    for n in P: assert (P[n] - was[n]).abs().max() > 1e-3, n

@every
def test_frozen_and_unused_parameters_are_left_alone(name):
    P, Q = start(), start(); unused = ("blocks.0.q.weight", "embed.weight", "norm.weight"); P["scale"].requires_grad_(False)
    a, b = make(name, P, lr=.01), make(name, Q, lr=.01)
    was = {n: p.detach().clone() for n,p in P.items()}
    for t in range(3):
        for n in P:
            Q[n].grad = gradient(n, t)
            if n not in (*unused, "scale"): P[n].grad = gradient(n, t)
        a.step(); b.step()
    for n in P: assert torch.allclose(P[n], was[n] if n in (*unused, "scale") else Q[n], rtol=1e-6), n
    assert not any(a.state.get(P[n]) for n in (*unused, "scale"))

@every
def test_empty_and_transposed_tensors(name):
    P = {"empty": torch.zeros(0, 4), "none": torch.zeros(0), "q.weight": torch.randn(6, 5, generator=rng(5)).mT, "up.weight": torch.randn(12, 5, generator=rng(6))[::2]}
    P = {n: p.requires_grad_() for n,p in P.items()}; Q = {n: p.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for n,p in P.items()}
    a, b = make(name, P, lr=.01), make(name, Q, lr=.01)
    for t in range(6):
        for n in P:
            g = torch.randn(tuple(P[n].shape)[::-1], generator=rng(8, t)); P[n].grad = g.mT if g.ndim == 2 else g; Q[n].grad = P[n].grad.clone(memory_format=torch.contiguous_format)
        a.step(); b.step()
    for n in P: assert torch.allclose(P[n], Q[n], rtol=1e-5, atol=1e-6) and not P[n].isnan().any(), n

@every
@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_parameters_of_16_bits_follow_those_of_32(name, dtype, eps):
    Q = start(dtype); P = {n: p.detach().float().requires_grad_() for n,p in Q.items()}; of = lambda n, t: gradient(n, t).to(dtype).float()
    train(P, make(name, P, lr=1e-3), 0, 5, of); o = make(name, Q, lr=1e-3); train(Q, o, 0, 5, of)
    for n in P: assert Q[n].dtype == dtype and (P[n] - Q[n].float()).abs().max() <= 5*eps*max(1, P[n].abs().max().item()), n          # five roundings

@every
def test_parameters_may_join_and_closures_have_gradients(name):
    P = start(); first = {n: P[n] for n in ("head.weight", "blocks.0.q.weight", "blocks.0.up.weight")}; o = make(name, first, lr=.01)
    late = {n: P[n] for n in P if n not in first}; o.add_param_group(dict(params=list(late.items()), lr=.02, weight_decay=0.))
    assert {n for g in o.param_groups for n in g["param_names"]} == set(P) and {g["lr"] for g in o.param_groups} == {.01, .02}
    def closure():
        o.zero_grad(); loss = sum(p.square().sum() for p in P.values()); loss.backward(); return loss
    losses = [o.step(closure).item() for _ in range(12)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="optimized once"): o.add_param_group(dict(params=[("again", P["scale"])]))

OPTIONS = [("apollo.APOLLO", dict(alpha=-1.)), ("apollo.APOLLO", dict(alpha=math.inf)), ("apollo.APOLLO", dict(rank=0)), ("apollo.APOLLO", dict(gap=0)), ("apollo.Mini", dict(rank=5)), ("galore.GaLore", dict(alpha=math.nan)), ("galore.GaLore", dict(gap=1.5)),
    ("scale.SCALE", dict(momentum=5.)), ("muon.Muon", dict(momentum=5.)), ("muon.Muon", dict(momentum="x")), ("sophia.Sophia", dict(gamma=-1.)), ("sophia.Sophia", dict(gap=0)), ("baselines.SOAP", dict(gap=0)), ("baselines.ScheduleFree", dict(betas=(0., .9))),
    *((n, x) for n in NAMES for x in (dict(lr="x"), dict(weight_decay=-3.), *([dict(betas=(5., 7.)), dict(betas=None)] if n != "baselines.Adafactor" else [])))]
@pytest.mark.parametrize("name, bad", OPTIONS)
def test_options_are_checked_alike_at_first_later_and_in_a_file(name, bad):
    (k, v), = bad.items(); P = start(); says = f"{k}={v!r}".replace("(", r"\(").replace(")", r"\)")
    if (name, k) != ("apollo.Mini", "rank") and v is not None:
        with pytest.raises(ValueError, match=says): make(name, P, **bad)
    o = make(name, P, lr=.01); train(P, o, 0, 2); was, groups = {n: p.detach().clone() for n,p in P.items()}, len(o.param_groups)
    for more,words in ((bad, says), (dict(lrr=3), "lrr=3")):
        with pytest.raises(ValueError, match=words): o.add_param_group(dict(params=[("new", torch.ones(8, 8).requires_grad_())], **more))
    saved = copy.deepcopy(o.state_dict()); saved["param_groups"][-1] |= bad
    with pytest.raises(ValueError, match=says): o.load_state_dict(saved)
    assert len(o.param_groups) == groups and same(P, was) and all(type(g[k]) is not str and g[k] != v for g in o.param_groups)

@every
def test_what_cannot_be_optimized_is_refused_before_anything_changes(name):
    P = start(); o = make(name, P); groups = len(o.param_groups)
    for odd in (torch.ones(8, 8).requires_grad_()*2, torch.eye(8).to_sparse_csr().requires_grad_(), torch.eye(8).to_sparse().requires_grad_()):
        with pytest.raises(ValueError, match="'odd'"): o.add_param_group(dict(params=[("fine", torch.ones(8, 8).requires_grad_()), ("odd", odd)]))
    assert len(o.param_groups) == groups
    with pytest.raises(ValueError, match="nothing to optimize"): o.add_param_group({})

def test_a_head_that_joins_an_embedding_of_its_rule_is_refused_and_the_other_way_round_is_not():
    S = {"embed.weight": (9, 4), "lm_head.weight": (9, 4), "q": (4, 4)}; P = start(shapes=S)
    o = make("scale.SCALE", {n: P[n] for n in ("embed.weight", "q")})
    with pytest.raises(ValueError, match="'embed.weight' would follow the rule 'embedding', and its state is of 'head'"): o.add_param_group(dict(params=[("lm_head.weight", P["lm_head.weight"])]))
    o = make("scale.SCALE", {"lm_head.weight": P["lm_head.weight"]}); o.add_param_group(dict(params=[(n, P[n]) for n in ("embed.weight", "q")]))
    for p in P.values(): p.grad = torch.ones_like(p)
    o.step(); assert bits(o) == member("optimizers", "scale.SCALE").state_bytes(S)

def test_sophia_s_groups_have_one_gap():
    o = make("sophia.Sophia", start()); new = lambda: [("new", torch.ones(3).requires_grad_())]
    with pytest.raises(ValueError, match=f"have gap={GAP} .got gap=3"): o.add_param_group(dict(params=new(), gap=3))
    o.add_param_group(dict(params=new(), gap=GAP))

def test_an_estimate_of_another_kind_is_refused_before_anything_changes():
    P = start(shapes=SHAPES | {"empty": (0, 4)}); S = {n: tuple(p.shape) for n,p in P.items()}; O = member("optimizers", "sophia.Sophia"); o = O(P.items(), gap=GAP)
    ĥ = [torch.ones(p.shape) for g in o.param_groups for p in g["params"]]; first = lambda x: [x, *ĥ[1:]]; last = lambda x: [*ĥ[:-1], x]
    for odd in (first(torch.tensor(3.)), last(torch.ones(3)), last(torch.ones(S["scale"]).to(torch.complex64)), first(ĥ[0].to_sparse()), last(2.), ĥ[:-1], 0, True, 2.5):
        with pytest.raises(ValueError, match="estimate"): o.observe(odd)
        assert not o.state
    for n,p in P.items(): p.grad = torch.ones(p.shape)
    P["head.weight"].grad = P["head.weight"].grad.to_sparse()
    with pytest.raises(ValueError, match="sparse one for 'head.weight'"): o.observe(5)
    assert not o.state
    P["head.weight"].grad = torch.ones(7, 4); o.observe(5); o.observe(ĥ); o.step()
    assert bits(o) == O.state_bytes(S)

@every
def test_a_file_that_cannot_be_goes_nowhere(name):
    P = start(); o = make(name, P, lr=.01); train(P, o, 0, 2); was = {n: {k: v.clone() for k,v in o.state[p].items()} for n,p in P.items()}
    saved, other = o.state_dict(), torch.optim.AdamW(list(P.values())); other.step()
    spoil = lambda **kw: {**saved, **kw}; group = lambda **kw: spoil(param_groups=[*saved["param_groups"][:-1], saved["param_groups"][-1] | kw])
    odd = [({}, "a saved state has"), (None, "a saved state has"), ([], "a saved state has"), (spoil(param_groups=[]), "a saved state has"), (other.state_dict(), "a saved state has|a saved group has"), (spoil(param_groups=other.state_dict()["param_groups"]*len(o.param_groups)), "without"), (group(rule="nothing"), "the saved state has")]
    odd += [(spoil(state=saved["state"] | {1: saved["state"][1] | dict(step=torch.tensor(t))}), "the saved step of") for t in (math.nan, math.inf, -1., .5)]
    if "rank" in o.defaults and name != "apollo.Mini": odd += [(spoil(param_groups=[g | dict(rank=r) for g in saved["param_groups"]]), "rank=") for r in (2, 0)]
    for state,says in odd:
        with pytest.raises(ValueError, match=says): o.load_state_dict(state)
        assert all(torch.equal(v, o.state[P[n]][k]) for n,s in was.items() for k,v in s.items())
    for g in saved["param_groups"]: g["lr"] = 0.                                                                          # the end of a schedule
    o.load_state_dict(spoil(state={i: s for i,s in saved["state"].items() if i}))                                        # the first never had a gradient
    first = o.param_groups[0]["params"][0]; assert not o.state[first] and all(o.state[p] for p in P.values() if p is not first)

@pytest.mark.parametrize("was, now", [(3, 4), (3, None), (None, 3), (0, None), (None, 0)])
def test_a_run_goes_on_with_its_own_rounding(was, now):
    def build(seed): o = make("adamw.AdamW", P := start(torch.bfloat16), lr=.01); train(P, o if seed is None else stochastic(o, seed), 0, 1); return o
    saved, o = build(was).state_dict(), build(now)
    with pytest.raises(ValueError, match="the saved run rounds"): o.load_state_dict(saved)
    build(was).load_state_dict(saved)

def test_who_joins_a_run_is_rounded_alike():
    o = stochastic(make("adamw.AdamW", start(torch.bfloat16)), seed=5)
    with pytest.raises(ValueError, match="float16 for 'h'"): o.add_param_group(dict(params=[("h", torch.ones(3).half().requires_grad_())]))
    with pytest.raises(ValueError, match="rounding=1"): o.add_param_group(dict(params=[("b", torch.ones(3).bfloat16().requires_grad_())], rounding=1))
    o.add_param_group(dict(params=[("b", torch.ones(3).bfloat16().requires_grad_())])); assert {g["rounding"] for g in o.param_groups} == {5}

BAD = [(dict(lr=-1.), "lr=-1"), (dict(lr=0), "lr=0"), (dict(lr=math.nan), "lr=nan"), (dict(lr=math.inf), "lr=inf"), (dict(weight_decay=-1), "weight_decay=-1")]
@every
@pytest.mark.parametrize("bad, says", BAD)
def test_arguments_that_cannot_be_are_refused(name, bad, says):
    with pytest.raises(ValueError, match=says): make(name, start(), **bad)

@pytest.mark.parametrize("name", ["apollo.APOLLO", "galore.GaLore"])
@pytest.mark.parametrize("rank, says", [(0, "rank=0"), (-1, "rank=-1"), (2, r"rank=2 for 'blocks.0.row.weight'"), (1.5, "rank=1.5")])
def test_ranks_that_cannot_be_are_refused(name, rank, says):
    with pytest.raises(ValueError, match=says): make(name, start(), rank=rank)

@every
@pytest.mark.parametrize("how", ["sparse", "complex", "shape"])
def test_gradients_that_cannot_be_are_refused_before_anything_changes(name, how):
    P = start(); o = make(name, P, lr=.01); train(P, o, 0, 2)
    was, state = {n: p.detach().clone() for n,p in P.items()}, {n: {k: v.clone() for k,v in o.state[p].items()} for n,p in P.items()}
    for n,p in P.items(): p.grad = gradient(n, 2)
    last = P["head.weight"]
    if how == "sparse": last.grad = last.grad.to_sparse()
    elif how == "shape": last.data = torch.zeros(9, 4); was["head.weight"] = last.detach().clone()
    else:
        z = torch.zeros(3, 2, dtype=torch.complex64).requires_grad_()
        with pytest.raises(ValueError, match="dense and real"): o.add_param_group(dict(params=[("z", z)]))
        return
    with pytest.raises(ValueError, match="'head.weight'"): o.step()
    assert same(P, was) and all(torch.equal(v, o.state[P[n]][k]) for n,s in state.items() for k,v in s.items())

# Ledgers, rules and plans

@every
@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4), st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_ledger_is_exact(name, sizes, half):
    shapes = {("embed" if i == 1 else "q") + f"{i}.weight": tuple(s) for i,s in enumerate(sizes)}
    P = {n: torch.zeros(s, dtype=torch.bfloat16 if half else torch.float32).requires_grad_() for n,s in shapes.items()}; o = make(name, P)
    for t,p in enumerate(P.values()): p.grad = torch.randn(p.shape, generator=rng(t)).to(p.dtype)
    o.step()
    assert member("optimizers", name).state_bytes(shapes) == bits(o)

@every
def test_rules_are_printed_and_every_tensor_has_one(name, capsys):
    from paretolab.models.mobilellm import MobileLLM, mobilellm
    m = MobileLLM(mobilellm("nano")); rules = member("optimizers", name).groups(m)
    said = capsys.readouterr().out
    assert set(rules) == {n for n,_ in m.named_parameters()} and all(n in said for n in rules) and "not decayed" in said
    assert sum(int(line.split()[-2].replace(",", "")) for line in said.splitlines()) == member("optimizers", name).state_bytes({n: p.shape for n,p in m.named_parameters()})

@every
def test_the_planner_knows_it(name):
    from paretolab.frontier import budget
    from paretolab.models.shape import Shape
    shape, O = Shape(vocab=33, dim=24, ff=40, layers=2, heads=3, kv_heads=1, context=8), member("optimizers", name)
    p = budget.plan(shape, O, 4, 1, 8)
    assert p["optimizer"] == O.state_bytes(budget._shapes(shape)) and 0 <= budget.workspace(O, shape) < 8*4*shape.parameters

def test_rounding_at_random_is_right_on_average_and_depends_on_no_order():
    g = rng(4); w = torch.randn(4000, generator=g)*torch.logspace(-6, 3, 4000); u = torch.randint(65536, (400, 4000), generator=g)
    r = round_to_bfloat16(w.expand(400, 4000).contiguous(), u).double()
    step = (torch.nextafter(w.bfloat16().abs(), torch.tensor(math.inf).bfloat16()).double() - w.bfloat16().abs().double())
    assert ((r.mean(0) - w.double()).abs()/step).mean() < .5*2/400**.5 and ((r - w.double()).abs() < 1.01*step).all() and abs(((r.mean(0) - w.double())/step).mean()) < 5*.5/(400*4000)**.5
    P, Q = start(torch.bfloat16), start(torch.bfloat16); Q = dict(reversed(Q.items()))
    train(P, stochastic(make("adamw.AdamW", P, lr=1e-3), 1), 0, 5); train(Q, stochastic(make("adamw.AdamW", Q, lr=1e-3), 1), 0, 5)
    assert same(P, Q)
    R = start(torch.bfloat16); train(R, stochastic(make("adamw.AdamW", R, lr=1e-3), 2), 0, 5); assert not same(P, R)

# Mutants of our own modules: each has to be noticed by a check that takes less than a second

ROOT = Path(importlib.import_module("paretolab.optimizers.contract").__file__).parent
def late_start(name):
    was = start(torch.float64); o = make(name, Q := start(torch.float64), lr=.01); train(Q, o, 0, 1, lambda n, t: torch.zeros(SHAPES[n])); train(Q, o, 1, 5)
    assert all((Q[n] - was[n]).abs().max() > 1e-3 and not Q[n].isnan().any() for n in Q)
def definition(name): assert against(name) < (1e-6 if name == "baselines.NAdamW" else 1e-10)
def half(name):
    P = start(torch.bfloat16); o = make(name, P, lr=.01); train(P, o, 0, 1); o2 = make(name, P, lr=.01); o2.load_state_dict(o.state_dict())
    assert all(v.dtype == torch.float32 for s in o2.state.values() for v in s.values()) and member("optimizers", name).state_bytes(SHAPES) == bits(o)
def up(name): test_maximising_is_minimising_the_negative(name)
def refused(name): test_gradients_that_cannot_be_are_refused_before_anything_changes(name, "sparse"); test_gradients_that_cannot_be_are_refused_before_anything_changes(name, "shape")
def ordered(name): test_order_of_parameters_does_not_matter(name)
def wrapped(name): test_names_given_by_wrappers_do_not_matter(name)

MUTANTS = [  # module, its text, the mutant's, the optimizer, the check
    ("apollo", "torch.minimum(norm, self.growth*before)", "norm", "apollo.APOLLO", definition), ("apollo", "torch.where(before > 0, torch.minimum(norm, self.growth*before), norm)", "torch.minimum(norm, self.growth*before)", "apollo.APOLLO", late_start),
    ("apollo", "= torch.where(limited > 0, limited, before)", "= norm", "apollo.Mini", definition), ("lowrank", "before = R.square().sum(1)", "before = R.square().sum()[None]", "apollo.APOLLO", definition),
    ("apollo", '1 - g["lr"]*g["weight_decay"]', '1 - g["weight_decay"]', "apollo.APOLLO", definition), ("apollo", '(1 - β2**t)**0.5/(1 - β1**t)', "1", "apollo.Mini", definition), ("apollo", '(t - 1)//g["gap"]', 't//g["gap"]', "apollo.APOLLO", definition),
    ("apollo", "channels = False", "channels = True", "apollo.Mini", definition), ("apollo", "(1 if self.channels else s)", "1", "apollo.Mini", definition), ("apollo", "a/b, torch.zeros_like(b)).sqrt()", "a/b, torch.zeros_like(b))", "apollo.APOLLO", definition),
    ("lowrank", "p.shape[0] >= p.shape[1]", "p.shape[0] < p.shape[1]", "apollo.APOLLO", definition), ("lowrank", "M/(V.sqrt() + g", "M/(V + g", "galore.GaLore", definition), ("lowrank", "alpha=1 - β1", "alpha=1.0", "apollo.APOLLO", definition), ("lowrank", "value=1 - β2", "value=β2", "galore.GaLore", definition),
    ("lowrank", "and not is_end(name)", "", "apollo.APOLLO", definition), ("lowrank", "/{name}", "", "apollo.APOLLO", lambda name: test_two_names_have_two_projections()), ("lowrank", "/{refresh}", "", "apollo.APOLLO", lambda name: test_two_names_have_two_projections()), ("lowrank", "r > min(p.shape)", "r > max(p.shape)", "apollo.APOLLO", lambda name: test_ranks_that_cannot_be_are_refused(name, 2, "rank=2")),
    ("galore", "gram(Z))[1].flip(1)", "gram(Z))[1]", "galore.GaLore", lambda name: test_galore_finds_the_leading_directions()), ("galore", "[1].flip(1)[:,:r].contiguous()", "[1][:,:r].contiguous()", "galore.GaLore", definition), ("galore", "< 0, -1, 1)", "> 0, -1., 1.)", "galore.GaLore", lambda name: test_galore_finds_the_leading_directions()),
    ("galore", '(t - 1) % g["gap"] == 0', 't == 1', "galore.GaLore", definition), ("galore", 'g["lr"]*g["alpha"]', 'g["lr"]', "galore.GaLore", definition),
    ("lion", "torch.lerp(g, m, β1)", "torch.lerp(g, m, β2)", "lion.Lion", definition), ("lion", "_sign(torch.lerp(g, m, β1))", "torch.lerp(g, m, β1)", "lion.Lion", definition), ("lion", "1 - β2", "β2", "lion.Lion", definition), ("lion", 'group["lr"]*group["weight_decay"]', '0', "lion.Lion", definition),
    ("sophia", ".clamp_(-1, 1)", "", "sophia.Sophia", definition), ("sophia", 'group["gamma"]*h', 'h', "sophia.Sophia", definition), ("sophia", "1 - β2))", "β2))", "sophia.Sophia", definition), ("sophia", '% self.param_groups[0]["gap"] == 0', '% self.param_groups[0]["gap"] == 1', "sophia.Sophia", definition),
    ("scale", '0 if g["rule"] == "embedding" else 1', "1", "scale.SCALE", definition), ("scale", '1 - g["momentum"]', 'g["momentum"]', "scale.SCALE", definition), ("scale", "rms == 0, torch", "rms < 0, torch", "scale.SCALE", late_start), ("scale", "squares/p.shape[axis]", "squares", "scale.SCALE", definition),
    ("adamw", 'weight_decay=g["weight_decay"], eps=g["eps"], maximize', 'weight_decay=0.1, eps=g["eps"], maximize', "adamw.AdamW", definition), ("adamw", 'maximize=g["maximize"])', "maximize=False)", "adamw.AdamW", up), ("adamw", "[w.contiguous() for w in W]", "W", "adamw.AdamW", lambda name: test_empty_and_transposed_tensors(name)), ("adamw", "dtype=working(p)", "dtype=p.dtype", "adamw.AdamW", half),
    ("contract", 'g["weight_decay"]*decayed', 'g["weight_decay"]', "adamw.AdamW", definition), ("contract", 'return -x if g["maximize"] else x', "return x", "lion.Lion", up), ("contract", "torch.float32 if p.dtype in", "p.dtype if p.dtype in", "lion.Lion", half), ("contract", "for each in zip(g[\"param_names\"], g[\"params\"], g[\"shapes\"]): _refuse(*each)", "pass", "lion.Lion", refused),
    ("contract", r"^module\.|(_orig_mod|", r"^nothing\.|(", "apollo.APOLLO", wrapped), ("contract", "self.state[p] = {k:", "dropped = {k:", "lion.Lion", half), ("contract", "and p.numel()", "", "baselines.Adafactor", lambda name: test_empty_and_transposed_tensors(name)),
    ("baselines", "decoupled_weight_decay=True", "decoupled_weight_decay=False", "baselines.NAdamW", definition), ("baselines", 'g["betas"][0], beta2', 'g["betas"][1], beta2', "baselines.NAdamW", definition),
]
FAST = [0, 1, 10, 20, 29, 40, 44]

def test_two_names_have_two_projections():
    g = importlib.import_module("paretolab.optimizers.lowrank").gaussian
    seen = [g(0, "q", 0, 2, 3), g(0, "k", 0, 2, 3), g(0, "q", 1, 2, 3), g(1, "q", 0, 2, 3)]
    assert all(not torch.equal(a, b) for i,a in enumerate(seen) for b in seen[:i])

def test_galore_finds_the_leading_directions():
    G = importlib.import_module("paretolab.optimizers.galore")
    X = torch.randn(30, 8, generator=rng(1)).double() @ torch.tensor([9., 7, 5, 3, 1, .5, .2, .1]).double().diag(); S = torch.linalg.svdvals(X)
    for basis in (G.exact, G.randomised):
        Q = basis(lambda Z: X.mT @ (X @ Z), 3, torch.randn(8, 8, generator=rng(2)).double())
        assert torch.allclose((X @ Q).norm(dim=0), S[:3], rtol=1e-3) and torch.allclose(Q.mT @ Q, torch.eye(3).double(), atol=1e-9) and (Q.gather(0, Q.abs().argmax(0, keepdim=True)) > 0).all()

def mutated(module, old, new, check, name):
    "Run the check with a module whose text was changed."
    text = (ROOT/f"{module}.py").read_text()
    assert old in text, f"{module} no longer says {old!r}: bring the list up to date"
    package, full = sys.modules["paretolab.optimizers"], f"paretolab.optimizers.{module}"
    kept = {k: sys.modules.pop(k) for k in list(sys.modules) if k.startswith("paretolab.optimizers.")}; attributes = dict(vars(package))
    try:
        m = sys.modules[full] = types.ModuleType(full); m.__file__, m.__package__ = str(ROOT/f"{module}.py"), "paretolab.optimizers"
        exec(compile(text.replace(old, new), m.__file__, "exec"), vars(m)); setattr(package, module, m)
        check(name)
    finally:
        for k in [k for k in sys.modules if k.startswith("paretolab.optimizers.")]: del sys.modules[k]
        sys.modules.update(kept); vars(package).clear(); vars(package).update(attributes)

@pytest.mark.parametrize("i", FAST)
def test_a_mutant_is_noticed(i):
    module, old, new, name, check = MUTANTS[i]
    with pytest.raises((Exception, pytest.fail.Exception)) as found: mutated(module, old, new, check, name)
    assert not str(found.value).startswith(f"{module} no longer says") and not isinstance(found.value, NameError | SyntaxError), found.value       # it runs, and does something else

@pytest.mark.soak
def test_every_mutant_is_noticed(record_property):
    record_property("mutants", len(MUTANTS))
    for i in range(len(MUTANTS)): test_a_mutant_is_noticed(i)

@pytest.mark.parametrize("name, check", [("apollo.APOLLO", definition), ("lion.Lion", up)])
def test_an_unchanged_module_passes_the_checks(name, check): mutated(name.split(".")[0], "import torch", "import torch", check, name)
