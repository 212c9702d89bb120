"""Mixed against uniform widths of the shipped checkpoint at equal bytes, and each score against the measured loss of each layer. Writes results/allocate.json; its journal lets a run that was stopped go on."""
import json
import torch
from torch import nn
from paretolab.engine.evaluate import bits_per_byte, macro
from paretolab.models import hf
from paretolab.quantizers import allocate, gptq, plan as plans, sensitivity
from shipped import Journal, RESULTS, Text

text, trial, model, spare = Text(2), Journal("allocate"), hf.load(hf.shipped()), hf.load(hf.shipped())
WIDTHS, short = (2, 3, 4, 6, 8), text.calibration[::2, :128]
options = {n: [(b, 64, "gptq.quantize") for b in WIDTHS] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
rest, shapes = {"embed": (8, 64, "gptq.quantize")}, {n: tuple(p.shape) for n, p in model.named_parameters()}
size = lambda plan: plans.model_bytes(plan, shapes)
tables = {f.__name__: trial(f.__name__, lambda: f(model, options, short)) for f in (sensitivity.output_error, sensitivity.salience, sensitivity.trace, sensitivity.divergence)}

few = {d: w[1:2] for d, w in list(text.held.items())[::2]}
def loss(): return macro(bits_per_byte(spare, few, text.nbytes))
whole = trial("one window, 16 bits", loss)
def alone(n):
    "Bits per byte lost by each width of one layer."
    w, lost = spare.get_submodule(n).weight, []
    kept = w.detach().clone()
    for b in (2, 3): w.data = gptq.quantize(kept, b, 64).dequantize(); lost.append(loss() - whole)
    w.data = kept
    return lost
measured = {n: trial(f"alone {n}", lambda: alone(n)) for n in options}

def nearest(plan): return dict(bytes=size(plan), bpb=text.quality(plans.restore(spare, plans.compress(model, plan))))
def calibrated(plan): return dict(bytes=size(plan), bpb=text.quality(plans.restore(spare, gptq.compress(model, plan, text.calibration[:, :256])[0])))
uniform = {b: {n: (b, 64, "gptq.quantize") for n in options} | rest for b in WIDTHS}
rows = {}
for b in (2, 3, 4): rows[f"uniform {b}"] = trial(f"uniform {b}", lambda: nearest(uniform[b]))
mean = lambda a, b: (size(uniform[a]) + size(uniform[b]))//2
budgets = {2.5: mean(2, 3), 3: size(uniform[3]), 3.5: mean(3, 4)}
for b, B in budgets.items():
    for name, table in tables.items(): rows[f"{name} {b}"] = trial(f"{name} {b}", lambda: nearest(allocate.layers(model, options, table, B, rest)))
worth = {n: tables["divergence"][n][1]/tables["output_error"][n][1] for n in options}
byg = {n: [(b, 64, "allocate.mixed") for b in WIDTHS] for n in options}
embedding = {"embed": [(b, 64, "gptq.quantize") for b in (3, 4, 6, 8)]}
of_embedding = trial("divergence of the embedding", lambda: sensitivity.divergence(model, embedding, short))
for b, B in budgets.items():
    rows[f"groups {b}"] = trial(f"groups {b}", lambda: nearest(allocate.groups(model, byg, short, B, rest)))
    rows[f"groups, worth {b}"] = trial(f"groups, worth {b}", lambda: nearest(allocate.groups(model, byg, short, B, rest, worth)))
    rows[f"embedding too {b}"] = trial(f"embedding too {b}", lambda: nearest(allocate.layers(model, options | embedding, tables["divergence"] | of_embedding, B)))
rows["GPTQ uniform 3"] = trial("GPTQ uniform 3", lambda: calibrated(uniform[3]))
rows["GPTQ divergence 3"] = trial("GPTQ divergence 3", lambda: calibrated(allocate.layers(model, options, tables["divergence"], budgets[3], rest)))
full = trial("16 bits", lambda: dict(bytes=2*model.shape.parameters, bpb=text.quality(model)))
chosen = {n: e[0] for n, e in allocate.layers(model, options, tables["divergence"], budgets[3], rest).items()}
brief = {k: {n: [float(f"{v:.4g}") for v in r[:2]] for n, r in t.items()} for k, t in (*tables.items(), ("measured", measured))}
(RESULTS/"allocate.json").write_text(json.dumps(dict(full=full, rows=rows, tables=brief, chosen=chosen), indent=None) + "\n")
