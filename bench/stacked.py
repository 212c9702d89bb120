"""Many tiny models as one batched program against two single-thread processes that train theirs one by one: wall time of a training step of all, taken in turns on two cores.
Three ways with 16 models: two processes of eight, one by one; two processes of eight, stacked; one process with two threads and one stack of 16. Processor time of one thread is kept beside it."""
import json, multiprocessing, platform, statistics, time
from pathlib import Path

import numpy as np, torch
from torch import nn
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import losses
from paretolab.mixers.stacked import stacked
from paretolab.models.mobilellm import MobileLLM, Shape

MODELS, ROUNDS, FILE = 8, 3, Path(__file__).parent/"results"/"stacked.json"

class Numbers:
    def __init__(self, vocab): self.t = np.random.default_rng(0).integers(0, vocab, 20_000)
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]

def adamw(named): return torch.optim.AdamW([p for _,p in named], lr=1e-3, fused=True)

def one_by_one(models, streams, steps):
    for m,s in zip(models, streams):
        o = adamw(m.named_parameters())
        for _ in range(steps): losses(m, next(s)[0]).mean().backward(); nn.utils.clip_grad_norm_(m.parameters(), 1.); o.step(); o.zero_grad()

def made(models, batch, length, vocab):
    text = dict(a=Numbers(vocab), b=Numbers(vocab))
    return ([MobileLLM(Shape(vocab=vocab, dim=64, ff=192, layers=2, heads=4, kv_heads=2, context=length)) for _ in range(models)],
        [MixedStream(text, dict(a=.5, b=.5), batch, length, i) for i in range(models)])

def ways(models, streams, steps): return dict(single=lambda: one_by_one(models, streams, steps), stack=lambda: stacked(models, streams, lambda t: 1., steps=steps, optimizer=adamw))

def worker(pipe):
    "A process with one thread: makes what it is told, then trains it as often as it is told; answers with its processor time."
    torch.set_num_threads(1); f, streams = {}, []
    while (told := pipe.recv()) is not None:
        start = time.process_time()
        if isinstance(told, tuple): [s.close() for s in streams]; m, streams = made(MODELS, *told[:3]); f = ways(m, streams, told[3])
        else: f[told]()
        pipe.send(time.process_time() - start)

def both(pipes, told):
    "Wall time until both processes have answered, and their mean processor time."
    start = time.perf_counter()
    for p in pipes: p.send(told)
    cpu = [p.recv() for p in pipes]
    return time.perf_counter() - start, statistics.fmean(cpu)

def measured(pipes, batch, length, vocab):
    steps = max(2, 512//(batch*length)); both(pipes, (batch, length, vocab, steps))
    m, streams = made(2*MODELS, batch, length, vocab); wide = ways(m, streams, steps)["stack"]
    def threads(): start = time.perf_counter(); wide(); return time.perf_counter() - start
    rounds = []
    for r in range(ROUNDS + 1):
        (single, c), (stack, d) = both(pipes, "single"), both(pipes, "stack")
        rounds.append(dict(two_stacks=single/stack, one_stack=single/threads(), cpu=c/d, tokens_per_s=2*MODELS*steps*batch*length/stack))
    for s in streams: s.close()
    of = lambda k: sorted(r[k] for r in rounds[1:])                      # the first warms up
    return dict(batch=batch, length=length, vocab=vocab, **{k: [round(x, 3) for x in (statistics.median(of(k)), of(k)[0], of(k)[-1])] for k in ("two_stacks", "one_stack", "cpu")}, tokens_per_s=round(statistics.median(of("tokens_per_s"))))

GRID = [(B, L, V) for V in (256, 512, 4096) for B,L in ((2, 16), (4, 32), (8, 32), (8, 64), (4, 128), (16, 128)) if V*B*L <= 4096*512]          # beyond, a gigabyte of logits

if __name__ == "__main__":
    torch.set_num_threads(2); context = multiprocessing.get_context("spawn"); pipes = []
    for _ in range(2): here, there = context.Pipe(); context.Process(target=worker, args=(there,), daemon=True).start(); pipes.append(here)
    grid = []
    for at in GRID: grid.append(measured(pipes, *at)); print(grid[-1], flush=True)
    for p in pipes: p.send(None)
    FILE.write_text(json.dumps(dict(machine=platform.machine(), torch=torch.__version__, models=MODELS, rounds=ROUNDS, parameters={v: made(1, 1, 128, v)[0][0].shape.parameters for v in (256, 512, 4096)}, grid=grid), indent=1) + "\n")
