"""Many tiny models as one batched program against the same models one by one: CPU time of a training step of all, on one thread, taken in turns.
Two single-thread processes do twice what one does on two free cores, whichever way each of them trains: so the ratio here is also that of two processes of stacks to two of single models."""
import json, platform, statistics, time
from pathlib import Path

import numpy as np, torch
from torch import nn
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import losses
from paretolab.mixers.stacked import stacked
from paretolab.models.mobilellm import MobileLLM, Shape

torch.set_num_threads(1)
MODELS, ROUNDS, STEPS = 8, 5, 2

class Numbers:
    def __init__(self, vocab): self.t = np.random.default_rng(0).integers(0, vocab, 20_000)
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]

def adamw(named): return torch.optim.AdamW([p for _,p in named], lr=1e-3, fused=True)

def one_by_one(models, streams):
    for m,s in zip(models, streams):
        o = adamw(m.named_parameters())
        for _ in range(STEPS): losses(m, next(s)[0]).mean().backward(); nn.utils.clip_grad_norm_(m.parameters(), 1.); o.step(); o.zero_grad()

def cpu(f): start = time.process_time(); f(); return time.process_time() - start

def ratio(batch, length, vocab):
    "Median, least and greatest ratio over the rounds, and tokens a second of the stack."
    text = dict(a=Numbers(vocab), b=Numbers(vocab)); models = [MobileLLM(Shape(vocab=vocab, dim=64, ff=192, layers=2, heads=4, kv_heads=2, context=length)) for _ in range(MODELS)]
    streams = [MixedStream(text, dict(a=.5, b=.5), batch, length, i) for i in range(MODELS)]
    ways = [lambda: one_by_one(models, streams), lambda: stacked(models, streams, lambda t: 1., steps=STEPS, optimizer=adamw)]
    for f in ways: f()
    taken = [[cpu(f) for f in ways] for _ in range(ROUNDS)]
    for s in streams: s.close()
    r = sorted(a/b for a,b in taken)
    return dict(batch=batch, length=length, vocab=vocab, ratio=round(r[ROUNDS//2], 3), lowest=round(r[0], 3), highest=round(r[-1], 3), tokens_per_s=round(MODELS*STEPS*batch*length/statistics.median(b for _,b in taken)))

if __name__ == "__main__":
    grid = []
    for vocab in (256, 512, 4096):
        for batch,length in ((2, 16), (4, 32), (8, 64), (4, 128), (16, 128)):
            if vocab == 4096 and batch*length > 512: continue              # a gigabyte of logits
            grid.append(ratio(batch, length, vocab)); print(grid[-1], flush=True)
    (Path(__file__).parent/"results"/"stacked.json").write_text(json.dumps(dict(machine=platform.machine(), torch=torch.__version__, models=MODELS, rounds=ROUNDS, parameters={v: Shape(vocab=v, dim=64, ff=192, layers=2, heads=4, kv_heads=2, context=128).parameters for v in (256, 512, 4096)}, grid=grid), indent=1) + "\n")
