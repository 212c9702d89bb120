import json
import pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.optimizers.adamw import AdamW


def steps(shapes, n=3, dtype=torch.float32, **kw):
    "Parameters after `n` steps with the same gradients each time, and their optimizer."
    g = torch.Generator().manual_seed(0)
    params = {k: torch.randn(s, generator=g, dtype=dtype).requires_grad_() for k, s in shapes.items()}
    o = AdamW(params.items(), **kw)
    for _ in range(n):
        for p in params.values(): p.grad = torch.randn(p.shape, generator=g, dtype=dtype)
        o.step()
    return params, o


@given(st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_ledger_is_exact(sizes):
    shapes = {f"p{i}": tuple(s) for i, s in enumerate(sizes)}
    _, o = steps(shapes, 1)
    assert AdamW.state_bytes(shapes) == sum(v.nbytes for s in o.state.values() for v in s.values())


def test_equals_torch_with_norms_undecayed():
    shapes = {"embed.weight": (7, 4), "q.weight": (4, 4), "norm.weight": (4,)}
    kw = dict(lr=.02, betas=(.8, .99), eps=1e-6, weight_decay=.3)
    ours, _ = steps(shapes, **kw)
    g = torch.Generator().manual_seed(0)
    ref = {k: torch.randn(s, generator=g).requires_grad_() for k, s in shapes.items()}
    *matrices, norm = ref.values()
    o = torch.optim.AdamW([dict(params=matrices), dict(params=[norm], weight_decay=0.)], fused=True, **kw)
    for _ in range(3):
        for p in ref.values(): p.grad = torch.randn(p.shape, generator=g)
        o.step()
    for k in shapes: assert torch.equal(ours[k], ref[k])


def test_resumes_to_the_bit_through_json():
    shapes = {"q.weight": (5, 3), "norm.weight": (3,)}
    whole, _ = steps(shapes, 4)
    half, o = steps(shapes, 2)
    saved = o.state_dict()
    saved["param_groups"] = [{k: tuple(v) if isinstance(v, list) and k == "betas" else v for k, v in g.items()} for g in json.loads(json.dumps(saved["param_groups"]))]
    again = AdamW(half.items()); again.load_state_dict(saved)
    g = torch.Generator().manual_seed(0)
    for p in half.values(): torch.randn(p.shape, generator=g)
    for t in range(4):
        for p in half.values(): p.grad = torch.randn(p.shape, generator=g)
        if t >= 2: again.step()
    for k in shapes: assert torch.equal(whole[k], half[k])


def test_only_norms_or_only_matrices():
    for shapes in ({"norm.weight": (3,)}, {"q.weight": (2, 3)}):
        _, o = steps(shapes, 1)
        assert len(o.param_groups) == 1


@pytest.mark.parametrize("kw, said", [(dict(lr=0), "lr=0"), (dict(lr=float("nan")), "lr=nan"), (dict(betas=(1., .9)), r"betas=\(1.0, 0.9\)"), (dict(eps=-1e-8), "eps=-1e-08"), (dict(weight_decay=float("nan")), "weight_decay=nan")])
def test_refuses(kw, said):
    with pytest.raises(ValueError, match=said): AdamW([("w", torch.ones(2, 2))], **kw)
