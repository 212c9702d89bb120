"""Mixed against uniform widths of the shipped checkpoint at equal bytes, and each score against the measured loss of each layer. Writes results/allocate.json; finished trials are in results/allocate.jsonl and not repeated, remove it to measure anew."""
import json
import torch
from torch import nn
from paretolab.engine.evaluate import bits_per_byte
from paretolab.models import hf
from paretolab.quantizers import allocate, gptq, plan as plans, sensitivity
from shipped import Journal, RESULTS, Text

text, trial, model, spare = Text(2), Journal("allocate"), hf.load(hf.shipped()), hf.load(hf.shipped())
WIDTHS, short = (2, 3, 4), text.calibration[::5, :64]                   # 128 tokens
options = {n: [(b, 64, "gptq.quantize") for b in WIDTHS] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
rest, shapes = {"embed": (8, 64, "gptq.quantize")}, {n: tuple(p.shape) for n, p in model.named_parameters()}
size = lambda plan: plans.model_bytes(plan, shapes)
tables = {f.__name__: trial(f.__name__, lambda: f(model, options, short)) for f in (sensitivity.output_error, sensitivity.salience, sensitivity.trace, sensitivity.divergence)}


def nearest(plan): return dict(bytes=size(plan), bpb=text.quality(plans.restore(spare, plans.compress(model, plan))))
uniform = {b: {n: (b, 64, "gptq.quantize") for n in options} | rest for b in WIDTHS}
budgets = {3: size(uniform[3]), 2.5: (size(uniform[2]) + size(uniform[3]))//2, 3.5: (size(uniform[3]) + size(uniform[4]))//2}
rows, measured = {f"uniform {b}": trial(f"uniform {b}", lambda: nearest(uniform[b])) for b in WIDTHS}, {}
chosen = {n: e[0] for n, e in allocate.layers(model, options, tables["divergence"], budgets[3], rest).items()}


def save():
    brief = {k: {n: [float(f"{v:.4g}") for v in r[:2]] for n, r in t.items()} for k, t in (*tables.items(), ("measured", measured))}
    (RESULTS/"allocate.json").write_text(json.dumps(dict(full=trial("16 bits", lambda: text.quality(model)), rows=rows, tables=brief, chosen=chosen)) + "\n")

few = torch.cat([w[1:2, :65] for w in text.held.values()])             # 640 tokens
def loss(): return bits_per_byte(spare, {"all": few}, text.nbytes, 10)["all"]
def alone(n):
    "Bits per byte lost by each width of one layer."
    w, lost = spare.get_submodule(n).weight, []
    kept = w.detach().clone()
    for b in (2, 3): w.data = gptq.quantize(kept, b, 64).dequantize(); lost.append(loss() - whole)
    w.data = kept
    return lost

worth = {n: tables["divergence"][n][1]/tables["output_error"][n][1] for n in options}
byg = {n: [(b, 64, "allocate.mixed") for b in WIDTHS] for n in options}
for b, B in budgets.items():
    for name, table in tables.items(): rows[f"{name} {b}"] = trial(f"{name} {b}", lambda: nearest(allocate.layers(model, options, table, B, rest)))
    rows[f"groups {b}"] = trial(f"groups {b}", lambda: nearest(allocate.groups(model, byg, short, B, rest, worth)))
    save()
plans.restore(spare, model.state_dict())
whole = trial("few windows, 16 bits", loss)
measured |= {n: trial(f"alone {n}", lambda: alone(n)) for n in options}
save()
