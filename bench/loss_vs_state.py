"""Held-out bits per byte against bytes of optimizer state on the shipped corpus: every optimizer, one small shape, four learning rates each, and two more seeds at the best of them.
Every finished trial is a line of results/loss_vs_state.jsonl and is not made again."""
import inspect, json, math, sys, time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from paretolab.data import corpus, split, tokens
from paretolab.data.stream import MixedStream
from paretolab.engine.evaluate import bits_per_byte, macro, windows
from paretolab.engine.fit import losses
from paretolab.engine.schedules import cosine
from paretolab.engine.settings import member
from paretolab.engine.sweep import sweep, trial as attempt
from paretolab.models.mobilellm import MobileLLM
from paretolab.models.shape import Shape

HERE = Path(__file__).parent
GAP = dict(gap=20)                                             # steps between projections: a twelfth of a run, as a short run needs them
CONTENDERS = [                                                 # label, optimizer, what differs from its defaults
    ("AdamW", "adamw.AdamW", {}), ("Muon", "muon.Muon", {}), ("Lion", "lion.Lion", {}), ("APOLLO-Mini", "apollo.Mini", GAP), ("SCALE", "scale.SCALE", {}), ("Schedule-Free", "baselines.ScheduleFree", {}),
    ("NAdamW", "baselines.NAdamW", {}), ("APOLLO r=16", "apollo.APOLLO", GAP | dict(rank=16)), ("APOLLO r=4", "apollo.APOLLO", GAP | dict(rank=4)), ("GaLore r=16", "galore.GaLore", GAP | dict(rank=16)),
    ("GaLore r=4", "galore.GaLore", GAP | dict(rank=4)), ("SOAP", "baselines.SOAP", {}), ("Sophia-G", "sophia.Sophia", {}), ("Adafactor", "baselines.Adafactor", {}),
    ("AdamW, 8 bits", "low_bit_states.AdamW8", {}), ("AdamW, tree", "low_bit_states.AdamTree", {}), ("AdamW, FP8", "low_bit_states.AdamFP8", {}),
]
RUN = dict(vocab=512, dim=64, ff=176, layers=4, heads=4, kv_heads=2, length=64, batch=8, steps=240, warmup=24, decay=0., clip=1.)
RATES, SWEPT, FRESH = (1/4, 1, 4, 16), 100, (0, 1)              # times the default rate; the seed they are compared on, and two more

@cache
def text(vocab, length, n=8):
    "The shipped text under a vocabulary of its own: training tokens, their weights, held-out windows, bytes of an entry."
    train, valid = split.split(corpus.load("tiny")); tok = tokens.train_tokenizer(train, vocab); folder = HERE.parent/"runs"/f"bench-{vocab}"
    T, V = (tokens.build(part, tok, folder/name) for name,part in (("train", train), ("valid", valid)))
    mass = {d: len(t)**.5 for d,t in T.items()}
    return SimpleNamespace(tokens=T, weights={d: m/sum(mass.values()) for d,m in mass.items()}, windows=windows(V, length, n), bytes=torch.from_numpy(tokens.token_bytes(tok)))

def estimate(o, model, x, generator):
    "Sophia's own: a gradient on labels drawn from the model."
    from paretolab.optimizers.sophia import sample
    z = model(x[:,:-1]); torch.nn.functional.cross_entropy(z.flatten(0, 1), sample(z, generator).flatten()).backward()
    o.observe(x[:,1:].numel()); o.zero_grad()

def trial(c):
    "One run from a configuration; what came out."
    torch.set_num_threads(1); torch.manual_seed(c["seed"]); start = time.thread_time()
    d = text(c["vocab"], c["length"]); model = MobileLLM(Shape(context=c["length"], **{k: c[k] for k in ("vocab", "dim", "ff", "layers", "heads", "kv_heads")}))
    kind = member("optimizers", c["optimizer"]); o = kind(model.named_parameters(), lr=c["lr"], weight_decay=c["decay"], **c["args"])
    averaged = c["optimizer"].endswith("ScheduleFree"); η = (lambda t: min((t + 1)/c["warmup"], 1)) if averaged else cosine(c["steps"], c["warmup"])
    stream, generator, curve, total = MixedStream(d.tokens, d.weights, c["batch"], c["length"], c["seed"]), torch.Generator().manual_seed(c["seed"]), [], 0.
    for t in range(c["steps"]):
        for g in o.param_groups: g["lr"] = c["lr"]*η(t)
        x, _ = next(stream)
        if getattr(o, "due", False): estimate(o, model, x, generator)
        ℓ = losses(model, x).mean(); ℓ.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), c["clip"]); o.step(); o.zero_grad(); total += ℓ.item()
        if (t + 1) % 20 == 0: curve.append(round(total/20, 4)); total = 0.
        if not math.isfinite(ℓ.item()): break
    stream.close()
    if averaged: o.eval()
    state = sum(v.nbytes for s in o.state.values() for v in s.values()); shapes = {n: p.shape for n,p in model.named_parameters()}
    assert state == kind.state_bytes(shapes, c["args"].get("rank"))
    bpb = bits_per_byte(model, d.windows, d.bytes); bpb = bpb if math.isfinite(macro(bpb)) else None
    return dict(bpb=bpb and round(macro(bpb), 5), domains=bpb and {k: round(v, 4) for k,v in bpb.items()}, curve=curve if bpb else None, state=state, weights=sum(p.nbytes for p in model.parameters()), cpu_s=round(time.thread_time() - start, 2))

def here(name, todo):
    "Executor: one trial after the other in this process, said aloud."
    for i,(key,c) in enumerate(todo):
        out = attempt(name, c); print(f"{i + 1}/{len(todo)}", c, {k: v for k,v in out.get("result", out).items() if k in ("bpb", "cpu_s", "error", "steps")}, flush=True)
        yield key, out

def study():
    "All trials; the table."
    from loss_vs_state import trial as f                      # by a name another process could import
    make = lambda optimizer, args, lr, seed: RUN | dict(optimizer=optimizer, args=args, lr=float(f"{lr:.3g}"), seed=seed)
    run = lambda configs: iter([r.get("result", r) for r in sweep(f, configs, HERE/"results"/"loss_vs_state.jsonl", here)])
    base = [inspect.signature(member("optimizers", o)).parameters["lr"].default for _,o,_ in CONTENDERS]
    found = run([make(o, a, b*x, SWEPT) for (_,o,a),b in zip(CONTENDERS, base) for x in RATES]); swept = [{b*x: next(found) for x in RATES} for b in base]
    best = [min(s, key=lambda lr: math.inf if s[lr]["bpb"] is None else s[lr]["bpb"]) for s in swept]
    found = run([make(o, a, lr, seed) for seed in FRESH for (_,o,a),lr in zip(CONTENDERS, best)]); fresh = [[next(found) for _ in CONTENDERS] for _ in FRESH]
    return [dict(label=label, optimizer=o, args=a, default=b, best=float(f"{lr:.3g}"), edge=lr in (min(s), max(s)), state=s[lr]["state"], weights=s[lr]["weights"],
        sweep={f"{x:.3g}": s[x]["bpb"] for x in s}, bpb=[x["bpb"] for x in (s[lr], *r)], domains=[x["domains"] for x in (s[lr], *r)], curve=s[lr]["curve"], cpu_s=[x["cpu_s"] for x in (s[lr], *r)]) for (label,o,a),b,lr,s,r in zip(CONTENDERS, base, best, swept, zip(*fresh))]

if __name__ == "__main__":
    sys.path.insert(0, str(HERE)); table = study()
    (HERE/"results"/"loss_vs_state.json").write_text(json.dumps(dict(torch=torch.__version__, run=RUN, rates=RATES, seeds=(SWEPT, *FRESH), table=table), indent=1) + "\n")
    for r in sorted(table, key=lambda r: r["bpb"][0]): print(f"{r['label']:>14}: {sum(r['bpb'])/len(r['bpb']):.4f} bits per byte ({min(r['bpb']):.4f} to {max(r['bpb']):.4f}), {r['state']/r['weights']:.3f} of the weights' bytes, lr {r['best']}" + ", at the edge of the sweep"*r["edge"])
