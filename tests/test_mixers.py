"""Every mixer against a planted law, in any order of the domains, through JSON at any step, and inside a run that stops anywhere."""
import copy, importlib, json, math, types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import fit
from paretolab.engine.gradients import gram
from paretolab.engine.steer import Replay, Steer
from paretolab.mixers.aioli import Aioli
from paretolab.mixers.automixer import AutoMixer
from paretolab.mixers.dga import DGA
from paretolab.mixers.doge import DoGE
from paretolab.mixers.doremi import DoReMi
from paretolab.mixers import regmix
from paretolab.mixers.protocol import exp_grad
from paretolab.mixers.mixing_laws import MixingLaws, fit_law, law as exponential
from paretolab.mixers.regmix import RegMix, draw, ridge
from paretolab.mixers.requests import DomainGradients, Evaluate, Influence, Keep
from paretolab.mixers.skill_it import SkillIt
from paretolab.mixers.static import Static
from paretolab.models.mobilellm import MobileLLM, Shape
from small_runs import Text, log

torch.set_num_threads(1)
ONLINE = dict(doremi=DoReMi(eta=.3), doge=DoGE(eta=.2, floor=.01), dga=DGA(eta=.2, every=3, beta=.5, floor=.02), skill_it=SkillIt(every=3, steps=2, eta=.5, floor=.01),
    aioli=Aioli(eta=.7, every=30, steps=2, passes=2, floor=.01), aioli_averaged=Aioli(eta=.7, every=30, steps=2, passes=2, ema=.3),
    automixer=AutoMixer(every=5, checkpoints=4, samples=3, floor=.01))
ALL = dict(static=Static(.5), **ONLINE)
every_mixer, online = pytest.mark.parametrize("m", ALL.values(), ids=ALL), pytest.mark.parametrize("m", ONLINE.values(), ids=ONLINE)
NAMES = ["code", "law", "math", "prose", "web"]
PRIOR = dict(zip(NAMES, (.3, .1, .2, .15, .25)))
kind = lambda m: type(m).__name__                                              # a mutant's class is another one of the same name
shares = lambda m, s: np.array(list((m.final if hasattr(m, "final") else m.weights)(s).values()))

class World:
    "Losses that fall by A p a step; everything a mixer may ask follows from A."
    def __init__(self, A, names=NAMES, forgets=False): self.A, self.names, self.L, self.t, self.forgets = A, names, {d: 3. for d in names}, 0, forgets
    def train(self, p, steps=1):
        self.t += steps
        for i in self.names: self.L[i] = self.L[i] - steps*sum(self.A[i, j]*p[j] for j in self.names)
    def answer(self, r):
        total = {j: sum(self.A[i, j] for i in self.names) for j in self.names}
        if r == Evaluate(): return dict(self.L)
        if r == Evaluate(excess=True): return {j: max(total[j], 0.) for j in self.names}
        if r == DomainGradients(): return dict(align=total, norm={j: abs(total[j]) + .1 for j in self.names})
        if isinstance(r, Keep): return {}
        if isinstance(r, Influence):                                           # a sample teaches its own domain most; the three of a domain are alike
            own = {d: [f"{d}:{i}" for i in range(r.samples)] for d in self.names}
            return dict(tokens={d: dict.fromkeys(x, 16) for d,x in own.items()}, influence={i: {x: self.A[i, d]*(1 if i == d else .1) for d in self.names for x in own[d]} for i in r.targets})
        before = dict(self.L); self.train(dict(zip(self.names, r.weights)), r.steps)
        after = dict(self.L)
        if self.forgets: self.L = dict(before)                                 # so that the order of probes does not matter
        return dict(before=before, after=after)
    def step(self, m, s, via=lambda x: x):
        if plan := m.plan(s, self.t + 1): s = m.observe(via(s), {r: self.answer(r) for r in plan})
        else: s = via(s)
        self.train(m.weights(s))
        return s

def law(seed=0, best="math", names=NAMES):
    rng = np.random.default_rng(seed)
    return {(i, j): .001*rng.uniform(0, 1) + .003*(j == best) for i in NAMES for j in NAMES}

def run(m, world, steps=60, prior=PRIOR, via=lambda x: x):
    s = m.init(world.names, {d: prior[d] for d in world.names}, 0); path = [s]
    while world.t < steps: path.append(s := world.step(m, s, via))
    return s, path

# The contract

@every_mixer
def test_weights_stay_on_the_simplex_above_the_floor(m):
    rng = np.random.default_rng(1)
    wild = {(i, j): .5*rng.standard_cauchy() for i in NAMES for j in NAMES}
    for world in (World(law()), World({k: v/max(abs(x) for x in wild.values()) for k,v in wild.items()})):
        if kind(m) == "SkillIt": world.L = {d: 1e3 for d in NAMES}     # losses above 0
        s, path = run(m, world)
        for s in path:
            for p in (np.array(list(m.weights(s).values())), shares(m, s)):
                assert abs(p.sum() - 1) < 1e-9 and p.min() >= getattr(m, "floor", 0.)*(1 - 1e-9) and list(m.weights(s)) == NAMES

@pytest.mark.parametrize("m", [DoReMi(floor=.1), DoGE(floor=.1), DGA(floor=.1), SkillIt(floor=.1), Aioli(floor=.1), AutoMixer(floor=.1)], ids=kind)
def test_a_prior_below_the_floor_is_lifted_at_once_and_a_floor_that_cannot_be_is_refused(m):
    prior = dict(a=.94, b=.05, c=.01)
    for p in (m.weights(s := m.init(list(prior), prior, 0)), getattr(m, "final", m.weights)(s)): assert min(p.values()) >= .1*(1 - 1e-9) and abs(sum(p.values()) - 1) < 1e-9
    for bad in (.5, -1., float("nan")):
        for other in (replace(m, floor=bad), MixingLaws(floor=bad)):
            with pytest.raises(ValueError, match=f"floor={bad}"): other.init(list(prior), prior, 0)

@pytest.mark.parametrize("m, says", [(DGA(eta=-1.), "eta=-1"), (SkillIt(eta=float("nan")), "eta=nan"), (Aioli(ema=1.5), "ema=1.5"), (Aioli(ema=float("nan")), "ema=nan"), (DoGE(most=0.), "most=0")])
def test_a_step_that_cannot_be_is_refused_before_any_is_made(m, says):
    with pytest.raises(ValueError, match=says): m.init(NAMES, PRIOR, 0)

@every_mixer
@pytest.mark.parametrize("seed", range(3))
def test_permuting_domains_permutes_weights(m, seed):
    mixed = [NAMES[i] for i in np.random.default_rng(seed).permutation(5)]
    one, two = run(m, World(law(), forgets=True))[0], run(m, World(law(), mixed, forgets=True))[0]
    a, b = m.weights(one), m.weights(two)
    assert list(b) == mixed and all(abs(a[d] - b[d]) < 1e-12 for d in NAMES)
    assert np.abs(shares(m, one) - shares(m, two)[[mixed.index(d) for d in NAMES]]).max() < 1e-12

@every_mixer
def test_no_signal_moves_nothing(m):
    s, path = run(m, World({k: 0. for k in law()}))
    assert len(path) > 20 and np.abs(shares(m, s) - shares(m, path[0])).max() < 1e-12

@online
@pytest.mark.parametrize("best", NAMES)
def test_a_planted_best_domain_is_found(m, best):
    world = World({k: 5*v for k,v in law(best=best).items()}); s, path = run(m, world)
    gain = shares(m, s)/shares(m, path[0])
    assert NAMES[gain.argmax()] == best and gain.max() > 1.1

@pytest.mark.parametrize("seed", range(4))
def test_automixer_finds_planted_groups_and_their_weights(seed, AutoMixer=AutoMixer):
    "Samples of hidden kinds and any length, over domains of any size; the last kind helps its own task and harms all others."
    rng, tasks = np.random.default_rng(seed), ["sum", "rhyme", "sort", "jam"]; m = AutoMixer(every=10, checkpoints=3, samples=9, targets=tuple(tasks)); s = m.init(NAMES, PRIOR, 0)
    best = rng.integers(0, 3, 4); t = 10.*(best + 1); α = t/t.sum(); worth = np.r_[rng.uniform(1, 1000, 3), .5]
    for c in range(3): s = m.observe(s, {Evaluate(): {k: 1. - (best[i] == c) for i,k in enumerate(tasks)}, Keep(10*(c + 1)): {}})
    hidden = {f"{d}/{i}": int(rng.integers(4)) for d in NAMES for i in range(9)}; tokens = {d: {x: int(rng.integers(5, 50)) for x in hidden if x.startswith(d)} for d in NAMES}
    I = {k: {x: worth[i]*(1. if h == i else -2. if h == 3 else .1) for x,h in hidden.items()} for i,k in enumerate(tasks)}        # the largest number is often another task's
    assert {r.step: set(r.targets) for r in m.plan(s, 31)} == {10*(c + 1): {k for k,b in zip(tasks, best) if b == c} for c in set(best.tolist())}
    new = m.observe(s, {r: dict(tokens=tokens, influence={k: I[k] for k in r.targets}) for r in m.plan(s, 31)})
    assert {x: k for k,xs in new["groups"].items() for x in xs} == {x: tasks[h] for x,h in hidden.items()}
    w = .9*α[:3]*worth[:3] + .1*(α @ worth); w /= w.sum(); assert np.abs(np.array([*new["shares"].values()]) - [*w, 0]).max() < 1e-12
    mass = {x: PRIOR[d]*n/sum(tokens[d].values()) for d in NAMES for x,n in tokens[d].items()}; M = [sum(mass[x] for x in hidden if hidden[x] == k) for k in range(4)]
    for d in NAMES: assert abs(m.weights(new)[d] - sum(w[h]*mass[x]/M[h] for x,h in hidden.items() if x.startswith(d + "/") and h < 3)) < 1e-11                    # shares are kept to 2**-40

def test_automixer_keeps_a_domain_that_only_harms_at_its_floor(AutoMixer=AutoMixer):
    m = AutoMixer(every=1, checkpoints=1, samples=1, targets=("good", "bad"), floor=.05); s = m.observe(m.init(["a", "b"], dict(a=.5, b=.5), 0), {Evaluate(): dict(good=1., bad=1.), Keep(1): {}})
    r, = m.plan(s, 2); new = m.observe(s, {r: dict(tokens=dict(a=dict(x=9), b=dict(y=9)), influence=dict(good=dict(x=1., y=-5.), bad=dict(x=0., y=1.)))})
    assert new["shares"] == dict(good=1., bad=0.) and np.abs(np.array(new["p"]) - [.95, .05]).max() < 1e-12

def test_automixer_with_one_target_gives_the_prior():
    s, _ = run(m := replace(ONLINE["automixer"], targets=("law",)), World({k: 5*v for k,v in law().items()}))
    assert s["done"] and s["shares"] == dict(law=1.) and max(abs(m.weights(s)[d] - PRIOR[d]) for d in NAMES) < 1e-9

@pytest.mark.parametrize("m", [ONLINE["aioli"], ONLINE["aioli_averaged"]])
def test_aioli_measures_the_planted_law(m):
    A = law(3); s, _ = run(m, World(A), 40)
    assert np.abs(np.array(s["law"])/m.steps - np.array([[A[i, j] for j in NAMES] for i in NAMES])).max() < 1e-12

def test_aiolis_matrix_has_losses_as_rows():
    A = {(i, j): .01*(i == "code" and j == "web") for i in NAMES for j in NAMES}           # training on web lowers the loss on code
    s, _ = run(ONLINE["aioli"], World(A), 40)
    assert np.unravel_index(np.argmax(s["law"]), (5, 5)) == (0, 4) and np.argmax(np.array(s["p"])/np.array(s["prior"])) == 4

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), eta=st.floats(.01, 3), rounds=st.integers(1, 6))
def test_the_averaged_aioli_never_leaves_its_bound(seed, eta, rounds):
    m = Aioli(eta=eta, every=30, steps=1, passes=1, ema=.1); rng = np.random.default_rng(seed); s = m.init(NAMES, PRIOR, seed)
    for r in range(rounds):
        told = {q: {k: dict(zip(NAMES, rng.standard_cauchy(5))) for k in ("before", "after")} for q in m.plan(s, 1)}
        s = m.observe(s, told)
        ratio = np.array(s["p"])/np.array(s["prior"])
        assert ratio.max()/ratio.min() <= math.exp(eta)*(1 + 1e-9)

@every_mixer
def test_a_state_through_json_at_any_step_has_the_same_future(m):
    calm, _ = run(m, World(law(2)))
    assert run(m, World(law(2)), via=lambda s: json.loads(json.dumps(s)))[0] == calm

@every_mixer
def test_nothing_that_is_passed_is_changed(m):
    world, s = World(law()), m.init(NAMES, PRIOR, 0)
    for t in range(1, 40):
        before = copy.deepcopy(s); plan = m.plan(s, t); signals = {r: world.answer(r) for r in plan}; told = copy.deepcopy(signals)
        new = m.observe(s, signals) if plan else s
        assert s == before and signals == told and m.plan(s, t) == plan
        s = new

def leaves(answer, path=()):
    for k,v in answer.items():
        if isinstance(v, dict): yield from leaves(v, (*path, k))
        else: yield (*path, k)

@online
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "missing"])
def test_a_bad_or_missing_signal_is_refused_by_name(m, bad):
    s, world, seen = m.init(NAMES, PRIOR, 0), World(law()), set()
    for t in range(1, 99):
        if not (plan := m.plan(s, t)): continue
        good = {r: world.answer(r) for r in plan}; kinds = frozenset(type(r) for r in plan)
        if kinds not in seen: refused(m, s, good, bad)                         # each kind of plan once
        seen.add(kinds); s = m.observe(s, good)
    assert len(seen) == (2 if kind(m) in ("AutoMixer", "SkillIt") else 1)

def refused(m, s, good, bad):
    for r in good:
        for *path, d in leaves(good[r]):
            if kind(m) == "DGA" and path == ["norm"] or path[:1] == ["tokens"] and r != next(iter(good)): continue     # which it does not use
            signals = copy.deepcopy(good); at = signals[r]
            for k in path: at = at[k]
            if bad == "missing": del at[d]
            else: at[d] = bad
            if path[:1] == ["tokens"] and bad == "missing": m.observe(s, signals); continue    # a sample less is no fault
            with pytest.raises(ValueError, match=f"(lacks|has to be a number for) '{d}'"): m.observe(s, signals)
        with pytest.raises(ValueError, match="was not answered"): m.observe(s, {q: a for q,a in good.items() if q != r})
        if isinstance(r, Influence):
            for part,name in (("tokens", "math"), ("influence", r.targets[0])):
                signals = copy.deepcopy(good); del signals[next(iter(good)) if part == "tokens" else r][part][name]
                with pytest.raises(ValueError, match=f"'{name}'"): m.observe(s, signals)

@every_mixer
@pytest.mark.parametrize("domains, prior, says", [([], {}, "at least one"), (["a", "a"], dict(a=1.), "different names"), (["a", "b"], dict(a=.5, b=.6), "sum to 1"), (["a", "b"], dict(a=1.), "one weight for each"), (["a", "b"], dict(a=float("nan"), b=1.), "'a' has to be a finite"), ([1, 2], {1: .5, 2: .5}, "names")])
def test_a_bad_start_is_refused(m, domains, prior, says):
    with pytest.raises(ValueError, match=says): Static().init(domains, prior, 0)
    with pytest.raises(ValueError): m.init(domains, prior, 0)

# From a table of runs

OFFLINE = dict(regmix=RegMix(runs=40, candidates=20_000), laws=MixingLaws(runs=40, floor=.01))
VALUE = dict(zip(NAMES, (.1, .6, .1, .1, .1)))

def told(m, s, names=NAMES, noise=0.):
    rng = np.random.default_rng(7)
    return {r: {i: 2 + math.exp(-3*sum(VALUE[j]*w for j,w in zip(s["domains"], r.weights))) + math.exp(-4*r.weights[s["domains"].index(i)]) + noise*rng.normal() for i in names} for r in m.plan(s, 0)}

@pytest.mark.parametrize("m", OFFLINE.values(), ids=OFFLINE)
def test_an_offline_mixer_finds_the_planted_best_domain_through_json(m):
    s = m.init(NAMES, PRIOR, 3); t = told(m, s, noise=.005); new = m.observe(json.loads(json.dumps(s)), t)
    p = np.array(list(m.weights(new).values())); assert abs(p.sum() - 1) < 1e-9 and p.min() >= getattr(m, "floor", 0.)*(1 - 1e-9)
    assert NAMES[(p/np.array(list(PRIOR.values()))).argmax()] == "law" and m.observe(s, t) == new and m.plan(json.loads(json.dumps(new)), 5) == []
    only = type(m)(**{**{f: getattr(m, f) for f in m.__dataclass_fields__}, "targets": ("web",)})
    assert only.weights(only.observe(s, told(only, s)))["web"] > m.weights(new)["web"]

@pytest.mark.parametrize("m", OFFLINE.values(), ids=OFFLINE)
@pytest.mark.parametrize("level", [.3, 2.])
def test_runs_that_all_end_alike_move_nothing(m, level):
    s = m.init(NAMES, PRIOR, 3); new = m.observe(s, {r: dict.fromkeys(NAMES, level) for r in m.plan(s, 0)})
    assert max(abs(m.weights(new)[d] - PRIOR[d]) for d in NAMES) < 1e-9 and abs(new["predicted"] - level) < 1e-9 and m.plan(new, 1) == []

@pytest.mark.parametrize("m", OFFLINE.values(), ids=OFFLINE)
@pytest.mark.parametrize("bad", [float("nan"), "missing", "run"])
def test_a_bad_or_missing_run_is_refused(m, bad):
    s = m.init(NAMES, PRIOR, 3); t = told(m, s); r = list(t)[17]
    if bad == "run": del t[r]
    elif bad == "missing": del t[r]["math"]
    else: t[r]["math"] = bad
    with pytest.raises(ValueError, match="was not answered" if bad == "run" else "(lacks|has to be a number for) 'math'"): m.observe(s, t)

@pytest.mark.parametrize("D", [2, 5, 17])
def test_mixtures_of_runs_permute_with_the_domains_in_law(D):
    P = draw(np.full(D, 1/D), 600, 0)
    assert np.abs(P.mean(0) - 1/D).max() < 5*P.std(0).max()/600**.5                         # no domain is favoured: 5 standard errors
    order = np.random.default_rng(0).permutation(D); y = np.exp(-P @ np.linspace(0, 2, D)) + 1
    assert np.abs(ridge(P, y)(P) - ridge(P[:,order], y)(P[:,order])).max() < 1e-8
    (c, A), (c2, A2) = fit_law(P, y), fit_law(P[:,order], y)
    assert abs(c - c2) < 1e-6 and np.abs(A[order] - A2).max() < 1e-5 and np.abs(exponential(P, c, A) - y).max() < 1e-6

def test_boosting_is_another_fit():
    boosting = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed").HistGradientBoostingRegressor
    m = RegMix(runs=100, fit=lambda P, y: boosting(max_iter=40, min_samples_leaf=5).fit(P, y).predict, candidates=5000, best=32); s = m.init(NAMES, PRIOR, 0)
    assert NAMES[(np.array(m.observe(s, told(m, s))["p"])/np.array(list(PRIOR.values()))).argmax()] == "law"

def test_many_domains_need_no_more_than_blocks(monkeypatch):
    "Offline methods at many domains: mixtures are found, candidates come in blocks, and after the fit a step asks for nothing."
    sizes = []; near = regmix.draw_near; monkeypatch.setattr(regmix, "draw_near", lambda *a: (sizes.append(len(q)) or q for q in near(*a)))
    for m,D in ((RegMix(runs=20, targets=("loss",), candidates=2500), 1000), (MixingLaws(runs=220, targets=("loss",)), 200)):       # laws of 1,000 take ten seconds: bench/mixers.py
        names = [f"d{i}" for i in range(D)]; prior = dict.fromkeys(names, 1/D); A = np.linspace(0, 3, D); s = m.init(names, prior, 0); plan = m.plan(s, 0); P = np.array([r.weights for r in plan])
        assert len(plan) == m.runs and (P <= 15/D).all() and np.abs(P.sum(1) - 1).max() < 1e-9
        s = m.observe(s, {r: dict(loss=2 + float(np.exp(-A @ r.weights))) for r in plan})
        assert all(m.plan(s, t) == [] for t in (0, 1, 10)) and abs(sum(m.weights(s).values()) - 1) < 1e-9 and A @ list(m.weights(s).values()) > A.mean()
    assert sizes == [1000, 1000, 500]

def test_a_run_cannot_make_runs(tmp_path):
    with pytest.raises(ValueError, match="RegMix asked for a Run.*paretolab mix or engine.sweep"): trained(tmp_path, RegMix(), 3)

# One update

@settings(max_examples=200, deadline=None)
@given(data=st.data(), D=st.integers(1, 30))
def test_exp_grad_stays_above_its_floor_and_keeps_order(data, D):
    numbers = lambda lo, hi: np.array(data.draw(st.lists(st.floats(lo, hi), min_size=D, max_size=D)))
    p = numbers(1e-6, 1); p /= p.sum(); a = numbers(-50, 50); floor = data.draw(st.floats(0, 1))/D
    q = exp_grad(p, a, 1., floor)
    assert abs(q.sum() - 1) < 1e-12 and q.min() >= floor*(1 - 1e-9)
    assert np.abs(exp_grad(p, a + 7, 1., floor) - q).max() < 1e-12                            # a gain shared by all moves nothing
    raw = np.log(p) + a; order = np.argsort(raw)
    assert (np.diff(q[order]) >= -1e-12).all()

# In a run

rng = np.random.default_rng(0)
TEXT = dict(count=Text(np.arange(900) % 23), noise=Text(rng.integers(0, 23, 900)))
WINDOWS = {d: torch.from_numpy(np.stack([t.read(i, 13) for i in (3, 400)])) for d,t in TEXT.items()}

def trained(folder, mixer, steps, hook=None):
    torch.manual_seed(0); model, reference = (MobileLLM(Shape(vocab=23, dim=8, ff=8, layers=1, heads=2, kv_heads=1, context=12)) for _ in "mr")
    stream = MixedStream(TEXT, dict(count=.5, noise=.5), batch=4, length=12); o = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    h = hook(stream) if hook else Steer(mixer, model, stream, WINDOWS, reference=reference, minibatch=2, kept=folder/"kept")
    fit(model, stream, o, lambda t: 1., [h], steps=steps, run=folder, every=4); stream.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()])

SHORT = dict(ONLINE, doge=replace(ONLINE["doge"], every=3), aioli=Aioli(eta=2., every=12, steps=2, passes=2), automixer=AutoMixer(every=3, checkpoints=3, samples=5))

@pytest.mark.parametrize("m", SHORT.values(), ids=SHORT)
def test_a_run_goes_on_exactly_and_its_log_replays_it(m, tmp_path):
    want = trained(tmp_path/"calm", m, 26)
    assert len({json.dumps([r["weights"], r.get("loss_weights")]) for r in log(tmp_path/"calm")}) > (1 if kind(m) == "AutoMixer" else 2)                   # it speaks once
    for i,cut in enumerate((1, 3, 7, 14)):
        trained(tmp_path/f"{i}", m, cut)
        assert torch.equal(trained(tmp_path/f"{i}", m, 26), want) and log(tmp_path/f"{i}") == log(tmp_path/"calm")
    assert torch.equal(trained(tmp_path/"replay", None, 26, lambda s: Replay(s, log(tmp_path/"calm"))), want)
    assert log(tmp_path/"replay") == log(tmp_path/"calm")

def test_the_mixers_state_counts(tmp_path, monkeypatch):
    "If it did not come back, the end would be another: the test above can fail."
    m = SHORT["aioli"]; want = trained(tmp_path/"calm", m, 26)
    trained(tmp_path/"cut", m, 7)
    monkeypatch.setattr(Steer, "load_state_dict", lambda self, s: None)
    assert not torch.equal(trained(tmp_path/"cut", m, 26), want)

def test_a_state_of_another_version_is_refused(tmp_path):
    h = Steer(SHORT["aioli"], None, MixedStream(TEXT, dict(count=.5, noise=.5), batch=4, length=12), WINDOWS); s = h.state_dict(); h.load_state_dict(copy.deepcopy(s)); h.stream.close()
    with pytest.raises(ValueError, match="lacks 'prior', so it is of another version"): h.load_state_dict(dict(s, state={k: v for k,v in s["state"].items() if k != "prior"}))

def test_gradients_of_frozen_and_unused_parameters():
    torch.manual_seed(0); m = MobileLLM(Shape(vocab=23, dim=8, ff=8, layers=2, heads=2, kv_heads=1, context=12)); x = list(WINDOWS.values())
    whole = gram(m, x)
    for p in m.blocks[0].parameters(): p.requires_grad_(False)
    part = gram(m, x)
    assert part[0,0] < whole[0,0] and all(p.grad is None for p in m.parameters())
    m.extra = torch.nn.Parameter(torch.ones(3))
    assert torch.equal(gram(m, x), part) and gram(m, x[:1]).shape == (1, 1)

# Stream and mixture

class Numbers(Text):
    def __init__(self, start, n): self.t = np.arange(start, start + n)

def schedules(n, seed):
    "Random changes of the weights, kills and resumes; what the log says happened is what happened."
    text = dict(a=Numbers(0, 900), b=Numbers(10_000, 300), c=Numbers(20_000, 120))
    for k in range(n):
        rng = np.random.default_rng([seed, k]); new = lambda: MixedStream(text, dict.fromkeys(text, 1/3), 3, 8, k)
        s, saved, log, seen = new(), None, [], []
        while len(log) < 40:
            event = rng.random()
            if event < .3: s.weights = dict(zip(text, rng.dirichlet([.4]*3)))
            elif event < .4: saved = json.loads(json.dumps([s.state_dict(), len(log)]))
            elif event < .5 and saved:                                   # killed: what came after the commit is gone, from the log too
                s.close(); s = new(); s.load_state_dict(saved[0]); log, seen = log[:saved[1]], seen[:saved[1]]
            tokens, δ = next(s); log.append(s.weights); seen.append([*zip(δ.tolist(), tokens[:,0].tolist())])
        s.close(); fresh, replayed = new(), []
        for p in log:
            fresh.weights = p; tokens, δ = next(fresh); replayed.append([*zip(δ.tolist(), tokens[:,0].tolist())])
        fresh.close()
        assert Counter(sum(seen, [])) == Counter(sum(replayed, [])) and seen == replayed
        given = np.bincount([d for b in seen for d,_ in b], minlength=3); asked = 3*np.sum([list(p.values()) for p in log], 0)
        assert (asked - given < 2).all() and (asked - given > -1).all()

def test_the_log_says_what_was_seen(): schedules(10, 0)

@pytest.mark.soak
def test_the_log_says_what_was_seen_under_200_schedules(record_property): schedules(200, 1); record_property("schedules", 200)

# Mutants of the mixers: each has to be noticed by a check of this file

def mutated(module, old, new):
    "A module with its text changed."
    text = Path(importlib.import_module(full := f"paretolab.mixers.{module}").__file__).read_text()
    assert old in text, f"{module} no longer says {old!r}: bring the list up to date"
    m = types.ModuleType(full); m.__package__ = "paretolab.mixers"; exec(compile(text.replace(old, new), full, "exec"), vars(m))
    return m

planted = lambda m: [test_a_planted_best_domain_is_found(m, d) for d in NAMES]
refuses = lambda m: [test_a_bad_or_missing_signal_is_refused_by_name(m, b) for b in (float("nan"), "missing")]
order = lambda m: [test_permuting_domains_permutes_weights(m, s) for s in range(2)]
table = lambda m: (test_an_offline_mixer_finds_the_planted_best_domain_through_json(m), [test_runs_that_all_end_alike_move_nothing(m, x) for x in (.3, 2.)])
groups = lambda m: [test_automixer_finds_planted_groups_and_their_weights(s, type(m)) for s in range(4)]

MUTANTS = [  # module, its text, the mutant's, the mixer, the check
    ("static", "**self.power", "**1.", "static", lambda m: test_a_static_mixture_is_the_prior_to_a_power(m)), ("static", "np.where(p > 0, np.where(p > 0, p, 1)**self.power, 0)", "p**self.power", "static", lambda m: test_a_static_mixture_is_the_prior_to_a_power(m)),
    ("doremi", "exp_grad(state[\"alpha\"], e,", "exp_grad(state[\"alpha\"], -e,", "doremi", planted), ("doremi", "if e is None else e for", "if e is None else 0. for", "doremi", planted), ("doremi", "e = read(signals, ask, state[\"domains\"])", "e = np.array([signals[ask][d] for d in state[\"domains\"]])", "doremi", refuses),
    ("doge", "np.clip(a/max(g.mean(), 1e-12), 0, self.most)", "np.arange(len(a))/9", "doge", test_no_signal_moves_nothing), ("doge", "self.eta, self.floor)\n        return dict(state, alpha", "self.eta, 0.)\n        return dict(state, alpha", "doge", test_weights_stay_on_the_simplex_above_the_floor),
    ("dga", "exp_grad(state[\"q\"], a,", "exp_grad(state[\"q\"], -a,", "dga", planted), ("dga", "(1 - self.beta)*", "(2 - self.beta)*", "dga", test_weights_stay_on_the_simplex_above_the_floor), ("dga", "state[\"domains\"], \"align\"", "sorted(state[\"domains\"]), \"align\"", "dga", order),
    ("skill_it", "np.maximum((before - after)/before, 0)", "np.maximum((after - before)/before, 0)", "skill_it", planted), ("skill_it", "@ np.array(state[\"graph\"])", "@ np.array(state[\"graph\"]).T", "skill_it", planted),
    ("aioli", "B.sum(0), self.eta", "B.sum(1), self.eta", "aioli", planted), ("aioli", "np.linalg.solve(W, np.asarray(fall).T).T", "np.linalg.solve(W, np.asarray(fall)).T", "aioli", test_aioli_measures_the_planted_law), ("aioli", "B/B.sum() if B.sum() > 0 else B", "(B + 1)*np.arange(len(B))", "aioli", test_no_signal_moves_nothing),
    ("automixer", "np.argmin(state", "np.argmax(state", "automixer", groups), ("automixer", "t/t.sum() @ I", "np.ones(len(t))/len(t) @ I", "automixer", groups), ("automixer", "w = np.maximum(ρ, 0)", "w = np.abs(ρ)", "automixer", groups), ("automixer", "np.divide(I, r,", "np.divide(I, 1,", "automixer", groups),
    ("automixer", "π*np.array([*s.values()])/sum(s.values())", "π*np.ones(len(s))/len(s)", "automixer", groups), ("automixer", "if not w.any(): return", "if False: return", "automixer", test_no_signal_moves_nothing), ("automixer", "w[g]*m/", "w[d % K]*m/", "automixer", groups),
    ("automixer", "part(plan[0], d, x, \"tokens\").tolist()", "signals[plan[0]][\"tokens\"].get(d, {}).values()", "automixer", refuses), ("automixer", "np.zeros(D), 1., self.floor)", "np.zeros(D), 1., 0.)", "automixer", lambda m: test_automixer_keeps_a_domain_that_only_harms_at_its_floor(type(m))), ("automixer", "if not kept: raise", "if False: raise", "automixer", refuses),
    ("regmix", "np.argsort(f(Q), kind=\"stable\")[:self.best]", "np.argsort(-f(Q), kind=\"stable\")[:self.best]", "regmix", table), ("regmix", " if np.ptp(y) else", " if True else", "regmix", table), ("mixing_laws", "if np.ptp(y) == 0:", "if False:", "laws", table), ("mixing_laws", "@ A/len(A), η, floor)", "@ -A/len(A), η, floor)", "laws", table),
]

def test_a_static_mixture_is_the_prior_to_a_power(m=Static(.5)):
    prior = dict(zip(NAMES, (.5, .3, .2, 0., 0.))); p = np.array([*m.weights(m.init(NAMES, prior, 0)).values()])
    assert np.abs(p - np.array([*prior.values()])**.5/np.sqrt([*prior.values()]).sum()).max() < 1e-6         # the prior is kept to 2**-40, and a root makes its rounding 1e-6
    assert not type(m)(0.).weights(type(m)(0.).init(NAMES, prior, 0))["web"]                               # uniform over what there is

def check(i):
    module, old, new, mixer, check = MUTANTS[i]; m = {**ALL, **OFFLINE}[mixer]
    check(getattr(mutated(module, old, new), kind(m))(**{f: getattr(m, f) for f in m.__dataclass_fields__}))

@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
@pytest.mark.parametrize("i", range(len(MUTANTS)))
def test_a_mutant_is_noticed(i):
    with pytest.raises((Exception, pytest.fail.Exception)) as found: check(i)
    assert "bring the list up to date" not in str(found.value), found.value

def test_unchanged_modules_pass_the_checks():
    for module,_,_,mixer,f in MUTANTS:
        m = {**ALL, **OFFLINE}[mixer]; f(getattr(mutated(module, "import numpy", "import numpy"), kind(m))(**{k: getattr(m, k) for k in m.__dataclass_fields__}))
