"""The native passes: built for three kinds of processor, at any number of threads, and against the optimizers' torch lines."""
import ctypes, math, shutil

import pytest, torch
from pathlib import Path
from hypothesis import given, settings, strategies as st
from mutants import noticed
import paretolab
from paretolab.kernels import native, steps
from paretolab.optimizers import apollo, galore, lion
from paretolab.optimizers.lowrank import Gaussian, Sparse

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
SOURCE, u = Path(paretolab.__file__).parent/"kernels"/"csrc"/"steps.cpp", 2**-24
SHAPES = {"a.weight": (33, 20), "b.weight": (20, 70), "c.weight": (16, 16), "d.weight": (1, 9), "e.weight": (130, 64), "norm.weight": (7,)}

class Dense(apollo.APOLLO): projection = Gaussian()
class One(apollo.APOLLO): projection = Sparse(entries=1)
class DenseMini(apollo.Mini): projection = Gaussian()
KINDS = {"Lion": lion.Lion, "APOLLO": apollo.APOLLO, "one entry": One, "dense": Dense, "Mini": apollo.Mini, "dense Mini": DenseMini, "GaLore": galore.GaLore}

def run(kind, dtype=torch.float32, count=7, **kw):
    g = torch.Generator().manual_seed(0); P = {n: torch.randn(s, generator=g).to(dtype).requires_grad_() for n,s in SHAPES.items()}; was = {n: p.detach().clone() for n,p in P.items()}
    o = kind(P.items(), lr=.05, weight_decay=.1, **({} if kind is lion.Lion else dict(gap=3)), **kw)
    for t in range(count):
        for i,p in enumerate(P.values()): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100*t + i)).to(dtype)
        o.step()
    return P, o, was

def off(P, Q, was): return max(((P[n] - Q[n]).abs().max()/(Q[n] - was[n]).abs().max()).item() for n in P)

@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_equal_to_the_torch_lines(name, maximize, monkeypatch):
    P, o, was = run(KINDS[name], maximize=maximize)
    monkeypatch.setattr(native, "load", lambda source: None)
    Q, o2, _ = run(KINDS[name], maximize=maximize)
    # single roundings grow by the division by small roots; a wrong channel, sign or limit is off by more than 1e-2
    assert off(P, Q, was) < (1e-4 if name == "GaLore" else 1e-5), off(P, Q, was)
    for p,q in zip(o.state.values(), o2.state.values()):
        for k in p: assert torch.allclose(p[k], q[k], rtol=1e-4, atol=1e-5), k

def test_the_native_passes_are_taken(monkeypatch):
    taken = []; call = steps._call
    monkeypatch.setattr(steps, "_call", lambda lib, name, *args: (taken.append(name), call(lib, name, *args)))
    for kind,names in ((lion.Lion, {"lion"}), (apollo.APOLLO, {"apollo"}), (Dense, {"apollo"}), (galore.GaLore, {"moments"})):
        taken.clear(); run(kind, count=1); assert set(taken) == names
    taken.clear(); run(apollo.APOLLO, torch.float64, 1); assert not taken

def build(tmp_path, target):
    f = (shutil.which("g++"), *[x for x in native._flags if not x.startswith("-march")], *target)
    return ctypes.CDLL(str(native.build(SOURCE, tmp_path, "steps-" + "".join(target).replace("=", ""), f)))

@pytest.mark.parametrize("target", [(), ("-mavx2", "-mfma")])
def test_other_processors_agree(target, tmp_path, monkeypatch):
    if target and "avx2" not in native.cpu(): pytest.skip("this processor has no AVX2")
    want = {name: run(kind) for name,kind in KINDS.items()}
    lib = build(tmp_path, target); monkeypatch.setattr(native, "load", lambda source: lib)
    for name,kind in KINDS.items():
        P, _, was = run(kind); assert off(P, want[name][0], was) < (1e-4 if name == "GaLore" else 1e-5), name

def of_many(W, G, wide, P, channels):
    "W, M, V, norm after two steps."
    turn = (lambda t: t.mT.contiguous().mT) if wide else torch.clone
    w, state = turn(W), (torch.zeros(len(W), len(P)), torch.zeros(len(W), len(P)), torch.zeros(()))
    for _ in range(2): assert steps.apollo([w], [turn(G)], [lambda: P], [state], channels, (.9, .999, 1e-6, 1.01), [(.1, .99)])
    return w, *state

def threads_and_blocks_are_right(monkeypatch):
    "One thread and more, to the bit; channels of more than one block, against the same from doubles."
    torch.manual_seed(0); W, G = torch.randn(2, 3000, 280); got = []
    for threads in (1, 2, 5):
        with monkeypatch.context() as at:
            at.setattr(torch, "get_num_threads", lambda: threads); m = torch.zeros_like(W); assert steps.lion([w := W.clone()], [G], [m], .01, (.9, .99), .99)
            got.append([w, m, *(t for wide in (False, True) for P in (Sparse()("w", 0, 1, 280), Sparse()("w", 0, 16, 280), Gaussian()("w", 0, 19, 280)) for channels in (False, True) for t in of_many(W, G, wide, P, channels))])
    for other in got[1:]: assert all(torch.equal(a, b) for a,b in zip(got[0], other, strict=True))
    for wide in (False, True):
        for g in (G, -2*G.flip(0)):                                            # memory of the first is there for the second
            (R, c), P = steps.project(g.mT.contiguous().mT if wide else g, p := Sparse()("w", 0, 1, 280)), p.to_dense().double()
            assert torch.allclose(R.double(), g.double() @ P.mT, atol=1e-3) and torch.allclose(c.double(), g.double().square().sum(1), rtol=1e-5)

def test_threads_and_blocks_do_not_change_a_bit(monkeypatch): threads_and_blocks_are_right(monkeypatch)

def test_many_are_as_each_alone_however_far_away():
    torch.manual_seed(0); draw = Sparse(); found = []
    shapes, P = [(40, 21), (33, 33), (1400, 1600)], [draw("w", 0, r, m) for r,m in ((6, 21), (1, 33), (8, 1600))]          # the last makes them too large for a cache
    W, G = ([torch.randn(s) for s in shapes] for _ in range(2)); states = lambda: [(torch.zeros(s[0], len(p)), torch.zeros(s[0], len(p)), torch.zeros(())) for s,p in zip(shapes, P)]
    assert steps._far(W) and not steps._far(W[:2])
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        w, m, S = [x.clone() for x in W], [torch.zeros_like(x) for x in W], states()
        for k in parts:
            assert steps.apollo(w[k], G[k], [lambda p=p: p for p in P[k]], S[k], True, (.9, .999, 1e-6, 1.01), [(.1, .99), (.2, .9), (.3, 1.)][k])
            assert steps.lion(w[k], G[k], m[k], .01, (.9, .99), .99)
        found.append([*w, *m, *(t for s in S for t in s)])
    assert all(torch.equal(a, b) for a,b in zip(*found, strict=True)) and not torch.equal(found[0][0], W[0])

@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 20), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_sketches_of_any_shape(n, m, r, s, wide):
    P, G = Sparse(7, s)("w", 1, r, m), torch.randn(n, m, generator=torch.Generator().manual_seed(n + 41*m)); D = P.to_dense().double()
    R, c = steps.project(G.mT.contiguous().mT if wide else G, P)
    assert ((R - G.double() @ D.mT).abs() <= (m + 2)*u*(G.abs().double() @ D.abs().mT)).all() and ((c - G.double().square().sum(1)).abs() <= (m + 1)*u*G.double().square().sum(1)).all()

def dense_is_right(n, m, r, wide):
    P, G = Gaussian(7)("w", 1, r, m), torch.randn(n, m, generator=torch.Generator().manual_seed(n + 41*m)); D = P.double()
    R, c = steps.project(G.mT.contiguous().mT if wide else G, P)
    assert ((R - G.double() @ D.mT).abs() <= (m + 2)*u*(G.abs().double() @ D.abs().mT)).all() and ((c - G.double().square().sum(1)).abs() <= (m + 1)*u*G.double().square().sum(1)).all()

@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_dense_projections_of_any_shape(n, m, r, wide): dense_is_right(n, m, r, wide)

@pytest.mark.parametrize("wide", [False, True])
def test_dense_projections_of_long_rows(wide): dense_is_right(50, 1100, 35, wide)             # more than is added up in one go

@pytest.mark.parametrize("projection", [Sparse(3), Gaussian(3), Gaussian(3, keep=True)])
def test_a_projection_is_part_of_the_saved_state(projection):
    P, o, _ = run(apollo.APOLLO); saved = o.state_dict(); o.projection = projection
    with pytest.raises(ValueError, match="goes on with projection"): o.load_state_dict(saved)
    o.load_state_dict(o.state_dict())

MUTANTS = [("c = b1 * y + c1 * x", "c = b2 * y + c2 * x"), ("| step) & (c != 0))", "| step) & (c == c))"), ("b2 * y + c2 * x", "b1 * y + c1 * x"), ("to[k] += t.sign", "to[k] = t.sign"), ("squares[k] += v[k] * v[k]", "squares[k] += v[k]"),
    ("l & d ? L + l : l + d", "l & d ? L + l : l"), ("for (; i < t.m; i++)", "for (; i < t.m - 1; i++)"), ("std::fill(R + from", "std::fill(R + from + 1"), ("p[i] * v", "p[0] * v"), ("R[j] += p[i] * g[j]", "R[j] += p[0] * g[j]"), ("c[j] += g[j] * g[j]", "c[j] += g[j]"), ("return row<far, false>(w + from * columns", "return row<far, false>(w + from"), ("c2 * (y * y)", "c2 * y"), ("(root(second) + eps)", "root(second)"),
    ("before += y * y", "before += y"), ("step + (of == 1 ? i : 0)", "step"), ("keep * x[j] - s[each ? j : 0]", "x[j] - s[each ? j : 0]"), ("keep * x[j] - s[each ? j : 0]", "keep * x[j] - s[0]"), ("keep * load(x + k)", "load(x + k)"), ("each ? load(s + k) : all(*s)", "all(*s)"), ("std::min(to, j + 2048)", "std::min(to, j + 1024)"), ("threads)) return 0;\n    return 1", "threads)) return 0; else break;\n    return 1"), ("*norm > 0 && now > most", "now > most"), ("if (limited > 0) *norm", "*norm"), ("step[j] * step[j] : 1", "step[j] : 1"), ("(channels ? 1 : one)", "1")]
DENSE = [("fused(v, p, a[i])", "fused(v, p, b[i])"), ("x[i * stride + k] - vec{}", "x[k] - vec{}"), ("load(panel + wide_of * k + L)", "load(panel + wide_of * k)"), ("h = tall_of; else", "h = tall_of + 1; else"), ("x + i * stride, stride, panel, deep, out), h = 1", "x, stride, panel, deep, out), h = 1"), ("turned ? r : 1", "1"), ("(more ? to : 0)", "0"), ("columns < wide_of || more || turned", "more || turned"), ("h + l < rows; l++", "h + l < rows - 1; l++"), ("4 * (deep - k)", "4 * (deep - k - 1)"), ("a = fused(v, v, a)", "a = fused(v, v, b)"), ("s += x[k] * x[k]", "s += x[k]"), ("from ? c[j + i] + s : s", "s"), ("from ? c[j + b] + now : now", "now"), ("deep_of, m - from), columns", "deep_of, m), columns"), ("s[b / L][b % L]", "s[0][b % L]"), ("memcpy((void*)v, x, 4 * columns)", "memcpy((void*)v, x, 4)"), ("p + q * m + from, m, std::min", "p + q * m, m, std::min"), ("dense_columns(g + from, m, n,", "dense_columns(g, m, n,"), ("if (!m) std::fill(R, R + n * r, 0.f)", "if (!m) std::fill(R, R, 0.f)")]

@pytest.mark.soak
def test_every_mutant_is_noticed(tmp_path, monkeypatch, record_property):
    source, alive = SOURCE.read_text(), []
    with monkeypatch.context() as m: m.setattr(native, "load", lambda source: None); want = {name: run(kind) for name,kind in KINDS.items()}
    def checks(lib):
        monkeypatch.setattr(native, "load", lambda source: lib)
        for name,kind in KINDS.items(): P, _, was = run(kind); assert off(P, want[name][0], was) < (1e-4 if name == "GaLore" else 1e-5)
        W, state = torch.ones(3, 2), (torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(())); one = lambda G: steps.apollo([W], [G], [lambda: torch.ones(1, 2)], [state], True, (.9, .999, 1e-6, 1.01), [(.1, 1.)])
        one(torch.zeros(3, 2)); one(torch.ones(3, 2)); norm = state[2].item(); assert (W < .999).all(); one(torch.zeros(3, 2)); assert state[2] == norm
        M = torch.zeros(40); W = torch.ones(40); steps.lion([W], [torch.zeros(40)], [M], .1, (.9, .99), 1.); assert (W == 1).all()
        R, M, V = torch.zeros(1, 32), torch.zeros(1, 32), torch.zeros(1, 32); steps.moments(R, M, V, (.9, .999), 1e-6); assert (R == 0).all()
        threads_and_blocks_are_right(monkeypatch)
        if lib.multiplies():
            for n,m,r in ((50, 1100, 35), (13, 29, 7), (32, 64, 32), (3, 0, 2)): [dense_is_right(n, m, r, wide) for wide in (False, True)]
    for i,(old,new) in enumerate(MUTANTS + DENSE):
        if (old, new) in DENSE and not native.load("steps.cpp").multiplies(): continue
        assert old in source, old
        (tmp_path/f"m{i}.cpp").write_text(source.replace(old, new)); lib = ctypes.CDLL(str(native.build(tmp_path/f"m{i}.cpp", tmp_path, f"m{i}", (shutil.which("g++"), *native._flags))))
        if not noticed(lambda: checks(lib)): alive.append((old, new))
    record_property("mutants", len(MUTANTS + DENSE)); assert not alive, alive

@pytest.mark.soak
def test_without_threads_it_is_done_and_without_memory_it_is_said(tmp_path, monkeypatch):
    def run(old, new, threads=4):
        (tmp_path/"broken.cpp").write_text("#include <new>\n#include <system_error>\n" + SOURCE.read_text().replace(old, new + old)); assert old in SOURCE.read_text()
        lib = ctypes.CDLL(str(native.build(tmp_path/"broken.cpp", tmp_path, "broken", (shutil.which("g++"), *native._flags))))
        monkeypatch.setattr(native, "load", lambda name: lib); monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        torch.manual_seed(0); W, G, M = torch.randn(3, 900, 512); S = steps.Sketch(torch.randint(0, 64, (2, 512), dtype=torch.int32), torch.ones(2, 512), 64)
        assert steps.lion([W], [G], [M], .1, (.9, .99), 1.)
        return W, M, *steps.project(G, S)
    thread, memory = "others[i] = std::thread(part, a, to);", "std::vector<float> memory("
    whole, broken = run(thread, "", 1), run(thread, "throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again)); ")
    assert all(torch.equal(a, b) for a,b in zip(whole, broken, strict=True))
    with pytest.raises(MemoryError, match="its matrix has not changed"): run(memory, "throw std::bad_alloc(); ")

@pytest.mark.parametrize("kind", [lion.Lion, apollo.APOLLO, apollo.Mini])
def test_a_rehearsal_takes_what_a_step_does(kind):
    from paretolab.frontier import budget
    from paretolab.models.shape import Shape
    shape = Shape(vocab=133, dim=24, ff=40, layers=2, heads=3, kv_heads=1, context=8)
    assert budget.workspace(kind, shape) <= budget._rehearse(kind, budget._shapes(shape)) < 4*shape.vocab*shape.dim

def test_what_does_not_fit_never_reaches_c():
    with pytest.raises(TypeError, match="int32 rows"): steps.Sketch(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4), 2)
    with pytest.raises(ValueError, match="0 to r - 1"): steps.Sketch(torch.full((1, 4), 10**8, dtype=torch.int32), torch.ones(1, 4), 2)
    W, G = torch.zeros(400, 8), torch.ones(400, 8)
    assert not steps.apply(W, G, torch.ones(1), 1.) and not steps.lion([torch.zeros(1000)], [torch.ones(1)], [torch.ones(1)], .1, (.9, .99), 1.) and steps.moments(W, G[:5], G[:5], (.9, .99), 1e-6) is None
    for P in (torch.ones(1, 3), torch.ones(0, 8), torch.ones(8), torch.ones(1, 8, 1)):
            with pytest.raises(ValueError, match="column for each"): steps.project(G, P)
    constants, rates, state = (.9, .99, 1e-6, 1.01), (.1, 1.), (torch.zeros(400, 2), torch.zeros(400, 2), torch.zeros(()))
    for G2, P, S, says in ((torch.ones(4000, 8), torch.ones(2, 8), state, "one shape"), (G, torch.ones(2, 7), state, "column for each"), (G, torch.ones(0, 8), state, "one row"), (G, torch.ones(2, 8, device="meta"), state, "on meta"), (G, torch.ones(2, 8), (torch.zeros(1, 2), *state[1:]), "both moments"), (G, torch.ones(3, 8), state, "both moments"), (G, torch.ones(2, 8).double(), state, "is float32")):
        with pytest.raises((ValueError, TypeError), match=says): steps.apollo([torch.zeros(9, 8), W], [torch.ones(9, 8), G2], [lambda: torch.ones(1, 8), lambda: P], [(torch.zeros(9, 1), torch.zeros(9, 1), torch.zeros(())), S], True, constants, [rates]*2)
    assert not W.any()

@pytest.mark.parametrize("n", [1, 7, 16, 37])
def test_lion_s_sign_of_every_kind_of_number(n):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0., -0., 1e-44, -1e-44, 3e38, -1.])
    for shift in range(9):
        W, G, M = torch.ones(n), x.roll(shift).repeat(5)[:n].clone(), torch.zeros(n)
        assert steps.lion([w := W.clone()], [G], [m := M.clone()], .25, (.5, .5), 1.)
        c = torch.lerp(G, M, .5); want = torch.where(c.isnan(), c, 1 - .25*c.sign())
        assert torch.equal(w.nan_to_num(9.), want.nan_to_num(9.)) and torch.equal(w.isnan(), G.isnan()) and torch.equal(m.isnan(), G.isnan())
