"""A training step through ParetoQ's rounding against the same step at full precision: CPU time, interleaved, one thread. Writes results/qat_step.json."""
import json, statistics, time
from pathlib import Path
import torch
from paretolab.engine.fit import losses
from paretolab.models.mobilellm import MobileLLM, mobilellm
from paretolab.optimizers.adamw import AdamW
from paretolab.quantizers import paretoq, plan

torch.set_num_threads(1); torch.manual_seed(0)
tokens, clock = torch.randint(4096, (2, 257)), time.thread_time

def made(bits, group):
    model = MobileLLM(mobilellm("tiny"))
    if bits < 16: paretoq.convert(model, {n: (8 if n == "embed" else bits, group, "paretoq.quantize") for n in plan.uniform(model, 4)})
    return model, AdamW(model.named_parameters(), lr=1e-4, weight_decay=0)

def step(model, optimizer):
    start = clock()
    losses(model, tokens).mean().backward(); optimizer.step(); optimizer.zero_grad()
    return clock() - start

kinds = {"full": (16, 0), "1 bit": (1, 0), "1.58 bits": (1.58, 0), "2 bits": (2, 0), "2 bits, groups of 64": (2, 64), "4 bits": (4, 0)}
pairs = {k: made(*v) for k, v in kinds.items()}
for p in pairs.values(): step(*p)
rounds = [{k: step(*p) for k, p in pairs.items()} for _ in range(7)]
ratios = {k: [r[k]/r["full"] for r in rounds] for k in kinds if k != "full"}
result = dict(tokens=tokens[:, 1:].numel(), parameters=mobilellm("tiny").parameters, full_seconds=round(statistics.median(r["full"] for r in rounds), 3),
    ratio={k: dict(median=round(statistics.median(v), 3), low=round(min(v), 3), high=round(max(v), 3)) for k, v in ratios.items()})
(Path(__file__).parent/"results"/"qat_step.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result, indent=1))
