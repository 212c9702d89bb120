"""Selection: spans of token files, scores and rules, and the losses that choose tokens, in any order, through files, and inside runs that stop anywhere."""
import math

import numpy as np, pytest, torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from paretolab.data import tokens as tok
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import fit, losses
from paretolab.engine.schedules import cosine
from paretolab.mixers.effective_tokens import effective, fit_law, law
from paretolab.mixers.likelihood_ratio import log_ratio
from paretolab.mixers.rho1 import Rho1, chosen
from paretolab.mixers.salt import Salt, learnable
from paretolab.mixers.select import draw, nll, score, top
from paretolab.mixers.spans import Picked, cut, documents, load, save
from paretolab.models.mobilellm import MobileLLM, Shape
from small_runs import Text

torch.set_num_threads(1)

def model(seed=0, vocab=30): torch.manual_seed(seed); return MobileLLM(Shape(vocab=vocab, dim=16, ff=16, layers=2, heads=2, kv_heads=1, context=16))
def text(seed=0, n=600): return Text(np.random.default_rng(seed).integers(1, 30, n))

# Spans

@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_documents_are_what_a_split_at_the_end_token_gives(t, chunk):
    spans, parts, at = documents(Text(t), chunk), [], []
    for x in t:
        at.append(x)
        if x == 0: parts.append(at); at = []
    assert [t[a:b] for a,b in spans.tolist()] == parts + [at]*bool(at)

@given(st.data())
def test_picked_reads_what_was_picked(data):
    x = text(); n = data.draw(st.integers(1, 6)); a = [data.draw(st.integers(0, 580)) for _ in range(n)]
    spans = [(i, i + data.draw(st.integers(1, 20))) for i in a]; heads = data.draw(st.none() | st.lists(st.lists(st.integers(50, 60), max_size=4), min_size=n, max_size=n))
    flat = np.concatenate([np.r_[h, x.t[a:b]] for (a,b),h in zip(spans, heads or [[]]*n)]); p = Picked(x, spans, heads); s = data.draw(st.integers(0, len(flat))); e = data.draw(st.integers(s, len(flat)))
    assert len(p) == len(flat) and p.read(s, e - s).tolist() == flat[s:e].tolist() and p.read(s, e - s).dtype == np.int64

def files(folder, words="some words that are chosen"):
    t = tok.tokenizer(); return tok.build(dict(a=Dataset.from_dict(dict(text=[f"{words} {i}" for i in range(40)]))), t, folder)

def test_a_choice_comes_back_and_only_to_its_file(tmp_path):
    f = files(tmp_path/"x"); p = dict(a=Picked(f["a"], documents(f["a"])[::3])); save(tmp_path/"c.safetensors", p, "a third")
    again = load(tmp_path/"c.safetensors", f)["a"]; assert np.array_equal(again.spans, p["a"].spans) and np.array_equal(again.read(0, len(again)), p["a"].read(0, len(p["a"])))
    with pytest.raises(ValueError, match="choose again"): load(tmp_path/"c.safetensors", files(tmp_path/"y", "other words that are chosen"))

@pytest.mark.parametrize("spans", [[[0, 700]], [[-1, 4]], [[4, 4]], [[5, 4]], np.zeros((0, 2), int), [[math.nan, 2.]], [0, 4]])
def test_spans_that_cannot_be_are_refused(spans):
    with pytest.raises(ValueError, match="span"): Picked(text(), spans)

# Scores

def test_scores_do_not_depend_on_batch_or_order():
    m, x = model(), text(); spans = cut([[0, 600]], 37, 2); f = lambda x: nll(m, x); s = score(f, x, spans, 16, 4); order = np.random.default_rng(0).permutation(len(spans))
    np.testing.assert_allclose(score(f, x, spans[order], 16, 7), s[order], rtol=1e-5)               # float32 sums in another order
    assert np.array_equal(s, score(f, x, spans, 16, 4))

def test_padding_is_counted_nowhere():
    count = lambda x: torch.ones(len(x), x.shape[1] - 1); spans = np.array([[0, 3], [3, 40], [40, 57], [57, 59]])
    assert score(count, text(), spans, 16, 3, np.sum).tolist() == [2, 36, 16, 1]

def test_a_score_is_the_mean_over_the_spans_own_tokens():
    x = text(); spans = np.array([[0, 2], [3, 40], [40, 57], [5, 9]]); s = score(lambda v: v[:,1:].float(), x, spans, 7, 3)
    np.testing.assert_allclose(s, [x.t[a+1:b].mean() for a,b in spans.tolist()])

def test_scoring_leaves_the_model_in_its_mode():
    m = model().train(); nll(m, torch.ones(1, 5, dtype=torch.int64)); assert m.training

def test_log_ratio_changes_its_sign_with_the_models():
    a, b, x = model(0), model(1), torch.randint(30, (3, 9)); assert torch.equal(log_ratio(a, b)(x), -log_ratio(b, a)(x)) and log_ratio(a, b)(x).abs().max() > 0

def test_learnable_is_between_nothing_and_the_loss():
    m, x = model(), torch.randint(30, (3, 9)); torch.testing.assert_close(learnable(m, 30)(x), nll(m, x)); assert (learnable(m, 0)(x) == 0).all()

# Rules

@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 9)), min_size=1, max_size=30), st.data())
def test_top_spends_the_budget_from_the_best_down(pool, data):
    s, c = np.array(pool).T; budget = data.draw(st.integers(1, int(c.sum()))); order = sorted(range(len(s)), key=lambda i: (-s[i], i)); want, left = [], budget
    for i in order:
        if c[i] > left: break
        want.append(i); left -= c[i]
    if not want:
        with pytest.raises(ValueError, match="cut spans shorter"): top(s, c, budget)
    else: assert top(s, c, budget).tolist() == sorted(want)

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [top, lambda *a: draw(*a, 1.)])
def test_scores_that_are_not_finite_are_refused(rule, bad):
    with pytest.raises(ValueError, match=r"scores are finite .* for span 1, and 2 such"): rule([1., bad, 2., bad], [1]*4, 2)

@pytest.mark.parametrize("s, c, budget", [([], [], 1), ([1.], [1, 2], 1), ([1.], [0], 1), ([1., 2.], [3, 3], 0), ([1., 2.], [3, 3], 7)])
def test_empty_and_impossible_choices_are_refused(s, c, budget):
    with pytest.raises(ValueError): top(np.array(s), np.array(c, int), budget)

def test_drawing_is_a_function_of_its_seed():
    s, c = np.zeros(500), np.full(500, 3); a = [draw(s, c, 300, 1., k) for k in range(3)]
    assert np.array_equal(a[0], draw(s, c, 300, 1., 0)) and len(a[0]) == len(set(a[0])) == 100 and not np.array_equal(a[0], a[1])
    assert abs(np.concatenate([draw(s, c, 300, 1., k) for k in range(40)]).mean() - 249.5) < 5 # mean of 4000 draws from 0..499: 2.3 is one standard deviation

def test_selected_text_trains_and_resumes(tmp_path):
    x = text(); spans = cut([[0, 600]], 30, 2); s = score(lambda v: nll(model(1), v), x, spans, 16); p = Picked(x, spans[top(s, spans[:,1] - spans[:,0], 240)])
    def run(folder, steps):
        m = model(); fit(m, MixedStream(dict(t=p), dict(t=1.), 4, 16), torch.optim.AdamW(m.parameters(), lr=1e-3), cosine(6), steps=steps, run=folder); return m
    whole = run(tmp_path/"a", 6); run(tmp_path/"b", 3)
    assert all(torch.equal(a, b) for a,b in zip(whole.parameters(), run(tmp_path/"b", 6).parameters()))

# Losses that choose

@given(st.integers(1, 6), st.integers(1, 40), st.floats(.01, 1))
def test_the_share_of_tokens_is_exact(B, L, k):
    e = torch.from_numpy(np.random.default_rng(B*L).integers(0, 3, (B, L)).astype(np.float32)); m = chosen(e, k)                # many ties
    assert m.sum() == math.ceil(k*B*L) and (m.all() or e[m].min() >= e[~m].max())

@pytest.mark.parametrize("hook", [lambda: Rho1(model(5), .5), lambda: Salt(model(5), 4)])
def test_a_run_with_its_own_losses_resumes_to_the_bit(hook, tmp_path):
    def run(folder, steps, h):
        m = model(); fit(m, MixedStream(dict(t=text()), dict(t=1.), 4, 16), torch.optim.AdamW(m.parameters(), lr=1e-3), cosine(6), [h], steps=steps, run=folder); return m
    whole = run(tmp_path/"a", 6, hook()); run(tmp_path/"b", 3, hook())
    assert all(torch.equal(a, b) for a,b in zip(whole.parameters(), run(tmp_path/"b", 6, hook()).parameters()))
    with pytest.raises(ValueError, match="was saved with"): run(tmp_path/"a", 7, Rho1(model(5), .7) if isinstance(hook(), Rho1) else Salt(model(5), 5))

def test_only_chosen_tokens_have_a_gradient():
    m, ref, x = model(), model(1), torch.randint(30, (3, 11)); seen = []
    def watched(t): z = m(t); z.retain_grad(); seen.append(z); return z
    Rho1(ref, .3).losses(0, watched, x).mean().backward(); moved = seen[0].grad.abs().sum(-1) > 0
    assert torch.equal(moved, chosen(nll(m, x) - nll(ref, x), .3))

def test_a_reference_that_says_nan_takes_no_step(tmp_path):
    ref = model(1); m = model()
    with torch.no_grad(): ref.norm.weight.fill_(math.nan); m.norm.weight.fill_(math.inf); before = m.embed.weight.clone()
    with pytest.raises(FloatingPointError): fit(m, MixedStream(dict(t=text()), dict(t=1.), 4, 16), torch.optim.AdamW(m.parameters(), lr=1e-3), cosine(3), [Rho1(ref)], steps=3, run=tmp_path, patience=2)
    assert torch.equal(before, m.embed.weight)

def test_weights_of_salt_at_both_ends():
    m, t, x = model(), model(1), torch.randint(30, (3, 9)); torch.testing.assert_close(Salt(t, 5, 0.).losses(0, m, x), losses(m, x))
    assert torch.autograd.grad(Salt(m, 5, 1.).losses(0, m, x).sum(), m.embed.weight)[0].abs().max() < 1e-6      # its own teacher: nothing to learn

# Effective tokens

def test_no_quality_is_the_plain_law_and_order_does_not_matter():
    rng = np.random.default_rng(1); N, D = rng.choice([1e5, 1e6], 24), rng.choice([5e4, 2e5, 4e5], 24); q = rng.uniform(0, 1, (24, 2)); L = law((2., .3, 5., .4, 1.), N, effective(D, q, (1., -2.)))
    θ, c = fit_law(N, D, L, q); order = rng.permutation(24); again = fit_law(N[order], D[order], L[order], q[order])
    np.testing.assert_allclose(c, (1., -2.), atol=.05); np.testing.assert_allclose(again[1], c, atol=.02); np.testing.assert_allclose(effective(D, q, (0., 0.)), D)
    with pytest.raises(ValueError, match="finite positive"): fit_law(N, D, np.where(np.arange(24) == 3, np.nan, L), q)
