"""APOLLO with dense and with sparse projections: held-out bits per byte of a small model on the shipped corpus, two learning rates, three seeds each.
Every finished trial is a line of results/sketch.jsonl and is not made again; results/sketch.json is the table."""
import json, time
from pathlib import Path

import torch
from paretolab.data import corpus, split, tokens
from paretolab.data.stream import MixedStream
from paretolab.engine.evaluate import bits_per_byte, macro, windows
from paretolab.engine.fit import losses
from paretolab.engine.schedules import cosine
from paretolab.models.mobilellm import MobileLLM
from paretolab.models.shape import Shape
from paretolab.optimizers.apollo import APOLLO, Mini
from paretolab.optimizers.lowrank import Gaussian, Sparse

torch.set_num_threads(1)
HERE = Path(__file__).parent
JOURNAL, VOCAB, LENGTH, BATCH, STEPS, RANK, GAP = HERE/"results"/"sketch.jsonl", 512, 128, 8, 200, 32, 20
MODEL = Shape(vocab=VOCAB, dim=128, ff=352, layers=2, heads=4, kv_heads=2, context=LENGTH)
CONTENDERS = {"dense": (APOLLO, Gaussian), "s = 1": (APOLLO, lambda seed: Sparse(seed, 1)), "s = 2": (APOLLO, Sparse), "Mini, dense": (Mini, Gaussian), "Mini, signs": (Mini, Sparse)}
RATES, SEEDS = {APOLLO: (0.01, 0.02), Mini: (0.005, 0.01)}, range(3)

def text():
    "Training tokens, their weights, held-out windows, bytes of an entry."
    train, valid = split.split(corpus.load("tiny")); tok = tokens.train_tokenizer(train, VOCAB); folder = HERE.parent/"runs"/f"bench-{VOCAB}"
    T, V = (tokens.build(part, tok, folder/name) for name,part in (("train", train), ("valid", valid)))
    mass = {d: len(t)**.5 for d,t in T.items()}
    return T, {d: m/sum(mass.values()) for d,m in mass.items()}, windows(V, LENGTH, 8), torch.from_numpy(tokens.token_bytes(tok))

def trial(name, lr, seed):
    kind, projection = CONTENDERS[name]
    torch.manual_seed(seed); model = MobileLLM(MODEL)
    o = kind(model.named_parameters(), lr=lr, gap=GAP, **(dict(rank=RANK) if kind is APOLLO else {})); o.projection = projection(seed)
    η, stream, start = cosine(STEPS, STEPS//10), MixedStream(T, weights, BATCH, LENGTH, seed), time.thread_time()
    for t in range(STEPS):
        for g in o.param_groups: g["lr"] = lr*η(t)
        losses(model, next(stream)[0]).mean().backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.); o.step(); o.zero_grad()
    stream.close()
    return dict(name=name, lr=lr, seed=seed, bpb=round(macro(bits_per_byte(model, W, lengths)), 5), cpu_s=round(time.thread_time() - start, 1))

T, weights, W, lengths = text()
done = [json.loads(line) for line in JOURNAL.read_text().splitlines()] if JOURNAL.exists() else []
known = {(r["name"], r["lr"], r["seed"]) for r in done}
def write():
    "The table of what is done."
    table = {name: {str(lr): [r["bpb"] for r in sorted(done, key=lambda r: r["seed"]) if (r["name"], r["lr"]) == (name, lr)] for lr in RATES[kind]} for name,(kind,_) in CONTENDERS.items()}
    (HERE/"results"/"sketch.json").write_text(json.dumps(dict(steps=STEPS, batch=BATCH, length=LENGTH, rank=RANK, gap=GAP, parameters=MODEL.parameters, seeds=list(SEEDS), bpb=table), indent=1) + "\n")

for i,seed in ((i, seed) for i in range(2) for seed in SEEDS):
    for name,lr in ((name, RATES[kind][i]) for name,(kind,_) in CONTENDERS.items()):
        if (name, lr, seed) in known: continue
        done.append(trial(name, lr, seed)); print(done[-1], flush=True)
        with JOURNAL.open("a") as f: f.write(json.dumps(done[-1]) + "\n")
        write()
