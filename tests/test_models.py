import json, os, stat
from dataclasses import replace

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from paretolab.data.tokens import tokenizer
from paretolab.models import hf
from paretolab.models.generate import Cache, decode_speed, generate, sample
from paretolab.models.linear import linear
from paretolab.models.mobilellm import MobileLLM
from paretolab.models.shape import Shape, mobilellm

SMALL = Shape(vocab=61, dim=24, ff=20, layers=2, heads=6, kv_heads=2, context=32)


def noisy(shape, seed=0):
    "A model whose weights are large enough that every part shows in the logits."
    g, m = torch.Generator().manual_seed(seed), MobileLLM(shape).requires_grad_(False)
    for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=g)*(0.1 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    return m

def text(shape, *size, seed=0): return torch.randint(shape.vocab, size, generator=torch.Generator().manual_seed(seed))

@st.composite
def shapes(draw, post_ln=0):
    kv, per, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    return Shape(draw(st.integers(1, 40)), kv*per*2*half, draw(st.integers(1, 30)), layers, kv*per, kv, context=24, theta=draw(st.sampled_from([1e4, 5e5])),
        eps=draw(st.sampled_from([1e-5, 1e-6])), repeat=draw(st.integers(1, 3)), post_ln=min(post_ln, layers), tied=draw(st.booleans()))

@pytest.fixture
def folder(tmp_path): return hf.save(noisy(SMALL), tmp_path/"model", dtype=torch.float32)


# the layout

@settings(max_examples=30, deadline=None)
@given(shapes())
def test_a_model_comes_back_bit_for_bit(tmp_path_factory, shape):
    m = noisy(shape); back = hf.load(hf.save(m, tmp_path_factory.mktemp("model"), dtype=torch.float32))
    assert back.shape == replace(shape, layers=shape.layers*shape.repeat, repeat=1)
    assert torch.equal(back(text(shape, 2, 20)), m(text(shape, 2, 20)))

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once(tmp_path, dtype):
    m = noisy(SMALL); back = hf.load(hf.save(m, tmp_path, dtype=dtype)).state_dict()
    for name,w in m.state_dict().items(): assert torch.equal(back[name], w.to(dtype).float()), name
    assert json.loads((tmp_path/"config.json").read_text())["dtype"] == str(dtype)[6:]

@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, repeat=2, tied=False), replace(SMALL, kv_heads=6, theta=5e5, eps=1e-6), replace(SMALL, heads=1, kv_heads=1)])
def test_transformers_agrees_both_ways(tmp_path, shape):
    from transformers import AutoModelForCausalLM
    m, x = noisy(shape), text(shape, 3, 32)
    theirs = AutoModelForCausalLM.from_pretrained(hf.save(m, tmp_path/"ours", dtype=torch.float32), dtype=torch.float32)
    z = theirs(x).logits.detach()
    assert_close(m(x), z, rtol=0, atol=2e-5*z.std().item())
    theirs.save_pretrained(tmp_path/"theirs")
    assert_close(hf.load(tmp_path/"theirs")(x), z, rtol=0, atol=2e-5*z.std().item())

def test_what_older_tools_add_is_understood(folder):
    path = folder/"model.safetensors"; t = load_file(path); more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(t | more | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, path); hf.load(folder)
    save_file(t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="not part of this model: lm_head.weight"): hf.load(folder)

def test_saving_replaces_all_or_nothing(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    def full(*_, **__): raise OSError(28, "No space left on device")
    for where,name in ((hf, "save_file"), (hf.json, "dumps")):
        with monkeypatch.context() as m:
            m.setattr(where, name, full)
            with pytest.raises(OSError, match="No space"): hf.save(noisy(SMALL, 1), folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    hf.save(noisy(replace(SMALL, vocab=4096)), folder, tokenizer())
    assert len({stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}) == 1 and not list(folder.glob(".*"))
    assert json.loads((folder/"tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"

def test_only_plain_weights_are_saved(tmp_path):
    m = noisy(SMALL); m.blocks[0].attn.q.register_buffer("scale", torch.ones(1))
    with pytest.raises(ValueError, match="blocks.0.attn.q.scale"): hf.save(m, tmp_path/"other")
    assert not (tmp_path/"other").exists()


# what strangers send

ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.integers(1, 99) | st.floats() | st.text(max_size=5) | st.sampled_from(["default", "llama", "silu", 10**400]),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "type", "factor"]), x, max_size=3), max_leaves=4)
ROPE = st.fixed_dictionaries({}, optional=dict(rope_theta=ANY, rope_type=ANY, type=ANY))

@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_configuration_is_a_shape_or_refused(data):
    c = hf._config(SMALL, torch.float16)
    c |= data.draw(st.dictionaries(st.sampled_from([*c, "rope_scaling", "quantization_config"]), ANY, min_size=1, max_size=3))
    if data.draw(st.booleans()): c[data.draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = data.draw(ROPE)
    try: assert isinstance(hf._shape(c), Shape)
    except ValueError as e: assert str(e)

@pytest.mark.parametrize("v", [0, 0., -1., 10**400, float("nan"), float("inf"), True, "1e4", [1e4]])
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_constants_are_positive_numbers(key, v):
    c = {k: x for k,x in hf._config(SMALL, torch.float16).items() if k != "rope_parameters"}
    with pytest.raises(ValueError, match=f"{key} has to be (a positive|one) number"): hf._shape(c | {key: v})

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_weights_load_or_are_refused(tmp_path_factory, data):
    folder = hf.save(noisy(SMALL), tmp_path_factory.mktemp("model")); path = folder/"model.safetensors"; b = bytearray(was := path.read_bytes())
    header = int.from_bytes(b[:8], "little")
    for i in data.draw(st.lists(st.integers(0, header + 40), max_size=3)): b[i] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(b[:data.draw(st.sampled_from([len(b), len(b) - 1, header, 7, 0]))])
    changed = path.read_bytes() != was
    try: loaded = hf.load(folder)
    except ValueError as e: assert changed and str(e)                     # only what was damaged is refused
    else:
        assert len(path.read_bytes()) == len(was) and all(p.isfinite().all() for p in loaded.parameters())     # a cut file never loads
        if not changed: assert all(torch.equal(a.half(), b.half()) for a,b in zip(loaded.parameters(), noisy(SMALL).parameters()))

class Hostile:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_pickle_runs_nothing(folder, name):
    sentinel = folder/"it ran"; (folder/"model.safetensors").unlink()
    torch.save(Hostile(str(sentinel)), folder/name)
    with pytest.raises((ValueError, FileNotFoundError), match="safetensors|not JSON"): hf.load(folder)
    assert not sentinel.exists()

@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b.safetensors", "b.bin", "b.safetensors\n", "", 3, None])
def test_an_index_stays_in_its_folder(folder, name):
    os.rename(folder/"model.safetensors", folder/"weights.safetensors"); index = folder/"model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"a": "weights.safetensors"}))); hf.load(folder)
    index.write_text(json.dumps(dict(weight_map={"a": "weights.safetensors", "b": name})))
    with pytest.raises(ValueError, match="in its own folder"): hf.load(folder)

def test_a_tensor_in_two_files_is_refused(folder):
    t = load_file(folder/"model.safetensors"); os.rename(folder/"model.safetensors", folder/"a.safetensors"); save_file({"model.norm.weight": t["model.norm.weight"]}, folder/"b.safetensors")
    (folder/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict(x="a.safetensors", y="b.safetensors"))))
    with pytest.raises(ValueError, match="repeats tensors of another file .model.norm.weight"): hf.load(folder)

@pytest.mark.parametrize("c", ["[]", "3", "{", "", "\xff", "["*100_000, '{"model_type": "llama"}', "{}"])
def test_a_configuration_has_to_be_one(folder, c):
    (folder/"config.json").write_text(c, encoding="latin-1")
    with pytest.raises(ValueError, match="JSON|has to be"): hf.load(folder)


# the cache and generation: in 64 bits, so that rounding hides nothing

@settings(max_examples=40, deadline=None)
@given(shapes(post_ln=1), st.integers(1, 3), st.integers(1, 24), st.sets(st.integers(1, 23)))
def test_pieces_give_the_logits_of_the_whole(shape, B, T, cuts):
    m, x, cache = noisy(shape).double(), text(shape, B, T), Cache(shape, B, T, torch.float64)
    edges = [0, *sorted(c for c in cuts if c < T), T]
    z = torch.cat([m(x[:,i:j], cache) for i,j in zip(edges, edges[1:])], 1)
    assert cache.length == T and cache.nbytes == 2*8*shape.layers*shape.repeat*B*shape.kv_heads*T*shape.head_dim
    assert_close(z, m(x), rtol=0, atol=1e-10)

@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("how", [(0., 0), (1., 0), (.7, 4), (2., 1)])
@pytest.mark.parametrize("size", [(1, 1, 31), (3, 5, 9), (2, 31, 1), (2, 4, 0), (0, 3, 2)])
def test_generation_equals_reading_everything_again(repeat, how, size):
    B, T, new = size; m = noisy(replace(SMALL, repeat=repeat)).double(); x, state = text(SMALL, B, T), torch.get_rng_state()
    y, slow, g = generate(m, x, new, *how, seed=5), x, torch.Generator().manual_seed(5)
    for _ in range(new): slow = torch.cat([slow, sample(m(slow)[:,-1], *how, g)], 1)
    assert torch.equal(y, slow) and torch.equal(y, generate(m, x, new, *how, seed=5))
    assert torch.equal(torch.get_rng_state(), state) and not y.requires_grad

@pytest.mark.parametrize("τ,k", [(1., 0), (.5, 0), (3., 7), (1., 1), (1e-40, 0), (1e30, 0)])
def test_draws_follow_the_equation(τ, k):
    n, z = 40_000, torch.randn(12, generator=torch.Generator().manual_seed(1))*2
    want = z.double(); want = torch.where(want >= want.sort(descending=True)[0][(k or 12) - 1], want, -torch.inf); want = ((want - want.max())/τ).softmax(-1)
    got = sample(z.expand(n, 12), τ, k, torch.Generator().manual_seed(2)).flatten().bincount(minlength=12).double()/n
    assert (got[want == 0] == 0).all()
    assert ((got - want).abs() <= 5*(want*(1 - want)/n).sqrt()).all()

@pytest.mark.parametrize("τ,k", [(-1, 0), (float("nan"), 0), (float("inf"), 0), (1., -1), (1., 62)])
def test_impossible_choices_are_refused(τ, k):
    with pytest.raises(ValueError, match="temperature|top_k"): generate(noisy(SMALL), text(SMALL, 1, 3), 2, τ, k)

def test_no_piece_passes_the_context():
    m, cache = noisy(SMALL), Cache(SMALL, 1, 99)
    m(text(SMALL, 1, 30), cache); m(text(SMALL, 1, 2), cache)
    with pytest.raises(ValueError, match=r"at most 32 tokens \(got 33\)"): m(text(SMALL, 1, 1), cache)
    with pytest.raises(ValueError, match=r"\(got 32 and 1 new ones\)"): generate(m, text(SMALL, 1, 32), 1)
    assert cache.length == 32

def test_speed_is_a_number_of_the_right_kind():
    assert 0 < decode_speed(noisy(SMALL), 2, 4) < float("inf")
    for n in ((0, 4), (4, 0), (30, 3)):
        with pytest.raises(ValueError, match="at most 32 together"): decode_speed(noisy(SMALL), *n)


# the parts

@pytest.mark.parametrize("rows", [(1,), (17,), (2, 9), (3, 1, 40)])
@pytest.mark.parametrize("k,m", [(1, 1), (7, 33), (64, 5)])
def test_both_libraries_give_one_product(rows, k, m):
    x, W = text(SMALL, *rows, k).float().div(61).requires_grad_(), text(SMALL, m, k, seed=1).float().div(61).requires_grad_()
    ours = linear(x, W); theirs = F.linear(x.double(), W.double())
    assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    for a,b in zip(torch.autograd.grad(ours.sin().sum(), (x, W)), torch.autograd.grad(theirs.sin().sum(), (x, W))): assert_close(a, b, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("name", ["125M", "350M-LS", "nano", "tiny"])
def test_no_parameter_is_uncounted(name):
    with torch.device("meta"): assert sum(p.numel() for p in MobileLLM(mobilellm(name)).parameters()) == mobilellm(name).parameters
