"""Rotations: Hadamard matrices of all sizes, the same function after folding and turning, the manifold."""
import pytest, torch
from dataclasses import replace
from paretolab.models.mobilellm import MobileLLM, Shape, mobilellm
from paretolab.quantizers import gptq, plan
from paretolab.quantizers.hadamard import Hadamard, orders, paley, random_signs
from paretolab.quantizers.spinquant import cayley, fold, orthogonal, rotate

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
    assert torch.allclose(turned(x), m(x), atol=1e-6*m(x).abs().max().item())
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
