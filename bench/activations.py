"""Bits per byte of the shipped checkpoint for all widths of weights, activations and cache, and what training through all three wins. Writes results/activations.json; its journal lets a run that was stopped go on."""
import json
import torch
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import fit
from paretolab.models import hf
from paretolab.optimizers.adamw import AdamW
from paretolab.quantizers import activations, paretoq, plan
from shipped import Journal, RESULTS, Text

text, trial = Text(4), Journal("activations")


def rounded(state=None, a=16, kv=16):
    model = hf.load(hf.shipped())
    if state: plan.restore(model, state)
    activations.attach(model, a, kv)
    return text.quality(model)


def nearest(w):
    model = hf.load(hf.shipped())
    return plan.compress(model, plan.uniform(model, w, 64)) if w != 16 else None

grid = {f"W{w} A{a} KV{kv}": trial(f"W{w} A{a} KV{kv}", lambda: rounded(nearest(w), a, kv)) for w in (16, 8, 4) for a in (16, 8, 4) for kv in (16, 8, 4, 2)}


def trained(seed, a, kv):
    "Fifteen steps at 4-bit weights, with or without rounded activations and cache; judged with them."
    torch.manual_seed(seed)
    model = hf.load(hf.shipped())
    paretoq.convert(model, {n: (8 if n == "embed" else 4, 64, "paretoq.quantize") for n in plan.uniform(model, 4)})
    activations.attach(model, a, kv)
    fit(model, MixedStream(text.train, {d: .1 for d in text.train}, 4, 128, seed), AdamW(model.named_parameters(), lr=3e-4, weight_decay=0), lambda t: 1 - t/15, steps=15, run=text.folder/f"run-{seed}-{a}")
    return rounded(paretoq.pack(model), 4, 4)

qat = {name: [trial(f"{name}, seed {s}", lambda: trained(s, a, kv)) for s in range(3)] for name, a, kv in (("weights only", 16, 16), ("weights, activations and cache", 4, 4))}
(RESULTS/"activations.json").write_text(json.dumps(dict(tokens=sum(w.numel() - len(w) for w in text.held.values()), grid=grid, qat=qat), indent=1) + "\n")
