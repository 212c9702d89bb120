"""CPU seconds of GPTQ on a model of SmolLM2-135M's shape: 4 bits, groups of 64, 4096 calibration tokens, one thread. Writes results/gptq.json, where each kind of processor has its entry. Argument: rounds."""
import json, statistics, sys, time
from pathlib import Path
import torch
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.quantizers import gptq, plan

torch.set_num_threads(1); torch.manual_seed(0)
model = MobileLLM(Shape(vocab=49152, dim=576, ff=1536, layers=30, heads=9, kv_heads=3, context=2048))
tokens, p, seconds = torch.randint(49152, (8, 512)), plan.uniform(model, 4, 64, "gptq.quantize"), []
for _ in range(int(*sys.argv[1:] or [3])):      # rounds
    start = time.process_time()
    _, reports = gptq.compress(model, p, tokens)
    seconds.append(round(time.process_time() - start, 1))
ratio = sum(r["error"] for r in reports.values())/sum(r["nearest"] for r in reports.values())
result = dict(cpu_seconds=seconds, median=statistics.median(seconds), parameters=model.shape.parameters, tokens=tokens.numel(), output_error_over_nearest=round(ratio, 3))
file, cpu = Path(__file__).parent/"results"/"gptq.json", torch.backends.cpu.get_cpu_capability()
file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | {cpu: result}, indent=1) + "\n")
print(cpu, result)
