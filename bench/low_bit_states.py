"Moments of 8 bits: the time of a step beside torch's fused AdamW, and what they cost a training run. `python bench/low_bit_states.py [speed|train|shaken]`; trials that are in the journal are not made again."
import json, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from paretolab.engine.settings import Settings, member
from paretolab.kernels import native

torch.set_num_threads(1)
RESULT, JOURNAL, SHAKEN = (Path(__file__).parent/"results"/f"low_bit_states{s}" for s in (".json", "_trials.jsonl", "_shaken.json"))
KINDS = "low_bit_states.AdamW8", "low_bit_states.AdamTree", "low_bit_states.AdamFP8", "lion.Lion", "low_bit_states.Lion8", "low_bit_states.LionTree", "low_bit_states.LionFP8"

def llama60m(layers, ends):
    block = {f"layers.{i}.{n}.weight": s for i in range(layers) for n,s in {"q": (512, 512), "k": (512, 512), "v": (512, 512), "o": (512, 512), "gate": (1376, 512), "up": (1376, 512), "down": (512, 1376), "norm1": (512,), "norm2": (512,)}.items()}
    return block | ({"embed.weight": (32000, 512), "norm.weight": (512,), "head.weight": (32000, 512)} if ends else {})

def peers(params):
    "8-bit AdamW of torchao and of bitsandbytes, where they are installed."
    found = {}
    try: import torchao; from torchao.optim import AdamW8bit; found[f"torchao {torchao.__version__} AdamW8bit"] = AdamW8bit(params, lr=1e-4)
    except ImportError: pass
    try: import bitsandbytes; found[f"bitsandbytes {bitsandbytes.__version__} AdamW8bit"] = bitsandbytes.optim.AdamW8bit(params, lr=1e-4)
    except ImportError: pass
    return found

def speed(shapes, rounds, others=True):
    "CPU time of the quickest of three steps, all contenders taken in turns on the same parameters; medians over rounds."
    def seconds(step): start = time.thread_time(); step(); return time.thread_time() - start
    torch.manual_seed(0)
    P = {n: torch.nn.Parameter(torch.randn(s)*.02) for n,s in shapes.items()}
    for p in P.values(): p.grad = torch.randn_like(p)*1e-3
    O = {"torch fused": torch.optim.AdamW(P.values(), lr=1e-4, fused=True)} | {k: member("optimizers", k)(P.items(), lr=1e-4) for k in KINDS} | (peers([*P.values()]) if others else {})
    T = {k: [] for k in O}
    for o in O.values(): o.step(); o.step()
    for r in range(rounds):
        for k,o in O.items():
            if k.endswith("8bit") and r%5: continue                       # these take long
            T[k].append(min(seconds(o.step) for _ in range(3)))
    size, fused = sum(p.numel() for p in P.values()), T["torch fused"]
    return {k: dict(ns_per_weight=statistics.median(t)/size*1e9, ratio=statistics.median(a/b for a,b in zip(t, fused[::5] if len(t) < rounds else fused)),
        state_bytes_per_weight=sum(x.nbytes for s in O[k].state.values() for v in s.values() if torch.is_tensor(v) for x in ([getattr(v, a) for a in v.tensor_attrs] if hasattr(v, "tensor_attrs") else [v]))/size) for k,t in T.items()}

def once():
    "In one process: a layer, all of the model, and a matrix that stays in the cache."
    return dict(layer=speed(llama60m(1, False), 41), whole=speed(llama60m(8, True), 7, others=False), cache=paths())

def often(n=5):
    "In processes of their own, between which memory's speed differs: the median, and the lowest and highest ratio."
    runs = [json.loads(subprocess.run([sys.executable, __file__, "once"], capture_output=True, text=True, check=True).stdout.splitlines()[-1]) for _ in range(n)]
    over = lambda rows: dict(ns_per_weight=statistics.median(r["ns_per_weight"] for r in rows), ratio=statistics.median(x := [r["ratio"] for r in rows]), spread=[min(x), max(x)], state_bytes_per_weight=rows[0]["state_bytes_per_weight"])
    return {name: {k: over([r[part][k] for r in runs]) for k in runs[0][part]} for part,name in (("layer", "layer"), ("whole", "60M"))} | dict(cache={k: statistics.median(r["cache"][k] for r in runs) for k in runs[0]["cache"]})

def paths():
    "AdamW on a matrix that stays in the cache, by instruction set."
    from paretolab.kernels import state_steps
    from paretolab.optimizers.state_codes import Expanded, Log, Tree
    n, out, shape = dict(beta1=.9, fresh1=.1, beta2=.95, fresh2=.05, keep=1., step=1e-3, eps=1e-8), {}, (256, 512)
    for form in (Log(), Tree(), Expanded()):
        w, g = torch.randn(shape), torch.randn(shape); m, v = form.encode(g, True), form.encode(g*g, False)
        for path in range(min(native.load("state_steps.cpp").best_path(), 1 if form.kind == 2 else 2) + 1):
            t = []
            for _ in range(40): start = time.thread_time(); [state_steps.adamw(form, [w], [g], [m], [v], path=path, **n) for _ in range(3)]; t.append((time.thread_time() - start)/3)
            out[f"{type(form).__name__} {('portable', 'AVX2', 'AVX-512')[path]}"] = statistics.median(t)/w.numel()*1e9
        t = []
        for _ in range(8): start = time.thread_time(); state_steps._adamw(form, w, g, m, v, **n); t.append(time.thread_time() - start)
        out[f"{type(form).__name__} torch"] = statistics.median(t)/w.numel()*1e9
    return out

STEPS, RATES = 60, {"AdamW": 4e-3, "Lion": 5e-4, "Mini": 1e-2, "GaLore": 1e-2}
TRAINED = {"AdamW": ("adamw.AdamW", "low_bit_states.AdamW8", "low_bit_states.AdamTree", "low_bit_states.AdamFP8"), "Lion": ("lion.Lion", "low_bit_states.Lion8", "low_bit_states.LionTree", "low_bit_states.LionFP8"), "Mini": ("apollo.Mini", "low_bit_states.Mini8"), "GaLore": ("galore.GaLore", "low_bit_states.GaLore8")}
def trial(optimizer, lr, seed, text, shake=0):
    "Bits per byte and bytes of state after a short run; `shake` draws a change of the start by a millionth."
    from paretolab.engine.evaluate import bits_per_byte, macro
    from paretolab.engine.fit import fit
    from paretolab.engine.schedules import cosine
    from paretolab.frontier import job
    s = Settings(optimizer=optimizer, lr=lr, seed=seed, batch=4, length=64, windows=4)
    model, stream, o = job._make(s, text)
    if shake:
        with torch.no_grad(): [p.mul_(1 + 1e-6*torch.randn(p.shape, generator=g)) for g in [torch.Generator().manual_seed(shake)] for p in model.parameters()]
    with tempfile.TemporaryDirectory() as folder: fit(model, stream, o, cosine(STEPS, 10), steps=STEPS, run=Path(folder)/"run", every=STEPS)
    return macro(bits_per_byte(model, text.windows, text.nbytes)), sum(v.nbytes for x in o.state.values() for v in x.values())

def train():
    from paretolab.frontier import job
    done = {tuple(r[:3]): r for r in map(json.loads, JOURNAL.read_text().splitlines())} if JOURNAL.exists() else {}
    with tempfile.TemporaryDirectory() as out:
        text = job.prepare(Settings(batch=4, length=64, windows=4, out=out))
        for seed in range(3):
            for k,lr in [(k, RATES[rule]) for rule,kinds in TRAINED.items() for k in kinds]:
                if (k, lr, seed) in done: continue
                loss, size = trial(k, lr, seed, text)
                with JOURNAL.open("a") as f: f.write(json.dumps([k, lr, seed, loss, size]) + "\n")

def shaken():
    "AdamW in 32 bits from starts that differ by a millionth: by how much do its ends?"
    from paretolab.frontier import job
    with tempfile.TemporaryDirectory() as out:
        text = job.prepare(Settings(batch=4, length=64, windows=4, out=out))
        SHAKEN.write_text(json.dumps({str(seed): [round(trial("adamw.AdamW", 4e-3, seed, text, k)[0], 4) for k in (0, 2, 3, 4, 5)] for seed in (0, 1)}) + "\n")

def main(what):
    if what in ("speed", "all"):
        lines = {l.split(":")[0].strip(): l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if ":" in l} if Path("/proc/cpuinfo").exists() else {}
        RESULT.write_text(json.dumps(dict(machine=f"{lines.get('model name', platform.machine())}, torch {torch.__version__}") | often(), indent=1) + "\n")
    if what in ("train", "all"): train()
    if what in ("shaken", "all"): shaken()

if sys.argv[1:] == ["once"]: print(json.dumps(once()))
elif __name__ == "__main__": main(sys.argv[1] if len(sys.argv) > 1 else "all")
