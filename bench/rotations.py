"""Bits per byte of the shipped checkpoint with rounded weights, activations and cache: as it is, SmoothQuant at five alphas, random Hadamard rotations and learned ones with three seeds. Writes results/rotations.json; finished trials are in results/rotations.jsonl and not repeated, remove it to measure anew."""
import copy, json
from functools import partial
import torch
from paretolab.models import hf
from paretolab.quantizers import absmax, activations, plan as plans, smoothquant, spinquant
from paretolab.quantizers.hadamard import Hadamard, random_signs
from shipped import Journal, RESULTS, Text

text, trial, shipped = Text(2), Journal("rotations"), hf.load(hf.shipped())
s, ranges = shipped.shape, smoothquant.ranges(shipped, text.calibration[:, :256])
SETUPS = {"W4 A4 KV4": (4, 4, 4), "W4 A4 KV16": (4, 4, 16), "W4 A8 KV16": (4, 8, 16), "W8 A8 KV16": (8, 8, 16)}
hadamard = lambda n, seed: Hadamard(n, random_signs(n, seed)).matrix()
start = lambda seed: (hadamard(s.dim, seed), [hadamard(s.head_dim, 1000*seed + i + 1) for i in range(s.layers)])


def rounded(model, setup, R3=None):
    "Bits per byte with blocks at w bits, a scale for each row, embedding and head at 8 in groups of 64."
    w, a, kv = SETUPS[setup]
    names = [n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim == 2]
    plans.restore(model, plans.compress(model, {n: (8, 64, "absmax.quantize") if n in ("embed", "head") else (w, 0, "absmax.quantize") for n in names}))
    if not any(m._forward_pre_hooks for m in model.modules() if hasattr(m, "kv_heads")): activations.attach(model, a, kv, R3=R3)
    return text.quality(model)


def turned(seed): return spinquant.rotate(spinquant.fold(shipped), *start(seed), online=True)


def learned(seed, lr, steps=8):
    "R1 and R2 learned with R3, R4 and all roundings in place."
    model, R3 = spinquant.rotate(spinquant.fold(shipped), torch.eye(s.dim, dtype=torch.float64), online=True), hadamard(s.head_dim, seed)
    activations.attach(model, 4, 4, R3=R3)
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.stack([t[(i := torch.randint(len(t) - 129, (), generator=g).item()):i+129] for k in torch.randperm(len(flat), generator=g)[:4] for t in [flat[k]]])
    flat = [torch.from_numpy(t.read(0, len(t))).long() for t in text.train.values()]
    R1, R2, log = spinquant.learn(model, *(start(seed)[:1]), partial(absmax.fake, bits=4), [draw() for _ in range(steps)], lr, start(seed)[1])
    return rounded(spinquant.rotate(model, R1, R2), "W4 A4 KV4")

rows, spread = {}, max((v.max()/v.median()).item() for v in ranges.values())
full = trial("16 bits", lambda: text.quality(shipped))
def save(): (RESULTS/"rotations.json").write_text(json.dumps(dict(full=full, spread=round(spread, 2), rows=rows), indent=1) + "\n")

for name in SETUPS:
    rows[name] = {"as it is": trial(f"{name}, as it is", lambda: rounded(copy.deepcopy(shipped), name)), "norms folded": trial(f"{name}, norms folded", lambda: rounded(spinquant.fold(shipped), name))}
    for alpha in (0, .25, .5, .75, 1): rows[name][f"alpha {alpha}"] = trial(f"{name}, alpha {alpha}", lambda: rounded(smoothquant.smooth(shipped, ranges, alpha), name))
    for seed in range(3): rows[name][f"Hadamard, seed {seed}"] = trial(f"{name}, Hadamard, seed {seed}", lambda: rounded(turned(seed), name, hadamard(s.head_dim, seed)))
    if name == "W4 A4 KV4":
        for seed in range(3): rows[name][f"learned, seed {seed}"] = trial(f"{name}, learned, seed {seed}", lambda: learned(seed, .1))
    save()
rows["W4 A4 KV4"]["Hadamard without R3, seed 0"] = trial("W4 A4 KV4, Hadamard without R3, seed 0", lambda: rounded(turned(0), "W4 A4 KV4"))
save()
