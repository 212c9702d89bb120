"""Time to a target, in the spirit of AlgoPerf: four small workloads, six optimizers, one search space, five trials in each of three studies, targets from tuned AdamW and NAdamW.
Argument: how many of the studies (all three); the table is of these. Every finished trial is a line of results/time_to_target.jsonl and is not made again."""
import json, math, statistics, sys, time
from functools import cache
from pathlib import Path

import numpy as np, torch
import torch.nn.functional as F
from scipy.stats import qmc
from torch import nn
from loss_vs_state import GAP, here, text
from paretolab.data.stream import MixedStream
from paretolab.engine.evaluate import bits_per_byte, macro
from paretolab.engine.fit import losses
from paretolab.engine.schedules import cosine
from paretolab.engine.settings import member
from paretolab.engine.sweep import sweep
from paretolab.frontier.budget import _Live
from paretolab.models.mobilellm import MobileLLM
from paretolab.models.shape import Shape

HERE = Path(__file__).parent

# Workloads: a model, the loss of the next batch, and the score on held-out data, lower is better

def language(seed, vocab):
    "A small Llama on the shipped text; bits per byte."
    d = text(vocab, 64, 4); model = MobileLLM(Shape(vocab=vocab, dim=64, ff=176, layers=3, heads=4, kv_heads=2, context=64)); stream = MixedStream(d.tokens, d.weights, 8, 64, seed)
    return model, lambda: losses(model, next(stream)[0]).mean(), lambda: macro(bits_per_byte(model, d.windows, d.bytes, batch=16))

class ViT(nn.Module):
    "Digits of 8 × 8 as 16 patches of 2 × 2."
    def __init__(self, d=48, layers=2):
        super().__init__()
        self.patch, self.embed_position, self.head = nn.Linear(4, d), nn.Parameter(torch.randn(16, d)*.02), nn.Linear(d, 10)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(d, 4, 2*d, 0., "gelu", batch_first=True, norm_first=True) for _ in range(layers))
    def forward(self, x):
        z = self.patch(x.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(x), 16, 4)) + self.embed_position
        for b in self.blocks: z = b(z)
        return self.head(z.mean(1))

@cache
def digits():
    from sklearn.datasets import load_digits
    X, y = load_digits(return_X_y=True); i = np.random.default_rng(0).permutation(len(y)); X, y = torch.tensor(X[i]/16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(y[i])
    return X[:1200], y[:1200], X[1200:], y[1200:]

def images(seed):
    "A small vision transformer on scikit-learn's digits, shifted by up to a pixel; cross-entropy."
    X, y, Xv, yv = digits(); model, g = ViT(), torch.Generator().manual_seed(seed)
    def loss():
        i, (a, b) = torch.randint(len(X), (32,), generator=g), torch.randint(-1, 2, (2,), generator=g).tolist()
        return F.cross_entropy(model(X[i].roll((a, b), (1, 2))), y[i])
    @torch.no_grad()
    def score(): model.eval(); s = F.cross_entropy(model(Xv), yv).item(); model.train(); return s
    return model, loss, score

def matrix(seed, n=256, k=64, r=8):
    "A matrix of low rank from products with ill-conditioned vectors, as two factors; the share of the variance that is not explained."
    fixed, g = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    scale = torch.arange(1, n + 1)**-1.; W = torch.randn(n, r, generator=fixed) @ torch.randn(r, n, generator=fixed)/(r*n)**.5/scale                        # every direction of x matters as much
    model = nn.Sequential(nn.Linear(n, k, bias=False), nn.Linear(k, n, bias=False)); off = lambda x: ((model(x) - x @ W.mT).square().sum(1)/r).mean()
    held = torch.randn(512, n, generator=fixed)*scale
    return model, lambda: off(torch.randn(128, n, generator=g)*scale), torch.no_grad()(lambda: off(held).item()*r/(held @ W.mT).square().sum(1).mean().item())

WORKLOADS = {                                                  # name -> (how it is made, steps at most, steps between scores)
    "text": (lambda seed: language(seed, 512), 150, 5), "wide vocabulary": (lambda seed: language(seed, 1536), 120, 4), "digits": (images, 600, 20), "matrix": (matrix, 900, 30)}
CONTENDERS = {                                                 # label -> (optimizer, reference learning rate: the best of loss_vs_state.py; what differs from its defaults, as there)
    "AdamW": ("adamw.AdamW", 4e-3, {}), "Schedule-Free": ("baselines.ScheduleFree", 2.5e-3, {}), "Muon": ("muon.Muon", 1.6e-2, {}), "SCALE": ("scale.SCALE", 4e-3, {}), "APOLLO-Mini": ("apollo.Mini", 1e-2, GAP), "Lion": ("lion.Lion", 1.6e-3, {})}
BESIDE = {"APOLLO-Mini, gap 200": ("apollo.Mini", 1e-2, {})}   # no contender: its default, one projection throughout on both texts
TARGETS = {"AdamW": ("adamw.AdamW", 4e-3, {}), "NAdamW": ("baselines.NAdamW", 4e-3, {})}
POINTS, STUDIES, SEARCH, RERUNS = 5, 3, 8, 5                  # trials of a study; studies; trials of each of the two that set a target; fresh seeds of the better
LENGTH = 2/3                                                   # a target is what the two reach in this share of the steps

def space(n, seed):
    "The search space: n points of a scrambled Sobol sequence, the same for every optimizer and workload."
    for u in qmc.Sobol(4, seed=seed).random(1 << (n - 1).bit_length())[:n]: yield dict(factor=float(f"{2**(-3 + 5*u[0]):.4g}"), warmup=float(f"{.02*5**u[1]:.4g}"), decay=float(f"{1e-3*200**u[2]:.4g}"), horizon=(1/2, 2/3, 1)[int(3*u[3])])

def prepare(c):
    "Workload, optimizer and schedule of a configuration."
    torch.set_num_threads(1); make, most, every = WORKLOADS[c["workload"]]; torch.manual_seed(c["seed"]); model, loss, score = make(c["seed"])
    o = member("optimizers", c["optimizer"])(model.named_parameters(), lr=c["lr"], weight_decay=c["decay"], **c.get("args", {})); averaged = hasattr(o, "eval")
    warmup = max(1, round(c["warmup"]*most)); η = (lambda t: min((t + 1)/warmup, 1)) if averaged else cosine(round(c["horizon"]*most), warmup)
    def step(t):
        for g in o.param_groups: g["lr"] = c["lr"]*η(t)
        ℓ = loss(); ℓ.backward(); nn.utils.clip_grad_norm_(model.parameters(), 1.); o.step(); o.zero_grad()
        return ℓ.item()
    return model, o, step, score, averaged

def trial(c):
    "One run up to its target, or to the end; scoring is not timed, what an optimizer does before it is."
    model, o, step, score, averaged = prepare(c); _, most, every = WORKLOADS[c["workload"]]; clock, spent, curve = time.thread_time, 0., []
    for t in range(c["steps"]):
        start = clock(); ℓ = step(t); spent += clock() - start
        if not math.isfinite(ℓ): break
        if (t + 1) % every: continue
        start = clock(); o.eval() if averaged else None; spent += clock() - start
        curve.append(float(f"{s:.4g}") if math.isfinite(s := score()) else None)
        if curve[-1] is None or c["target"] is not None and s <= c["target"]: break
        start = clock(); o.train() if averaged else None; spent += clock() - start
    hit = bool(c["target"] is not None and curve and curve[-1] is not None and curve[-1] <= c["target"])
    return dict(hit=hit, steps=t + 1, cpu_s=round(spent, 3), best=min((x for x in curve if x is not None), default=None), curve=curve)

def run(configs):
    from time_to_target import trial as f
    return [r.get("result", r) for r in sweep(f, configs, HERE/"results"/"time_to_target.jsonl", here)]

def config(workload, method, point, seed, steps, target):
    optimizer, rate, args = method
    return dict(workload=workload, optimizer=optimizer, lr=float(f"{rate*point['factor']:.4g}"), **{k: point[k] for k in ("warmup", "decay", "horizon")}, seed=seed, steps=steps, target=target) | (dict(args=args) if args else {})

def target(workload):
    "The better of two searches, run again on fresh seeds: the median of what it ends with."
    steps = round(LENGTH*WORKLOADS[workload][1]); points = [p | dict(horizon=LENGTH) for p in space(SEARCH, 1000)]
    asked = [config(workload, method, p, 1000, steps, None) for method in TARGETS.values() for p in points]; last = lambda r: math.inf if not r["curve"] or r["curve"][-1] is None else r["curve"][-1]
    found = run(asked); best = min(range(len(asked)), key=lambda i: last(found[i]))
    ends = [last(r) for r in run([asked[best] | dict(seed=2000 + i) for i in range(RERUNS)])]
    return dict(target=float(f"{statistics.median(ends):.4g}"), ends=ends, optimizer=asked[best]["optimizer"], lr=asked[best]["lr"], searched=[dict(optimizer=a["optimizer"], lr=a["lr"], end=r["curve"][-1] if r["curve"] else None) for a,r in zip(asked, found)])

def measured(workload, label):
    "Peak bytes of a training step and of its parts, by watching every tensor."
    model, o, step, *_ = prepare(config(workload, CONTENDERS[label], next(space(1, 0)), 0, 1, None)); step(0)
    held = [*model.parameters(), *model.buffers(), *(v for s in o.state.values() for v in s.values())]
    with (live := _Live(*held)): step(1)
    return dict(weights=sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), state=sum(v.nbytes for s in o.state.values() for v in s.values()), rest=live.peak, peak=sum(t.nbytes for t in held) + live.peak)

def costs(workload, rounds=7, steps=GAP["gap"]):
    "CPU seconds of a step of every contender, in turns; in each of them Mini draws one projection."
    steppers, taken = {}, {label: [] for label in CONTENDERS}
    for label,method in CONTENDERS.items(): steppers[label] = prepare(config(workload, method, next(space(1, 0)), 0, 1, None))[2]
    for r in range(rounds + 1):
        for label,step in steppers.items():
            start = time.thread_time(); [step(r*steps + i) for i in range(steps)]; r and taken[label].append((time.thread_time() - start)/steps)
    return {label: dict(median=statistics.median(x), lowest=min(x), highest=max(x)) for label,x in taken.items()}

def study(studies):
    "Targets, then all trials; for each workload and contender, the best trial of every study."
    sys.stdout.reconfigure(line_buffering=True); targets, out, beside = {}, {}, {}
    for w in WORKLOADS: targets[w] = target(w); print(w, {k: v for k,v in targets[w].items() if k != "searched"})
    asked = {(w, label, s, i): config(w, method, p, 10*s, WORKLOADS[w][1], targets[w]["target"]) for s in range(studies) for w in WORKLOADS for label,method in (CONTENDERS | BESIDE).items() for i,p in enumerate(space(POINTS, s))}
    found = dict(zip(asked, run(list(asked.values()))))
    for w in WORKLOADS:
        seconds = costs(w)
        for label in CONTENDERS | BESIDE:
            of_study = [[found[w, label, s, i] for i in range(POINTS)] for s in range(studies)]
            steps = [min((r["steps"] for r in rs if r["hit"]), default=None) for rs in of_study]
            came = dict(steps=steps, hits=[sum(r["hit"] for r in rs) for rs in of_study], best=[min((r["best"] for r in rs if r["best"] is not None), default=None) for rs in of_study],
                raw_cpu_s=[min((r["cpu_s"] for r in rs if r["hit"]), default=None) for rs in of_study])
            if label in BESIDE: beside.setdefault(w, {})[label] = came
            else: out.setdefault(w, {})[label] = came | dict(step_s=seconds[label], memory=measured(w, label))
    return dict(torch=torch.__version__, points=POINTS, studies=studies, planned=STUDIES, length=LENGTH, space={s: list(space(POINTS, s)) for s in range(studies)}, references={k: dict(optimizer=o, lr=lr, args=a) for k,(o,lr,a) in CONTENDERS.items()},
        workloads={w: dict(steps=n, every=e, **targets[w]) for w,(_,n,e) in WORKLOADS.items()}, results=out, beside=beside)

if __name__ == "__main__":
    sys.path.insert(0, str(HERE)); (HERE/"results"/"time_to_target.json").write_text(json.dumps(study(int(sys.argv[1]) if len(sys.argv) > 1 else STUDIES), indent=1) + "\n")
