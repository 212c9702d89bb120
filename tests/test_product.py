"""Low-bit products: exact integers on every path, widths, grids, groups and shapes; the float bound; threads, forks, torch.compile."""
import ctypes, shutil, subprocess, sys, threading, warnings
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.kernels import activations, native, product, rows16
from paretolab.kernels.rows16 import levels
from paretolab.quantizers.lowbit import LowBit

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
PATHS = range(native.load("product.cpp").best_path() + 1) if shutil.which("g++") else []
E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])
GRIDS = {"sign": (1, torch.tensor([-1., 1])), "0/1": (1, torch.tensor([0., 1])), "ternary": (1.58, torch.tensor([-1., 0, 1])), "uneven ternary": (1.58, torch.tensor([-1., 0, 2])),
    "stretched": (2, torch.tensor([-1.5, -.5, .5, 1.5])), "2": (2, torch.arange(-2, 2.)), "three of 2": (2, torch.arange(-1, 2.)), "offset": (2, torch.tensor([.1, 1.3, 2.5, 3.7])),
    "3": (3, torch.arange(-4, 4.)), "3 half": (3, torch.arange(-3.5, 4)), "4": (4, torch.arange(-8, 8.)), "falling": (4, -.25*torch.arange(-8, 8.)), "FP4": (4, torch.cat([E2M1, -E2M1])), "table to 127": (4, torch.cat([torch.arange(15.), torch.tensor([127.])])),
    "6": (6, torch.arange(-31, 32.)), "8": (8, torch.arange(-128, 128.)), "8 half": (8, torch.arange(-127.5, 128)), "8 squares": (8, torch.cat([torch.arange(0, 100.), torch.arange(100, 256, 2.)]))}

def tensor(grid, m, k, group=0, seed=0, scales=torch.float16, zeros=None, perm=False):
    g = torch.Generator().manual_seed(seed)
    bits, Q = GRIDS[grid]
    n = k//(group or max(k, 1))
    s = (torch.rand(m, n, generator=g) + .5).to(scales)
    z = torch.randn(m, n, generator=g).to(zeros) if zeros else None
    return LowBit.pack(torch.randint(len(Q), (m, k), generator=g), s, Q, bits, group, z, torch.randperm(k, generator=g).int() if perm else None)

def extreme(M, k, seed=0):
    "Activations that are their own integers: whole numbers up to 127, one of them 127 in each row."
    x = torch.randint(-127, 128, (M, k), generator=torch.Generator().manual_seed(seed)).float()
    x[:, :1] = 127
    return x

def bound(x, q):
    "What roundings can do, as derived on the page: (2 groups + 8) of them, each on at most the sum of magnitudes; and a grid's own error."
    a, s = activations.quantize(x)
    a = a.double().abs() if q.perm is None else a.double().abs()[:, q.perm.long()]
    L, G = levels(q.grid[0]), q.scales.shape[1]
    value = (torch.tensor(L.level, dtype=torch.float64)*2**L.shift + L.offset).abs()*abs(L.step) + abs(L.rest)
    a, v = a.view(len(a), G, q.group if G else 0), value[q.codes().int()].view(q.shape[0], G, q.group if G else 0)*q.scales.double()[..., None]
    if q.zeros is not None: v = v + q.zeros.double().abs()[..., None]
    size = s.double() * torch.einsum("Mgk,mgk->Mm", a, v)
    return ((2*G + 8)*2**-24 + 2**-21)*size if L.rest or q.zeros is not None else (2*G + 8)*2**-24*size

# ---- the packing

@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("m, k, group", [(1, 32, 0), (37, 96, 32), (16, 60, 20), (5, 7, 0), (33, 0, 0), (0, 64, 64), (17, 192, 96)])
def test_packing_keeps_every_value(grid, m, k, group):
    for zeros, perm in [(None, False), (torch.float16, True)]:
        q = tensor(grid, m, k, group, zeros=zeros, perm=perm)
        p = product.pack(q)
        ids = torch.arange(m).flip(0)
        loose = dict(atol=3e-6, rtol=0) if levels(q.grid[0]).rest or zeros and p.step % .5 else dict(atol=0, rtol=0)
        torch.testing.assert_close(product.rows(p, ids), q.dequantize()[ids], **loose)
        torch.testing.assert_close(rows16._rows(p, ids), q.dequantize()[ids], **loose)

@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_scales_are_exact_in_the_packing(scales):
    q = tensor("3", 20, 64, 32, scales=scales)
    assert torch.equal(product.rows(product.pack(q), torch.arange(20)), q.dequantize())
    s = torch.arange(0, 0x7c00, dtype=torch.int16).view(torch.float16)                    # every finite half of positive sign
    q = LowBit.pack(torch.ones(len(s), 1, dtype=torch.int), s[:, None], torch.arange(2.), 1)
    assert torch.equal(product.rows(product.pack(q), torch.arange(len(s)))[:, 0], s.float())
    x = torch.full((1, 1), 127.)
    assert torch.equal(product._run(x, product.pack(q), path=0)[0], 127*s.float())
    z = torch.cat([s, -s])[:, None]
    p = product.pack(LowBit.pack(torch.zeros(len(z), 1, dtype=torch.int), torch.ones_like(z), torch.arange(2.), 1, 0, z))
    for path in PATHS: assert torch.equal(product._run(x, p, path)[0], 127*z[:, 0].float()), path

@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 20, 32, 64, 96]), st.sampled_from(list(rows16._PIECES)), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_c_places_codes_as_defined(m, groups, group, width, seed):
    c = torch.randint(2**width, (m, groups*group), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    padded = torch.nn.functional.pad(torch.nn.functional.pad(c.view(m, groups, group), (0, -group % 32)).flatten(1), (0, 0, 0, -m % 16))
    data = rows16._place(c, width, group)
    assert torch.equal(data, rows16.place(padded, width)) and torch.equal(rows16._codes_of(data, width), padded)

@pytest.mark.parametrize("change, sentence", [(dict(grid={2: torch.tensor([0, 1, 2.7182818, 4])}), "multiples of one step"), (dict(grid={2: torch.tensor([0., 1, 2, 200])}), "at most 127 steps")])
def test_grids_without_integers_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence): product.pack(LowBit.pack(torch.zeros(1, 4, dtype=torch.int), torch.ones(1, 1).half(), bits=2, **change))

def test_what_pack_refuses():
    with pytest.raises(ValueError, match=r"one width .got widths \[2, 4\]"):
        product.pack(LowBit.pack(torch.zeros(1, 4, dtype=torch.int), torch.ones(1, 2).half(), {2: torch.arange(4.), 4: torch.arange(16.)}, (2, 4), 2))
    with pytest.raises(ValueError, match="65536 columns .*got 65537"): product.pack(tensor("8", 1, 65537))

# ---- products

@compiler
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group", [32, 64, 128, 0])
def test_integers_are_exact_on_every_path(grid, group):
    "With scales of one and activations of whole numbers the result is an integer below 2^24, or its rounding."
    bits, Q = GRIDS[grid]
    L = levels(Q)
    m, k = 35, 384
    codes = torch.randint(len(Q), (m, k), generator=torch.Generator().manual_seed(1))
    codes[0], codes[1] = len(Q) - 1, 0                                                    # the extremes
    q = LowBit.pack(codes, torch.ones(m, k//(group or k)).half(), Q, bits, group)
    for M in (1, 3, 4, 17):
        x = extreme(M, k)
        x[-1] = 127                                                                       # with all codes at the top: the largest sum
        i = x.long() @ (2**L.shift*torch.tensor(L.level)[codes] + L.offset).t()
        if L.rest: continue
        want = (i.double()*L.step).float()
        for path in PATHS: assert torch.equal(product._run(x, product.pack(q), path), want), path

@compiler
@pytest.mark.parametrize("grid, k", [("8", 65536), ("8 half", 65536), ("FP4", 40000), ("table to 127", 65536), ("4", 65536), ("stretched", 65536), ("sign", 65536)])
def test_the_largest_sums_do_not_overflow(grid, k):
    bits, Q = GRIDS[grid]
    L, p = levels(Q), product.pack(LowBit.pack(torch.tensor([[len(Q) - 1]]).expand(1, k), torch.ones(1, 1).half(), Q, bits))
    for sign in (1, -1):
        x = torch.full((5, k), 127.)*sign
        i = k*127*sign*(2**L.shift*L.level[-1] + L.offset)
        for path in PATHS:
            for M in (1, 5): assert torch.equal(product._run(x[:M], p, path), torch.full((M, 1), i*L.step)), (path, M)

@st.composite
def problems(draw):
    g = draw(st.sampled_from([32, 64, 128, 1, 5, 48, 33]))
    groups = draw(st.integers(0, 4))
    shape = draw(st.integers(0, 50)), g*groups
    parts = dict(scales=draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float8_e4m3fn])), zeros=draw(st.sampled_from([None, torch.float16, torch.float32])), perm=draw(st.booleans()))
    seed = draw(st.integers(0, 999))
    q = tensor(draw(st.sampled_from(list(GRIDS))), *shape, g if groups else 0, seed, **parts)
    x = torch.randn(draw(st.sampled_from([0, 1, 2, 3, 4, 5, 12, 13, 16, 29])), shape[1] + 3, generator=torch.Generator().manual_seed(seed))
    return q, draw(st.sampled_from([lambda x: x[:, :-3], lambda x: x[:, 3:].contiguous(), lambda x: x[:, 1:-2].t().contiguous().t(), lambda x: x[:, :-3]*1e30, lambda x: x[:, :-3]*1e-20]))(x)

@compiler
@given(problems())
@settings(max_examples=250, deadline=None)
def test_every_path_is_within_the_bound_and_all_are_equal(problem):
    q, x = problem
    p, want = product.pack(q), product.naive(x, q)
    first = product._run(x, p, 0, 1)
    assert first.shape == want.shape
    assert ((first.double() - want.double()).abs() <= bound(x, q)).all()
    assert ((product._plain(x, p).double() - want.double()).abs() <= bound(x, q)).all()
    for path in PATHS[1:]: assert torch.equal(product._run(x, p, path, 1), first), path

@compiler
@pytest.mark.parametrize("grid", ["FP4", "table to 127", "4"])
@pytest.mark.parametrize("group", [5, 20, 33])
def test_the_padding_of_a_group_counts_for_nothing(grid, group):
    "A group ends within a block of 32 columns; the level of code 0 is not zero."
    q, x = tensor(grid, 20, 3*group, group), torch.randn(5, 3*group, generator=torch.Generator().manual_seed(group))
    for path in PATHS:
        for M in (1, 5): assert ((product._run(x[:M], product.pack(q), path).double() - product.naive(x[:M], q).double()).abs() <= bound(x[:M], q)).all(), (path, M)

@compiler
def test_misaligned_activations():
    q = tensor("4", 33, 96, 32)
    flat = torch.randn(1 + 5*96)
    x = flat[1:].view(5, 96)
    assert x.data_ptr() % 8 and torch.equal(product.fast(x, product.pack(q)), product.fast(x.clone(), product.pack(q)))

@compiler
@pytest.mark.parametrize("path", PATHS)
def test_rows_that_are_not_finite_say_so_and_spoil_no_other(path):
    p, x = product.pack(tensor("3", 20, 64, 32)), torch.randn(6, 64)
    clean = product._run(x, p, path)
    for row, bad in enumerate([torch.nan, torch.inf, -torch.inf, 0]): x[row, 7] = bad
    x[3] = 0
    y = product._run(x, p, path)
    assert y[:3].isnan().all() and not y[3].any() and torch.equal(y[4:], clean[4:])

@compiler
@given(st.integers(1, 9), st.integers(0, 300), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_activations_are_rounded_as_defined(M, k, seed):
    "Seen through products with the identity."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, k, generator=g) * 10.**torch.randint(-35, 36, (M, 1), generator=g)
    x[torch.rand(M, k, generator=g) < .2] *= 1e-3
    a, s = activations.quantize(x)
    if not k: return
    p = product.pack(LowBit.pack(torch.eye(k).int(), torch.ones(k, 1).half(), torch.arange(2.), 1))
    for path in PATHS: assert torch.equal(product._run(x, p, path), s*a)

@pytest.mark.parametrize("form", ["naive", "fast"])
@pytest.mark.parametrize("x, error, sentence", [(torch.ones(2, 64).double(), TypeError, "float32 .got torch.float64"), (torch.ones(2, 63), ValueError, "64 columns .got activations of shape .2, 63"),
    (torch.ones(()), ValueError, "64 columns"), (torch.ones(2, 64, device="meta"), ValueError, "on meta")])
def test_activations_that_do_not_fit_are_refused(form, x, error, sentence):
    q = tensor("2", 8, 64)
    with pytest.raises(error, match=sentence): product.naive(x, q) if form == "naive" else product.fast(x, product.pack(q))

@pytest.mark.parametrize("ids", [torch.tensor([0, 8]), torch.tensor([-1])])
def test_rows_that_do_not_exist_are_refused(ids):
    with pytest.raises(IndexError, match="from 0 to 7"): product.rows(product.pack(tensor("2", 8, 64)), ids)

def test_nothing_is_written_beyond_the_result():
    for m, M in [(1, 1), (17, 5), (33, 13)]:
        p, x = product.pack(tensor("4", m, 64, 32)), torch.randn(M, 64)
        for path in PATHS:
            out = torch.full((64 + M*m + 64,), 7.)
            native.load("product.cpp").product(ctypes.byref(p.struct), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out[64:].data_ptr()), ctypes.c_int64(M), 1, path)
            assert (out[:64] == 7).all() and (out[-64:] == 7).all() and torch.equal(out[64:-64].view(M, m), product._run(x, p, path))

# ---- threads, forks, torch

BIG = dict(m=2000, k=640, group=128)

@compiler
@pytest.mark.parametrize("M", [1, 3, 30])
@pytest.mark.parametrize("path", PATHS[1:])
def test_any_number_of_threads_gives_the_same(M, path):
    p, x = product.pack(tensor("4", **BIG)), torch.randn(M, 640)
    one = product._run(x, p, path, 1)
    for threads in (2, 3, 8, 2): assert torch.equal(product._run(x, p, path, threads), one)

@compiler
def test_many_callers_at_once():
    p, xs, bad = product.pack(tensor("stretched", **BIG)), [torch.randn(M, 640) for M in (1, 2, 13)], []
    want = [product._run(x, p, None, 1) for x in xs]
    def call():
        for _ in range(60):
            for x, y in zip(xs, want):
                if not torch.equal(product._run(x, p, None, 3), y): bad.append(len(x))
    crew = [threading.Thread(target=call) for _ in range(6)]
    for t in crew: t.start()
    for t in crew: t.join()
    assert not bad

@compiler
def test_a_fork_of_a_process_with_threads_works():
    run = """if True:
    import os, torch
    from paretolab.kernels import product
    from paretolab.quantizers import absmax
    torch.manual_seed(0)
    p, x = product.pack(absmax.quantize(torch.randn(2000, 640), 4)), torch.randn(4, 640)
    y = product._run(x, p, None, 3)
    child = os.fork()
    if not child: os._exit(0 if torch.equal(product._run(x, p, None, 3), y) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    assert subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=60).stdout == "0\n"

def test_gradient_is_that_of_the_dequantized_matrix():
    q = tensor("3", 20, 64, 32, zeros=torch.float16, perm=True)
    x, dy = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 20)
    y = product.fast(x, product.pack(q))
    y.backward(dy)
    assert torch.equal(y.detach(), product.fast(x.detach(), product.pack(q)))
    torch.testing.assert_close(x.grad, dy @ q.dequantize())

@compiler
def test_a_fork_while_others_multiply_works():
    "A lock that is held at the moment of the fork would be held for ever in the child."
    run = """if True:
        import os, sys, threading, torch
        sys.path.insert(0, %r)
        import test_product as t
        torch.set_num_threads(1)
        p, x = t.product.pack(t.tensor("4", 160, 640, 128)), torch.randn(11, 640)      # barely large enough for more than one thread: locks are taken often
        y, stop = t.product._run(x, p, None, 1), []
        def call():
            while not stop: t.product._run(x, p, None, 2)
        crew = [threading.Thread(target=call) for _ in range(6)]
        for c in crew: c.start()
        bad = 0
        sys.setswitchinterval(1e-5)
        for _ in range(40):
            child = os.fork()
            if not child:
                import signal
                signal.alarm(20)
                os._exit(0 if torch.equal(t.product._run(x, p, None, 2), y) else 1)
            bad += os.waitpid(child, 0)[1] != 0
        stop.append(1)
        for c in crew: c.join()
        print(bad)""" % str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", run], capture_output=True, text=True, timeout=240)
    assert done.stdout == "0\n", done.stdout + done.stderr[-2000:]

@pytest.mark.parametrize("grid", ["FP4", "stretched"])
def test_the_operator_keeps_its_promises_to_torch(grid):
    p = product.pack(tensor(grid, 20, 64, 32, zeros=torch.float16, perm=True))
    torch.library.opcheck(product._product, (torch.randn(3, 64), *p.parts))
    torch.library.opcheck(rows16._op, (torch.tensor([[3, 0], [19, 3]]), *p.parts))

@compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    p = product.pack(tensor("ternary", 48, 64))
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def f(x): return product.fast(x*2, p).relu()
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def looked_up(ids): return product.rows(p, ids)*2
    for ids in (torch.tensor([[1, 47], [0, 1]]), torch.tensor([5])): assert torch.equal(looked_up(ids), product.rows(p, ids)*2)
    for M in (1, 4, 7):
        x = torch.randn(M, 64, requires_grad=True)
        y = f(x)
        assert torch.equal(y.detach(), product.fast(x.detach()*2, p).relu())
        y.sum().backward()
        eager = x.detach().clone().requires_grad_()
        product.fast(eager*2, p).relu().sum().backward()
        assert torch.equal(x.grad, eager.grad)

@pytest.mark.parametrize("change, says", [(dict(perm=torch.zeros(64, dtype=torch.int32)), "each column from 0 to 63 once"), (dict(perm=torch.arange(63, dtype=torch.int32)), "perm of a packed matrix"), (dict(shape=(400, 64)), "data of"),
    (dict(shape=(20, 4096)), "columns|groups divide|data of"), (dict(width=8), "data of"), (dict(width=5), "codes have"), (dict(group=0), "groups divide"), (dict(scales=torch.ones(2, 2, 8).half()), "scales of"), (dict(grid=torch.ones(3)), "grid of"),
    (dict(data=torch.zeros(0, dtype=torch.uint8)), "data of"), (dict(version=2), "version 2"), (dict(layout="plain"), "layout")])
def test_what_no_packing_made_is_refused(change, says):
    import dataclasses
    p, x = dataclasses.replace(product.pack(tensor("4", 20, 64, 32, perm=True)), **change), torch.randn(3, 64)
    with pytest.raises((ValueError, TypeError), match=says): product.fast(x, p)
    with pytest.raises((ValueError, TypeError), match=says): product.rows(p, torch.tensor([0]))
    if not {"version", "layout"} & change.keys():
        with pytest.raises((ValueError, TypeError), match=says): torch.ops.paretolab.product(x, *p.parts)

def test_traced_batched_and_negated():
    p, x, other = product.pack(tensor("stretched", 20, 64, 32)), torch.randn(3, 64), torch.randn(3, 64)
    assert torch.equal(torch.jit.trace(lambda v: product.fast(v, p), x)(other), product.fast(other, p))
    assert torch.equal(torch.func.vmap(lambda v: product.fast(v, p), in_dims=1)(x.t()), product.fast(x, p))
    assert torch.equal(product.fast(torch._neg_view(x), p), product.fast(-x, p))
    with pytest.raises(NotImplementedError, match="forward mode"): torch.func.jvp(lambda v: product.fast(v, p), (x,), (x,))

def test_the_gradient_has_a_gradient():
    q = tensor("stretched", 20, 64, 32, zeros=torch.float16, perm=True)
    p, W, dy, v = product.pack(q), q.dequantize(), torch.randn(3, 20, requires_grad=True), torch.randn(3, 64)
    x = torch.randn(3, 64, requires_grad=True)
    first, = torch.autograd.grad(product.fast(x, p), x, dy, create_graph=True)
    second, = torch.autograd.grad(first, dy, v, create_graph=True)
    torch.testing.assert_close(second, v @ W.t())
    grads, = torch.autograd.grad(product.fast(x, p), x, torch.eye(60).view(60, 3, 20), is_grads_batched=True)           # the gradient under vmap
    torch.testing.assert_close(grads, torch.eye(60).view(60, 3, 20) @ W)
    with pytest.raises(NotImplementedError, match="torch.func"): torch.func.grad(lambda u: product.fast(u, p).sum())(x.detach())

@compiler
def test_far_too_many_threads_are_some():
    p, x = product.pack(tensor("4", **BIG)), torch.randn(3, 640)
    assert torch.equal(product._run(x, p, None, 100_000), product._run(x, p, None, 1))

def test_the_order_of_columns_is_its_own():
    q, x = tensor("4", 20, 64, 32, perm=True), torch.randn(2, 64)
    p = product.pack(q)
    y = product.fast(x, p)
    q.perm.fill_(2**30)
    assert torch.equal(product.fast(x, p), y)

@compiler
def test_without_the_newest_instructions_compiled_in(tmp_path, monkeypatch):
    "Built for any x86-64 or ARM: every path is chosen when it runs, and gives the same bits."
    source = Path(native.__file__).parent/"csrc"/"product.cpp"
    f = (shutil.which("g++"), *[flag for flag in native._flags if not flag.startswith("-march")])
    lib, load = ctypes.CDLL(str(native.build(source, tmp_path, "product-plain", f))), native.load
    for grid in ("sign", "ternary", "3", "4", "FP4", "8 half"):
        p = product.pack(tensor(grid, 37, 96, 32, zeros=torch.float16))
        for M in (1, 5):
            x = torch.randn(M, 96)
            want = product._run(x, p)
            with monkeypatch.context() as m:
                m.setattr(native, "load", lambda name: lib if name == "product.cpp" else load(name))
                for path in PATHS: assert torch.equal(product._run(x, p, path), want)

# ---- without a compiler, and under the sanitizer

def test_without_a_compiler_the_definition_runs(tmp_path, monkeypatch):
    q, x, ids = tensor("FP4", 20, 96, 32, zeros=torch.float16), torch.randn(3, 96), torch.tensor([19, 0])
    p, y, e = product.pack(q), product.naive(x, q), q.dequantize()[ids]
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    native._compiler.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            slow = product.pack(q)
            assert torch.equal(slow.data, p.data) and torch.equal(product.rows(slow, ids), e)
            assert ((product.fast(x, slow).double() - y.double()).abs() <= bound(x, q)).all()
    native.load.cache_clear()
    assert len(said) == 1                                                     # though three C++ files are wanted

@compiler
@pytest.mark.parametrize("what", ["memory", "threads"])
def test_where_the_system_gives_no_more(what):
    "Without memory a product is refused by a sentence; without threads it is done by those there are. No exception crosses C++."
    run = f"""if True:
    import resource, sys, torch
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_product as t
    from paretolab.kernels import product
    torch.set_num_threads(1)
    rows = 20_000 if {what == "memory"} else 4
    p, x = product.pack(t.tensor("ternary", 64, 4096, 128)), torch.ones(rows, 4096)
    y = product._run(x[:4], p, threads=1)
    used = int(open("/proc/self/statm").read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 6_000_000,)*2)                       # less than a thread's stack, or than 80 MB of rounded activations
    try: print("equal" if torch.equal(product._run(x, p, threads=4), y) else "not equal")
    except MemoryError as e: print(e)"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.stdout.strip() == ("no memory for the rounded activations of 20000 rows; multiply fewer rows at a time" if what == "memory" else "equal"), done.stdout + done.stderr[-2000:]

@compiler
@pytest.mark.soak
def test_under_the_address_sanitizer(tmp_path, record_property):
    "Every path, width and odd shape in a process whose reads and writes are all checked, buffers of exactly their size."
    libasan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(libasan).is_absolute(): pytest.skip("no address sanitizer")
    wrapper = tmp_path/"g++"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined -g "$@"\n')
    wrapper.chmod(0o755)
    run = f"""if True:
    import sys, torch
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_product as t
    from paretolab.kernels import native, product
    n = 0
    for grid in t.GRIDS:
        for m, k, group in [(1, 32, 0), (37, 96, 32), (16, 60, 20), (5, 7, 0), (33, 0, 0), (0, 64, 64), (50, 640, 128)]:
            for zeros, perm in [(None, False), (torch.float32, True)]:
                p = product.pack(t.tensor(grid, m, k, group, zeros=zeros, perm=perm))
                product.rows(p, torch.arange(m))
                for M in (0, 1, 3, 4, 5, 13, 29):
                    ys = [product._run(torch.randn(M, k, generator=torch.Generator().manual_seed(M)), p, path, threads) for path in range(native.load('product.cpp').best_path() + 1) for threads in (1, 3)]
                    assert all(torch.equal(y, ys[0]) for y in ys)
                    n += len(ys)
    import test_decode as d
    for heads, kv, half, ff, T, bits in [(1, 1, 1, 1, 1, 2), (6, 2, 5, 31, 23, 4), (3, 3, 8, 40, 9, 3)]:
        s = d.Shape(vocab=13, dim=2*heads*half, ff=ff, layers=2, heads=heads, kv_heads=kv, context=T)
        with torch.no_grad():
            p, x = d.packed(s, bits)[0], torch.arange(T)[None] % 13
            cache = d.Cache(s, 1, T)
            assert torch.equal(torch.cat([p(x[:, i:i + 1], cache) for i in range(T)], 1), p(x)) and torch.equal(p(x), d.naive(p, x))
            n += 2*T
    from paretolab.kernels import unpack
    for bits in (1, 1.58, 2, 3, 4, 6, 8):
        for R, C in [(1, 1), (3, 7), (5, 8), (2, 41), (0, 9), (4, 0)]:
            codes = torch.randint(0, 256, (R, unpack.row_bytes(bits, C)), dtype=torch.uint8)
            assert torch.equal(unpack.fast(codes, bits, C), unpack.naive(codes, bits, C))
            n += 1
    import test_steps, test_low_bit_states as l
    torch.set_num_threads(3)
    for kind in test_steps.KINDS.values(): test_steps.run(kind)
    for name in l.NAMES:
        getattr(l.low_bit_states, name).states.least = 64
        P = l.start()
        l.train(P, l.make(name, P), 0, 3)
    n += len(test_steps.KINDS) + len(l.NAMES)
    import test_gptq
    for R in (1, 15, 16, 17, 40): test_gptq.test_nothing_is_written_beyond_the_rows(R)
    n += 5
    print(n)"""
    import os
    env = os.environ | dict(CXX=str(wrapper), PARETOLAB_CACHE=str(tmp_path/"cache"), LD_PRELOAD=libasan, ASAN_OPTIONS="detect_leaks=0:abort_on_error=0")
    done = subprocess.run([sys.executable, "-c", run], env=env, capture_output=True, text=True)
    assert not done.returncode and "ERROR: AddressSanitizer" not in done.stderr, done.stderr[-3000:]
    record_property("products", int(done.stdout))
    assert int(done.stdout) > 5000

# ---- broken on purpose: the tests must see it

MUTANTS = [("product", "x[j] * r + 12582912.f) - 12582912.f", "x[j] * r + 12582913.f) - 12582912.f"), ("product", "most >= 0x1p-100f", "most >= 0x1p-1f"), ("product", "memset(a + p.group, 0, pad - p.group);", "memset(a + p.group, 1, pad - p.group);"),
    ("product", "planes<2, 0>, 2); lines(planes<1, 2>, 1)", "planes<2, 0>, 2); lines(planes<1, 1>, 1)"), ("product", "h >> 15 ? -f : f", "f"), ("product", "n = (i << p.shift)", "n = i"), ("product", "_mm512_srai_epi32(row[t], w * t)", "_mm512_srai_epi32(row[t], w * t + 1)"),
    ("product", "_mm512_slli_epi32(total<w1, false>(s1), w0)", "total<w1, false>(s1)"), ("product", "for (auto& x : c) x = _mm512_shuffle_epi8(T, x)", ";"), ("product", "_mm512_sll_epi16(c[i], _mm_cvtsi32_si128(p.shift))", "c[i]"),
    ("product", "_mm512_set1_epi32(rows[r].oA[g])", "_mm512_set1_epi32(rows[r].A[g])"), ("product", "if (!zeros) continue;", "continue;"), ("product", "_mm512_set1_ps(float(rows[r].A[g]))", "_mm512_set1_ps(float(rows[0].A[g]))"), ("product", "n < 4 * (g + 1) * steps", "n < 4 * (g + 1) * steps - 4"),
    ("product", "w == 2 ? 5 : 1;", "w == 2 ? 6 : 1;"), ("product", "(alone ? 8 : 16)", "(alone ? 9 : 16)"),
    ("product", "short((part ? 16 : 1) << shift)", "short(1 << shift)"), ("product", "short((part ? 16 : 1) << shift)", "short(part ? 16 : 1)"), ("product", "if (p.m - row >= 8) return", "if (p.m > row) return"), ("product", "_mm256_set1_epi32(rows[r].oA[g])", "_mm256_set1_epi32(rows[r].A[g])"),
    ("product", "_mm256_srai_epi16(s.of[h][j], j)", "s.of[h][j]"), ("product", "w * (t - j)", "w * t"), ("product", "if (!p.zeros) continue;", "continue;"), ("product", "_mm256_set1_ps(float(rows[r].A[g]))", "_mm256_set1_ps(float(rows[0].A[g]))"), ("product", "left < 16 ? (1 << left) - 1 : 0xffff", "0xffff"),
    ("product", "(path == 1 || p.width < 8 || !p.shift)", "true"), ("product", "rows[r] = rows[M - 1]", "rows[r] = rows[0], rows[M - 1].s = 1"), ("product", "want = 0;", ""), ("rows16", "32 * (b + 1) <= group", "32 * b <= group"), ("rows16", "p.perm ? p.perm[j] : j", "j"), ("rows16", "tile * p.groups * blocks * 64 * p.width", "tile * blocks * 64 * p.width")]

@compiler
@pytest.mark.soak
@pytest.mark.parametrize("name, old, new", MUTANTS, ids=[f"{o} → {w}"[:80].strip() for _, o, w in MUTANTS])
def test_a_broken_product_is_seen(name, old, new, tmp_path):
    import os
    root = Path(__file__).parent.parent
    shutil.copytree(root/"pkg", tmp_path/"pkg", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path/"pkg"/"paretolab"/"kernels"/"csrc"/f"{name}.cpp"
    text = source.read_text()
    assert old in text, "the mutant's line is gone: write it anew"
    newest = text.index("#define HAS_AVX512") < text.index(old) < text.index('target("avx2,fma,f16c")') if name == "product" else False
    if (newest or "path == 1" in old) and native.load("product.cpp").best_path() < 2: pytest.skip("this processor does not run what was broken")
    source.write_text(text.replace(old, new))
    env = os.environ | dict(PYTHONPATH=str(tmp_path/"pkg"), PARETOLAB_CACHE=str(tmp_path/"cache"))
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-2000:]

@compiler
@pytest.mark.parametrize("grid", GRIDS)
def test_the_largest_sums_fit(grid):
    "Every code and every activation the largest, with sums of 16 bits on the way."
    bits, Q = GRIDS[grid]
    for sign in (1, -1):
        for most in (0, len(Q) - 1):
            q = LowBit.pack(torch.full((18, 1056), most), torch.ones(18, 1).half(), Q, bits)
            x = torch.full((5, 1056), sign*127.)
            for path in PATHS:
                for M in (1, 5): torch.testing.assert_close(product._run(x[:M], product.pack(q), path), product.naive(x[:M], q), rtol=2**-21, atol=0)   # one sum, scaled

def test_integers_that_do_not_fit_are_refused():
    for grid, k in ((torch.arange(256.) + 256, 65536), (torch.arange(256.) + 255.5, 18432)):
        with pytest.raises(ValueError, match="fit 32 bits"): product.pack(LowBit.pack(torch.zeros(1, k, dtype=torch.int), torch.ones(1, 1).half(), grid, 8))

@compiler
def test_tensors_that_move_are_found_again():
    q, x = tensor("4", 40, 64, 32), torch.randn(2, 64)
    p = product.pack(q)
    y = product.fast(x, p)
    p.data.share_memory_(), p.scales.share_memory_()
    assert torch.equal(product.fast(x, p), y)
