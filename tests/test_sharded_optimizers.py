"""Sharded parameters: equal to one process at any number of them, with no more numbers sent than was counted."""
import json

import pytest
from processes import run

CHILD = r'''
import json, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from paretolab.optimizers import adamw, apollo, baselines, galore, lion, scale, sophia
from paretolab.optimizers.lowrank import Gaussian
from paretolab.optimizers.stochastic_rounding import stochastic

world, steps = int(os.environ["WORLD_SIZE"]), int(sys.argv[1])
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (world,))
SHAPES = {"embed.weight": (11, 7), "up.weight": (96, 48), "down.weight": (48, 96), "odd.weight": (50, 33), "side.weight": (48, 96), "tiny.weight": (2, 5), "norm.weight": (33,)}
DIMS = {n: n == "side.weight" for n in SHAPES}                             # one matrix is cut along its columns
class Given(galore.GaLore): basis = staticmethod(lambda gram, r, start: torch.linalg.qr(start)[0][:,:r])         # a basis that no rounding touches
class Estimated(sophia.Sophia):                                                                                  # every gradient is also an estimate, of 100 tokens
    def step(self, closure=None): self.observe(100); return super().step(closure)
class Dense(apollo.APOLLO): projection = Gaussian()
KINDS = {"AdamW": (adamw.AdamW, {}), "APOLLO": (apollo.APOLLO, dict(gap=5)), "Dense": (Dense, dict(gap=5)), "Mini": (apollo.Mini, dict(gap=5)), "GaLore": (Given, dict(gap=5)), "Lion": (lion.Lion, {}),
    "Sophia": (Estimated, {}), "SCALE": (scale.SCALE, {}), "NAdamW": (baselines.NAdamW, {})}

def gradients(t): g = torch.Generator().manual_seed(t); return {n: torch.randn(s, generator=g) for n,s in SHAPES.items()}
def start(): g = torch.Generator().manual_seed(99); return {n: torch.randn(s, generator=g) for n,s in SHAPES.items()}

sent, plain = [], dist.all_reduce
def counted(t, *args, **kw): sent.append(t.numel()); return plain(t, *args, **kw)
dist.all_reduce = counted

def run(kind, kw, spread, collect, steps):
    P = {n: nn.Parameter(spread(n, w)) for n,w in start().items()}
    o = kind(P.items(), lr=0.1, **kw); sent.clear()                             # steps far larger than the last bit of a weight
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

# GaLore's own bases, found from pieces: those of the whole gradient, for a spectrum with gaps; and what a refresh sends
S = torch.arange(48, 0, -1.)**2
wide = torch.linalg.qr(torch.randn(96, 48, generator=torch.Generator().manual_seed(5)))[0]*S @ torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(6)))[0]
refresh = {}
for name,basis in (("exact", galore.exact), ("randomised", galore.randomised)):
    for cut in (0, 1):
        bases = []
        for spread in (lambda w: w.clone(), lambda w: distribute_tensor(w, mesh, [Shard(cut)])):
            p = nn.Parameter(spread(torch.zeros(96, 48))); o = galore.GaLore([("w", p)]); o.basis = basis; p.grad = spread(wide); sent.clear(); o.step(); bases.append(o.state[p]["basis"])
        assert torch.allclose(*bases, atol=1e-3), (name, cut, (bases[0] - bases[1]).abs().max())
        refresh[f"{name} {cut}"] = sum(sent) - 96*12*cut
result["refresh"] = refresh

# stochastic rounding: the same bits at every number of processes
ends = []
for spread in (lambda n, w: w.bfloat16(), lambda n, w: shard(n, w.bfloat16())):
    P = {n: nn.Parameter(spread(n, w)) for n,w in start().items()}; o = stochastic(lion.Lion(P.items(), lr=1e-3), seed=2)
    for t in range(3):
        for n,g in gradients(t).items(): P[n].grad = spread(n, g)
        o.step()
    ends.append({n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n,p in P.items()})
assert all(torch.equal(ends[0][n], ends[1][n]) for n in SHAPES)

# what cannot be sharded says so
from paretolab.optimizers import muon
for kind in (muon.Muon, baselines.Adafactor, baselines.SOAP, baselines.ScheduleFree):
    try: kind([("w", nn.Parameter(shard("up.weight", torch.zeros(96, 48))))])
    except ValueError as e: assert "sharded 'w'" in str(e)
    else: raise AssertionError(kind)
w = nn.Parameter(shard("up.weight", torch.zeros(96, 48)))
try: sophia.hutchinson(w.sum(), [w])
except ValueError as e: assert "DTensor" in str(e)
else: raise AssertionError("Hutchinson")

# a model as users shard it, and its state through torch's own sharded state dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24, bias=False), nn.RMSNorm(24), nn.Linear(24, 12, bias=False))
def train(m, o, steps, at=0):
    for t in range(at, at + steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(t))
        o.zero_grad(); m(x).pow(2).mean().backward(); o.step()
for name,(kind,kw) in {k: v for k,v in KINDS.items() if steps > 10 or k in ("AdamW", "APOLLO", "Mini", "GaLore")}.items():
    want = model(); train(want, kind(want.named_parameters(), lr=1e-2, **kw), 8)
    m = fully_shard(model()); o = kind(m.named_parameters(), lr=1e-2, **kw); train(m, o, 4)
    ms, os_ = get_state_dict(m, o)
    again = fully_shard(model()); o2 = kind(again.named_parameters(), lr=1e-2, **kw)
    set_state_dict(again, o2, model_state_dict=ms, optim_state_dict=os_); train(again, o2, 4, at=4); train(m, o, 4, at=4)
    for p,q,w in zip(m.parameters(), again.parameters(), want.parameters()):
        assert torch.equal(p.full_tensor(), q.full_tensor()), name                          # resumed to the bit
        assert torch.allclose(p.full_tensor(), w, rtol=1e-5, atol=1e-6), (name, (p.full_tensor() - w).abs().max())
if dist.get_rank() == 0: print(json.dumps(result), flush=True)
'''

# numbers sent in a step: rows of R for matrices that are not aligned, n*r, then the sums of all matrices in one message
UNALIGNED = {"down.weight": 96, "tiny.weight": 5}
RANK = {"down.weight": 12, "tiny.weight": 1}
MATRICES = 5
def expected(kind, world):
    if kind in ("AdamW", "Lion", "Sophia", "NAdamW"): return 0, 0
    if kind == "SCALE": return 48, 1                                          # the outputs of the matrix that is cut along its inputs
    if kind == "GaLore": return sum(n*RANK[k] for k,n in UNALIGNED.items()), len(UNALIGNED)
    channels = {"APOLLO": 1, "Dense": 1, "Mini": 0}[kind]
    rows = sum(n*(RANK[k] if channels else 1) for k,n in UNALIGNED.items())
    sums = MATRICES if channels else 3*(MATRICES - len(UNALIGNED)) + len(UNALIGNED)
    return rows + sums, len(UNALIGNED) + 1

def check(world, steps):
    found = json.loads(run(CHILD, world, steps)); k = 12 + 8
    assert found.pop("refresh") == {"exact 0": 48*48, "exact 1": 96*48 + 48*48, "randomised 0": 4*48*k, "randomised 1": 4*(96*k + 48*k)}
    for kind,r in found.items():
        assert max(r["error"].values()) < 1e-5, (kind, r["error"])
        assert (r["sent"], r["messages"]) == expected(kind, world), (kind, r["sent"], r["messages"])
        if world > 1 and expected(kind, world)[0]: assert r["naive"] > 1e-3, (kind, r["naive"])     # the same bound would see a wrong program
        print(world, kind, f"error {max(r['error'].values()):.1e}, naive {r['naive']:.2g}, {r['sent']:.0f} numbers sent, state here {r['state']}")

@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_optimizer_at_every_number_of_processes(world): check(world, 6)

@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_longer(world): check(world, 40)
