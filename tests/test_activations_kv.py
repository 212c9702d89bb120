"""Rounded activations and the low-bit cache: the kernel's numbers, exact bytes, one pass against many, every model."""
import pytest, torch
from dataclasses import replace
from paretolab.kernels import activations as kernel
from paretolab.models.generate import Cache, generate
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.quantizers import paretoq, plan
from paretolab.quantizers.activations import KVCache, attach, fake, fake_kv
from paretolab.quantizers.hadamard import Hadamard, random_signs

SHAPE = Shape(vocab=40, dim=24, ff=40, layers=2, heads=2, kv_heads=1, context=16)


def model(dtype=torch.float32, **more):
    torch.manual_seed(0)
    m = MobileLLM(replace(SHAPE, **more)).to(dtype)
    for p in m.parameters():
        if p.ndim == 2: p.data *= 4
    return m, torch.randint(40, (2, 16))


@pytest.mark.parametrize("scale", [1e-32, 1e-20, 1e-3, 1., 1e6, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3, 17), (4, 256)])
def test_the_numbers_of_the_kernel(scale, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))*scale
    x.view(-1, shape[-1])[-1] = 0
    a, s = kernel.quantize(x)
    assert torch.equal(fake(x, 8), a*s)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_error_is_half_a_step_and_ties_go_to_even(bits):
    n = 2**(bits-1) - 1
    x = torch.randn(50, 33, dtype=torch.float64)
    x̂, step = fake(x, bits), x.abs().amax(-1, keepdim=True)/n
    assert ((x̂ - x).abs() <= step*(.5 + 1e-9)).all() and (x̂ - x).abs().max() > .3*step.min()
    assert len(torch.unique((x̂/step).round())) <= 2*n + 1 and torch.equal(fake(x̂, bits).sign(), x̂.sign())
    ties = torch.cat([torch.tensor([n*1.]), torch.arange(-n, n) + .5])
    assert torch.equal(fake(ties, bits), ties.round())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_broken_stays_visible(bad):
    x = torch.ones(2, 4); x[0, 1] = bad
    for y in (fake(x, 8), fake_kv(x, 4), fake_kv(x, 2, 2)): assert not y[0].isfinite().all() and torch.equal(y[1], x[1])


def test_gradients_go_straight_through():
    x, g = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    for f in (lambda x: fake(x, 4), lambda x: fake_kv(x, 2, 4), lambda x: fake_kv(x, 2, R3=Hadamard(8).matrix())):
        assert torch.equal(torch.autograd.grad((f(x)*g).sum(), x)[0], g)


@pytest.mark.parametrize("bits, group", [(b, g) for b in (2, 4, 8) for g in (0, 1, 3, 4, 12)])
def test_bytes_are_exact(bits, group):
    s, rows = SHAPE, 2*2*3*1*10                                    # keys and values, blocks, texts, heads, tokens
    for repeat in (1, 2): assert KVCache(replace(s, repeat=repeat), 3, 10, bits, group).nbytes == repeat*rows*(12*bits//8 + 4*(12//group if group else 1))


@pytest.mark.parametrize("more", [dict(), dict(tied=False), dict(repeat=2), dict(post_ln=1)])
@pytest.mark.parametrize("bits, group, turned", [(8, 0, False), (4, 6, True), (2, 3, False)])
def test_hooks_and_packed_cache_agree_to_the_bit(more, bits, group, turned):
    m, x = model(**more)
    R3 = Hadamard(12, random_signs(12)).matrix() if turned else None
    with torch.no_grad(): cached, plain = m(x, KVCache(m.shape, 2, 16, bits, group, R3)), m(x)
    attach(m, kv_bits=bits, kv_group=group, R3=R3)
    with torch.no_grad():
        assert torch.equal(m(x), cached) and not torch.allclose(cached, plain, atol=1e-4*plain.abs().max().item())
        floats = Cache(m.shape, 2, 16)                             # hooks in front of a cache of floats
        assert torch.equal(m(x, floats), cached)
        parts = Cache(m.shape, 2, 16)
        again = torch.cat([m(piece, parts) for piece in x.split([11, 5], 1)], 1)
    assert (again - cached).abs().mean() < 2e-2*cached.abs().mean()    # a code half-way between two levels may fall either way


def test_token_by_token_is_one_pass():
    m, x = model(torch.float64)
    cache, parts = KVCache(m.shape, 2, 16, 4, 4), []
    with torch.no_grad():
        for piece in x.split([5, 1, 7, 3], 1): parts.append(m(piece, cache))
        whole = m(x, KVCache(m.shape, 2, 16, 4, 4))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6) and cache.length == 16


def test_the_cache_keeps_texts_and_blocks_apart():
    cache = KVCache(SHAPE, 2, 4, 8)
    k = torch.randn(4, 2, 1, 3, 12)
    first, second = cache.slot(0)(k[0], k[1]), cache.slot(1)(k[2], k[3])
    for x, y in zip(k, (*first, *second)): assert (x - y).abs().max() < .02
    cache.length = 3
    with pytest.raises(ValueError, match="room for 4 tokens"): cache.slot(0)(k[0], k[1])
    again = cache.slot(0)(k[2][:, :, :1], k[3][:, :, :1])
    assert torch.equal(again[0][:, :, :3], first[0]) and torch.equal(again[1][:, :, :3], first[1])


def test_rounding_changes_only_what_was_asked():
    m, x = model()
    seen = {}
    for n, l in m.named_modules():
        if isinstance(l, torch.nn.Linear): l.register_forward_hook(lambda l, a, y, n=n: seen.update({n: a[0]}))
    handles = attach(m, 4)
    m(x)
    assert len(seen) == 14 and all(torch.equal(fake(v, 4), v) or (fake(v, 4) - v).abs().max() < 1e-5 for v in seen.values())
    assert len(handles) == 14 and len(attach(model()[0], 4, 4)) == 16 and len(attach(model()[0], 16, 4)) == 2 and not attach(model()[0])
    for h in handles: h.remove()
    assert torch.equal(m(x), model()[0](x))


def test_rounds_after_a_hook_that_was_there_before():
    m, x = model(torch.float64)
    turn = Hadamard(40)
    l = m.blocks[0].mlp.down
    l.register_forward_pre_hook(lambda layer, args: (turn(args[0]),))
    attach(m, 4)
    l.register_forward_hook(lambda l, a, y: got.append(a[0]))
    got, given = [], torch.randn(3, 40, dtype=torch.float64)
    l(given)
    assert torch.allclose(got[0], fake(turn(given), 4), atol=1e-12)


def test_trained_and_packed_models_are_the_same_function():
    m, x = model()
    paretoq.convert(m, {n: (2 if n != "embed" else 8, 8, "paretoq.quantize") for n in plan.uniform(m, 4)})
    attach(m, 4, 4)
    opt = torch.optim.SGD(m.parameters(), lr=.01)
    for _ in range(3): opt.zero_grad(); torch.nn.functional.cross_entropy(m(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward(); opt.step()
    for n, p in m.named_parameters():
        if "norm" in n: p.data = p.data.half().float()             # as the file holds them
    packed = plan.restore(model()[0], paretoq.pack(m))
    attach(packed, 4, 4)
    assert torch.equal(packed(x), m(x))
    assert generate(packed, x[:, :4], 4).shape == (2, 8)


@pytest.mark.parametrize("call, sentence", [(lambda m: attach(m, 5), "got bits=5"), (lambda m: attach(m, 16, 3), "got bits=3"), (lambda m: attach(m, 16, 4, 5), "got group=5 for 12"),
    (lambda m: KVCache(SHAPE, 1, 4, 16), "got bits=16"), (lambda m: KVCache(SHAPE, 1, 4, 4, -3), "got group=-3")])
def test_what_is_refused(call, sentence):
    m, x = model()
    with pytest.raises(ValueError, match=sentence): call(m)
    assert torch.equal(m(x), model()[0](x))                        # and nothing was changed
