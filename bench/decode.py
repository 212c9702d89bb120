"""Decoding from low-bit tensors against llama.cpp on the same weights, and what a low-bit head costs: bench/results/decode_avx2.json, or as the processor's instructions are called.
CPU time of one thread, all in one process, taken in turns. Needs the extra `bench`."""
import ctypes, json, platform, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

import numpy as np, torch
try: import gguf, llama_cpp
except ImportError as e: raise SystemExit(print(f"decode: left out, since {e.name} is not installed; it comes with the extra bench, as in `pip install -c constraints.txt paretolab[bench]`")) from None
from kernels import PATHS
from machine import processor
from paretolab.engine.evaluate import bits_per_byte, macro
from paretolab.engine.settings import Settings
from paretolab.frontier.job import prepare
from paretolab.kernels import native, rows16
from paretolab.models import hf
from paretolab.models.decode import PackedLM
from paretolab.models.generate import Cache, decode_speed
from paretolab.models.mobilellm import MobileLLM, mobilellm
from paretolab.quantizers import plan
from paretolab.quantizers.lowbit import LowBit

torch.set_num_threads(1); torch.set_grad_enabled(False)
PROMPT, NEW, ROUNDS, SITTINGS = 32, 64, int(sys.argv[1]) if len(sys.argv) > 1 else 11, 4

# The peer's formats for which our low-bit tensor can hold the very same weights: bits, group, grid, and codes (blocks, group) as bytes

def halves(c): return c[:, :16] | c[:, 16:] << 4
def quarters(c): c = c.reshape(-1, 2, 4, 32); return (c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6).reshape(-1, 64)
FORMATS = {"Q4_0": (4, 32, np.arange(-8, 8), halves, True), "Q8_0": (8, 32, np.arange(-128, 128), lambda c: c ^ 128, True), "TQ2_0": (2, 256, np.array([-1, 0, 1]), quarters, False)}

def random_state(s, body, head, seed=0):
    "A state of shape s with random codes; `body` and `head` are formats, or (bits, group)."
    g, state = torch.Generator().manual_seed(seed), {}
    with torch.device("meta"): shapes = {n: t.shape for n,t in MobileLLM(s).state_dict().items()}
    for n,(r,*c) in shapes.items():
        if not c: state[n] = torch.ones(r).half(); continue
        format = head if n in ("embed.weight", "head.weight") else body
        bits, group, grid = FORMATS[format][:3] if isinstance(format, str) else (*format, np.arange(2**format[0]) - (2**format[0] - 1)/2)
        codes = torch.randint(len(grid), (r, c[0]), generator=g, dtype=torch.uint8)
        scales = (0.5 + torch.rand(r, c[0]//(group or c[0]), generator=g))/grid.std()/c[0]**0.5
        state[n] = LowBit.pack(codes, scales.half(), torch.tensor(grid, dtype=torch.float32), bits, group)
    return state

def blocks(t, format, heads=0):
    "A low-bit tensor as rows of the peer's blocks; the peer pairs neighbours where we pair halves of a head, so the rows of q and k move."
    bits, group, grid, codes_of, first = FORMATS[format]
    c, s = t.codes().numpy(), t.scales.numpy()
    if heads: c, s = (x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape) for x in (c, s))
    parts = s.reshape(-1, 1).view(np.uint8).reshape(-1, 2), codes_of(c.reshape(-1, group))
    return np.concatenate(parts if first else parts[::-1], 1).reshape(len(c), -1)

def write(path, s, state, body, head):
    "A GGUF file of a state; `body` may be Q2_K, whose blocks are then random bytes with small scales."
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(s.context); w.add_embedding_length(s.dim); w.add_block_count(s.layers); w.add_feed_forward_length(s.ff); w.add_vocab_size(s.vocab)
    w.add_head_count(s.heads); w.add_head_count_kv(s.kv_heads); w.add_rope_dimension_count(s.head_dim); w.add_layer_norm_rms_eps(s.eps); w.add_rope_freq_base(s.theta)
    w.add_tokenizer_model("no_vocab")
    theirs = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
    inner = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down", "norm1": "attn_norm", "norm2": "ffn_norm"}
    rng = np.random.default_rng(0)
    for n,t in state.items():
        n = n.removesuffix(".weight")
        name = theirs[n] if n in theirs else "blk.{1}.{0}".format(inner[n.split(".", 2)[2]], n.split(".")[1])
        if not isinstance(t, LowBit): w.add_tensor(f"{name}.weight", t.float().numpy()); continue
        format = head if n in ("embed", "head") else body
        if format == "Q2_K":
            b = rng.integers(0, 256, (t.shape[0]*t.shape[1]//256, 84), dtype=np.uint8)
            b[:, 80:] = np.array([0.01/t.shape[1]**0.5]*2, np.float16).view(np.uint8)
            rows = b.reshape(t.shape[0], -1)
        else: rows = blocks(t, format, {"attn_q": s.heads, "attn_k": s.kv_heads}.get(name.split(".")[-1], 0))
        w.add_tensor(f"{name}.weight", rows, raw_dtype=gguf.GGMLQuantizationType[format])
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

class Peer:
    "llama.cpp by its C functions: one thread, one text."
    def __init__(self, path, vocab):
        p = llama_cpp.llama_model_default_params(); self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), p)
        c = llama_cpp.llama_context_default_params(); c.n_ctx, c.n_batch, c.n_threads, c.n_threads_batch, c.no_perf = 256, 256, 1, 1, True
        self.ctx, self.vocab = llama_cpp.llama_init_from_model(self.model, c), vocab
    def clear(self): llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)
    def __call__(self, ids):
        ids = (llama_cpp.llama_token*len(ids))(*ids)
        if llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(ids, len(ids))): raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), (self.vocab,))
    def close(self): llama_cpp.llama_free(self.ctx); llama_cpp.llama_model_free(self.model)

def decoding(step, start):
    "Seconds of processor time for each of NEW greedy tokens after PROMPT of them."
    z = start()
    begin = time.process_time()
    for _ in range(NEW): z = step(int(z.argmax()))
    return (time.process_time() - begin)/NEW

def ours(model, prompt):
    caches = []
    def start(): caches[:] = [Cache(model.shape, 1, PROMPT + NEW)]; return model(prompt, caches[0], last=True)
    return lambda: decoding(lambda token: model(torch.tensor([[token]]), caches[0], last=True), start)

def theirs(peer, prompt):
    def start(): peer.clear(); return peer(prompt[0].tolist())
    return lambda: decoding(lambda token: peer([token]), start)

lib, buffer = native.load(Path(__file__).parent/"read.cpp"), rows16._memory(256_000_000).view(torch.int64).fill_(1)
def read():
    "Seconds to read a byte, on one thread, the best of a few ways to read."
    def one(way):
        begin = time.process_time(); lib.read_all(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_int64(buffer.numel() - 8192), way)
        return (time.process_time() - begin)/buffer.nbytes
    return min(map(one, range(5)))

LIMITS = dict(TQ2_0=.1, Q4_0=.005)   # the peer rounds activations per block, we per row: with three levels a weight that is a few hundredths, at 4 bits a few thousandths

def row(values): return dict(median=float(np.median(values)), lowest=float(min(values)), highest=float(max(values)))

def compare(name, s, body, head, others, folder):
    "Speeds on one shape: the peer's format and ours with the same weights, and `others`: {name: (body, head)} of ours, or a format of the peer."
    prompt = torch.randint(s.vocab, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    state = random_state(s, body, head)
    write(folder/"same.gguf", s, state, body, head)
    models, peers, runs, nbytes = {"same": PackedLM(s, state)}, {body: Peer(folder/"same.gguf", s.vocab)}, {}, {}
    z, ẑ = models["same"](prompt, last=True)[0, 0], torch.tensor(peers[body](prompt[0].tolist()))
    distance = float((z - ẑ).norm()/ẑ.norm())
    assert distance < LIMITS[body], f"not the same model: the logits differ by {distance:.1%}"
    for other, what in others.items():
        if isinstance(what, str): write(folder/f"{other}.gguf", s, state, what, head); peers[what] = Peer(folder/f"{other}.gguf", s.vocab)
        else: models[other] = PackedLM(s, random_state(s, *what))
    for n,m in models.items(): runs[n], nbytes[n] = ours(m, prompt), m.nbytes
    for n,p in peers.items(): runs[n], nbytes[n] = theirs(p, prompt), llama_cpp.llama_model_size(p.model)
    taken = {n: [] for n in ["read", *runs]}
    for f in runs.values(): f()
    for _ in range(ROUNDS):
        taken["read"].append(read())
        for n,f in runs.items(): taken[n].append(f())
    for p in peers.values(): p.close()
    found = dict(shape=name, parameters=s.parameters, body=body, head=head, logits_relative_distance=distance, read_gb_per_s=1e-9/np.median(taken["read"]), rows={})
    for n in runs:
        found["rows"][n] = dict(peer=n in peers, bytes=nbytes[n], tokens_per_s=1/np.median(taken[n]), share_of_bound=np.median(taken["read"])*nbytes[n]/np.median(taken[n]),
            ratio_to_peer=row([b/a for a,b in zip(taken[n], taken[body])]))
        r = found["rows"][n]
        print(f"{name:>5} {n:>12}: {r['bytes']/1e6:6.1f} MB, {r['tokens_per_s']:6.1f} tokens/s, {r['share_of_bound']:.0%} of the bound, {r['ratio_to_peer']['median']:.2f} ({r['ratio_to_peer']['lowest']:.2f} to {r['ratio_to_peer']['highest']:.2f}) times {body}", flush=True)
    return found

def heads():
    "Bits per byte of the shipped model with its embedding, which is also its head, at several widths; products from low-bit tensors."
    with tempfile.TemporaryDirectory() as out: text = prepare(replace(Settings(), out=out))
    windows, model, found = {d: w[:4] for d,w in text.windows.items()}, hf.load(hf.shipped()), []
    found.append(dict(body=16, head=16, bpb=macro(bits_per_byte(model, windows, text.nbytes))))
    for body in (8, 4):
        for head in (8, 6, 4, 3, 2):
            state = plan.compress(model, plan.uniform(model, body, 64, embed_bits=head))
            packed = PackedLM(model.shape, state)
            found.append(dict(body=body, head=head, bpb=macro(bits_per_byte(packed, windows, text.nbytes, batch=1)), bpb_float_activations=macro(bits_per_byte(plan.restore(MobileLLM(model.shape), state), windows, text.nbytes)), bytes=packed.nbytes, head_bytes=packed.head.nbytes, tokens_per_s=decode_speed(packed)))
            print(found[-1], flush=True)
    return found

PEERS = {"1B": ("TQ2_0", "Q8_0"), "125M": ("Q4_0", "Q4_0")}         # the peer's formats of body and head

def sitting(name):
    "A shape once more, in a process of its own: memory lies elsewhere, and an engine may be quicker or slower for as long as it lives."
    rows = json.loads(subprocess.run([sys.executable, __file__, str(ROUNDS), name], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])["rows"]
    return dict(ratio=rows["same"]["ratio_to_peer"], tokens_per_s=rows["same"]["tokens_per_s"], peer_tokens_per_s=rows[PEERS[name][0]]["tokens_per_s"])

llama_cpp.llama_log_set(quiet := llama_cpp.llama_log_callback(lambda *a: None), ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    both = lambda name, others: compare(name, mobilellm(name), *PEERS[name], others, folder)
    if sys.argv[2:]: raise SystemExit(print(json.dumps(both(sys.argv[2], {}))))
    shapes = [both("1B", {"head 4": ("TQ2_0", "Q4_0"), "head 2": ("TQ2_0", (2, 64)), "rows": ((2, 0), (8, 0)), "group 32": ((2, 32), "Q8_0"), "Q2_K": "Q2_K"}, folder),
              both("125M", {"rows": ((4, 0), (4, 0)), "2 bits": ((2, 64), (4, 64))})]
for s in shapes: s["sittings"] = [sitting(s["shape"]) for _ in range(SITTINGS)]
cpu = processor()
result = dict(machine=platform.machine(), cpu=cpu, capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, llama_cpp_python=llama_cpp.__version__,
    system=llama_cpp.llama_print_system_info().decode(), prompt=PROMPT, new=NEW, rounds=ROUNDS, shapes=shapes, heads=heads())
(Path(__file__).parent/"results"/f"decode_{PATHS[native.load('product.cpp').best_path()]}.json").write_text(json.dumps(result, indent=1) + "\n")
