"""Distributed Lion: the family's contract in one process, and in two and three, the definition to the bit, bytes, resuming and refusals."""
import pytest, torch
from hypothesis import given, settings, strategies as st
import test_optimizers as family
from processes import run
from paretolab.optimizers.distributed_lion import DistributedLion, bits, decode, encode

NAME = "distributed_lion.DistributedLion"
CHECKS = ["state_is_tensors_and_groups_are_plain", "a_state_of_other_parameters_is_refused", "maximising_is_minimising_the_negative", "order_of_parameters_does_not_matter", "names_given_by_wrappers_do_not_matter",
    "gradients_added_up_are_the_gradient", "zero_gradients_move_nothing_and_a_late_start_is_not_frozen", "frozen_and_unused_parameters_are_left_alone", "empty_and_transposed_tensors",
    "parameters_may_join_and_closures_have_gradients", "the_planner_knows_it"]
@pytest.mark.parametrize("check", CHECKS)
def test_keeps_the_contract_alone(check): getattr(family, f"test_{check}")(NAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_alone_at_every_step(dtype): family.test_resumes_to_the_bit_at_every_step(NAME, dtype)
@pytest.mark.parametrize("how", ["sparse", "complex", "shape"])
def test_refuses_before_anything_changes(how): family.test_gradients_that_cannot_be_are_refused_before_anything_changes(NAME, how)
@pytest.mark.parametrize("bad, says", family.BAD)
def test_refuses_arguments(bad, says): family.test_arguments_that_cannot_be_are_refused(NAME, bad, says)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_tensor(value): family.test_a_bad_number_stays_in_its_tensor(NAME, value)

@pytest.mark.parametrize("saved", [{}, None, dict(state={}), dict(state={}, param_groups=[]), dict(state={}, param_groups=[{}])])
def test_what_is_no_saved_state_is_refused_before_anything_changes(saved):
    w = torch.nn.Parameter(torch.ones(3, 4)); o = DistributedLion([("w", w)]); w.grad = torch.ones(3, 4); o.step(); m = o.state[w]["exp_avg"].clone()
    with pytest.raises(ValueError, match="a saved state has state and 1 param_groups|a saved group has its options"): o.load_state_dict(saved)
    assert o.alike and torch.equal(o.state[w]["exp_avg"], m)

@given(st.integers(1, 300), st.sampled_from([1, 2]), st.integers(1, 4), st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_bits_come_back_and_are_as_few_as_can_be(n, s, rows, eights, data):
    codes = 2*n//s + 1 + (s == 1)
    x = torch.tensor(data.draw(st.lists(st.integers(0, codes - 1), min_size=8*rows*eights, max_size=8*rows*eights))).view(rows, -1)*s - n
    packed = encode(x, n, s)
    assert torch.equal(decode(packed, n, s), x.short()) and packed.dtype == torch.uint8 and packed.numel()*8 == x.numel()*bits(n, s) and 2**(bits(n, s) - 1) < codes <= 2**bits(n, s)

CHILD = r'''
import io, torch, torch.distributed as dist
from torch import nn
from paretolab.optimizers import distributed_lion as module
from paretolab.optimizers.distributed_lion import DistributedLion, bits
N, i = dist.get_world_size(), dist.get_rank()
torch.set_num_threads(1)
SHAPES = {"embed.weight": (11, 7), "q.weight": (3, 5), "one.weight": (1, 1), "norm.weight": (33,), "none.weight": (0, 4), "scale": ()}
STEPS, MADE = 7, dict(lr=.02, weight_decay=.1)
def gradient(t, k, n):
    "Of worker k: whole numbers, so that votes tie and signs are zero; the norm's never are."
    x = torch.randn(SHAPES[n], generator=torch.Generator().manual_seed(1000*t + 100*k + list(SHAPES).index(n)))
    return x if n == "norm.weight" else x.round()
def start(dtype=torch.float32): g = torch.Generator().manual_seed(99); return {n: torch.randn(s, generator=g).to(dtype) for n,s in SHAPES.items()}
def missing(t, k, n): return n == "q.weight" and k == 1 and t in (0, 3) or n == "scale" and t == 2     # one worker has no gradient; nobody has

def slow(dtype, majority, maximize, β=(.9, .99)):
    "All workers at hand, in 32 bits, entry by entry where the vote is counted."
    W, m, zeros = start(dtype), {n: [torch.zeros(s) for _ in range(N)] for n,s in SHAPES.items()}, []
    for t in range(STEPS):
        for n in W:
            if all(missing(t, k, n) for k in range(N)): continue
            G = [torch.zeros(SHAPES[n]) if missing(t, k, n) else gradient(t, k, n).to(dtype).float()*(-1 if maximize else 1) for k in range(N)]
            δ = torch.stack([torch.lerp(g, a, β[0]).sign() for g,a in zip(G, m[n])])
            votes = [int(sum(x)) for x in δ.reshape(N, -1).T.tolist()]
            Δ = torch.tensor([(v > 0) - (v < 0) if majority else v/N for v in votes], dtype=torch.float32).view(SHAPES[n])
            m[n] = [torch.lerp(a, g, 1 - β[1]) for g,a in zip(G, m[n])]
            W[n] = torch.sub(W[n].float()*(1 - .02*.1*(len(SHAPES[n]) == 2)), Δ, alpha=.02).to(dtype); zeros.append((t, n, bool((δ == 0).any())))
    return W, {n: a[i] for n,a in m.items()}, zeros

sent, to_all, gather = [], dist.all_to_all_single, dist.all_gather
def counted(out, x, **kw): sent.append(x.numel()*(N - 1)//N); to_all(out, x, **kw)
def gathered(out, x, **kw): sent.append(x.numel()*(N - 1)); gather(out, x, **kw)
dist.all_to_all_single, dist.all_gather = counted, gathered
def steps(P, o, at, to, dtype):
    for t in range(at, to):
        for n,p in P.items(): p.grad = None if missing(t, i, n) else gradient(t, i, n).to(dtype)
        o.step()
def make(W, **kw): P = {n: nn.Parameter(w.clone()) for n,w in W.items()}; return P, DistributedLion(P.items(), **MADE | kw)
def same(P, W): return all(torch.equal(P[n], W[n]) for n in W)
def refused(says, f):
    try: f()
    except ValueError as e: assert says in str(e), e
    else: raise AssertionError(f"not refused: {says}")

def count(zeros, majority):
    "Bytes of all messages, from which tensors have zeros in which steps."
    total = 0
    for t in range(STEPS):
        for two in (True, False):
            for s in (1, 2):
                d = sum(torch.Size(SHAPES[n]).numel() for u,n,z in zeros if u == t and (len(SHAPES[n]) == 2) == two and z == (s == 1))
                if d: k = 8*-(-d//(8*N)); n, u = (1, s if N % 2 else 1) if majority else (N, s); total += k//8*(N - 1)*(bits(1, s) + bits(n, u))
    return total

for majority in (False, True):
    for dtype,maximize in ((torch.float32, False), (torch.bfloat16, True)):
        W, m, zeros = slow(dtype, majority, maximize); P, o = make(start(dtype), majority=majority, maximize=maximize); sent.clear(); files = []
        for t in range(STEPS):
            torch.save(dict(P={n: p.detach() for n,p in P.items()}, o=o.state_dict()), f := io.BytesIO()); files.append(f); steps(P, o, t, t + 1, dtype)
        assert same(P, W), (majority, dtype, {n: (P[n] - W[n]).abs().max() for n in W if P[n].numel()})                  # to the bit
        assert all(torch.equal(o.state[P[n]]["exp_avg"], m[n]) for n in W if P[n].numel()) and len({z for *_,z in zeros}) == 2
        assert sum(sent) == count(zeros, majority), (sum(sent), count(zeros, majority))
        for at in (0, 1, 4):                                              # resumed, to the bit
            files[at].seek(0); saved = torch.load(files[at], weights_only=True); Q, again = make(saved["P"], lr=.5)
            again.load_state_dict(saved["o"]); steps(Q, again, at, STEPS, dtype); assert same(Q, P), at
    every = [None]*N; dist.all_gather_object(every, ({n: p.tolist() for n,p in P.items()}, o.state[P["norm.weight"]]["exp_avg"].tolist()))
    assert all(e[0] == every[0][0] for e in every) and every[0][1] != every[1][1]          # weights of all are one, momenta are not

# a bad number of one worker is one of all, and in its tensor only
P, o = make(start()); Q, clean = make(start())
for t in range(2):
    for n in P:
        Q[n].grad = gradient(t, i, n); P[n].grad = Q[n].grad.clone()
        if n == "q.weight" and i == N - 1 and t: P[n].grad[0, 2] = float("nan")
    o.step(); clean.step()
bad = torch.zeros(3, 5, dtype=torch.bool); bad[0, 2] = True
assert torch.equal(P["q.weight"].isnan(), bad) and torch.equal(P["q.weight"][~bad], Q["q.weight"][~bad]) and all(torch.equal(P[n], Q[n]) for n in P if n != "q.weight")

# if one refuses, all do, and nothing has moved
was, state = {n: p.detach().clone() for n,p in Q.items()}, {n: {k: v.clone() for k,v in clean.state[p].items()} for n,p in Q.items()}
for n in Q: Q[n].grad = gradient(5, i, n)
if i == 0: Q["q.weight"].grad = Q["q.weight"].grad.to_sparse()
refused("got a sparse one for 'q.weight'" if i == 0 else "another worker refuses", clean.step)
assert same(Q, was) and all(torch.equal(v, clean.state[Q[n]][k]) for n,s in state.items() for k,v in s.items())

# who starts elsewhere is found at the first step
W = start(); W["norm.weight"][7] += 1e-7*i; P, o = make(W); [setattr(p, "grad", gradient(0, i, n)) for n,p in P.items()]
refused("other weights in 'norm.weight'", o.step); assert same(P, W) and not any(o.state.values())
for n in ("embed.weight", "q.weight", "norm.weight"):                  # the same numbers in another order
    for dtype in (torch.float32, torch.bfloat16):
        W = start(dtype); W[n] = W[n].roll(i, 0); P, o = make(W); [setattr(p, "grad", gradient(0, i, m).to(dtype)) for m,p in P.items()]
        refused(f"other weights in {n!r}", o.step); assert same(P, W) and not any(o.state.values())
W = start(); W["q.weight"] = W["q.weight"].mT.contiguous().mT if i else W["q.weight"]; P, o = make(W); [setattr(p, "grad", gradient(0, i, m)) for m,p in P.items()]; o.step()   # another layout is no difference
P, o = make(start(), lr=.02 + i); [setattr(p, "grad", gradient(0, i, n)) for n,p in P.items()]
refused("other parameters or options", o.step)

# a momentum is its worker's
saved = [None]*N; dist.all_gather_object(saved, clean.state_dict()); refused(f"the saved one is of worker {(i + 1) % N} of {N}", lambda: o.load_state_dict(saved[(i + 1) % N]))
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
refused("sharded 'w'", lambda: DistributedLion([("w", nn.Parameter(distribute_tensor(torch.zeros(8, 4), init_device_mesh("cpu", (N,)), [Shard(0)])))]))
print("all done")
'''

@pytest.mark.parametrize("world", [2, 3])
def test_in_processes(world): assert run(CHILD, world).strip() == "all done"
