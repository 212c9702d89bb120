"""The Triton kernels without a GPU: right in the interpreter, well compiled for three targets, and each check able to fail."""
import importlib, json, re, subprocess, sys
from pathlib import Path

import pytest, torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import kernel_checks
import triton.language as tl
from paretolab.kernels import aot, interpreter
from paretolab.kernels.interpreter import interpret
from paretolab.quantizers.lowbit import LEVELS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"bench"))
import triton_snapshot

module = lambda name: importlib.import_module(f"paretolab.kernels.{name}")

# The interpreter

@triton.jit
def _chain(x, y, n, a, B: tl.constexpr):
    i = tl.program_id(0)*B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n)*a, mask=i < n)

@triton.jit
def _cut(x, y, B: tl.constexpr): tl.store(y + tl.arange(0, B), tl.load(x + tl.arange(0, B)).to(y.dtype.element_ty, fp_downcast_rounding="rtz"))

@triton.jit
def _between(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + tl.program_id(0) + i))
    tl.store(x + i, tl.load(y + i))

@triton.autotune([triton.Config(dict(B=16)), triton.Config(dict(B=32))], key=["n"])
@triton.jit
def _tuned(x, y, n, B: tl.constexpr):
    i = tl.program_id(0)*B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) + 1, mask=i < n)

@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_numbers_given_as_python_floats_are_float32(n):
    x, y = torch.randn(n), torch.zeros(n)
    with interpret(): _chain[(-(-n//32),)](x, y, n, 0.1, B=32)
    assert torch.equal(y, x*torch.tensor(0.1))

@pytest.mark.parametrize("ty", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounding_toward_zero_never_goes_away_from_it(ty):
    x = torch.randn(4096)*torch.exp2(torch.randint(-20, 20, (4096,)).float())
    y, top = torch.empty(4096, dtype=ty), torch.finfo(ty).max
    with interpret(): _cut[(1,)](x, y, B=4096)
    up = (y.view(torch.int8 if ty.itemsize == 1 else torch.int16) + 1).view(ty).float().abs()
    assert (y.float().abs() <= x.abs()).all() and ((up > x.abs()) | (y.float().abs() == top)).all()

def test_reading_what_another_program_wrote_is_an_error():
    with interpret(), pytest.raises(RuntimeError, match="another program of the launch wrote or read"): _between[(2,)](torch.zeros(40), torch.zeros(40), B=32)
    with interpret(strict=False): _between[(2,)](torch.zeros(40), torch.zeros(40), B=32)

def test_a_tensor_that_is_a_view_ends_where_the_view_does():
    whole = torch.zeros(64)
    with interpret():
        _chain[(2,)](whole[:33], whole.new_zeros(33), 33, 1.0, B=32)
        with pytest.raises(IndexError, match="outside"): _chain[(2,)](whole[:32], whole.new_zeros(33), 33, 1.0, B=32)

def test_lanes_that_were_not_loaded_are_not_zero():
    x, y = torch.ones(8), torch.zeros(8)
    @triton.jit
    def spread(x, y, B: tl.constexpr): tl.store(y + tl.arange(0, B), tl.load(x + tl.arange(0, B), mask=tl.arange(0, B) < 4))
    with interpret(): spread[(1,)](x, y, B=8)
    assert y[:4].eq(1).all() and y[4:].isnan().all()

def test_an_autotuned_kernel_runs():
    y = torch.zeros(40)
    with interpret(): _tuned[lambda meta: (triton.cdiv(40, meta["B"]),)](torch.zeros(40), y, 40)
    assert y.eq(1).all()

def test_it_leaves_nothing_behind_even_after_an_error():
    from triton.runtime.jit import JITFunction
    seen = lambda: (tl.load, tl.core.load, tl.sum, tl.tensor.__add__, JITFunction.run, JITFunction.__call__, type(interpreter.base.interpreter_builder), interpreter.base._convert_float, interpreter.base.ReduceOps.apply_impl)
    before, names = seen(), set(globals())
    with pytest.raises(IndexError), interpret(): _chain[(9,)](torch.zeros(1), torch.zeros(1), 99, 1.0, B=32)
    assert seen() == before and set(globals()) - names <= {"interpreter_semantic", "_InterpreterComparison"}

def test_one_process_interprets_and_compiles():
    case = aot.Case("x", interpreter._cast, dict(x="*fp32", y="*bf16", n="i32"), dict(B=64))
    text = lambda: aot.compile(case, "sm_90").asm["ttgir"]
    before = text()
    with interpret(): interpreter._cast[(1,)](torch.zeros(64), torch.zeros(64).bfloat16(), 64, B=64)
    assert text() == before

def test_the_rest_of_the_package_does_without_triton():
    run = "import sys; sys.modules['triton'] = None\nimport paretolab.quantizers.lowbit, paretolab.kernels.unpack, paretolab.kernels.native, paretolab.models.mobilellm, paretolab.optimizers.muon, paretolab.frontier.command"
    subprocess.run([sys.executable, "-c", run], check=True)

# The kernels in the interpreter

@pytest.mark.parametrize("case", kernel_checks.PRODUCTS, ids=str)
@pytest.mark.parametrize("bits", LEVELS)
def test_product(bits, case):
    with interpret(): kernel_checks.product(module("dequant"), "cpu", bits, *case)

@pytest.mark.parametrize("bits", LEVELS)
def test_product_of_integers_is_exact(bits):
    with interpret(): kernel_checks.exact_product(module("dequant"), "cpu", bits)

@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_product_of_nothing(shape):
    M, N, C = shape
    q = kernel_checks.LowBit.pack(torch.zeros(N, C).int(), torch.ones(N, 1 if C else 0).half(), torch.zeros(4), 2)
    with interpret(): assert torch.equal(module("dequant").fast(torch.ones(M, C), q), torch.zeros(M, N))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", kernel_checks.TRANSFORMS, ids=str)
def test_transform(case, dtype):
    with interpret(): kernel_checks.transform(module("hadamard"), "cpu", *case, dtype)

@pytest.mark.soak
@pytest.mark.parametrize("n", [1024, 4096])
def test_large_transforms(n):
    for dtype in (torch.bfloat16, torch.float32):
        with interpret(): kernel_checks.transform(module("hadamard"), "cpu", (2, n), n, dtype)

def test_microscaled():
    with interpret(): kernel_checks.microscaled(module("mxfp4"), "cpu")

@pytest.mark.parametrize("case", kernel_checks.STATES, ids=str)
def test_lion(case):
    with interpret(): kernel_checks.lion(module("states"), "cpu", *case, exact=True)

@pytest.mark.parametrize("case", kernel_checks.LOGS, ids=str)
def test_logarithms(case):
    with interpret(): kernel_checks.logarithms(module("states"), "cpu", *case, exact=True)

@pytest.mark.parametrize("case", kernel_checks.ATTENTIONS, ids=str)
def test_attention(case):
    with interpret(): kernel_checks.attention(module("s2_attention"), "cpu", *case)

@pytest.mark.parametrize("case", kernel_checks.STEPS, ids=str)
def test_apollo(case):
    with interpret(): kernel_checks.apollo(module("apollo_step"), "cpu", *case)

@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])       # the weights' own rounding, ten times
def test_apollo_in_16_bits(dtype, tolerance):
    with interpret(): kernel_checks.apollo(module("apollo_step"), "cpu", (33, 40), 4, dtype, tolerance)

# Broken on purpose: each check must see it

MUTANTS = [("dequant", "word >> BITS*p", "word >> BITS"), ("dequant", "word // 3**p", "word // 3"), ("dequant", "<< 8*i", "<< 7*i"), ("dequant", "+ j//GROUP", "+ p"), ("dequant", "bits << 23", "bits << 22"),
    ("dequant", "to(tl.float32)*256", "to(tl.float32)*128"), ("dequant", "if ZEROS: v +=", "if ZEROS: v -="), ("dequant", "Q0 + δ*c", "Q0 + δ*(c+1)"), ("dequant", "for i in tl.static_range(1, P)", "for i in tl.static_range(2, P)"),
    ("dequant", "(m[:, None] < M) & (n[None, :] < N))", "(m[:, None] < M))"), ("dequant", "(p == 2, 9,", "(p == 2, 8,"), ("dequant", "+ j[None, :]//GROUP", "+ p//GROUP"), ("dequant", "tl.program_id(1)*BU + tl.arange(0, BU), tl.program_id(2)\n    j = u*U + p", "tl.program_id(1)*BU + tl.arange(0, BU), tl.program_id(2)\n    j = u*U"),
    ("dequant", "mask=(m[:, None] < M) & (j < C)[None, :]", "mask=(m[:, None] < M)"), ("hadamard", "s ^= s >> 4", "s ^= s >> 3"), ("hadamard", "_right(tl.trans(v), _signs(a), MID)", "_right(tl.trans(v), _signs(a), 1)"),
    ("hadamard", "tl.static_range(1, PARTS)", "tl.static_range(2, PARTS)"), ("hadamard", "mask=r < R)\n", "mask=r < R + 1)\n"), ("mxfp4", "(a >= 0.75)", "(a > 0.75)"), ("mxfp4", "(a > 5.0)", "(a >= 5.0)"), ("mxfp4", "top - 2", "top - 1"),
    ("mxfp4", "even | odd << 4", "odd | even << 4"), ("mxfp4", "mask=g < groups)", "mask=g <= groups)"), ("states", "β1*old + fresh1*grad", "β2*old + fresh1*grad"), ("states", "keep*v", "v"), ("states", "if INT: new = (new + 12582912.0) - 12582912.0", "pass"),
    ("states", "tl.abs(new)", "new"), ("states", "tl.where(c < 0, -1.0", "tl.where(c <= 0, -1.0"), ("states", "-1.0, 0*c)", "-1.0, 0.0)"), ("states", "c & 127 if SIGNED", "c if SIGNED"), ("states", "(N - n)*p", "(126 - n)*p"), ("states", "c > 127, -x, x", "c > 127, x, x"), ("states", "b & 0x7fffffff", "b"), ("states", "top < 0x7f800000", "top > 0"), ("states", "T >> 8)", "T >> 12)"), ("states", "a >= 128, a, 0x7fff", "a >= 0, a, 0x7fff"), ("states", "+ N - 2)//(N - 1)", ")//(N - 1)"), ("states", "+ 16384 >> 15", ">> 15"), ("states", "tl.maximum(n, 1)", "n"), ("states", "n < 1 - 128//p", "n < 1"), ("states", "| (h >> 8 & 128)", ""), ("states", "tl.where(n == 0, 0.0, x)", "x"), ("states", "(65536//p + 1)//2", "65536//p//2 - 9"), ("states", "x *= 1 + 0*s", "pass"), ("states", "(β1 + 0*s)", "β1"), ("states", "(β2 + 0*s)", "β2"),
    ("states", "grad*fresh2*grad", "grad*fresh2"), ("states", "tl.sqrt_rn(y) + eps", "y + eps"), ("states", "tl.load(g + i, mask=inside, other=0.0).to(tl.float32), tl.load(w", "tl.load(g + i, mask=inside, other=9.0).to(tl.float32), tl.load(w"), ("states", "θ*keep - tl.div_rn", "θ - tl.div_rn"), ("states", "θ*keep - tl.where(d > 0", "θ - tl.where(d > 0"), ("states", "-η, 0*d)", "-η, 0.0)"), ("states", "x = x*β2 + grad*fresh2", "x = d"), ("s2_attention", "(u <= t)", "(u < t + 2)"), ("s2_attention", "acc*fade[:, None]", "acc"), ("s2_attention", "for j in range(h, first, STRIDE): acc, μ", "for j in range(0, first, STRIDE): acc, μ"),
    ("s2_attention", "for j in range(h, first, STRIDE): acc = ", "for j in range(h, first + 1, STRIDE): acc = "), ("s2_attention", "(j - h) % STRIDE == 0", "j % STRIDE == 0"), ("s2_attention", "to_k*scale", "to_k"),
    ("s2_attention", "tl.minimum(j + LOCAL, blocks)", "blocks"), ("s2_attention", "(tl.dot(do, tl.trans(v), input_precision=\"ieee\") - ", "(tl.dot(do, tl.trans(v), input_precision=\"ieee\") + "), ("apollo_step", "_normal(seed, i*m + k[None, :])", "_normal(seed, i*m + k[None, :] + 1)"),
    ("apollo_step", "fresh2*R*R", "fresh2*R"), ("apollo_step", "second*unbias2", "second"), ("apollo_step", "G -= part.to(tl.float32)", "pass"), ("apollo_step", "if r > 1 else", "if r > 0 else"), ("apollo_step", "(s*s*sums[2])", "(s*sums[2])"), ("apollo_step", "keep*tl.load", "tl.load")]

@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, old, new", MUTANTS, ids=[f"{n}: {o} → {w}"[:80].strip() for n, o, w in MUTANTS])
def test_a_broken_kernel_is_seen(name, old, new, tmp_path, monkeypatch):
    text = (ROOT/"pkg"/"paretolab"/"kernels"/f"{name}.py").read_text()
    assert old in text, "the mutant's line is gone: write it anew"
    text = re.sub(r"^from \.\.(\w)", r"from paretolab.\1", text.replace(old, new), flags=re.M)
    (tmp_path/f"broken_{name}.py").write_text(re.sub(r"^from \.(\w)", r"from paretolab.kernels.\1", text, flags=re.M))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, f"broken_{name}", raising=False)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)), interpret():
        kernel_checks.everything(importlib.import_module(f"broken_{name}"), "cpu", name, exact=True)
    del sys.modules[f"broken_{name}"]

# What they compile to

SNAPSHOT = json.loads(triton_snapshot.SNAPSHOT.read_text())
JOBS = triton_snapshot.jobs()
FEW = {"dequant._product | 2 bits, row, decode", "dequant._product | 3 bits, group, prefill", "dequant._gradient | 4 bits, zeros, prefill", "s2_attention._forward | D=64, B=64", "states._lion | float32, int8"}

def compare(jobs):
    for (case, target), now in zip(jobs, aot.reports(jobs)):
        name = triton_snapshot.name(case, target)
        was = dict(SNAPSHOT[name])
        was.pop("key")
        assert not aot.problems(case, target, now)
        assert not aot.grown(aot.Report(**was), now), f"{name}: {aot.grown(aot.Report(**was), now)}; if that is meant, run bench/triton_snapshot.py"

def test_the_snapshot_is_of_these_kernels():
    now = {triton_snapshot.name(c, t): aot.key(c, t) for c, t in JOBS}
    old = [n for n in now.keys() | SNAPSHOT.keys() if now.get(n) != SNAPSHOT.get(n, {}).get("key")]
    assert not old, f"run bench/triton_snapshot.py: {sorted(old)[:5]} and {max(len(old) - 5, 0)} more changed since the snapshot"

def test_nothing_in_the_snapshot_spills():
    for c, t in JOBS:
        was = dict(SNAPSHOT[triton_snapshot.name(c, t)])
        was.pop("key")
        assert not aot.problems(c, t, aot.Report(**was))

def test_a_few_kernels_compile_as_before(): compare([(c, t) for c, t in JOBS if triton_snapshot.name(c, t).rpartition(" | ")[0] in FEW])

@pytest.mark.soak
def test_all_kernels_compile_as_before(record_property):
    record_property("kernels", len(JOBS))
    compare(JOBS)

def test_every_width_has_a_case_in_both_configurations():
    names = {c.name for c in module("dequant").cases}
    assert {f"{b:g} bits, {v}, {m}" for b in LEVELS for v in ("row", "group", "table") for m in ("decode", "prefill")} <= names
