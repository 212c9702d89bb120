"""The Triton kernels on a GPU, where there is one: the same checks that the interpreter passes."""
import importlib

import pytest, torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

@pytest.mark.parametrize("name", ["dequant", "hadamard", "mxfp4", "states", "s2_attention", "apollo_step"])
def test_kernels_agree_with_their_definitions(name):
    pytest.importorskip("triton")
    import kernel_checks
    kernel_checks.everything(importlib.import_module(f"paretolab.kernels.{name}"), "cuda", name)

@pytest.mark.parametrize("ty", ["bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"])
def test_casts_are_those_of_the_interpreter(ty):
    from paretolab.kernels import interpreter
    ty = getattr(torch, ty)
    if ty == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9): pytest.skip("no e4m3 before sm_89")
    x = torch.cat([torch.randn(1000)*10.0**k for k in range(-6, 5)] + [torch.tensor([0., -0., torch.inf, torch.nan, 448, 464, 480, 57344, 65519, 65520, 1 + 2**-8])])
    there, here = torch.empty(len(x), dtype=ty, device="cuda"), torch.empty(len(x), dtype=ty)
    interpreter._cast[(1,)](x.cuda(), there, len(x), B=16384)
    with interpreter.interpret(): interpreter._cast[(1,)](x, here, len(x), B=16384)
    bits = torch.int8 if ty.itemsize == 1 else torch.int16
    nan = here.float().isnan()
    assert torch.equal(there.cpu().view(bits)[~nan], here.view(bits)[~nan]) and there.cpu().float()[nan].isnan().all()
