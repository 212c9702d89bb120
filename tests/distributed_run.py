"""Runs of several processes for tests/test_distributed.py, forked from one warm process: `python distributed_run.py NAME`."""
import contextlib, hashlib, json, os, random, signal, sys, tempfile, time, warnings
from datetime import timedelta
from pathlib import Path

import numpy as np, torch, torch.distributed as dist
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor    # once, before the forks
from torch.nn.parallel import DistributedDataParallel as DDP
from paretolab.data.stream import MixedStream
from paretolab.engine import commits, pieces
from paretolab.engine.distributed import Team, shard
from paretolab.engine.fit import fit
from paretolab.engine.schedules import cosine
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.optimizers import apollo, galore, lion, low_bit_states
from paretolab.optimizers.state_codes import Tree

torch.set_num_threads(1); warnings.simplefilter("ignore"); os.environ["GLOO_SOCKET_IFNAME"] = "lo"
STEPS, EVERY = 12, 3

class Text:
    def __init__(self, t): self.t = t
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]
rng = np.random.default_rng(0)
TEXT = {d: Text(rng.integers(k, k + 20, 900)) for d,k in dict(a=0, b=40).items()}

class Mixer:
    "A hook with a state that steers the stream."
    def __init__(self, stream): self.stream, self.mean = stream, dict(a=0., b=0.)
    def on_losses(self, step, per_domain):
        for d,l in per_domain.items(): self.mean[d] = round(.9*self.mean[d] + .1*l, 3)      # coarser than rounding, so that any number of processes steers alike
    def on_step(self, step, record): p = .5 + .2*self.mean["a"]/(self.mean["a"] + self.mean["b"] + 1); self.stream.weights = dict(a=p, b=1 - p)
    def state_dict(self): return self.mean
    def load_state_dict(self, s): self.mean = dict(s)

class Noise:
    "Random numbers in a step, other ones on each process."
    def on_gradients(self, step, model):
        for p in model.parameters(): (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).add_(1e-4*torch.randn(()))

adamw = lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, fused=True)
class Eight(low_bit_states.AdamW): states = low_bit_states.Small(Tree(), least=64)                # so that matrices as small as these count
OPTIMIZERS = dict(AdamW=adamw, Lion=lambda m: lion.Lion(m.named_parameters(), lr=1e-3), APOLLO=lambda m: apollo.APOLLO(m.named_parameters(), lr=3e-3, gap=4),
    GaLore=lambda m: galore.GaLore(m.named_parameters(), lr=3e-3, gap=4), AdamW8=lambda m: Eight(m.named_parameters(), lr=3e-3), SGD=lambda m: torch.optim.SGD(m.parameters(), lr=.1, momentum=.9))

def make(how="fsdp", optimizer="AdamW", batch=6, seed=0):
    torch.manual_seed(seed)
    model = MobileLLM(Shape(vocab=64, dim=32, ff=40, layers=2, heads=2, kv_heads=1, context=16))
    if dist.is_initialized(): model = DDP(model) if how == "ddp" else shard(model)
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
    return model, MixedStream(TEXT, dict(a=.5, b=.5), batch=batch, length=16), OPTIMIZERS[optimizer](model)

def flat(model): return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in model.parameters()])
def digest(model): return hashlib.sha256(flat(model).numpy().tobytes()).hexdigest()
def state(model, optimizer):
    "Weights and moments, gathered."
    full = lambda t: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()
    return [full(p) for p in model.parameters()] + [full(v) for p in model.parameters() for k,v in sorted(optimizer.state[p].items()) if torch.is_tensor(v)]
def sha(tensors): return hashlib.sha256(b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()

def train(run, hooks=lambda s: (Mixer(s),), steps=STEPS, how="fsdp", optimizer="AdamW", batch=6, seed=0, **kw):
    m, s, o = make(how, optimizer, batch, seed)
    records = fit(m, s, o, cosine(STEPS, 3), hooks(s), **dict(dict(steps=steps, run=run, every=EVERY), **kw)); s.close()
    return m, o, records

def launch(world, f, timeout=60, limit=120, alone=False):
    "Fork processes that call f(rank); what each gave, as JSON, and how each ended. When one dies the others are ended, as torchrun does."
    tmp, pids, ends = Path(tempfile.mkdtemp()), {}, [None]*world
    for rank in range(world):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                if not os.environ.get("LOUD"): os.dup2(os.open(tmp/f"err{rank}", os.O_WRONLY | os.O_CREAT), 2)
                if world > 1 or alone: dist.init_process_group("cpu:gloo", store=dist.FileStore(str(tmp/"store"), world), rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
                (tmp/f"out{rank}").write_text(json.dumps(f(rank)))
                if world > 1 or alone: dist.barrier()
                code = 0
            except BaseException as e:
                import traceback; traceback.print_exc(); sys.stderr.flush()
                (tmp/f"out{rank}").write_text(json.dumps(dict(error=f"{type(e).__name__}: {e}", after=round(time.perf_counter() - t0, 2))) if "t0" in globals() else json.dumps(dict(error=f"{type(e).__name__}: {e}")))
            finally: os._exit(code)
        pids[pid] = rank
    start = time.perf_counter()
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid: ends[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif time.perf_counter() - start > limit or any(e is not None and e < 0 for e in ends) and time.perf_counter() - died > 10:
            for p in pids: os.kill(p, signal.SIGKILL)
        else: time.sleep(.02)
        if not any(e is not None and e < 0 for e in ends): died = time.perf_counter()
    read = lambda r: json.loads((tmp/f"out{r}").read_text()) if (tmp/f"out{r}").exists() else None
    return [read(r) for r in range(world)], ends

def ok(world, f, **kw):
    out, ends = launch(world, f, **kw)
    assert ends == [0]*world, (ends, out)
    return out

def folder(): return Path(tempfile.mkdtemp())

# What is asked

def agree():
    "Loss, domain losses and weights at 1, 2, 3 processes, FSDP2 and DDP, whole batches and parts."
    def one(how, accumulate, keep):
        def f(rank):
            m, o, r = train(folder() if world == 1 else keep, how=how, accumulate=accumulate)
            return dict(loss=[x["loss"] for x in r], norm=[x["norm"] for x in r], per=[x["per_domain"] for x in r], flat=flat(m).tolist())
        return f
    found = {}
    for how in ("fsdp", "ddp"):
        for accumulate in (1, 2):
            for world in (1, 2, 3):
                outs = ok(world, one(how, accumulate, folder()))
                assert all(o == outs[0] for o in outs)
                found[f"{how} {accumulate} {world}"] = outs[0]
    return found

class First(Mixer):
    "Also asks, before the first step of a call, what was loaded."
    def __init__(self, stream, ask): super().__init__(stream); self.ask, self.sha = ask, None
    def loss_weights(self, step, tokens, domain): self.sha = self.sha or self.ask()

def reshard():
    "Saved at K, loaded at K', for every pair and several optimizers; also DDP to FSDP2 and back, and one sharded process."
    kinds = [(o, "fsdp") for o in OPTIMIZERS] + [("AdamW", "ddp")]
    here, found = {(o, how, K): folder() for o,how in kinds for K in (1, 2, 3)}, []
    def save(K):
        def f(rank):
            out = {}
            for o,how in kinds:
                m, opt, _ = train(here[o, how, K], steps=6, optimizer=o, how=how)
                out[o, how] = sha(state(m, opt))
            return [[*k, v] for k,v in out.items()]
        return f
    saved = {(o, how, K): v for K in (1, 2, 3) for o,how,v in ok(K, save(K))[0]}
    def load(K2, pairs):
        def f(rank):
            out = []
            for o,how,K,to in pairs:
                run = here[o, how, K].parent/f"{here[o, how, K].name}-{to}{K2}"
                if rank == 0: import shutil; shutil.copytree(here[o, how, K], run)
                if dist.is_initialized(): dist.barrier()
                m, s, opt = make(to, o, seed=7)
                first = First(s, lambda: sha(state(m, opt)))
                r = fit(m, s, opt, cosine(STEPS, 3), (first,), steps=STEPS, run=run); s.close()
                out.append([o, how, K, to, first.sha, [x["loss"] for x in r]])
            return out
        return f
    for K2 in (1, 2, 3):
        pairs = [(o, how, K, "fsdp") for o,how,K in saved] + [("AdamW", "fsdp", K, "ddp") for K in (1, 2, 3)]
        for o,how,K,to,loaded,loss in ok(K2, load(K2, pairs))[0]: found.append(dict(optimizer=o, saved=f"{how} {K}", loaded=f"{to} {K2}", same=loaded == saved[o, how, K], loss=loss))
    for o,how,K,to,loaded,loss in ok(1, load(11, [("AdamW", "fsdp", K, "fsdp") for K in (1, 2, 3)]), alone=True)[0]: found.append(dict(optimizer=o, saved=f"{how} {K}", loaded="fsdp 1 sharded", same=loaded == saved[o, how, K], loss=loss))
    return found

if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True); os._exit(0)
