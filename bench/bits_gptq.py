"""What GPTQ wins back on the shipped checkpoint at 1.58 to 4 bits, beside nearest levels at every width, with three calibration texts of 2560 tokens, and at 3 bits with levels taken as each group begins (two texts). Writes results/bits_gptq.json; its journal lets a run that was stopped go on."""
import json
from functools import partial
import torch
from paretolab.engine.evaluate import windows
from paretolab.models import hf
from paretolab.quantizers import gptq, plan as plans
from shipped import Journal, RESULTS, Text

text, trial, model, spare = Text(2), Journal("bits_gptq"), hf.load(hf.shipped()), hf.load(hf.shipped())
calibration = [torch.stack([w[k] for w in windows(text.train, 256, 3).values()])[:, :256] for k in range(3)]
GRIDS = {4: "grids.symmetric", 3: "grids.symmetric", 2: "grids.stretched", 1.58: "grids.ternary"}
VARIANTS = {"levels as the group begins": dict(solver=partial(gptq.solve, static=False))}
plan = lambda b, q: {n: (8, 64, "absmax.quantize") if n == "embed" else (b, 64, q) for n in plans.uniform(model, 4, 64)}
quality = lambda state: text.quality(plans.restore(spare, state))


def calibrated(b, k, **how):
    state, report = gptq.compress(model, plan(b, "gptq.quantize"), calibration[k], **how)
    return [quality(state), round(sum(r["error"] for r in report.values())/sum(r["nearest"] for r in report.values()), 4)]

full = trial("16 bits", lambda: text.quality(model))
nearest = {b: trial(f"nearest {b}", lambda: quality(plans.compress(model, plan(b, q)))) for b, q in (GRIDS | {8: "grids.symmetric", 6: "grids.symmetric", 1: "grids.sign"}).items()}
ours = {b: [trial(f"GPTQ {b} {k}", lambda: calibrated(b, k)) for k in range(3)] for b in GRIDS}
variants = {n: [trial(f"{n} {k}", lambda: calibrated(3, k, **how)) for k in range(2)] for n, how in VARIANTS.items()}
(RESULTS/"bits_gptq.json").write_text(json.dumps(dict(full=full, tokens=calibration[0].numel(), held=sum(w[:, 1:].numel() for w in text.held.values()), nearest=nearest, gptq=ours, variants=variants), indent=1) + "\n")
