"""Sharded parameters: equal to one process at any number of them, with no more numbers sent than was counted; one spawn a world size."""
import json, os, subprocess, sys

import pytest

CHILD = r'''
import json, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from paretolab.optimizers import adamw, apollo, lowrank

world, steps = int(os.environ["WORLD_SIZE"]), int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo"); mesh = init_device_mesh("cpu", (world,))
SHAPES = {"embed.weight": (11, 7), "up.weight": (96, 48), "down.weight": (48, 96), "odd.weight": (50, 33), "side.weight": (48, 96), "tiny.weight": (2, 5), "norm.weight": (33,)}
DIMS = {n: n == "side.weight" for n in SHAPES}                             # one matrix is cut along its columns
KINDS = {"AdamW": (adamw.AdamW, {}), "APOLLO": (apollo.APOLLO, dict(gap=5)), "Mini": (apollo.Mini, dict(gap=5))}

def gradients(t): g = torch.Generator().manual_seed(t); return {n: torch.randn(s, generator=g) for n,s in SHAPES.items()}
def start(): g = torch.Generator().manual_seed(99); return {n: torch.randn(s, generator=g) for n,s in SHAPES.items()}

sent, plain = [], dist.all_reduce
def counted(t, *args, **kw): sent.append(t.numel()); return plain(t, *args, **kw)
dist.all_reduce = counted

def run(kind, kw, spread, collect, steps):
    P = {n: nn.Parameter(spread(n, w)) for n,w in start().items()}
    o = kind(P.items(), **kw); sent.clear()
    for t in range(steps):
        for n,g in gradients(t).items(): P[n].grad = spread(n, g)
        o.step()
    messages = list(sent)
    return {n: collect(p.detach()) for n,p in P.items()}, o, messages

def part(n, w): return w.chunk(world, int(DIMS[n]))[dist.get_rank()].clone() if dist.get_rank() < len(w.chunk(world, int(DIMS[n]))) else w[:0].clone()
shard = lambda n, w: distribute_tensor(w, mesh, [Shard(int(DIMS[n]))])
off = lambda got, want, was: {n: ((got[n] - want[n]).abs().max()/(want[n] - was[n]).abs().max()).item() for n in want}
result, was = {}, start()
for name,(kind,kw) in KINDS.items():
    want, one, _ = run(kind, kw, lambda n, w: w.clone(), lambda p: p, steps)
    got, o, messages = run(kind, kw, shard, lambda p: p.full_tensor(), steps)
    naive, n, _ = run(kind, kw, part, lambda p: p, steps)                                   # as if its piece were the matrix
    share = off({k: v for k,v in naive.items() if v.numel()}, {k: part(k, v) for k,v in want.items() if naive[k].numel()}, {k: part(k, v) for k,v in was.items() if naive[k].numel()})
    state = sum(v.to_local().nbytes if isinstance(v, DTensor) else v.nbytes for s in o.state.values() for v in s.values())
    result[name] = dict(error=off(got, want, was), naive=max(share.values()), sent=sum(messages)/steps, messages=len(messages)/steps, state=state)
    # saved pieces come back whole: the tensors of state are sharded tensors, of the shapes of the ledger
    for (k,p),(k1,p1) in zip(zip(SHAPES, o.state), zip(SHAPES, one.state)):
        for key,v in one.state[p1].items():
            full = o.state[p][key].full_tensor() if isinstance(o.state[p][key], DTensor) else o.state[p][key]
            assert full.shape == v.shape and torch.allclose(full, v, rtol=1e-4, atol=1e-5*float(v.abs().max())), (name, k, key)

# a model as users shard it, and its state through torch's own sharded state dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24, bias=False), nn.RMSNorm(24), nn.Linear(24, 12, bias=False))
def train(m, o, steps, at=0):
    for t in range(at, at + steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(t))
        o.zero_grad(); m(x).pow(2).mean().backward(); o.step()
for name,(kind,kw) in KINDS.items():
    want = model(); train(want, kind(want.named_parameters(), lr=1e-2, **kw), 8)
    m = fully_shard(model()); o = kind(m.named_parameters(), lr=1e-2, **kw); train(m, o, 4)
    ms, os_ = get_state_dict(m, o)
    again = fully_shard(model()); o2 = kind(again.named_parameters(), lr=1e-2, **kw)
    set_state_dict(again, o2, model_state_dict=ms, optim_state_dict=os_); train(again, o2, 4, at=4); train(m, o, 4, at=4)
    for p,q,w in zip(m.parameters(), again.parameters(), want.parameters()):
        assert torch.equal(p.full_tensor(), q.full_tensor()), name                          # resumed to the bit
        assert torch.allclose(p.full_tensor(), w, rtol=1e-5, atol=1e-6), (name, (p.full_tensor() - w).abs().max())
if dist.get_rank() == 0: print(json.dumps(result))
dist.destroy_process_group()
'''

def spawn(world, steps):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--no-python", sys.executable, "-c", CHILD, str(steps)]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])

# numbers sent in a step: rows of R for matrices that are not aligned, n*r, then the sums of all matrices in one message
UNALIGNED = {"down.weight": 96, "tiny.weight": 5}
RANK = {"down.weight": 12, "tiny.weight": 1}
MATRICES = 5
def expected(kind, world):
    if kind in ("AdamW",): return 0, 0
    channels = {"APOLLO": 1, "Mini": 0}[kind]
    rows = sum(n*(RANK[k] if channels else 1) for k,n in UNALIGNED.items())
    sums = MATRICES if channels else 3*(MATRICES - len(UNALIGNED)) + len(UNALIGNED)
    return rows + sums, len(UNALIGNED) + 1

def check(world, steps):
    for kind,r in spawn(world, steps).items():
        assert max(r["error"].values()) < 1e-5, (kind, r["error"])
        assert (r["sent"], r["messages"]) == expected(kind, world), (kind, r["sent"], r["messages"])
        if world > 1 and expected(kind, world)[0]: assert r["naive"] > 1e-3, (kind, r["naive"])     # the same bound would see a wrong program
        print(world, kind, f"error {max(r['error'].values()):.1e}, naive {r['naive']:.2g}, {r['sent']:.0f} numbers sent, state here {r['state']}")

@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_optimizer_at_every_number_of_processes(world): check(world, 6)

@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_longer(world): check(world, 40)
