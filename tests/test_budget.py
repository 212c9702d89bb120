"""What the page cannot show: more shapes, and whole processes."""
import json, os, subprocess, sys
from dataclasses import replace
import pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.engine.fit import losses
from paretolab.frontier import budget
from paretolab.models.mobilellm import MobileLLM
from paretolab.models.shape import Shape, mobilellm
from paretolab.optimizers.adamw import AdamW
from paretolab.optimizers.muon import Muon
from paretolab.quantizers import lowbit
from paretolab.quantizers.plan import compress, uniform

TINY, NANO = mobilellm("tiny"), mobilellm("nano")


@st.composite
def small(draw):
    kv, per, half, layers = (draw(st.integers(1, n)) for n in (3, 3, 4, 3))
    return Shape(vocab=draw(st.integers(2, 50)), dim=kv*per*2*half, ff=draw(st.integers(1, 40)), layers=layers, heads=kv*per, kv_heads=kv, context=12,
        repeat=draw(st.integers(1, 3)), post_ln=draw(st.integers(0, layers)), tied=draw(st.booleans()))


@given(small(), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_activations_are_what_autograd_keeps(shape, B, T):
    model, seen = MobileLLM(shape), {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    def pack(t): seen[t.untyped_storage().data_ptr()] = t; return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): ℓ = losses(model, torch.randint(shape.vocab, (B, T + 1)))
    assert ℓ.shape == (B,) and budget.activations(shape, B, T) == sum(t.untyped_storage().nbytes() for p, t in seen.items() if p not in own)


@given(small(), st.sampled_from([AdamW, Muon]))
@settings(max_examples=15, deadline=None)
def test_optimizer_and_weights_are_exact(shape, Optimizer):
    model = MobileLLM(shape); o = Optimizer(model.named_parameters())
    losses(model, torch.randint(shape.vocab, (2, 5))).sum().backward(); o.step()
    p = budget.moments(shape, Optimizer, 2, 4)["end"]
    assert p["weights"] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert p["gradients"] == sum(t.grad.nbytes for t in model.parameters())
    assert p["optimizer"] == sum(t.nbytes for s in o.state.values() for t in s.values())
    with (live := budget._Live(*model.parameters())): o.step()
    assert budget.workspace(Optimizer, shape) == live.peak


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_file_holds_what_is_written(tmp_path, bits, tied):
    shape = Shape(vocab=33, dim=24, ff=40, layers=2, heads=3, kv_heads=1, context=8, tied=tied)
    model = MobileLLM(shape)
    lowbit.save(tmp_path/"m", compress(model, uniform(model, bits)))
    with open(tmp_path/"m", "rb") as f: header = 8 + int.from_bytes(f.read(8), "little")
    assert budget.plan(shape, AdamW, bits, 1, 8)["file"] == (tmp_path/"m").stat().st_size - header


def test_the_largest_batch_is_the_largest():
    for memory in (0, 3*10**8, 5*10**9):
        b = budget.largest_batch(memory, NANO, Muon, 256)
        total = lambda batch: budget.plan(NANO, Muon, 4, batch, 256)["total"]
        assert (b == 0 or total(b) <= memory) and memory < total(b + 1)


def test_published_shapes_are_planned_without_being_made():
    p = budget.plan(mobilellm("1.5B-LS"), AdamW, 4, 1, 2048)
    assert p["weights"] > 6e9 and p["activations"] > 2*budget.activations(mobilellm("1.5B"), 1, 2048) - 1e9


def test_planning_loads_neither_the_model_nor_datasets():
    code = "import sys, paretolab.frontier.budget; print(sorted(m for m in sys.modules if m.startswith('paretolab.') or m == 'datasets'))"
    loaded = eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    ours = [m for m in loaded if m.count(".") == 2 and m != "paretolab.frontier.budget"]
    assert "datasets" not in loaded and len(ours) <= 5


@pytest.mark.parametrize("args, said", [((1, 1, 8), "bits=1"), ((16.5, 1, 8), "bits=16.5"), ((4, -1, 8), "batch=-1"), ((4, 1.5, 8), "batch=1.5"), ((4, 1, 0), "length=0"), ((4, 1, 2049), "length=2049")])
def test_refuses(args, said):
    with pytest.raises(ValueError, match=said): budget.plan(TINY, AdamW, *args)


# The peak of a process, on configurations that nothing was fitted to

MEASURE = """
import json, sys, tempfile, torch
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.optimizers import adamw, muon
from paretolab.engine.fit import fit
class Random:
    domains, weights = ["a"], {"a": 1.}
    def __init__(self, V, B, T): self.V, self.batch, self.length = V, B, T
    def __next__(self): return torch.randint(self.V, (self.batch, self.length + 1)), torch.zeros(self.batch, dtype=torch.int64)
    def state_dict(self): return {}
def run(shape, Optimizer, B, T):
    model = MobileLLM(Shape(**shape))
    with tempfile.TemporaryDirectory() as folder:
        fit(model, Random(model.shape.vocab, B, T), Optimizer(model.named_parameters()), lambda t: 1., steps=2, run=folder)
def highest(): return next(int(l.split()[1])*1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
shape, name, B, T = json.loads(sys.argv[1])
Optimizer = dict(AdamW=adamw.AdamW, Muon=muon.Muon)[name]
run(dict(vocab=64, dim=32, ff=32, layers=1, heads=2, kv_heads=1, context=16), Optimizer, 2, 16); before = highest()
run(shape, Optimizer, B, T); print(highest() - before)
"""
soak = lambda *x: pytest.param(*x, marks=pytest.mark.soak)
RUNS = [(replace(NANO, layers=11, ff=320), AdamW, 5, 352), (replace(NANO, vocab=32000), AdamW, 2, 448), (replace(TINY, dim=288, layers=7), Muon, 4, 300),
    (replace(NANO, vocab=16000, repeat=2, post_ln=3, tied=False), Muon, 4, 256), (replace(TINY, repeat=2, layers=7), AdamW, 4, 256), (replace(TINY, dim=512, heads=8, ff=1536, layers=4, vocab=32000), AdamW, 1, 128),
    (NANO, AdamW, 6, 512), soak(TINY, AdamW, 16, 512), soak(TINY, AdamW, 32, 512), soak(mobilellm("125M"), AdamW, 1, 128), soak(mobilellm("125M"), AdamW, 2, 256), soak(mobilellm("125M"), Muon, 1, 64)]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not tell a process its peak")
@pytest.mark.parametrize("shape, Optimizer, B, T", RUNS)
def test_peak_of_a_process(shape, Optimizer, B, T, record_property):
    given = json.dumps([vars(shape), Optimizer.__name__, B, T])
    out = subprocess.run([sys.executable, "-c", MEASURE, given], env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    measured, total = int(out.stdout), budget.plan(shape, Optimizer, 4, B, T)["total"]
    record_property("measured", measured); record_property("predicted", total)
    print(f"predicted {total/1e6:.1f} MB, measured {measured/1e6:.1f} MB, {100*(total/measured - 1):+.1f} %")
    within = .1 if torch.backends.cpu.get_cpu_capability() == "AVX512" else .15       # the plan's holes were learnt there; with AVX2 one run takes up to 12 % more, as the page says
    assert measured > 300e6 and abs(total/measured - 1) < within, f"planned {total/1e6:.0f} MB, took {measured/1e6:.0f} MB"
