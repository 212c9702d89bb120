"""Every grid: nearest level by brute force over widths, groups, dtypes and hard matrices; the file; what is refused."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.quantizers import absmax, gptq, grids, lowbit, paretoq
from paretolab.quantizers.plan import compress, model_bytes, resolve

FAMILY = dict(symmetric=(2, 3, 4, 6, 8), asymmetric=(2, 3, 4, 6, 8), sign=(1,), ternary=(1.58,), stretched=(1.58, 2), bipolar=(1, 2, 3, 4, 6, 8), e4m3=(8,), e5m2=(8,), mxfp4=(4,))
CASES = [(n, b) for n, bs in FAMILY.items() for b in bs]
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def levels(q):
    "The level of each code of each group, (R, C/g, levels)."
    return q.scales.float()[..., None] * q.grid[0] + (q.zeros.float()[..., None] if q.zeros is not None else 0)


@given(st.sampled_from(CASES), st.sampled_from(FLOATS), st.integers(0, 5), st.integers(0, 4), st.integers(1, 9), st.floats(-3, 2), st.booleans(), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_nearest_level(case, dtype, rows, groups, group, power, turned, seed):
    name, bits = case
    if name == "mxfp4": group = 32
    w = torch.randn(rows, groups*group, generator=torch.Generator().manual_seed(seed)) * 10**power
    if rows > 2: w[1], w[2] = 0, -3
    w = (w.T.contiguous().T if turned else w).to(dtype)
    before, q = w.clone(), resolve(f"grids.{name}")(w, bits, group)
    assert torch.equal(w, before) and (q.shape, q.bits) == ((rows, groups*group), bits)
    if not w.numel(): return
    x = w.float().view(rows, groups, group)
    least = (x[..., None] - levels(q)[:, :, None]).abs().amin(-1)
    err = (x - q.dequantize().view_as(x)).abs()
    assert (err <= least + 1e-5*x.abs().amax(-1, keepdim=True) + 1e-7).all()


@pytest.mark.parametrize("name, bits", [(n, b) for n, b in CASES if n in ("symmetric", "asymmetric", "bipolar")])
def test_no_error_beyond_half_a_step(name, bits):
    w = torch.randn(50, 64) + torch.linspace(-3, 3, 50)[:, None]
    q = resolve(f"grids.{name}")(w, bits, 16)
    half = q.scales.float().repeat_interleave(16, 1) * (1 if name == "bipolar" else .5)
    assert ((w - q.dequantize()).abs() <= half*(1 + 2**(bits - 22)) + 1e-6).all()


@pytest.mark.parametrize("dtype, name", [(torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2")])
def test_codes_are_the_bytes_of_the_float(dtype, name):
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()][None]
    q = resolve(f"grids.{name}")(every, 8)
    assert q.scales.item() == 1 and torch.equal(q.dequantize(), every) and torch.equal(q.codes().view(dtype).float(), every)


def test_mxfp4_ties_go_to_even_and_the_largest_saturates():
    x = torch.zeros(1, 32)
    x[0, :11] = torch.tensor([7.9, .25, .75, 1.25, 1.75, 2.5, 3.5, 5, -.75, -5, .2499])
    assert grids.mxfp4(x).dequantize()[0, :11].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -1, -4, 0]
    assert grids.mxfp4(torch.full((1, 32), 1e-30)).dequantize().max() > 0


def test_stretched_ties_are_half_to_even():
    "With α = 1 the two-bit midpoints are ±½ and 0; (w·2 - ½) rounds to even."
    w = torch.tensor([[1., .5, -.5, 0., -1]])
    assert grids.stretched(w, 2).dequantize().tolist() == [[.75, .25, -.75, .25, -.75]]


@pytest.mark.parametrize("name, bits", CASES)
def test_a_plan_prices_it_and_a_file_keeps_it(name, bits, tmp_path):
    net = torch.nn.Linear(64, 10, bias=False)
    plan = {"": (bits, 32, f"grids.{name}")}
    state = compress(net, plan)
    assert sum(t.nbytes for t in state.values()) == model_bytes(plan, {"weight": (10, 64)})
    lowbit.save(tmp_path/"m", state)
    assert torch.equal(lowbit.load(tmp_path/"m")[0]["weight"].dequantize(), state["weight"].dequantize())


@pytest.mark.parametrize("name, bits", CASES)
def test_what_is_refused(name, bits):
    f = resolve(f"grids.{name}")
    for w, args, sentence in ((torch.ones(2, 64), (5, 32), "bits=5"), (torch.ones(64), (bits, 32), r"shape \(64,\)"), (torch.ones(2, 48), (bits, 32), "48 columns"),
        (torch.full((1, 32), torch.nan), (bits, 32), "32 of 32"), (torch.tensor([[torch.inf] + [0]*31]), (bits, 32), "1 of 32"), (torch.ones(2, 32, dtype=torch.int), (bits, 32), "int32")):
        with pytest.raises(ValueError, match=sentence): f(w, *args)


ROUND = dict({f"grids.{n}": (resolve(f"grids.{n}"), bs[0]) for n, bs in FAMILY.items()}, **{"absmax.quantize": (absmax.quantize, 4), "absmax.fake": (absmax.fake, 4), "paretoq.quantize": (paretoq.quantize, 2), "paretoq.scale": (paretoq.scale, 2),
    "paretoq.fake": (lambda w, b: paretoq.fake(w, torch.ones(2, 1, 1), b), 2), "gptq.quantize": (gptq.quantize, 4), "gptq.clipped": (gptq.clipped, 4)})
WRONG = {"a layer": (torch.nn.Linear(64, 2), "got Linear, .*its .weight"), "numpy": (torch.ones(2, 64).numpy(), "got ndarray"), "a list": ([[1.]], "got list"), "nothing": (None, "got NoneType"), "codes": (absmax.quantize(torch.ones(2, 64), 4), "got LowBit"),
    "no numbers": (torch.ones(2, 64, device="meta"), "without numbers"), "sparse": (torch.eye(64).to_sparse(), "sparse"), "complex": (torch.ones(2, 64) + 0j, "complex64"), "a cube": (torch.ones(2, 2, 64), r"\(2, 2, 64\)")}

@pytest.mark.parametrize("f, bits", ROUND.values(), ids=ROUND)
def test_a_wrong_object_is_answered_by_a_sentence(f, bits):
    for w, why in WRONG.values():
        with pytest.raises(ValueError, match=f"takes a matrix of floats \\(.*{why}"): f(w, bits)
    for b in ("4", None, [4], (2, 4), True if bits != 1 else 7, -1, float("nan")):
        with pytest.raises(ValueError, match="bits"): f(torch.ones(2, 64), b)


@pytest.mark.parametrize("f", [absmax.quantize, grids.symmetric, paretoq.quantize, gptq.quantize, gptq.clipped])
@pytest.mark.parametrize("group", ["8", None, 8., True, [8], -8, 5, 128])
def test_a_wrong_group_is_answered_by_a_sentence(f, group):
    with pytest.raises(ValueError, match="must divide the columns .got group="): f(torch.ones(2, 64), 4, group)
