"""Decoding from low-bit tensors: the same logits and text as the definition, streaming, the command, wrong input, two models at once."""
import copy, os, shutil, signal, subprocess, sys, threading
from dataclasses import replace

import pytest, torch
from hypothesis import given, settings, strategies as st

from paretolab.data.tokens import tokenizer
from paretolab.frontier import job
from paretolab.frontier.command import main
from paretolab.kernels import product
from paretolab.models import decode, hf
from paretolab.models.decode import PackedLM, load, naive, stream, write
from paretolab.models.generate import Cache, sample
from paretolab.models.mobilellm import MobileLLM
from paretolab.models.shape import Shape
from paretolab.quantizers import lowbit, plan

pytestmark = pytest.mark.filterwarnings("ignore:no C++ compiler")
TOK = tokenizer()

@pytest.fixture(autouse=True)
def one_thread():
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(1); torch.set_grad_enabled(False)
    yield
    torch.set_num_threads(threads); torch.set_grad_enabled(grad)

def noisy(s, seed=0):
    m, g = MobileLLM(s), torch.Generator().manual_seed(seed)
    for w in m.parameters(): w.data = torch.randn(w.shape, generator=g)*(0.1 if w.ndim > 1 else 0.3) + (w.ndim == 1)
    return m

def packed(s, bits=4, group=0, seed=0):
    m = noisy(s, seed); state = plan.compress(m, plan.uniform(m, bits, group, embed_bits=bits))
    return PackedLM(s, state), state

@pytest.fixture(scope="module")
def shipped(): return load(hf.shipped(), 4)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A model as the job writes it: 3 bits, and the tokenizer."
    at, m = tmp_path_factory.mktemp("model"), hf.load(hf.shipped())
    hf.save(m, at, TOK); lowbit.save(at/"lowbit.safetensors", plan.compress(m, plan.uniform(m, 3, 64))); (at/"model.safetensors").unlink()
    return at

shapes = st.builds(lambda heads, share, half, ff, layers, repeat, post, tied, vocab: Shape(vocab=vocab, dim=2*heads*share*half, ff=ff, layers=layers, heads=heads*share, kv_heads=heads, context=24, repeat=repeat, post_ln=post*layers, tied=tied),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 11), st.integers(1, 70), st.integers(1, 2), st.integers(1, 2), st.integers(0, 1), st.booleans(), st.integers(1, 40))

@settings(max_examples=20, deadline=None)
@given(shapes, st.sampled_from([2, 3, 4, 6, 8]), st.integers(1, 24), st.data())
def test_cpp_and_torch_agree_to_the_last_bit(s, bits, T, data):
    p, _ = packed(s, bits)
    x = torch.tensor([data.draw(st.lists(st.integers(0, s.vocab - 1), min_size=T, max_size=T))])
    z, cut = p(x), data.draw(st.integers(1, T))
    assert torch.equal(z, naive(p, x)) and torch.equal(z[:, -1:], p(x, last=True))
    a, b = Cache(s, 1, T), Cache(s, 1, T)
    pieces = [p(x[:, :cut], a), *(p(x[:, i:i+1], a) for i in range(cut, T))]
    slow = [naive(p, x[:, :cut], b), *(naive(p, x[:, i:i+1], b) for i in range(cut, T))]
    assert torch.equal(torch.cat(pieces, 1), z) and torch.equal(torch.cat(slow, 1), z)
    assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v) and a.length == b.length == T

def test_it_is_the_dequantized_model_but_for_the_rounding_of_activations():
    s = Shape(vocab=97, dim=96, ff=160, layers=3, heads=6, kv_heads=2, context=40)
    for bits in (2, 4, 8):
        p, state = packed(s, bits)
        x = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(bits))
        z, exact = p(x), plan.restore(MobileLLM(s), state)(x)
        assert 1e-2 < (z - exact).norm()/exact.norm() < 0.045                                   # measured: 0.030 to 0.034 with these random weights
        floats = lambda u, w: u @ decode.rows(w, torch.arange(w.shape[0])).t()                  # no rounding: only the products' order is left
        assert (naive(p, x, multiply=floats) - exact).norm()/exact.norm() < 1e-5

def test_scores_beyond_the_exponentials_of_doubles():
    m = noisy(s := Shape(vocab=50, dim=16, ff=16, layers=1, heads=1, kv_heads=1, context=24))
    for w in (m.blocks[0].attn.q.weight, m.blocks[0].attn.k.weight): w.mul_(100)
    p = PackedLM(s, plan.compress(m, plan.uniform(m, 8, 0)))
    x = torch.randint(50, (1, 24), generator=torch.Generator().manual_seed(0))
    assert p(x).isfinite().all() and torch.equal(p(x), naive(p, x))

def slow_text(p, state, prompt, new):
    "Greedy text without a cache, every product from the integers of the low-bit tensors."
    at = {id(p.head): state["embed.weight"]}
    for i,b in enumerate(p.blocks): at |= {id(getattr(b, x)): state[f"blocks.{i}.{'attn' if x in 'qkvo' else 'mlp'}.{x}.weight"] for x in ("q", "k", "v", "o", "gate", "up", "down")}
    ids = TOK.encode(prompt).ids
    for _ in range(new): ids.append(int(sample(naive(p, torch.tensor([ids]), multiply=lambda u, w: product.naive(u, at[id(w)]))[:, -1])))
    return TOK.decode(ids)

def test_the_text_is_that_of_the_definition():
    m = hf.load(hf.shipped()); state = plan.compress(m, plan.uniform(m, 4, 64)); p = PackedLM(m.shape, state)
    prompt = "def __init__(self"
    assert prompt + "".join(write(p, TOK, prompt, 5, end=())) == slow_text(p, state, prompt, 5)

def test_a_seed_decides_and_threads_do_not(shipped):
    say = lambda **how: "".join(write(shipped, TOK, "CHAPTER 12. The", 30, **how))
    assert say(temperature=1., top_k=50, seed=3) == say(temperature=1., top_k=50, seed=3) != say(temperature=1., top_k=50, seed=4)
    x = torch.randint(4096, (1, 64), generator=torch.Generator().manual_seed(0)); one = shipped(x)
    torch.set_num_threads(2)
    assert torch.equal(shipped(x), one) and torch.equal(shipped(x, last=True), one[:, -1:])

def test_two_models_decode_in_two_threads_at_once(shipped):
    other = load(hf.shipped(), 2)
    say = lambda m, prompt: "".join(write(m, TOK, prompt, 60, 0.8, 40, 1))
    alone, together = [say(shipped, "CHAPTER"), say(other, "def f(x")], [None, None]
    def run(i): together[i] = [say((shipped, other)[i], ("CHAPTER", "def f(x")[i]) for _ in range(3)]
    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert together == [[a]*3 for a in alone]

def test_a_text_ends_at_its_end(shipped):
    ids = [int(i) for i in sample(shipped(torch.tensor([TOK.encode("The").ids]), last=True)[:, -1])]
    assert list(write(shipped, TOK, "The", 5, end=tuple(ids))) == [] and "".join(write(shipped, TOK, "The", 0)) == ""

# Streaming

@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_pieces_together_are_the_text(text):
    ids = TOK.encode(text).ids
    pieces = list(stream(TOK, ids))
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces if "\ufffd" not in text)

@settings(max_examples=100, deadline=None)
@given(st.text(max_size=8), st.lists(st.one_of(st.integers(1, 300), st.integers(1, 4095)), max_size=8))
def test_any_tokens_come_out_as_they_decode(front, ids):
    before = TOK.encode(front).ids                      # bytes that are no characters, or only half of one, too
    assert front + "".join(stream(TOK, ids, before)) == TOK.decode(before + ids)

def test_a_character_is_held_back_until_it_is_whole():
    ids, came = TOK.encode("🙂x").ids, []
    assert len(ids) == 5
    def feed():
        for n,i in enumerate(ids): came.append(n); yield i
    assert next(pieces := stream(TOK, feed())) == "🙂" and came == [0, 1, 2, 3]
    assert next(pieces) == "x"

# What can be wrong

def test_what_does_not_fit_is_refused_and_nothing_changes(shipped):
    cache = Cache(shipped.shape, 1, 8); shipped(torch.tensor([[5, 6]]), cache); kept = cache.k[:, :, :, :2].clone()
    for x, part in ((torch.tensor([[5, 4096]]), "from 0 to 4095 (got 4096)"), (torch.tensor([[-1]]), "(got -1)"), (torch.zeros(1, 7).long(), "room for 8 tokens (got 9)"), (torch.zeros(2, 1).long(), "one text at a time"),
                    (torch.zeros(1, 0).long(), "at least one token"), (torch.zeros(1, 3), "float32"), (torch.zeros(1, 600).long(), "at most 512")):
        with pytest.raises((ValueError, IndexError)) as e: shipped(x, cache)
        assert part in str(e.value)
    assert cache.length == 2 and torch.equal(cache.k[:, :, :, :2], kept)
    for other in (Cache(shipped.shape, 2, 8), Cache(shipped.shape, 1, 8, torch.float16), Cache(replace(shipped.shape, layers=shipped.shape.layers + 1), 1, 8)):
        with pytest.raises(ValueError, match="the cache has to be float32"): shipped(torch.tensor([[1]]), other)

def test_a_state_that_is_no_low_bit_model_is_refused():
    s = Shape(vocab=20, dim=16, ff=16, layers=1, heads=2, kv_heads=1, context=8); _, state = packed(s)
    for name, t, part in (("blocks.0.mlp.up.weight", torch.zeros(16, 16).half(), "blocks.0.mlp.up.weight has no width"), ("blocks.0.attn.k.weight", state["blocks.0.attn.q.weight"], "of shape (8, 16)"), ("other", torch.zeros(1), "only in the state")):
        with pytest.raises(ValueError) as e: PackedLM(s, state | {name: t})
        assert part in str(e.value)
    with pytest.raises(ValueError, match="only in the shape"): PackedLM(s, {n: t for n,t in state.items() if n != "embed.weight"})

def test_without_a_compiler_the_definition_runs(monkeypatch):
    s = Shape(vocab=20, dim=16, ff=16, layers=1, heads=2, kv_heads=1, context=8); p, state = packed(s); x = torch.tensor([[1, 2, 3]])
    monkeypatch.setattr(decode.native, "load", lambda _: None)
    q = PackedLM(s, state)
    assert q._native is None and (q(x, last=True) - p(x, last=True)).abs().max() < 1e-5

# The command

@pytest.mark.parametrize("argv, part", [(["nowhere", "a"], "nowhere is no model"), (["shipped", ""], "at least one token"), (["shipped", "a", "--new", "-1"], "-1"), (["shipped", "a", "--new", "600"], "at most 512 tokens"),
    (["shipped", "a", "--temperature", "nan"], "nan"), (["shipped", "a", "--top-k", "9999"], "9999"), (["shipped", "a", "--bits", "7"], "(got 7"), (["shipped", "a", "--group", "7"], "group=7"), (["shipped", "a", "--threads", "-2"], "-2"), (["shipped", "a", "--threads", "100000"], "(got 100000)"),
    (["shipped", "a\udcff"], "UTF-8"), (["shipped", "a", "--seed", str(2**63)], "a seed is"), (["shipped", "a", "--embed-bits", "1"], "(got 1 for the embedding)")])
def test_generate_refuses_by_a_sentence(argv, part, capsys):
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and part in err and err.startswith("paretolab: ") and "Traceback" not in err

def test_generate_takes_a_folder_of_the_job(folder, capsys):
    run = lambda *more: (main(["generate", str(folder), "The", "--new", "12", "--temperature", "0", *more]), *capsys.readouterr())
    code, out, err = run()
    assert code == 0 and out == "The" + "".join(write(load(folder), TOK, "The", 12)) + "\n"
    assert run("--bits", "4")[0] == 2 and "have their widths already" in run("--bits", "4")[2]
    (bad := folder.parent/"bad").mkdir(); [shutil.copy(folder/n, bad) for n in ("config.json", "lowbit.safetensors")]; (bad/"tokenizer.json").write_text("{")
    assert main(["generate", str(bad), "The"]) == 2 and "tokenizer.json" in capsys.readouterr().err
    (bad/"lowbit.safetensors").write_bytes(b"damaged")
    assert main(["generate", str(bad), "The"]) == 2 and "safetensors" in capsys.readouterr().err

def test_ctrl_c_ends_the_line_and_leaves_with_130(folder):
    run = "import sys, time; from paretolab.models import decode; slow = decode.write\n" \
          "def write(*a): return (time.sleep(0.05) or p for p in slow(*a))\ndecode.write = write\nfrom paretolab.frontier.command import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", run, "generate", str(folder), "The", "--new", "400", "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))                        # a shell's background jobs ignore Ctrl-C, and so would their children
    first = child.stdout.read(12); child.send_signal(signal.SIGINT)                             # the prompt and at least one piece came while it was writing
    out, err = child.communicate(timeout=240)
    assert child.returncode == 130 and (first + out).startswith(b"The") and out.endswith(b"\n") and b"Traceback" not in err

def test_the_speed_of_a_point_is_that_of_the_low_bit_model(folder):
    floats = job.load(folder)
    (packed, engine), floating = job._runner(folder, floats, 3), job._runner(folder, floats, 16)
    assert type(packed) is PackedLM and engine == "packed" and floating == (floats, "torch")
    m = hf.load(hf.shipped()); (wide := folder.parent/"wide").mkdir(exist_ok=True)
    hf.save(m, wide, TOK); lowbit.save(wide/"lowbit.safetensors", plan.compress(m, {"blocks.0.attn.q": (4, 64, "absmax.quantize")})); (wide/"model.safetensors").unlink()
    assert job._runner(wide, floats, 4) == (floats, "torch")                    # and the point says so

def test_a_packed_model_stays_where_it_is_and_can_be_copied():
    import copy
    s = Shape(vocab=13, dim=8, ff=16, layers=1, heads=2, kv_heads=1, context=8)
    p, x = packed(s)[0], torch.arange(5)[None]
    with pytest.raises(TypeError, match="stays on the processor"): p.double()
    assert torch.equal(copy.deepcopy(p)(x), p(x))
    with pytest.raises(ValueError, match="tokens on meta"): p(x.to("meta"))
    for change in (lambda c: setattr(c, "length", -1), lambda c: setattr(c, "v", c.v[..., :4, :]), lambda c: setattr(c, "k", c.k.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2, :])):
        c = Cache(s, 1, 8); change(c)
        with pytest.raises(ValueError, match="cache"): p(x, c)


def test_matrices_share_memory_but_not_when_they_are_sent():
    import pickle
    s = Shape(vocab=64, dim=32, ff=48, layers=2, heads=2, kv_heads=1, context=16)
    with torch.no_grad():
        p, x = packed(s, 4)[0], torch.randint(64, (1, 8))
        assert len({m.data.untyped_storage().data_ptr() for m in p._matrices} | {m.scales.untyped_storage().data_ptr() for m in p._matrices}) == 1
        assert len(pickle.dumps(p._matrices[0])) < p._matrices[0].nbytes + 4000 < p.nbytes
        assert len(sent := pickle.dumps(p)) < 2*p.nbytes + 40000 and torch.equal(pickle.loads(sent)(x), p(x)) and torch.equal(copy.deepcopy(p)(x), p(x))

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_type_of_new_tensors_changes_nothing(dtype):
    "C++ writes 32-bit floats, whatever torch makes when nothing is said."
    s = Shape(vocab=64, dim=32, ff=48, layers=2, heads=2, kv_heads=1, context=16)
    with torch.no_grad():
        (p, state), x = packed(s, 4), torch.randint(64, (1, 8))
        if not p._native: pytest.skip("no C++ compiler")
        y, e = p(x), product.rows(p.embed, x)
        before = torch.get_default_dtype(); torch.set_default_dtype(dtype)
        try:
            again = p(x), PackedLM(s, state)(x)
            assert torch.equal(product.rows(p.embed, x), e) and all(a.dtype == torch.float32 and torch.equal(a, y) for a in again)
        finally: torch.set_default_dtype(before)
        with torch.device("meta"): assert torch.equal(product.rows(p.embed, x), e)

def test_tensors_that_move_are_found_again():
    "Pickling for another process, or sharing by hand, puts them elsewhere."
    from multiprocessing.reduction import ForkingPickler
    s = Shape(vocab=64, dim=32, ff=48, layers=2, heads=2, kv_heads=1, context=16)
    with torch.no_grad():
        p, x = packed(s, 4)[0], torch.randint(64, (1, 8))
        y = p(x)
        ForkingPickler.dumps(p)
        assert torch.equal(p(x), y)
        p.blocks[1].down.data.share_memory_(), p.blocks[0].q.scales.share_memory_(), p.embed.grid.share_memory_()
        assert torch.equal(p(x), y) and torch.equal(naive(p, x), y)
        assert torch.equal(p(torch._neg_view(-x)), y)                                 # a view that torch negates when it is read
        p.norm.weight = torch.nn.Parameter(2*p.norm.weight, requires_grad=False)
        assert torch.equal(p(x), naive(p, x)) and not torch.equal(p(x), y)
