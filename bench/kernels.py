"""Low-bit products against ggml, onnxruntime and torch: CPU time of one thread in one process, engines taken in turns, weights that are never in the cache."""
import ctypes, dataclasses, json, os, platform, subprocess, sys, time, warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from machine import processor
from paretolab.kernels import native, product, rows16
from paretolab.quantizers.lowbit import LowBit

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
HERE = Path(__file__).parent
COLD, ROUNDS = 160_000_000, 11                           # bytes of distinct weights an engine walks through, and walks
PATHS = "portable", "avx2", "avx512"                       # a file of results for each kind of processor
SHAPES = (5632, 2048), (3584, 1280)                     # (m, k)
GRIDS = {1: torch.tensor([-1., 1]), 1.58: torch.tensor([-1., 0, 1]), 2: torch.tensor([-1.5, -.5, .5, 1.5]), 3: torch.arange(-4, 4.), 4: torch.arange(-8, 8.), 8: torch.arange(-127, 128.)}

def seconds(f):
    start = time.thread_time()
    f()
    return time.thread_time() - start

def median(v): return sorted(v)[len(v)//2]

# ---- an engine is (bytes of one matrix, number of copies, function that multiplies with each copy once)

def ours(bits, group, m, k, M, path, cold, large=True):
    q = LowBit.pack(torch.randint(len(GRIDS[bits]), (m, k)), (torch.rand(m, k//(group or k)) + .5).half(), GRIDS[bits], bits, group)
    p, x, y = product.pack(q), torch.randn(M, k), torch.empty(M, m)
    assert torch.allclose(product._run(x[:1], p, path), product.naive(x[:1], q), atol=2e-3*k**.5)
    n = max(1, -(-cold//p.nbytes))
    new = rows16._memory if large else lambda n: torch.zeros(n, dtype=torch.uint8)                       # pages of 2 MB, or those the system gives to all
    memory, at, copies = new(n*(p.data.nbytes + p.scales.nbytes + 128)), 0, []                           # one piece, as `models.decode` places a model
    def place(t):
        nonlocal at
        at += -(-t.nbytes//64)*64
        return memory[at - -(-t.nbytes//64)*64:][:t.nbytes].view(t.dtype).view(t.shape).copy_(t)
    for _ in range(n): copies.append(dataclasses.replace(p, data=place(p.data), scales=place(p.scales)))
    structs = [ctypes.byref(c.struct) for c in copies]
    lib, args = native.load("product.cpp"), (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(M), 1, path)
    def run(keep=(copies, x, y)):
        for s in structs: lib.product(s, *args)
    return p.data.nbytes + p.scales.nbytes, n, run

TYPES = dict(Q4_0=2, Q8_0=8, Q2_K=10, Q3_K=11, Q4_K=12, TQ1_0=34, TQ2_0=35, Q1_0=41, Q2_0=42)

QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)

def ggml(kind, repack, m, k, M, cold):
    folder = Path(find_spec("llama_cpp").origin).parent/"lib"
    base, cpu = (ctypes.CDLL(str(folder/f"libggml-{n}.so"), mode=ctypes.RTLD_GLOBAL) for n in ("base", "cpu"))
    P, I, S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    class Init(ctypes.Structure): _fields_ = [("mem_size", S), ("mem_buffer", P), ("no_alloc", ctypes.c_bool)]
    for lib, name, result, *args in ((base, "ggml_init", P, Init), (base, "ggml_new_tensor_2d", P, P, ctypes.c_int, I, I), (base, "ggml_mul_mat", P, P, P, P), (base, "ggml_new_graph_custom", P, P, S, ctypes.c_bool),
            (base, "ggml_build_forward_expand", None, P, P), (base, "ggml_row_size", S, ctypes.c_int, I), (base, "ggml_quantize_chunk", S, ctypes.c_int, P, P, I, I, I, P), (base, "ggml_get_data", P, P),
            (base, "ggml_backend_alloc_ctx_tensors_from_buft", P, P, P), (base, "ggml_backend_tensor_set", None, P, P, S, S), (base, "ggml_backend_graph_compute", ctypes.c_int, P, P),
            (base, "ggml_backend_reg_dev_get", P, P, S), (base, "ggml_backend_reg_get_proc_address", P, P, ctypes.c_char_p), (base, "ggml_backend_cpu_buffer_type", P),
            (cpu, "ggml_backend_cpu_init", P), (cpu, "ggml_backend_cpu_set_n_threads", None, P, ctypes.c_int), (cpu, "ggml_backend_cpu_reg", P)):
        f = getattr(lib, name)
        f.restype, f.argtypes = result, args
    base.ggml_log_set(QUIET, None)
    backend, reg, t = cpu.ggml_backend_cpu_init(), cpu.ggml_backend_cpu_reg(), TYPES[kind]
    cpu.ggml_backend_cpu_set_n_threads(backend, 1)
    buffers = base.ggml_backend_cpu_buffer_type()
    if repack:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(base.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts"))(base.ggml_backend_reg_dev_get(reg, 0))
        base.ggml_backend_buft_name.restype, base.ggml_backend_buft_name.argtypes = ctypes.c_char_p, (P,)
        found = []
        for b in extra:
            if not b: break
            found.append(b)
        buffers = next(b for b in found if b"REPACK" in base.ggml_backend_buft_name(b))
    size = m*base.ggml_row_size(t, k)
    n = max(1, -(-cold//size))
    w, raw, x = torch.randn(m, k), torch.empty(size, dtype=torch.uint8), torch.randn(M, k)
    base.ggml_quantize_chunk(t, w.data_ptr(), raw.data_ptr(), 0, m, k, None)
    weights = base.ggml_init(Init(n*4096, None, True))
    a = [base.ggml_new_tensor_2d(weights, t, k, m) for _ in range(n)]
    assert base.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffers)
    for c in a: base.ggml_backend_tensor_set(c, raw.data_ptr(), 0, size)
    ctx = base.ggml_init(Init(n*(m*M*4 + 8192) + M*k*4 + (1 << 20), None, False))
    b, graph = base.ggml_new_tensor_2d(ctx, 0, k, M), base.ggml_new_graph_custom(ctx, n + 16, False)
    ctypes.memmove(base.ggml_get_data(b), x.data_ptr(), x.nbytes)
    for c in a: base.ggml_build_forward_expand(graph, y := base.ggml_mul_mat(ctx, c, b))
    def run(): assert base.ggml_backend_graph_compute(backend, graph) == 0
    run()
    got = torch.frombuffer((ctypes.c_float*(M*m)).from_address(base.ggml_get_data(y)), dtype=torch.float32).view(M, m)
    got, want = got.clone(), x @ w.t()
    error = float((got - want).norm()/want.norm())
    assert error < (.9 if kind in ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0") else .6), (kind, error)
    return size, n, run

def onnx(bits, group, m, k, M, cold):
    "Every copy has numbers of its own: onnxruntime keeps one of equal ones."
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    size = m*k*bits//8 + m*(k//group)*4
    n = max(1, -(-cold//size))
    w, s, x = (lambda: torch.randint(256, (m, k//group, group*bits//8), dtype=torch.uint8)), (lambda: torch.rand(m, k//group) + .5), torch.randn(M, k).numpy()
    nodes = [helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", K=k, N=m, bits=bits, block_size=group, accuracy_level=4) for i in range(n)]
    parts = [numpy_helper.from_array(t().numpy(), f"{name}{i}") for i in range(n) for name, t in (("w", w), ("s", s))]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [M, k])], [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [M, m]) for i in range(n)], parts)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    o = onnxruntime.SessionOptions()
    o.intra_op_num_threads = o.inter_op_num_threads = 1
    o.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(model.SerializeToString(), o, providers=["CPUExecutionProvider"])
    return size, n, lambda: session.run(None, {"x": x})

def int4pack(m, k, M, cold):
    w, s = torch._convert_weight_to_int4pack_for_cpu(torch.randint(16, (m, k), dtype=torch.int32), 1), torch.rand(k//128, m, 2).bfloat16()
    size = w.nbytes + s.nbytes
    copies, x = [(w.clone(), s.clone()) for _ in range(max(1, -(-cold//size)))], torch.randn(M, k).bfloat16()
    def run():
        for a, b in copies: torch.ops.aten._weight_int4pack_mm_for_cpu(x, a, 128, b)
    return size, len(copies), run

def qint8(engine, m, k, M, cold):
    torch.backends.quantized.engine = engine
    n = max(1, -(-cold//(m*k)))
    layers = [torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(k, m, bias=False)), {torch.nn.Linear}, torch.qint8)[0] for _ in range(n)]
    x = torch.randn(M, k)
    def run():
        torch.backends.quantized.engine = engine
        with torch.no_grad():
            for f in layers: f(x)
    return m*k + 8*m, n, run

# ---- measuring

def roofs(lib, big):
    "Bytes a second that one thread reads, the best of a few ways to read."
    lib.read_all.restype = ctypes.c_uint64
    return max(big.nbytes/seconds(lambda: lib.read_all(ctypes.c_void_p(big.data_ptr()), ctypes.c_int64(big.numel() - 8192), way)) for way in range(5))

def compare(name, engines, lib, big, m, k, M):
    "All engines in turns; per engine the median over the rounds. The bound of a round is the fastest that anything read memory in it."
    times, reads = {e: [] for e in engines}, []
    for _ in range(ROUNDS):
        reads.append(roofs(lib, big))
        for e, (_, n, run) in engines.items(): times[e].append(seconds(run)/n)
    loops = [round(f(reads)/1e9, 2) for f in (median, min, max)]
    if M == 1: reads = [max(read, *(size/times[e][i] for e, (size, _, _) in engines.items())) for i, read in enumerate(reads)] # an engine may read faster than a plain loop
    table = {}
    for e, (size, n, _) in engines.items():
        share = [size/r/t for r, t in zip(reads, times[e])]
        table[e] = dict(us=round(1e6*median(times[e]), 1), us_lowest=round(1e6*min(times[e]), 1), us_highest=round(1e6*max(times[e]), 1), bytes=size, copies=n, gb_per_s=round(size/median(times[e])/1e9, 2),
            gop_per_s=round(2*m*k*M/median(times[e])/1e9, 1), share_of_bound=round(median(share), 3), share_lowest=round(min(share), 3), share_highest=round(max(share), 3))
        print(f"{name:>16} {e:>24}: {table[e]['us']:9.1f} us {table[e]['gb_per_s']:6.2f} GB/s {100*table[e]['share_of_bound']:5.1f} % of the bound {table[e]['gop_per_s']:7.1f} GOP/s", flush=True)
    return dict(m=m, k=k, M=M, read_gb_per_s=round(median(reads)/1e9, 2), loops_gb_per_s=loops, engines=table), times

def ratio(times, mine, theirs):
    "Against the peer with the lowest median: the best engine, not the luckiest one of each round."
    best = min(theirs, key=lambda t: median(times[t]))
    r = [t/o for t, o in zip(times[best], times[mine])]
    return dict(ours=mine, peers=theirs, best=best, ratio=round(median(r), 3), lowest=round(min(r), 3), highest=round(max(r), 3))

def maybe(engines, name, make, *args):
    try: engines[name] = make(*args)
    except (ImportError, PackageNotFoundError, StopIteration, AttributeError) as e: print(f"{name} is not measured: {e}")

def main():
    lib, big = native.load(HERE/"read.cpp"), rows16._memory(COLD).view(torch.int64).fill_(1)
    lib.multiply.restype = ctypes.c_int64
    best, result, W = native.load("product.cpp").best_path(), dict(gemv=[], gemm=[], ratios=[], roofline=[]), (1, 1.58, 2, 3, 4, 8)
    for m, k in SHAPES:
        engines = {}
        for bits, group in [(b, 0) for b in W] + [(2, 32), (3, 32), (4, 32), (4, 128)]: engines[f"ours {bits} {group or 'row'}"] = ours(bits, group, m, k, 1, best, COLD)
        for bits in (2, 4): engines[f"ours {bits} row, pages of 4 KB"] = ours(bits, 0, m, k, 1, best, COLD, large=False)
        for kind in ("TQ2_0", "TQ1_0", "Q1_0", "Q2_K", "Q3_K", "Q8_0"): maybe(engines, f"ggml {kind}", ggml, kind, False, m, k, 1, COLD)
        for kind in ("Q4_0", "Q4_K"): maybe(engines, f"ggml {kind} repacked", ggml, kind, True, m, k, 1, COLD)
        for bits, group in ((2, 128), (4, 32), (4, 128)): maybe(engines, f"onnxruntime {bits} {group}", onnx, bits, group, m, k, 1, COLD)
        engines["torch int4pack 128"] = int4pack(m, k, 1, COLD)
        engines["torch qint8 fbgemm"] = qint8("fbgemm", m, k, 1, COLD)
        part, times = compare(f"{m}x{k}, 1 row", engines, lib, big, m, k, 1)
        result["gemv"].append(part)
        fours = ["ggml Q4_0 repacked", "onnxruntime 4 32", "onnxruntime 4 128"]
        for mine, theirs in (("2 row", ["ggml TQ2_0"]), ("2 row, pages of 4 KB", ["ggml TQ2_0"]), ("4 row, pages of 4 KB", fours), ("1.58 row", ["ggml TQ2_0"]), ("2 32", ["ggml TQ2_0"]), ("4 row", fours), ("4 32", fours[:2]), ("4 128", fours[2:]), ("3 row", ["ggml Q3_K"]), ("3 32", ["ggml Q3_K"]), ("1 row", ["ggml Q1_0"])):
            if theirs := [t for t in theirs if t in engines]: result["ratios"].append(dict(m=m, k=k, M=1) | ratio(times, f"ours {mine}", theirs))
        engines = {}
        for bits, group in ((2, 0), (4, 0), (2, 32), (4, 32), (8, 0)): engines[f"ours {bits} {group or 'row'}"] = ours(bits, group, m, k, 256, best, 0)
        maybe(engines, "ggml TQ2_0", ggml, "TQ2_0", False, m, k, 256, 0)
        maybe(engines, "ggml Q4_0 repacked", ggml, "Q4_0", True, m, k, 256, 0)
        for bits in (4, 8): maybe(engines, f"onnxruntime {bits} 128", onnx, bits, 128, m, k, 256, 0)
        for e in ("fbgemm", "onednn"): engines[f"torch qint8 {e}"] = qint8(e, m, k, 256, 0)
        part, times = compare(f"{m}x{k}, 256 rows", engines, lib, big, m, k, 256)
        result["gemm"].append(part)
        for mine in ("2 row", "4 row", "4 32"): result["ratios"].append(dict(m=m, k=k, M=256) | ratio(times, f"ours {mine}", ["torch qint8 fbgemm", "torch qint8 onednn"]))
        for bits in (1, 2, 4, 8):
            for M in (1, 2, 4, 16, 64, 256):
                size, n, run = ours(bits, 0, m, k, M, best, COLD if M < 8 else COLD//4)
                t = median([seconds(run)/n for _ in range(3)])
                result["roofline"].append(dict(m=m, k=k, bits=bits, M=M, bytes=size + 4*M*(m + k), operations=2*m*k*M, us=round(1e6*t, 1)))
    for r in result["ratios"]: print(f"{r['m']}x{r['k']}, {r['M']:>3} rows: {r['ours']:>18} is {r['ratio']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f}) times the speed of {r['best']}, the best of {', '.join(r['peers'])}")
    ops = lambda: 2*lib.multiply(ctypes.c_int64(1_000_000))
    peak = median([ops()/seconds(ops) for _ in range(5)])
    result["peak_gop_per_s"] = round(peak/1e9, 1)
    result["packing"] = []
    for bits in W:
        q = LowBit.pack(torch.randint(len(GRIDS[bits]), (5632, 2048)), torch.ones(5632, 1).half(), GRIDS[bits], bits)
        t = median([seconds(lambda: product.pack(q)) for _ in range(15)])
        result["packing"].append(dict(bits=bits, mb_per_s=round(q.nbytes/t/1e6), codes_per_s=round(5632*2048/t)))
    nothing, x = product.pack(LowBit.pack(torch.zeros(0, 2048, dtype=torch.int), torch.ones(0, 1).half(), GRIDS[2], 2)), torch.randn(1, 2048)
    result["round_activations_us"] = round(1e6*median([seconds(lambda: [product._run(x, nothing) for _ in range(100)])/100 for _ in range(9)]), 2)
    run = "import sys, time, os; from paretolab.kernels import native; t = time.perf_counter(); [native.load(f + '.cpp') for f in sys.argv[1:]]; c = os.times(); print(time.perf_counter() - t, c.children_user + c.children_system)"
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        first, again, three = ([float(v) for v in subprocess.run([sys.executable, "-c", run, *files], env=os.environ | dict(PARETOLAB_CACHE=folder), capture_output=True, text=True, check=True).stdout.split()] for files in (["product"], ["product"], ["rows16", "decode", "unpack"]))
    result["compile"] = dict(cpu_s=round(first[1], 2), wall_s=round(first[0], 2), cached_s=round(again[0], 3), others_cpu_s=round(three[1], 2))
    def of(name):
        try: return version(name)
        except PackageNotFoundError: return None
    result |= dict(cold_bytes=COLD, rounds=ROUNDS, best_path=best, torch=torch.__version__, onnxruntime=of("onnxruntime"), llama_cpp_python=of("llama-cpp-python"), machine=platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(), cpu=processor(), compiler=subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip())
    print({k: v for k, v in result.items() if k in ("peak_gop_per_s", "packing", "round_activations_us", "compile")})
    (HERE/"results"/f"kernels_{PATHS[best]}.json").write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__": main()
