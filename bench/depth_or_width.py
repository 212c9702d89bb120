"""Deep and thin or shallow and wide? Shapes of equal parameters, block-wise sharing, and Mix-LN, three seeds each at the best of three learning rates. Every finished trial is a line of results/depth_or_width.jsonl and is not made again."""
import json, math, platform, statistics, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import small, torch
from paretolab.engine.sweep import sweep, trial as attempt
from paretolab.models.mobilellm import MobileLLM, Shape

STEPS, RATES, SWEPT, SEEDS = 150, (1.5e-3, 3e-3, 6e-3), 100, (0, 1, 2)   # the seed rates are compared on, and those that are reported
SHAPES = {1: (224, 156), 2: (160, 168), 4: (128, 100), 8: (96, 68), 16: (64, 60)}                 # blocks -> width and inner width: 0.45 million parameters each
PLAIN = [dict(layers=n) for n in SHAPES]
MIXED = [dict(layers=n, post_ln=n//4) for n in (8, 16)] + [dict(layers=16, post_ln=16)]           # the norm after the residual in a quarter of the blocks, and in all
SHARED = [dict(layers=n, repeat=2) for n in (4, 8)]
LONGER = [dict(layers=n, times=2) for n in (4, 8)]                    # without sharing, in the time that sharing takes

def shape(layers, repeat=1, post_ln=0):
    dim, ff = SHAPES[layers]; return Shape(vocab=small.V, dim=dim, ff=ff, layers=layers, heads=dim//32, kv_heads=1, context=small.L, repeat=repeat, post_ln=post_ln)

def trial(c):
    "One run from a configuration; what came out."
    (train, valid, β), start = small.files(), time.thread_time()
    torch.manual_seed(c["seed"]); m = MobileLLM(shape(c["layers"], c.get("repeat", 1), c.get("post_ln", 0)))
    small.train(m, train, STEPS*c.get("times", 1), seed=c["seed"], lr=c["lr"]); seconds = time.thread_time() - start
    bpb = small.judge(m, valid, β); return dict(bpb=round(statistics.mean(bpb.values()), 5), domains={d: round(v, 4) for d,v in bpb.items()}, parameters=m.shape.parameters, cpu_s=round(seconds, 2))

def here(name, todo):
    "Executor: one trial after the other in this process, said aloud."
    for i,(key,c) in enumerate(todo):
        out = attempt(name, c); print(f"{i + 1}/{len(todo)}", c, {k: v for k,v in out.get("result", out).items() if k in ("bpb", "cpu_s", "error")}, flush=True)
        yield key, out

def study():
    "All trials; one row a contender."
    from depth_or_width import trial as f                     # by a name another process could import
    run = lambda configs: iter([r["result"] for r in sweep(f, configs, small.ROOT/"bench"/"results"/"depth_or_width.jsonl", here)])
    swept = PLAIN + MIXED; found = run([c | dict(lr=lr, seed=SWEPT) for c in swept for lr in RATES]); rates = {json.dumps(c): {lr: next(found)["bpb"] for lr in RATES} for c in swept}
    best = lambda c: min(s := rates.get(json.dumps(c)) or rates[json.dumps(dict(layers=c["layers"]))], key=lambda lr: s[lr] if math.isfinite(s[lr]) else math.inf)   # sharing keeps its shape's rate
    rows = [c | dict(lr=best(c)) for c in PLAIN + MIXED + SHARED + LONGER]
    found = run([c | dict(seed=s) for s in SEEDS for c in rows]); seeds = [[next(found) for _ in rows] for _ in SEEDS]
    return [dict(c, dim=SHAPES[c["layers"]][0], ff=SHAPES[c["layers"]][1], sweep=rates.get(json.dumps({k: v for k,v in c.items() if k != "lr"})), parameters=r[0]["parameters"], bpb=[x["bpb"] for x in r], domains=[x["domains"] for x in r], cpu_s=[x["cpu_s"] for x in r]) for c,r in zip(rows, zip(*seeds))]

if __name__ == "__main__":
    table = study()
    result = dict(machine=platform.machine(), cpu=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, steps=STEPS, batch=small.B, length=small.L, rates=RATES, swept=SWEPT, seeds=SEEDS, table=table)
    (small.ROOT/"bench"/"results"/"depth_or_width.json").write_text(json.dumps(result, indent=1) + "\n")
    for r in table: print({k: r[k] for k in ("layers", "dim", "repeat", "post_ln", "times", "lr") if k in r}, f"{statistics.mean(r['bpb']):.4f} ({min(r['bpb']):.4f} to {max(r['bpb']):.4f})")
