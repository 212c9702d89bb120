"""GPTQ: never worse than nearest, all storage forms, shared and repeated blocks, a run killed by a signal."""
import json, os, signal
import pytest, torch
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.quantizers import gptq, grids, lowbit, plan
from paretolab.quantizers.lowbit import LowBit

SMALL = dict(vocab=48, dim=32, ff=64, layers=2, heads=2, kv_heads=1, context=16)


def layer(seed, R=24, C=32, N=256):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(C, C, generator=g) * torch.logspace(0, -seed % 3, C) @ torch.randn(C, N, generator=g)
    return torch.randn(R, C, generator=g), X, X @ X.T / N


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
def test_never_worse_than_nearest_on_a_hundred_layers(bits):
    "Twenty layers at each of five widths; the layer, and each of its rows. The choice is made with 1 % damping, the errors here are without."
    ratios = []
    for seed in range(20):
        w, X, H = layer(seed)
        near, ours = gptq.quantize(w, bits, 8), gptq.quantize(w, bits, 8, H)
        e, E = (((w - q.dequantize()) @ X).square().sum(1) for q in (near, ours))
        assert (E <= e*(1 + 1e-5)).all()                            # sums of 256 squares in 32 bits
        ratios.append((E.sum()/e.sum()).item())
    assert max(ratios) < .9 and sorted(ratios)[10] < .8


@pytest.mark.parametrize("start", [grids.symmetric, grids.asymmetric, grids.bipolar, gptq.clipped])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_the_reported_error_is_that_of_the_file(start, static, order, tmp_path):
    w, X, H = layer(3)
    q, report = gptq.solve(w, 4, 8, gptq.factor(H, order), start, static)
    lowbit.save(tmp_path/"m", {"w": q})
    E = w - lowbit.load(tmp_path/"m")[0]["w"].dequantize()
    D = H + report["damping"]*H.diagonal().mean()*torch.eye(len(H))
    assert (q.perm is not None) == (order and not static)
    assert report["error"] == pytest.approx((E @ D * E).sum(1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("start", [grids.e4m3, grids.mxfp4])
def test_grids_that_are_not_even(start):
    w, X, H = layer(5)
    q, report = gptq.solve(w, start.__defaults__[0], 32, gptq.factor(H), start)
    assert report["error"] < .8*report["nearest"]
    if start is grids.e4m3: assert q.codes().view(torch.float8_e4m3fn).float().isfinite().all()


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bits, group, start", [(1, 8, None), (1.58, 0, None), (2, 8, None), (4, 16, grids.asymmetric), (4, 32, grids.mxfp4), (8, 32, grids.e4m3)])
def test_without_a_compiler_the_same_comes_out(bits, group, start, static, monkeypatch):
    w, _, H = layer(7, R=37)
    ours = gptq.solve(w, bits, group, gptq.factor(H), start, static)
    monkeypatch.setattr(gptq.native, "load", lambda name: None)
    theirs = gptq.solve(w, bits, group, gptq.factor(H), start, static)
    assert torch.equal(ours[0].codes(), theirs[0].codes()) and torch.equal(ours[0].scales, theirs[0].scales) and ours[1] == theirs[1]


@pytest.mark.parametrize("R", [1, 15, 16, 17, 40])
def test_nothing_is_written_beyond_the_rows(R):
    B, grid = 5, torch.arange(8.)
    w, u, levels = torch.randn(B, R), torch.randn(B, B).triu() + 3*torch.eye(B), [(torch.rand(R) + .1, torch.randn(R)) for _ in range(B)]
    kept, made = w.clone(), []
    def framed(t): made.append(torch.full((B*R + 64,), 7.)); return made[-1][32:-32].view(B, R)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "empty_like", framed)
        codes, E = gptq._at_once(w, u, levels, grid)
    assert all((f[:32] == 7).all() and (f[-32:] == 7).all() for f in made) and len(made) == 2 and torch.equal(w, kept)
    assert all(torch.equal(a, b) for a, b in zip((codes, E), gptq._in_turn(w, u, levels, grid)))


def test_a_column_that_was_never_seen_keeps_its_nearest_level():
    w, X, H = layer(0)
    H[:, 7] = H[7] = 0
    assert torch.equal(gptq.quantize(w, 4, 8, H).codes()[:, 7], gptq.quantize(w, 4, 8).codes()[:, 7])
    assert torch.equal(gptq.quantize(w, 4, 8, 0*H).codes(), gptq.quantize(w, 4, 8).codes())


def test_damping_is_raised_and_reported():
    w, X, H = layer(1)
    _, report = gptq.solve(w, 4, 8, gptq.factor(H - .3*H.diagonal().mean()*torch.eye(32)))
    assert report["damping"] in (pytest.approx(1.), pytest.approx(10.))


def model(**more):
    torch.manual_seed(1)
    m = MobileLLM(Shape(**SMALL, **more))
    for p in m.parameters():
        if p.ndim == 2: p.data *= 4
    return m, torch.randint(48, (5, 16))


def same(a, b): return a.keys() == b.keys() and all(torch.equal(x, y) for n in a for x, y in zip(*(t.parts.values() if isinstance(t, LowBit) else [t] for t in (a[n], b[n]))))


@pytest.mark.parametrize("more", [dict(), dict(tied=False), dict(repeat=2), dict(post_ln=1)])
def test_hessians_are_those_of_the_quantized_model(more):
    "What each layer was given is what the restored model gives it."
    m, text = model(**more)
    before = {n: p.clone() for n, p in m.state_dict().items()}
    given = []
    def watch(w, bits, group, factors):
        q, r = gptq.solve(w, bits, group, factors)
        given.append(factors)
        return q, r
    state, reports = gptq.compress(m, plan.uniform(m, 4, 16, "gptq.quantize"), text, solver=watch)
    assert all(torch.equal(p, before[n]) for n, p in m.state_dict().items()) and len(given) == 14 + (not m.shape.tied)
    small, seen = plan.restore(model(**more)[0], state), {}
    for n, l in small.named_modules():
        if f"{n}.weight" in reports: l.register_forward_pre_hook(lambda l, x, n=n: seen.setdefault(n, []).append(x[0]))
    small.norm.register_forward_hook(lambda l, x, y: seen.setdefault("head", []).append(y))
    with torch.no_grad(): small(text)
    if "repeat" in more: return                                     # second calls saw the layer before it was rounded
    for n, (perm, T, U, λ) in zip((n.removesuffix(".weight") for n in reports), given):
        H = gptq._mean_outer(seen[n])
        D = (H + λ*H.diagonal().mean()*torch.eye(len(H)))[perm][:, perm]
        assert torch.allclose(T @ T.T, D, rtol=1e-3, atol=1e-4*D.abs().max()), n


def test_chunks_give_all_text_its_say():
    m, text = model(repeat=2)
    p = plan.uniform(m, 4, 16, "gptq.quantize")
    whole, parts, less = (gptq.compress(m, p, t, batch=b)[0] for t, b in ((text, 8), (text, 2), (text[:2], 8)))
    agree = lambda a, b: sum((a[n].codes() == b[n].codes()).sum().item() for n in p if n != "embed" for n in [f"{n}.weight"]) / sum(m.get_submodule(n).weight.numel() for n in p if n != "embed")
    assert agree(whole, parts) > .98 > .9 > agree(whole, less)


def test_killed_and_resumed_gives_the_same_file(tmp_path):
    m, text = model()
    p = plan.uniform(m, 3, 16, "gptq.quantize")
    lowbit.save(tmp_path/"a", gptq.compress(m, p, text)[0])
    left = [10]
    def die(*a):
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        return gptq.solve(*a)
    if not (child := os.fork()): gptq.compress(m, p, text, tmp_path/"run", solver=die); os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and [f.name for f in (tmp_path/"run").iterdir()] == ["blocks.0.safetensors"]
    lowbit.save(tmp_path/"b", gptq.compress(m, p, text, tmp_path/"run")[0])
    assert (tmp_path/"a").read_bytes() == (tmp_path/"b").read_bytes()


def test_plans_from_json_and_mixed_plans():
    m, text = model()
    p = plan.uniform(m, 3, 16, "gptq.quantize") | {"blocks.1.attn.q": (16, 0, "gptq.quantize"), "blocks.0.mlp.up": (4, 32, "absmax.quantize")}
    state, reports = gptq.compress(m, json.loads(json.dumps(p)), text)
    assert "blocks.0.mlp.up.weight" not in reports and len(reports) == 12 and state["blocks.1.attn.q.weight"].dtype == torch.float16
    assert same({"w": state["blocks.0.mlp.up.weight"]}, {"w": plan.compress(m, {"blocks.0.mlp.up": p["blocks.0.mlp.up"]})["blocks.0.mlp.up.weight"]})


@pytest.mark.parametrize("change, sentence", [(dict(tokens=torch.zeros(0, 4, dtype=torch.long)), r"shape \(0, 4\)"), (dict(tokens=torch.zeros(1, 17, dtype=torch.long)), "up to 16 tokens"),
    (dict(plan={"blocks.0.attn.q": (4, 5, "gptq.quantize")}), "blocks.0.attn.q: "), (dict(plan={"x": (4, 8, "gptq.quantize")}), "'x'")])
def test_what_is_refused(change, sentence):
    m, text = model()
    with pytest.raises(ValueError, match=sentence): gptq.compress(m, **{**dict(plan={}, tokens=text), **change})


def test_a_broken_activation_is_named():
    m, text = model()
    m.blocks[0].norm1.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite|NaN|does not fit"): gptq.compress(m, {"blocks.0.attn.q": (4, 8, "gptq.quantize")}, text)
