"""What delivering batches costs beside a training step, and the memory that a 4 GB token file takes while all of it is streamed."""
import json, os, platform, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, torch
from machine import processor
from paretolab.data.stream import MixedStream
from paretolab.data.tokens import Tokens
from paretolab.engine.fit import losses
from paretolab.models.mobilellm import MobileLLM, mobilellm

torch.set_num_threads(1)
B, L, ROUNDS, DOMAINS, BYTES = 8, 512, 7, 10, 4_000_000_000

def write(folder, name, nbytes, seed=0):
    "A file of random 16-bit tokens, no block of it sparse, and its record."
    rng = np.random.default_rng(seed)
    with open(folder/f"{name}.tokens", "wb") as f:
        for at in range(0, nbytes, 2**24):
            f.write(rng.bytes(min(2**24, nbytes - at)))
        f.flush(); os.fsync(f.fileno())
    (folder/f"{name}.json").write_text(json.dumps(dict(tokens=nbytes//2, dtype="uint16")))

# One epoch in a process of its own; windows are shorter than a page of memory, so that no page is left out
EPOCH = """
import json, sys, time
import numpy as np
from paretolab.data.stream import MixedStream
from paretolab.data.tokens import Tokens
memory = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))*1024
class Watched(Tokens):
    def read(self, start, n):
        pages[2*start//4096:(2*(start + n) - 1)//4096 + 1] = True
        return super().read(start, n)
t = Watched(sys.argv[1])
pages = np.zeros(-(-2*len(t)//4096), bool)
s, before, began = MixedStream(dict(a=t), dict(a=1.), batch=256, length=1024), memory(), time.perf_counter()
while s.state["epoch"][0] == 0: next(s)
s.close()
print(json.dumps(dict(pages=len(pages), touched=int(pages.sum()), before=before, peak=memory(), seconds=time.perf_counter() - began)))
"""

def share_of_step(folder):
    "CPU time of `next`, the prefetching thread's included, and of a training step on what it gives."
    for i in range(DOMAINS): write(folder, f"d{i}", 2_000_000, seed=i)
    stream = MixedStream({f"d{i}": Tokens(folder/f"d{i}.tokens") for i in range(DOMAINS)}, {f"d{i}": 1/DOMAINS for i in range(DOMAINS)}, B, L)
    model = MobileLLM(mobilellm("tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    def step(tokens):
        losses(model, tokens % 4096).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.).item()
        optimizer.step(); optimizer.zero_grad()
    step(next(stream)[0])
    deliver, train = [], []
    for _ in range(ROUNDS):
        start = time.process_time()                                      # all threads of this process
        for _ in range(100): tokens, _ = next(stream)
        deliver.append((time.process_time() - start)/100)
        start = time.process_time()
        step(tokens)
        train.append(time.process_time() - start)
    stream.close()
    return sorted(deliver), sorted(train)

folder = Path(tempfile.mkdtemp())
try:
    if shutil.disk_usage(folder).free < 1.5*BYTES: sys.exit(f"{folder} needs {1.5*BYTES/1e9:.0f} GB of free disk")
    deliver, train = share_of_step(folder)
    write(folder, "large", BYTES)
    on_disk = os.stat(folder/"large.tokens").st_blocks*512
    run = subprocess.run([sys.executable, "-c", EPOCH, folder/"large.tokens"], capture_output=True, text=True)
    if run.returncode: sys.exit(run.stderr)
finally: shutil.rmtree(folder)

seen, (low, high) = json.loads(run.stdout), (deliver[ROUNDS//2]/train[-1], deliver[ROUNDS//2]/train[0])
assert on_disk >= BYTES and seen["touched"] == seen["pages"]
cpu = processor()
result = dict(machine=platform.machine(), cpu=cpu, torch=torch.__version__, shape="tiny", batch=B, length=L, domains=DOMAINS, rounds=ROUNDS,
    next_s=round(deliver[ROUNDS//2], 6), step_s=round(train[ROUNDS//2], 4), share_of_step=round(deliver[ROUNDS//2]/train[ROUNDS//2], 5), share_lowest=round(low, 5), share_highest=round(high, 5),
    file_bytes=BYTES, on_disk_bytes=on_disk, pages=seen["pages"], pages_touched=seen["touched"], epoch_s=round(seen["seconds"], 1),
    before_bytes=seen["before"], peak_bytes=seen["peak"])
(Path(__file__).parent/"results"/"stream.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"a batch costs {result['share_of_step']:.2%} of a step ({result['next_s']*1e3:.2f} ms); {BYTES/1e9:.0f} GB streamed in {result['epoch_s']} s with a peak of {seen['peak']/1e6:.0f} MB ({seen['before']/1e6:.0f} MB before)")
