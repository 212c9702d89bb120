"""Rotations: Hadamard matrices of all sizes, the same function after folding and turning, the manifold."""
import pytest, torch
from dataclasses import replace
from paretolab.models.mobilellm import MobileLLM, Shape, mobilellm
from paretolab.quantizers import absmax, activations, gptq, plan, smoothquant
from paretolab.quantizers.hadamard import Hadamard, orders, paley, random_signs
from paretolab.quantizers.spinquant import cayley, fold, learn, orthogonal, rotate

SHAPE = Shape(vocab=40, dim=24, ff=40, layers=2, heads=2, kv_heads=1, context=16)


def model(dtype=torch.float32, **more):
    torch.manual_seed(0)
    m = MobileLLM(replace(SHAPE, **more)).to(dtype)
    for p in m.parameters(): p.data = p.data*4 if p.ndim == 2 else torch.rand_like(p) + .3
    return m, torch.randint(40, (2, 16))


@pytest.mark.parametrize("n", [4, 8, 12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 140, 148])
def test_paley_matrices_are_hadamard(n):
    H = paley(n)
    assert H is not None and torch.equal(H @ H.T, n*torch.eye(n)) and (H.abs() == 1).all()


@pytest.mark.parametrize("name", ["125M", "350M", "600M", "1B", "1.5B", "tiny", "nano"])
def test_every_mobilellm_width(name):
    s = mobilellm(name)
    for n in (s.dim, s.ff, s.head_dim): assert torch.tensor(orders(n)).prod() == n


LLAMA = {"1B": (2048, 5632), "3.2-1B": (2048, 8192), "3.2-3B": (3072, 8192), "7B": (4096, 11008), "8B": (4096, 14336), "13B": (5120, 13824), "65B": (8192, 22016), "70B": (8192, 28672), "405B": (16384, 53248)}

@pytest.mark.parametrize("n", sorted({n for widths in LLAMA.values() for n in widths} | {64, 128}))
def test_every_llama_width(n):
    "The product has the order, and its rows are orthonormal and flat (a few of them, the whole matrix would be large)."
    H, at = Hadamard(n), torch.tensor([0, 1, n//2, n - 1])
    rows = H(torch.eye(n, dtype=torch.float64)[at] if n <= 4096 else torch.zeros(4, n, dtype=torch.float64).index_put((torch.arange(4), at), torch.ones(4, dtype=torch.float64)))
    assert H.block == n and torch.allclose(rows @ rows.T, torch.eye(4, dtype=torch.float64), atol=1e-9) and torch.allclose(rows.abs(), torch.full_like(rows, n**-.5), rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 12, 24, 40, 144])
def test_the_fast_form_is_the_matrix(n):
    R, x = Hadamard(n, random_signs(n, 3)), torch.randn(5, n)
    assert torch.allclose(R(x).double(), x.double() @ R.matrix(), atol=1e-5) and torch.allclose(R.matrix() @ R.matrix().T, torch.eye(n).double(), atol=1e-6)


@pytest.mark.filterwarnings("ignore:no Hadamard")
@pytest.mark.parametrize("more", [dict(), dict(tied=False), dict(repeat=2), dict(ff=39)])
@pytest.mark.parametrize("online", [False, True])
def test_the_function_stays(more, online):
    m, x = model(torch.float64, **more)
    R1, R2 = Hadamard(24, random_signs(24)).matrix(), [orthogonal(torch.randn(12, 12)) for _ in m.blocks]
    turned = rotate(fold(m), R1, R2, online)
    assert torch.allclose(turned(x), m(x), atol=1e-10*m(x).abs().max().item())
    assert not torch.allclose(turned.blocks[0].attn.q.weight, fold(m).blocks[0].attn.q.weight, atol=.1)


def test_a_size_without_a_matrix_is_said():
    with pytest.warns(UserWarning, match="no Hadamard matrix of order 5461 .* 1 axes"): Hadamard(5461)


def test_a_hundred_steps_stay_orthogonal():
    g, R = torch.Generator().manual_seed(0), orthogonal(torch.randn(48, 48))
    for _ in range(100): R = cayley(R, torch.randn(48, 48, generator=g, dtype=torch.float64), 1.)
    assert (R @ R.T - torch.eye(48)).abs().max() < 1e-12


def test_a_step_goes_down():
    T = orthogonal(torch.randn(16, 16)); R = orthogonal(torch.randn(16, 16))
    if torch.det(R)*torch.det(T) < 0: T[0] *= -1
    f = lambda R: (R - T).square().sum()
    first = f(R)
    for _ in range(100): R = cayley(R, 2*(R - T), .1)
    assert f(R) < .05*first


def test_turned_models_go_through_gptq():
    m, x = model()
    turned = rotate(fold(m), Hadamard(24, random_signs(24)).matrix())
    state, reports = gptq.compress(turned, plan.uniform(turned, 4, 8, "gptq.quantize"), x)
    assert "head.weight" in reports and all(r["error"] <= r["nearest"] for r in reports.values())


@pytest.mark.parametrize("with_R2", [False, True])
def test_a_hundred_learned_steps_leave_rotations_and_the_function(with_R2):
    m, x = model()
    folded, x = fold(m), x[:, :9]
    R1, R2 = Hadamard(24, random_signs(24)).matrix(), [orthogonal(torch.randn(12, 12)) for _ in range(2)]*with_R2
    before = {n: p.clone() for n, p in folded.named_parameters()}
    L1, L2, log = learn(folded, R1, lambda w: absmax.fake(w, 2), [x]*100, .1, R2)
    assert len(log) == 100 and min(log[-10:]) < log[0] and len(L2) == len(R2) and all(torch.equal(p, before[n]) for n, p in folded.named_parameters())
    for L, R in zip((L1, *L2), (R1, *R2)): assert (L @ L.T - torch.eye(len(L))).abs().max() < 1e-12 and (L - R).abs().max() > .01
    m64 = model(torch.float64)[0]
    assert torch.allclose(rotate(fold(m64), L1, L2)(x), m64(x), atol=1e-10*m64(x).abs().max().item())


def test_learning_sees_rounded_activations_and_the_online_rotation():
    m, x = model()
    R1, first = Hadamard(24).matrix(), {}
    for name, online, bits in (("plain", False, 16), ("online", True, 16), ("rounded", True, 3)):
        folded = rotate(fold(m), torch.eye(24, dtype=torch.float64), online=online)
        activations.attach(folded, bits)
        first[name] = learn(folded, R1, lambda w: w, [x[:, :9]], .1)[2][0]
    assert first["online"] == pytest.approx(first["plain"], abs=1e-4) and abs(first["rounded"] - first["plain"]) > 1e-2


def test_R3_leaves_scores_and_helps_a_cache_with_an_outlier():
    m, x = model(torch.float64)
    m.blocks[0].attn.k.weight.data[5] *= 20; m.blocks[0].attn.q.weight.data[5] /= 20; m.blocks[0].attn.q.weight.data[17] /= 20
    m.blocks[0].attn.k.weight.data[11] *= 20; m.blocks[0].attn.q.weight.data[11] /= 20; m.blocks[0].attn.q.weight.data[23] /= 20
    full, error = m(x), {}
    for name, R3 in (("none", None), ("R3", Hadamard(12, random_signs(12)).matrix())):
        h = activations.attach(m, kv_bits=4, R3=R3)
        error[name] = (m(x) - full).square().mean().item()
        for handle in h: handle.remove()
    k = torch.randn(7, 12, dtype=torch.float64)
    assert (activations.fake_kv(k, 8, R3=R3) - k).abs().max() < .05
    assert error["R3"] < error["none"]


@pytest.mark.parametrize("more", [dict(), dict(tied=False), dict(repeat=2)])
@pytest.mark.parametrize("alpha", [0, .3, 1])
def test_smoothing_keeps_the_function_and_moves_the_size(more, alpha):
    m, x = model(torch.float64, **more)
    m.blocks[1].norm2.weight.data[3] = 90
    a = smoothquant.ranges(m, x)
    new = smoothquant.smooth(m, a, alpha)
    assert torch.allclose(new(x), m(x), atol=1e-10*m(x).abs().max().item())
    spread = lambda m: (lambda v: (v.max()/v.median()).item())(smoothquant.ranges(m, x)["blocks.1.norm2"])
    assert not alpha or spread(new) < spread(m)
    w = torch.cat([new.blocks[1].mlp.gate.weight, new.blocks[1].mlp.up.weight]).abs().amax(0)
    b = smoothquant.ranges(new, x)["blocks.1.norm2"]
    assert torch.allclose(b**alpha, w**(1 - alpha), rtol=1e-6)          # (aw)^(1-α) and (aw)^α
    assert len(new.state_dict()) == len(m.state_dict())


def test_smoothing_survives_an_axis_that_is_never_used():
    m, x = model(torch.float64)
    m.blocks[0].norm1.weight.data[2] = 0
    m.blocks[0].attn.q.weight.data[:, 4] = 0; m.blocks[0].attn.k.weight.data[:, 4] = 0; m.blocks[0].attn.v.weight.data[:, 4] = 0
    new = smoothquant.smooth(m, smoothquant.ranges(m, x))
    assert torch.allclose(new(x), m(x), atol=1e-9*m(x).abs().max().item())


def test_ranges_are_those_of_all_text():
    m, x = model(torch.float64)
    text = torch.randint(40, (19, 16))
    each = [smoothquant.ranges(m, t[None]) for t in text]
    for n, a in smoothquant.ranges(m, text).items(): assert torch.allclose(a, torch.stack([e[n] for e in each]).amax(0))
