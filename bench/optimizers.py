"""A step of every optimizer against torch's fused AdamW: CPU time of one thread, in turns in one process, on one layer of Llama 60M and on all of it; and what a step takes for a moment beside its state.
Arguments: rounds on the layer, rounds on all of it (0: leave it out), then labels to measure again (all by default; the others are kept from the file of this kind of processor)."""
import gc, json, os, platform, shutil, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn
from machine import processor
from paretolab.frontier.budget import _Live
from paretolab.kernels import native, steps
from paretolab.optimizers import adamw, apollo, baselines, galore, lion, muon, scale, sophia
from paretolab.optimizers.contract import is_end
from paretolab.optimizers.lowrank import Gaussian, Sparse

warnings.simplefilter("ignore")
torch.set_num_threads(1); torch.manual_seed(0)
FILE, R = Path(__file__).parent/"results"/("optimizers_avx512.json" if "avx512f" in native.cpu() else "optimizers_avx2.json"), 128

def llama(layers, d=512, f=1376, V=32000):
    block = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (d, d), "self_attn.v_proj": (d, d), "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f), "input_layernorm": (d,), "post_attention_layernorm": (d,)}
    shapes = {f"layers.{i}.{n}.weight": s for i in range(layers) for n,s in block.items()}
    return shapes if layers == 1 else {"embed_tokens.weight": (V, d), **shapes, "norm.weight": (d,), "lm_head.weight": (V, d)}

def projecting(kind, projection, **kw):
    def make(named): o = kind(named, **kw); o.projection = projection; return o
    return make

def plain(make):
    "Without a compiler: the torch lines."
    def build(named):
        o = make(named); step, load = o.step, native.load
        def slow():
            native.load = lambda name: None
            try: step()
            finally: native.load = load
        o.step = slow; return o
    return build

class Products:
    "Nothing but the products with a projection, once or there and back."
    def __init__(self, named, times):
        self.pairs = [(p.grad if p.shape[0] >= p.shape[1] else p.grad.mT) for n,p in named if p.ndim == 2 and not is_end(n)]; self.times, self.state = times, {}
        self.Q = torch.randn(R, 512)
    def step(self):
        for G in self.pairs:
            X = G @ self.Q.mT
            if self.times == 2: X @ self.Q

# label, what makes it from (name, parameter) pairs
CONTENDERS = {
    "torch AdamW, fused": lambda named: torch.optim.AdamW([p for _,p in named], lr=1e-3, fused=True),
    "torch AdamW, default": lambda named: torch.optim.AdamW([p for _,p in named], lr=1e-3),
    "AdamW": adamw.AdamW, "Lion": lion.Lion, "Lion, torch lines": plain(lion.Lion),
    "APOLLO-Mini": apollo.Mini, "APOLLO-Mini, torch lines": plain(apollo.Mini),
    "APOLLO": partial(apollo.APOLLO, rank=R), "APOLLO, s = 1": projecting(apollo.APOLLO, Sparse(entries=1), rank=R), "APOLLO, s = 4": projecting(apollo.APOLLO, Sparse(entries=4), rank=R),
    "APOLLO, dense": projecting(apollo.APOLLO, Gaussian(), rank=R), "APOLLO, dense, kept": projecting(apollo.APOLLO, Gaussian(keep=True), rank=R), "APOLLO, dense, torch lines": plain(projecting(apollo.APOLLO, Gaussian(), rank=R)),
    "one product": partial(Products, times=1), "two products": partial(Products, times=2),
    "GaLore": partial(galore.GaLore, rank=R), "GaLore, torch lines": plain(partial(galore.GaLore, rank=R)), "GaLore, each step a basis": partial(galore.GaLore, rank=R, gap=1),
    "SCALE": scale.SCALE, "Sophia": sophia.Sophia, "NAdamW": baselines.NAdamW, "Adafactor": baselines.Adafactor, "Schedule-Free": baselines.ScheduleFree, "Muon": muon.Muon, "SOAP": baselines.SOAP,
}
AGAINST = {"APOLLO, dense": "one product", "APOLLO, dense, kept": "one product", "GaLore": "two products"}   # beside the ratio to AdamW
LAYER_ONLY = {"SOAP", "GaLore, each step a basis", "torch AdamW, default", "one product", "two products", "APOLLO, s = 1", "APOLLO, s = 4"}

def seconds(f, times=3):
    "The quickest of some calls in a row: the machine may be shared, and one that was interrupted begins with cold caches."
    taken = []
    for _ in range(times):
        start = time.thread_time()
        f()
        taken.append(time.thread_time() - start)
    return min(taken)

def hints(times=5, rounds=5):
    "Time of two passes with lines that are asked for once, of that with lines that are to be kept: a matrix that a cache holds, a layer, all. Tensors are made anew some times, because where they happen to lie counts."
    out, far = {}, steps._far
    for part,shapes in (("cached", [(512, 512)]), ("layer", llama(1).values()), ("all", llama(8).values())):
        ratios = {"Lion": [], "moving the weights": []}
        for _ in range(times):
            W, G, M = ([torch.randn(s) for s in shapes] for _ in range(3)); one = torch.tensor(1e-4)
            passes = {"Lion": lambda: steps.lion(W, G, M, 1e-4, (.9, .99), 1.), "moving the weights": lambda: [steps.apply(w, g, one, 1.) for w,g in zip(W, G) if w.ndim == 2]}
            for name,f in passes.items():
                taken = {True: [], False: []}
                for _ in range(rounds):
                    for once,t in taken.items(): steps._far = lambda _: once; t.append(seconds(f))
                ratios[name] += [a/b for a,b in zip(taken[True], taken[False])]
        out[part] = {name: middle(x) for name,x in ratios.items()}
    steps._far = far
    return out

def middle(x): x = sorted(x); return dict(ratio=round(x[len(x)//2], 3), lowest=round(x[0], 3), highest=round(x[-1], 3))

def measure(named, label, rounds):
    "Ratios of neighbours in time: the contender, what it is held against, and fused AdamW, in turns."
    params = [p for _,p in named]
    runs = {label: CONTENDERS[label](named), "torch AdamW, fused": CONTENDERS["torch AdamW, fused"](named)}
    if label in AGAINST: runs[AGAINST[label]] = CONTENDERS[AGAINST[label]](named)
    for _ in range(2):
        for o in runs.values(): o.step()
    o = runs[label]; known = [p for p in params] + [p.grad for p in params] + [v for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
    with (live := _Live(*known)): o.step()
    taken = {name: [] for name in runs}
    for _ in range(rounds):
        for name,o in runs.items(): taken[name].append(seconds(o.step))
    t = taken[label]; row = dict(ms=round(1e3*sorted(t)[rounds//2], 3), reference_ms=round(1e3*sorted(taken["torch AdamW, fused"])[rounds//2], 3), **middle([a/b for a,b in zip(t, taken["torch AdamW, fused"])]),
        state=sum(v.nbytes for s in runs[label].state.values() for v in s.values() if torch.is_tensor(v)), peak=live.peak)
    if label in AGAINST: row["against"] = dict(what=AGAINST[label], **middle([a/b for a,b in zip(t, taken[AGAINST[label]])]))
    return row

def main(layer=15, whole=5, *labels):
    result = json.loads(FILE.read_text()) if FILE.exists() else {}
    for part,layers,rounds in (("layer", 1, int(layer)), ("all", 8, int(whole))):
        if not rounds: continue
        named = [(n, nn.Parameter(torch.randn(s)*.02)) for n,s in llama(layers).items()]
        for _,p in named: p.grad = torch.randn_like(p)
        rows = result.setdefault(part, {})
        for label in labels or CONTENDERS:
            if part == "all" and label in LAYER_ONLY: continue
            rows[label] = measure(named, label, rounds if label not in ("SOAP", "Muon") else min(rounds, 3)); gc.collect(); print(part, label, rows[label], flush=True)
        result[part + "_parameters"], result[part + "_largest"] = sum(p.numel() for _,p in named), max(p.nbytes for _,p in named)
        result[part] = {k: rows[k] for k in CONTENDERS if k in rows}
    result["hints"] = hints(); print("hints", result["hints"])
    cpu = processor()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    result |= dict(machine=platform.machine(), cpu=cpu, cores=os.cpu_count(), capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, compiler=subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True).stdout.strip() if compiler else None, load=round(os.getloadavg()[0], 1), rank=R)
    FILE.write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__": main(*sys.argv[1:])
