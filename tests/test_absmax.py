import pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.quantizers.absmax import fake, quantize

BITS = 2, 3, 4, 6, 8
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


@given(st.sampled_from(BITS), st.sampled_from(FLOATS), st.integers(0, 5), st.integers(0, 6), st.integers(1, 9), st.floats(-9, 3), st.booleans(), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_half_a_step_and_fake_equals_file(bits, dtype, rows, groups, group, power, turned, seed):
    w = torch.randn(rows, groups*group, generator=torch.Generator().manual_seed(seed)) * 10**power
    if rows > 2: w[1] = 0
    w = (w.T.contiguous().T if turned else w).to(dtype)
    q = quantize(w, bits, group)
    step = q.scales.float().repeat_interleave(group, 1)
    assert ((w.float() - q.dequantize()).abs() <= step * (.5 + 2**(bits-1) * 2**-23)).all()
    assert (step.half().float() * (2**(bits-1) - 1) >= w.float().abs() * (1 - 2**-23)).all()       # the step covers the largest weight
    ŵ = fake(w, bits, group)
    assert ŵ.dtype == dtype and torch.equal(ŵ, q.dequantize(dtype))
    if ((step == 0) | (step >= 2**-14)).all(): assert torch.equal(quantize(q.dequantize(), bits, group).dequantize(), q.dequantize())      # rounding twice is rounding once


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_is_straight_through(dtype):
    w = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    up = torch.randn(6, 8, dtype=dtype)
    (fake(w, 3, 4) * up).sum().backward()
    assert torch.equal(w.grad, up)


def test_zero_group_is_the_whole_row_and_the_weights_stay():
    w = torch.randn(3, 10)
    before = w.clone()
    assert torch.equal(quantize(w, 4).dequantize(), quantize(w, 4, 10).dequantize()) and torch.equal(w, before)
    assert quantize(torch.zeros(2, 0), 4).shape == fake(torch.zeros(2, 0), 4).shape == (2, 0)


@pytest.mark.parametrize("w, args, sentence", [(torch.tensor(1.), (4,), r"shape \(\)"), (torch.ones(2, 2, 2), (4,), r"\(2, 2, 2\)"), (torch.ones(2, 2, dtype=torch.int), (4,), "int32"),
    (torch.ones(2, 4), (1,), "quantizers.grids"), (torch.ones(2, 4), (5,), "bits=5"), (torch.ones(2, 4), (4, 3), "group=3 for 4"), (torch.ones(2, 4), (4, -2), "group=-2"),
    (torch.tensor([[1, torch.inf]]), (4,), "1 of 2 weights"), (torch.tensor([[65505.]]), (2,), "above 65504"), (torch.ones(2, 4), (4, 2.), "group=2.0")])
@pytest.mark.parametrize("f", [quantize, fake])
def test_what_is_refused(f, w, args, sentence):
    with pytest.raises(ValueError, match=sentence): f(w, *args)
