"""What every Triton kernel must satisfy, on a device or in the interpreter: each check takes the kernel's module and asserts. `test_triton.py` and `test_gpu.py` run them."""
import torch
from paretolab.quantizers.lowbit import LEVELS, LowBit

# The low-bit product: rows, columns of the result, columns, group (0: the row), grid, scales, zeros, activations
PRODUCTS = [(1, 1, 1, 0, "even", torch.float16, False, torch.float32), (1, 65, 37, 0, "even", torch.float16, False, torch.bfloat16), (17, 33, 96, 32, "table", torch.bfloat16, True, torch.float16),
    (3, 70, 65, 13, "table", torch.float8_e4m3fn, False, torch.bfloat16), (2, 9, 384, 128, "even", torch.float8_e8m0fnu, False, torch.float32), (5, 6, 40, 1, "even", torch.float16, True, torch.float32)]

def matrix(bits, N, C, group, grid, scales, zeros, device):
    levels = LEVELS[bits]
    g, Q = group or C, torch.randn(levels).sort().values if grid == "table" else torch.arange(levels) - (levels - 1)/2
    q = LowBit.pack(torch.randint(levels, (N, C)), (torch.rand(N, C//g)*0.1 + 0.01).to(scales), Q, bits, g, torch.randn(N, C//g).half() if zeros else None)
    return q, LowBit(tuple(p.to(device) for p in q.packed), q.scales.to(device), tuple(p.to(device) for p in q.grid), q.shape, q.bits, q.group, None if q.zeros is None else q.zeros.to(device))

def product(module, device, bits, M, N, C, group, grid, scales, zeros, dtype):
    "Values and gradients within the bound of the page."
    torch.manual_seed(N)
    q, there = matrix(bits, N, C, group, grid, scales, zeros, device)
    x, dy = torch.randn(M, C).to(dtype), torch.randn(M, N).to(dtype)
    on_device = x.clone().to(device).requires_grad_()
    y = module.fast(on_device, there)
    y.backward(dy.to(device))
    ŵ, eps = q.dequantize(torch.float64), torch.finfo(dtype).eps
    u, η = (0, 0) if dtype == torch.float32 else (eps/2, 2**-25 if dtype == torch.float16 else 0)
    size = ŵ.abs() + (0 if q.zeros is None else 2*q.zeros.double().abs().repeat_interleave(q.group, 1))
    for got, a, w, s in ((y.detach().cpu(), x, ŵ.T, size.T), (on_device.grad.cpu(), dy, ŵ, size)):
        n, a = len(w), a.double()
        limit = (u + (n + 5)*2**-24)*(a.abs() @ s) + n*η*a.abs().max() + (u + 2**-24)*(a @ w).abs()
        assert got.dtype == dtype and got.shape == (M, w.shape[1]) and ((got.double() - a @ w).abs() <= limit + 1e-30).all()

def exact_product(module, device, bits):
    "Integers are not rounded at all."
    torch.manual_seed(0)
    x, levels = torch.randint(-9, 10, (18, 77)).float(), LEVELS[bits]
    q = LowBit.pack(torch.randint(levels, (20, 77)), torch.ones(20, 1).half(), torch.arange(levels)*1. - levels//2, bits)
    there = LowBit((q.packed[0].to(device),), q.scales.to(device), (q.grid[0].to(device),), q.shape, q.bits, q.group)
    assert torch.equal(module.fast(x.to(device), there).cpu().long(), x.long() @ q.dequantize().long().T)

TRANSFORMS = [((3, 48), 16), ((1, 32), 32), ((2, 3, 576), 64), ((33, 128), 128), ((3, 256), 256), ((2, 1536), 512)]

def transform(module, device, shape, n, dtype):
    "Within the bound of the page, and so the gradient, which is the transform of the gradient."
    torch.manual_seed(n)
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    there = x.clone().to(device).requires_grad_()
    y = module.fast(there, n)
    y.backward(g.to(device))
    a, b = (0, n) if n <= 128 else module._factors(n)
    for got, v in ((y.detach(), x), (there.grad, g)):
        exact, size = module.naive(v.double(), n), v.double().abs().unflatten(-1, (-1, n)).sum(-1, keepdim=True).expand(*shape[:-1], -1, n).flatten(-2)/n**0.5
        limit = ((a + b + 2)*2**-24 + 2**(-27 if dtype == torch.float32 else -18))*size + torch.finfo(dtype).eps/2*exact.abs() + (2**-25 if dtype == torch.float16 else 0)
        assert got.dtype == dtype and ((got.cpu().double() - exact).abs() <= limit).all()

def mx_inputs():
    torch.manual_seed(0)
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    Q = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ties = torch.cat([Q, (Q[1:] + Q[:-1])/2, torch.nextafter((Q[1:] + Q[:-1])/2, torch.tensor(9.)), torch.nextafter((Q[1:] + Q[:-1])/2, torch.tensor(0.)), torch.tensor([7., 7.99])])
    return [torch.randn(3, 96), torch.randn(1, 32).half(), torch.zeros(2, 32), torch.randn(70, 64).bfloat16(), ties[torch.randint(len(ties), (60, 32))]*torch.exp2(torch.randint(-30, 30, (60, 1)).float()),
        every[torch.randperm(len(every))[:len(every)//32*32]].view(-1, 32), -torch.rand(4, 64)]

def microscaled(module, device):
    "Bit for bit."
    for w in mx_inputs():
        p, q = module.naive(w), module.fast(w.to(device))
        assert torch.equal(p.packed[0], q.packed[0].cpu()) and torch.equal(p.scales.view(torch.uint8), q.scales.cpu().view(torch.uint8))

STATES = [(n, dtype, state) for state in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn) for n, dtype in ((1, torch.float32), (257, torch.bfloat16), (1000, torch.float32), (513, torch.float16))]

def lion(module, device, n, dtype, state, exact):
    "Bit for bit in the interpreter; where products may be contracted, but for a few last bits."
    torch.manual_seed(n)
    a = [torch.randn(n).to(dtype), torch.zeros(n).to(state), torch.zeros(-(-n//256)) if state.itemsize == 1 else None]
    b = [None if t is None else t.clone().to(device) for t in a]
    for _ in range(3):
        g = torch.randn(n).to(dtype)
        g[::7] = 0                                                       # the sign of zero is zero
        module.naive(a[0], g, *a[1:], 0.1, (0.9, 0.95), 0.1)
        module.fast(b[0], g.to(device), *b[1:], 0.1, (0.9, 0.95), 0.1)
    for x, y in zip(a, b):
        if x is None: continue
        x, y = x.float(), y.cpu().float()
        far = (x - y).abs() > (0 if exact else 2**-6*x.abs() + (1.001 if state == torch.int8 else 1e-6))
        assert far.sum() <= (0 if exact else 1 + n//500)
    g[-1] = torch.nan                                                     # a bad gradient is let through to its weight
    module.naive(a[0], g, *a[1:], 0.1), module.fast(b[0], g.to(device), *b[1:], 0.1)
    assert torch.equal(a[0].isnan(), b[0].cpu().isnan()) and a[0].isnan().any()

LOGS = [("Log", 1, 1, torch.float32), ("Log", 3, 255, torch.bfloat16), ("Log", 2, 600, torch.float32), ("Log", 2, 257, torch.float16), ("Expanded", 3, 300, torch.float32)]

def logarithms(module, device, form, R, C, dtype, exact):
    "AdamW and Lion: bit for bit in the interpreter; where products may be contracted, codes but for a few by one."
    from paretolab.kernels import state_steps
    from paretolab.optimizers import state_codes
    torch.manual_seed(C); form = getattr(state_codes, form)()
    numbers = dict(beta1=0.9, fresh1=0.1, beta2=0.95, fresh2=0.05, keep=0.99, step=0.1)
    for moments, rule, more in (((True, False), state_steps._adamw, dict(eps=1e-8)), ((True,), state_steps._lion, {})):
        a = [torch.randn(R, C).to(dtype), *(form.encode(torch.zeros(R, C), s) for s in moments)]
        b = [a[0].clone().to(device), *(tuple(t.clone().to(device) for t in x) for x in a[1:])]
        for t in range(5):
            g = (torch.randn(R, C)*torch.exp2(8*torch.randn(R, C)).clamp(1e-4, 1e4)).to(dtype)     # more octaves than steps of 32 places reach
            g[:, ::5] = 0
            if t == 3: g[0, -1] = torch.inf                               # a bad gradient is seen in the scale of its block, and in no other
            w = a[0].float()
            rule(form, w, g.float(), *a[1:], **numbers, **more)
            a[0].copy_(w)
            module.log(b[0], g.to(device), *b[1:], *([] if more else [()]), most=form.most[False], **numbers, **more)
            if t > 2: continue
            for x, y in zip([a[0], *(u for m in a[1:] for u in m)], [b[0], *(u for m in b[1:] for u in m)]):
                far = (x.float() - y.cpu().float()).abs() > (0 if exact else 1 if x.dtype == torch.uint8 else 2**-6*x.float().abs() + 1e-6)
                assert far.sum() <= (0 if exact else 1 + x.numel()//500)
        assert torch.equal(a[0].isnan(), b[0].cpu().isnan()) and a[0].isnan().any()
        for (_, s, _), (_, there, _) in zip(a[1:], b[1:]): assert torch.equal(s.isnan(), there.cpu().isnan()) and s.isnan().sum() == 1

ATTENTIONS = [(1, 1, 1, 16, 16, 1, 1, torch.float32), (1, 3, 70, 16, 16, 1, 2, torch.float32), (2, 2, 60, 32, 16, 2, 2, torch.float32), (1, 4, 90, 16, 16, 1, 4, torch.float32), (1, 3, 70, 32, 16, 1, 3, torch.bfloat16), (1, 2, 65, 16, 32, 1, 2, torch.float16)]

def attention(module, device, N, H, T, D, block, local, stride, dtype):
    "Values and gradients against torch's masked attention in float64."
    torch.manual_seed(T)
    x = [torch.randn(N, H, T, D).to(dtype) for _ in range(3)]
    g, there, wide = torch.randn(N, H, T, D).to(dtype), [t.clone().to(device).requires_grad_() for t in x], [t.double().requires_grad_() for t in x]
    o, od = module.fast(*there, block, local, stride), module.naive(*wide, block, local, stride)
    o.backward(g.to(device))
    od.backward(g.double())
    tolerance = 1e-5 if dtype == torch.float32 else 4*torch.finfo(dtype).eps
    for a, b in [(o, od)] + [(p.grad, q.grad) for p, q in zip(there, wide)]:
        assert float((a.detach().cpu().double() - b.detach()).abs().max()/b.detach().abs().max().clamp_min(0.1)) < tolerance

STEPS = [((5, 7), 1), ((33, 70), 4), ((70, 33), 4), ((16, 16), 16), ((64, 65), 20)]

def apollo(module, device, shape, r, dtype=torch.float32, tolerance=1e-4):
    "Updates and state of six steps with two seeds, relative to their size."
    torch.manual_seed(r)
    n = max(shape)
    a = [torch.randn(shape).to(dtype), torch.zeros(r, n), torch.zeros(r, n), torch.zeros(1)]
    w0, b = a[0].clone(), [t.clone().to(device) for t in a]
    for t in range(1, 7):
        g = (torch.randn(shape)*10**float(torch.randn(1))).to(dtype)
        module.naive(a[0], g, tuple(a[1:]), t, 11 + t//3, 0.01, 1., (0.9, 0.99, 1e-6, 0.1, 1.01))
        module.fast(b[0], g.to(device), tuple(b[1:]), t, 11 + t//3, 0.01, 1., (0.9, 0.99, 1e-6, 0.1, 1.01))
    assert float((a[0].float() - b[0].cpu().float()).norm()/(a[0].float() - w0.float()).norm()) < tolerance
    for x, y in zip(a[1:], b[1:]): assert float((x - y.cpu()).norm()/x.norm()) < tolerance

def everything(module, device, name, exact=False):
    "All checks of one module."
    if name == "dequant":
        for bits in LEVELS:
            exact_product(module, device, bits)
            for case in PRODUCTS: product(module, device, bits, *case)
    if name == "hadamard":
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for case in TRANSFORMS: transform(module, device, *case, dtype)
    if name == "mxfp4": microscaled(module, device)
    if name == "states":
        for case in STATES:
            if case[2] == torch.float8_e4m3fn and device == "cuda" and torch.cuda.get_device_capability() < (8, 9): continue    # Triton compiles no e4m3 there, and `states.cases` names no such target
            lion(module, device, *case, exact)
        for case in LOGS: logarithms(module, device, *case, exact)
    if name == "s2_attention":
        for case in ATTENTIONS: attention(module, device, *case)
    if name == "apollo_step":
        for case in STEPS: apollo(module, device, *case)
