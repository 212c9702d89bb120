"""Muon on odd shapes and types, its state through files, and its ledger."""
import io

import pytest, torch
from paretolab.models.mobilellm import MobileLLM, mobilellm
from paretolab.optimizers.muon import Muon, orthogonal

def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (7, 4), "blocks.0.q.weight": (4, 6), "blocks.1.q.weight": (4, 6), "blocks.0.o.weight": (6, 1), "head.weight": (7, 4), "norm.weight": (4,), "conv": (2, 3, 2)}
    return {n: torch.randn(s, generator=g).to(dtype).requires_grad_() for n,s in shapes.items()}

def train(P, opt, steps, seed=1):
    for t in range(steps):
        for i,p in enumerate(P.values()): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000*(seed + t) + i)).to(p.dtype)
        opt.step()

@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 5, 3), (3, 4, 4), (1, 1, 7), (1, 7, 1), (1, 1, 1)])
def test_singular_values_come_near_one(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(orthogonal(G))
    assert S.min() > 0.3 and S.max() < 1.3
    assert torch.allclose(orthogonal(G.mT), orthogonal(G).mT, atol=1e-5) and torch.allclose(orthogonal(8*G), orthogonal(G), atol=1e-5)
    assert orthogonal(torch.zeros(shape)).abs().max() == 0

@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_types_stay_what_they_are_and_go_the_same_way(dtype, eps):
    P, Q = parameters(), parameters(dtype)
    train(P, Muon(P.items(), lr=1e-3), 3)
    opt = Muon(Q.items(), lr=1e-3)
    train(Q, opt, 3)
    for n in P:
        assert Q[n].dtype == dtype and all(v.dtype == (torch.float32 if k == "step" or dtype == torch.bfloat16 else dtype) for k,v in opt.state[Q[n]].items())
        assert torch.allclose(P[n].double(), Q[n].double(), atol=eps, rtol=eps), n

def test_a_parameter_without_gradient_is_left_alone():
    P, Q = parameters(), parameters()
    a, b = Muon(P.items(), lr=.01), Muon(Q.items(), lr=.01)
    for n in P:
        if n not in ("blocks.1.q.weight", "embed.weight", "norm.weight"): P[n].grad = torch.ones_like(P[n])
        Q[n].grad = torch.ones_like(Q[n])
    before = {n: p.detach().clone() for n,p in P.items()}
    a.step(); b.step()
    for n in P: assert torch.equal(P[n], before[n] if P[n].grad is None else Q[n]) and (P[n].grad is not None) == bool(a.state[P[n]])

def test_matrices_of_one_shape_do_not_mix():
    P, alone = parameters(), parameters()
    train(P, Muon(P.items()), 4)
    for n in alone:
        one = {n: alone[n]}
        opt = Muon(one.items())
        for t in range(4):
            alone[n].grad = torch.randn(alone[n].shape, generator=torch.Generator().manual_seed(1000*(1 + t) + list(P).index(n)))
            opt.step()
        assert torch.allclose(P[n], alone[n], atol=1e-6), n

def test_resumed_from_a_file_it_goes_on_to_the_bit():
    P = parameters()
    a = Muon(P.items(), lr=.01)
    train(P, a, 5)
    torch.save(dict(P={n: p.detach() for n,p in P.items()}, opt=a.state_dict()), file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    Q = {n: p.clone().requires_grad_() for n,p in saved["P"].items()}
    b = Muon(Q.items(), lr=.5, momentum=.1)
    b.load_state_dict(saved["opt"])
    train(P, a, 5, seed=50); train(Q, b, 5, seed=50)
    assert all(torch.equal(P[n], Q[n]) for n in P) and b.param_groups[0]["lr"] == .01

@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_the_ledger_is_the_state_of_a_real_model(name):
    model = MobileLLM(mobilellm(name))
    opt = Muon(model.named_parameters())
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    tensors = [v for s in opt.state.values() for v in s.values()]
    assert all(torch.is_tensor(v) for v in tensors) and len(opt.state) == len(list(model.parameters()))
    assert sum(v.numel()*v.element_size() for v in tensors) == Muon.state_bytes({n: p.shape for n,p in model.named_parameters()})

def test_norms_are_not_decayed_and_the_rest_is():
    P = parameters()
    before = {n: p.detach().clone() for n,p in P.items()}
    opt = Muon(P.items(), lr=.1, weight_decay=.5)
    for p in P.values(): p.grad = torch.zeros_like(p)
    opt.step()
    for n,p in P.items(): assert torch.allclose(p, before[n]*(1 if p.ndim != 2 else .95)), n

@pytest.mark.parametrize("kw, words", [(dict(lr=0), "lr=0"), (dict(lr=float("nan")), "lr=nan"), (dict(momentum=1.), "momentum=1.0"), (dict(momentum=-.1), "momentum=-0.1"),
    (dict(betas=(.9, 1.)), "betas="), (dict(betas=(-.1, .9)), "betas="), (dict(weight_decay=-1), "weight_decay=-1")])
def test_what_no_optimizer_takes_is_refused(kw, words):
    with pytest.raises(ValueError, match=words): Muon(parameters().items(), **kw)

def test_complex_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match="'z'"): Muon({"z": torch.zeros(2, 2, dtype=torch.complex64)}.items())
