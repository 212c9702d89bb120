"""Bits per byte of the shipped checkpoint for all widths of weights, activations and cache. Writes results/activations.json; finished trials are in results/activations.jsonl and not repeated, remove it to measure anew."""
import json
from paretolab.models import hf
from paretolab.quantizers import activations, plan
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
(RESULTS/"activations.json").write_text(json.dumps(dict(tokens=sum(w.numel() - len(w) for w in text.held.values()), grid=grid), indent=1) + "\n")
