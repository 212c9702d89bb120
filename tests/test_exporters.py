"""compressed-tensors and ONNX: every grid against the packages that read the files; what is refused, by GGUF too, leaves nothing behind."""
import itertools, json
from dataclasses import replace
import numpy as np
import pytest, torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from onnx import helper, numpy_helper
from safetensors.torch import load_file
import onnxruntime
from paretolab.data.tokens import tokenizer
from paretolab.models import hf
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.quantizers import absmax, compressed_tensors, gguf, grids, plan
from paretolab.quantizers import onnx as ours
from paretolab.quantizers.lowbit import LowBit
GRIDS = [(f, b) for f, bs in ((absmax.quantize, (2, 3, 4, 6, 8)), (grids.symmetric, (2, 3, 4, 6, 8)), (grids.sign, (1,)), (grids.ternary, (1.58,)), (grids.stretched, (1.58, 2)), (grids.bipolar, (1, 2, 3, 4, 6))) for b in bs]
SMALL = Shape(vocab=300, dim=64, ff=96, layers=2, heads=4, kv_heads=2, context=64)


def matrix(columns):
    w = torch.randn(5, columns)*torch.logspace(-3, 2, 5)[:, None]
    w[2], w[3] = 0, -3                                      # with an offset both have no step
    return w


@pytest.mark.parametrize("f, bits", GRIDS)
@pytest.mark.parametrize("widths", [(2, 3, 4, 5, 6, 7, 8), (4, 8)])
def test_compressed_tensors_decompresses_what_was_packed(f, bits, widths):
    for group, columns in ((32, 96), (0, 33), (0, 7), (16, 160)):
        q = f(matrix(columns), bits, group)
        b, parts = compressed_tensors.pack(q, widths)
        kind = dict(strategy="group", group_size=group) if group else dict(strategy="channel")
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=b, type="int", symmetric=True, **kind))
        reader = BaseCompressor.get_value_from_registry("pack-quantized")
        got = reader.decompress(parts | dict(weight_scale=parts["weight_scale"].float()), scheme)["weight"]
        assert b in widths and torch.equal(got, q.dequantize())


@pytest.mark.parametrize("f, bits", GRIDS + [(grids.asymmetric, b) for b in (2, 3, 4)])
def test_onnxruntime_multiplies_by_what_was_packed(f, bits):
    for group, columns in ((32, 96), (0, 48), (48, 96), (16, 32), (0, 512)):
        q = f(matrix(columns), bits, group)
        p = ours.pack(q)
        inputs = {"B": p["codes"], "s": p["scales"]} | ({} if p["zeros"] is None else {"z": p["zeros"]})
        node = helper.make_node("MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", K=columns, N=5, bits=p["bits"], block_size=p["block"])
        graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", 1, [columns, columns])], [helper.make_tensor_value_info("y", 1, [columns, 5])], [numpy_helper.from_array(a, n) for n, a in inputs.items()])
        run = onnxruntime.InferenceSession(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)], ir_version=11).SerializeToString())
        got, want = torch.from_numpy(run.run(None, {"x": np.eye(columns, dtype=np.float32)})[0].T), q.dequantize()
        if q.zeros is None: assert torch.equal(got, want)
        else: assert ((got - want).abs() <= 2**-21*(want.abs().amax(1, keepdim=True) + q.zeros.float().abs().amax())).all()       # s(q - z) rounds otherwise than Δq + m


@pytest.mark.parametrize("save", [lambda p, s, state: compressed_tensors.save(p, s, state), lambda p, s, state: ours.save(p, s, state)], ids=["compressed_tensors", "onnx"])
@pytest.mark.parametrize("q, why", [(grids.mxfp4(torch.ones(64, 64)), "float8_e8m0fnu|not whole multiples"), (grids.e4m3(torch.ones(64, 64)), "not whole multiples"), (grids.bipolar(torch.ones(64, 64), 8), "-255 to 255")])
def test_what_is_refused(save, q, why, tmp_path):
    state = plan.compress(MobileLLM(SMALL), {}) | {"blocks.1.attn.o.weight": q}
    with pytest.raises(ValueError, match=f"1 of 20 .*blocks.1.attn.o.weight: .*({why})"): save(tmp_path/"m", SMALL, state)
    assert not list(tmp_path.iterdir())


def test_a_folder_names_each_layer_once(tmp_path):
    m = MobileLLM(SMALL)
    state = plan.compress(m, {n: (4 if "attn" in n else 8, 32, "absmax.quantize") for n in plan.uniform(m, 4) if n != "embed" and "down" not in n})
    folder = compressed_tensors.save(tmp_path/"m", SMALL, state)
    config = json.loads((folder/"config.json").read_text())["quantization_config"]
    named = [n for g in config["config_groups"].values() for n in g["targets"]] + config["ignore"]
    assert len(named) == len(set(named)) == 2*7 + 1 and sorted(config["ignore"]) == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    packed = {n.rpartition(".")[0] for n in load_file(folder/"model.safetensors") if n.endswith("weight_packed")}
    assert packed == set(named) - set(config["ignore"])


@pytest.mark.parametrize("more", [dict(theta=500.), dict(tied=False, repeat=2), dict(post_ln=2)])
def test_onnx_gives_our_logits(more, tmp_path):
    m = MobileLLM(replace(SMALL, **more))
    with torch.no_grad():
        for p in m.parameters(): p.mul_(3) if p.ndim == 2 else p.uniform_(.5, 2)
    state = plan.compress(m, {n: (4, 16, "absmax.quantize") for n in plan.uniform(m, 4)})
    run = onnxruntime.InferenceSession(ours.save(tmp_path/"m.onnx", m.shape, state))
    small = plan.restore(MobileLLM(m.shape), state)
    for B, T in ((1, 1), (3, 17), (2, 64)):
        x = torch.randint(300, (B, T))
        with torch.no_grad(): z = small(x)
        y = torch.from_numpy(run.run(None, {"tokens": x.numpy()})[0])
        assert (y - z).norm() < 1e-5*z.norm()                                               # 32-bit sums in another order


def hand(lo, hi, bits, **more):
    "A matrix with the whole levels lo to hi, each of them used."
    n = hi - lo + 1
    codes = torch.arange(n)[None].repeat(2, 32)[:, :32*-(-n//32)]
    return LowBit.pack(codes, torch.ones(2, 1 if "group" not in more else codes.shape[1]//more["group"]).half(), torch.arange(lo, hi + 1.), bits, **more)


@pytest.mark.parametrize("lo, hi, bits, packed, product", [(-2, 1, 2, 2, 2), (-2, 2, 3, 3, 4), (-3, 1, 3, 3, 4), (-4, 3, 3, 3, 4), (-4, 4, 4, 4, 4), (-8, 7, 4, 4, 4), (-9, 6, 4, 5, 8), (-7, 8, 4, 5, 8), (-128, 127, 8, 8, 8), (-127, 128, 8, None, None)])
def test_the_ends_of_a_grid_decide_the_width(lo, hi, bits, packed, product):
    q = hand(lo, hi, bits)
    assert compressed_tensors.fits(q)[0] == packed and (ours.fits(q)[0] or (None,))[0] == product


ALL = {"gguf": gguf.fits, "compressed_tensors": compressed_tensors.fits, "onnx": ours.fits}
ODD = {"an order": (hand(-8, 7, 4, perm=torch.arange(32).flip(0).int()), "another order"), "widths": (LowBit.pack(torch.zeros(2, 64, dtype=torch.int), torch.ones(2, 2).half(), {2: torch.arange(4.), 4: torch.arange(16.)}, (2, 4), 32), "different widths"),
    "halves": (LowBit.pack(torch.zeros(2, 32, dtype=torch.int), torch.ones(2, 1).half(), torch.arange(16.)/2, 4), "whole multiples"), "an offset of wide levels": (LowBit.pack(torch.zeros(2, 32, dtype=torch.int), torch.ones(2, 1).half(), torch.arange(64.), 6, zeros=torch.ones(2, 1).half()), "offset")}

@pytest.mark.parametrize("fits", ALL.values(), ids=ALL)
@pytest.mark.parametrize("q, why", ODD.values(), ids=ODD)
def test_what_no_exporter_takes(fits, q, why):
    kind, reason = fits(q)
    assert kind is None and why in reason


@pytest.mark.parametrize("save, file", [(lambda p, s, x: compressed_tensors.save(p, s, x), "m"), (lambda p, s, x: ours.save(p, s, x), "m.onnx"), (lambda p, s, x: gguf.save(p, s, x, tokenizer()), "m.gguf")], ids=["compressed_tensors", "onnx", "gguf"])
def test_a_state_is_the_whole_model_or_nothing_is_written(save, file, tmp_path):
    shape = replace(SMALL, vocab=4096)
    state = plan.compress(MobileLLM(shape), {})
    for bad, why in (({n: t for n, t in state.items() if "norm1" not in n}, "lacks blocks.0.norm1.weight, blocks.1.norm1.weight"), (state | {"more": torch.ones(2)}, "has no more"), (state | {"norm.weight": torch.ones(7)}, r"of shape \(64,\)"), (state | {"norm.weight": 1.}, "norm.weight: a LowBit or a Tensor")):
        with pytest.raises(ValueError, match=why): save(tmp_path/file, shape, bad)
    with pytest.raises(ValueError, match="lacks blocks.2"): save(tmp_path/file, replace(shape, layers=3), state)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_read_by_its_own_config(tmp_path):
    "As a stranger would: widths and groups from config.json, tensors from the file, values from the package."
    m = MobileLLM(replace(SMALL, ff=104, tied=False))
    with torch.no_grad():
        for p in m.parameters(): p.normal_()
    entries = itertools.cycle([(4, 8, "grids.symmetric"), (1.58, 0, "grids.ternary"), (2, 4, "grids.stretched"), (8, 8, "absmax.quantize"), (4, 0, "absmax.quantize")])
    state = plan.compress(m, {n: (8, 8, "absmax.quantize") if n == "embed" else next(entries) for n in plan.uniform(m, 4)})
    assert state["blocks.0.mlp.down.weight"].bits == 1.58                                  # rows of 208 bits, that end at 224
    rows, folder = compressed_tensors.table(state), compressed_tensors.save(tmp_path/"m", m.shape, state)
    file, config = load_file(folder/"model.safetensors"), json.loads((folder/"config.json").read_text())["quantization_config"]
    assert sum(t.nbytes for t in file.values()) == sum(n for _, n, _ in rows.values())
    schemes = {n: QuantizationScheme(**(g | dict(targets=["Linear"]))) for g in config["config_groups"].values() for n in g["targets"]}
    reader = BaseCompressor.get_value_from_registry("pack-quantized")
    for theirs, name in hf._names(m.shape).items():
        module = theirs.removesuffix(".weight")
        if module in schemes:
            a, groups = schemes[module].weights, state[name].scales.shape[1]
            parts = {k: file[f"{module}.{k}"] for k in ("weight_packed", "weight_scale", "weight_shape")}
            got = reader.decompress(parts | dict(weight_scale=parts["weight_scale"].float()), schemes[module])["weight"]
            assert (a.symmetric, a.group_size or state[name].shape[1], parts["weight_scale"].shape[1]) == (True, state[name].group, groups)
        else: got = file[theirs].float()
        assert torch.equal(got, state[name].dequantize() if isinstance(state[name], LowBit) else state[name].float()), theirs
    assert file["model.embed_tokens.weight"].dtype == torch.float32
