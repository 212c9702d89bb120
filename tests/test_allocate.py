"""Scores against their definitions, solvers against brute force, plans that fit their budget to the byte."""
import itertools, json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.quantizers import gptq, lowbit, plan, sensitivity
from paretolab.quantizers.allocate import dynamic, groups, layers, mixed, program

tables = st.lists(st.lists(st.tuples(st.integers(0, 40), st.one_of(st.integers(0, 9).map(float), st.floats(0, 1e3))), min_size=1, max_size=4), max_size=6)


def brute(costs, damage, budget):
    picks = itertools.product(*[range(len(c)) for c in costs])
    return min(sum(d[k] for d, k in zip(damage, p)) for p in picks if sum(c[k] for c, k in zip(costs, p)) <= budget)


@settings(max_examples=150, deadline=None)
@given(tables, st.floats(0, 1))
def test_dynamic_is_brute_force(items, share):
    costs, damage = [[c for c, _ in i] for i in items], [[d for _, d in i] for i in items]
    low, high = (sum(map(f, costs)) for f in (min, max))
    for budget in (low, low + int(share*(high - low)), high):
        k = dynamic(costs, damage, budget)
        assert sum(c[j] for c, j in zip(costs, k)) <= budget
        assert sum(d[j] for d, j in zip(damage, k)) == pytest.approx(brute(costs, damage, budget), abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_program_is_brute_force(seed):
    g = np.random.default_rng(seed)
    costs = [g.integers(0, 30, g.integers(1, 5)).tolist() for _ in range(g.integers(0, 7))]
    damage = [(g.exponential(size=len(c))*10.**g.integers(-9, 6)).tolist() for c in costs]
    budget = int(g.integers(sum(map(min, costs)), sum(map(max, costs)) + 1))
    k = program(costs, damage, budget)
    assert sum(c[j] for c, j in zip(costs, k)) <= budget
    assert sum(d[j] for d, j in zip(damage, k)) == pytest.approx(brute(costs, damage, budget), rel=1e-6)


def test_all_budgets_of_a_large_case():
    g = np.random.default_rng(0)
    costs, damage = [[64*int(v) for v in sorted(g.integers(1, 40, 5))] for _ in range(60)], [sorted(g.exponential(size=5), reverse=True) for _ in range(60)]
    low, high, last = sum(map(min, costs)), sum(map(max, costs)), np.inf
    for budget in np.linspace(low, high, 7).astype(int):
        a, b = (sum(d[j] for d, j in zip(damage, f(costs, damage, int(budget)))) for f in (dynamic, program))
        assert a == pytest.approx(b, rel=1e-6) and a <= last
        last = a


def model(dtype=torch.float32, **more):
    torch.manual_seed(0)
    m = MobileLLM(Shape(**dict(vocab=40, dim=48, ff=96, layers=2, heads=2, kv_heads=1, context=16) | more)).to(dtype)
    for p in m.parameters():
        if p.ndim == 2: p.data *= 5
    options = {n: [(b, 8, "gptq.quantize") for b in (2, 3, 4, 8)] for n, l in m.named_modules() if isinstance(l, nn.Linear)}
    return m, options, torch.randint(40, (10, 16))


@pytest.mark.parametrize("more", [dict(), dict(repeat=2), dict(post_ln=1)])
@pytest.mark.parametrize("score", [sensitivity.output_error, sensitivity.trace, sensitivity.salience, sensitivity.divergence])
def test_scores_leave_the_model_and_fall_with_bits(score, more):
    m, options, text = model(**more)
    before, few = {n: p.clone() for n, p in m.state_dict().items()}, {n: options[n] for n in ("blocks.0.attn.v", "blocks.1.mlp.down")}
    table = score(m, few, text)
    assert all(torch.equal(p, before[n]) for n, p in m.state_dict().items()) and not any(l._forward_pre_hooks for l in m.modules()) and all(p.grad is None for p in m.parameters())
    for r in table.values(): assert len(r) == 4 and (r[0] > r[3] > 0 or score is sensitivity.trace and r == [0]*4)     # this model is at no minimum
    assert score(m, few, text) == table


def test_divergence_survives_an_interruption():
    m, options, text = model()
    w, n = m.blocks[0].attn.q.weight.clone(), "blocks.0.attn.q"
    calls = []
    def stop(*a):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
    m.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): sensitivity.divergence(m, {n: options[n]}, text)
    assert torch.equal(m.blocks[0].attn.q.weight, w)


def test_the_kullback_leibler_is_that_of_the_restored_model():
    m, options, text = model(torch.float64)
    n = "blocks.1.attn.v"
    got = sensitivity.divergence(m, {n: options[n]}, text)[n][1]
    p = m(text).log_softmax(-1)
    small = plan.restore(model(torch.float64)[0], {k: t if k != f"{n}.weight" else gptq.quantize(t, 3, 8) for k, t in m.state_dict().items()})
    q = small(text).log_softmax(-1)
    assert got == pytest.approx((p.exp()*(p - q)).sum(-1).mean().item(), rel=1e-9)


@pytest.mark.parametrize("solver", [dynamic, program])
def test_plans_fit_their_budget_and_beat_uniform_ones(solver):
    m, options, text = model()
    rest, shapes = {"embed": (8, 8, "gptq.quantize")}, {n: p.shape for n, p in m.named_parameters()}
    table = sensitivity.output_error(m, options, text)
    harm = lambda p: sum(table[n][[2, 3, 4, 8].index(p[n][0])] for n in options)
    for b in (3, 4):
        uniform = {n: (b, 8, "gptq.quantize") for n in options} | rest
        B = plan.model_bytes(uniform, shapes)
        p = layers(m, options, table, B, rest, solver)
        assert plan.model_bytes(p, shapes) <= B and harm(p) <= harm(uniform) and p["embed"] == rest["embed"]
        assert sum(t.nbytes for t in plan.compress(m, p).values()) == plan.model_bytes(p, shapes)
    exact = plan.model_bytes({n: (2, 8, "gptq.quantize") for n in options} | rest, shapes)
    assert {e[0] for n, e in layers(m, options, table, exact, rest, solver).items() if n != "embed"} == {2}
    with pytest.raises(ValueError, match=f"takes {exact} bytes .got a budget of {exact - 1}"): layers(m, options, table, exact - 1, rest, solver)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 1.58, 2, 3, 4, 6, 8]), min_size=1, max_size=5), st.sampled_from([1, 3, 8]), st.integers(1, 4), st.integers(0, 99))
def test_mixed_is_each_group_at_its_width(bits, group, rows, seed):
    w = torch.randn(rows, group*len(bits), generator=torch.Generator().manual_seed(seed))
    q = mixed(w, tuple(bits), group)
    for i, b in enumerate(bits): assert torch.equal(q.dequantize()[:, i*group:(i+1)*group], gptq.quantize(w[:, i*group:(i+1)*group], b, group).dequantize())


def test_plans_by_group_go_through_files(tmp_path):
    m, options, text = model()
    rest, shapes = {"embed": (8, 8, "gptq.quantize")}, {n: p.shape for n, p in m.named_parameters()}
    byg = {n: [(b, 8, "allocate.mixed") for b in (2, 3, 4)] for n in options}
    B = plan.model_bytes({n: (3, 8, "allocate.mixed") for n in options} | rest, shapes)
    p = groups(m, byg, text, B, rest)
    again = json.loads(json.dumps(p))
    widths = [e[0] for e in p.values() if isinstance(e[0], tuple)]
    assert .95*B < plan.model_bytes(again, shapes) <= B and widths and {b for w in widths for b in w} <= {2, 3, 4}
    lowbit.save(tmp_path/"m", plan.compress(m, again))
    a, b = (plan.restore(model()[0], s) for s in (plan.compress(m, p), lowbit.load(tmp_path/"m")[0]))
    assert torch.equal(a(text), b(text))
    favoured = groups(m, byg, text, B, rest, {"blocks.0.attn.q": 1e6})
    assert favoured["blocks.0.attn.q"][0] == 4
    alone = {n: (8, 8, "gptq.quantize") for n in options} | rest
    error = lambda p: sum(sensitivity.output_error(m, {n: [p[n]] for n in options}, text)[n][0] for n in options)
    uniform = {n: (3, 8, "gptq.quantize") for n in options} | rest
    more = groups(m, byg, text, B + 14*4*(4 + 8 + 16), rest)        # pays for the tables of levels that are set aside
    assert error(more) < error(uniform) and error(alone) < error(more)


@pytest.mark.parametrize("call, sentence", [(lambda m, o, x: layers(m, o, {}, 10**6), "in one only"), (lambda m, o, x: layers(m, o, {n: [1.]*4 for n in o}, 10**6, {"blocks.0.attn.q": (4, 8, "gptq.quantize")}), "in both"),
    (lambda m, o, x: layers(m, o, {n: [1., 2.] for n in o}, 10**6), r"got \[4, 4"), (lambda m, o, x: layers(m, o, {n: [float("nan")]*4 for n in o}, 10**6), "finite number"),
    (lambda m, o, x: groups(m, o, x, 10**6), "'allocate.mixed' in all options"), (lambda m, o, x: sensitivity.salience(m, {"embed": o["blocks.0.attn.q"]}, x), "got embed"),
    (lambda m, o, x: sensitivity.divergence(m, {"nowhere": o["blocks.0.attn.q"]}, x), "'nowhere'"), (lambda m, o, x: sensitivity.divergence(m, o, x[0]), r"shape \(16,\)"),
    (lambda m, o, x: plan.compress(m, {"blocks.0.attn.q": ((2, 3), 8, "allocate.mixed")}), "got 2 widths"), (lambda m, o, x: plan.compress(m, {"blocks.0.attn.q": ([2, 5]*3, 8, "allocate.mixed")}), "a width is one of"),
    (lambda m, o, x: plan.compress(m, {"blocks.0.attn.q": ((2, 3)*3, 8, "absmax.quantize")}), "absmax rounds to"), (lambda m, o, x: plan.compress(m, {"blocks.0.attn.q": ((16, 2)*3, 8, "allocate.mixed")}), "blocks.0.attn.q: ")])
def test_what_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence): call(*model())
