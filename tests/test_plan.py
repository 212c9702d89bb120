import copy, json
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from paretolab.quantizers import lowbit
from paretolab.quantizers.lowbit import LowBit
from paretolab.quantizers.plan import compress, model_bytes, resolve, restore, uniform

ABS = "absmax.quantize"


class Net(nn.Module):
    "A shared head, a module used twice, a bias, a buffer of integers."
    def __init__(self, head_first=False):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.a = nn.Linear(12, 24)
        self.again = self.a
        self.b = nn.Linear(24, 12, bias=False)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor([3, 4]))
        if head_first: self._modules = dict(reversed(self._modules.items()))


shapes = lambda m: {n: p.shape for n, p in m.named_parameters()}


@given(st.lists(st.tuples(st.sampled_from([2, 3, 4, 6, 8, 16]), st.sampled_from([0, 1, 3, 12])), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_price_is_exact_and_files_restore(tmp_path_factory, entries):
    torch.manual_seed(0)
    net, plan = Net(), {n: (*e, ABS) for n, e in zip(("embed", "a", "b"), entries)}
    state = compress(net, plan)
    assert sum(t.nbytes for t in state.values()) == model_bytes(plan, shapes(net)) + net.count.nbytes
    assert {n: isinstance(t, LowBit) for n, t in state.items()} == {"embed.weight": entries[0][0] != 16, "a.weight": entries[1][0] != 16, "a.bias": False, "b.weight": entries[2][0] != 16, "count": False}
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    lowbit.save(path, state, {"plan": json.dumps(plan)})
    loaded, meta = lowbit.load(path)
    new = restore(Net(), loaded)
    assert compress(net, json.loads(meta["plan"])).keys() == state.keys()
    for n, t in state.items(): assert torch.equal(new.state_dict()[n], t.dequantize() if isinstance(t, LowBit) else t.to(new.state_dict()[n].dtype))
    assert new.head.weight is new.embed.weight and new.count.dtype == torch.int64


@pytest.mark.parametrize("head_first", [False, True])
def test_uniform_names_a_shared_weight_once(head_first):
    plan = uniform(Net(head_first), 3, 4, embed_bits=6)
    shared, layer = ("head", "again") if head_first else ("embed", "a")
    assert plan == {shared: (6, 4, ABS), layer: (3, 4, ABS), "b": (3, 4, ABS)}
    assert compress(Net(head_first), plan).keys() == {f"{shared}.weight", f"{layer}.weight", f"{layer}.bias", "b.weight", "count"}


def test_compress_leaves_the_model_alone_and_shares_nothing_with_it():
    net = Net().half()
    before = copy.deepcopy(net.state_dict())
    state = compress(net, {})
    for t in state.values(): t.zero_()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert uniform(nn.Linear(4, 2), 4)[""] == (4, 0, ABS) and "weight" in compress(nn.Linear(4, 2), {"": (4, 0, ABS)})


@pytest.mark.parametrize("name", ["absmax", "absmax.", ".quantize", "absmax.quantize.x", "../absmax.quantize", "absmax.quantize\n", "absmax.__doc__", "_x.quantize", "os.system", "absmax.LowBit",
    "absmax._round", "absmax.nothing", "lowbit.LEVELS", "lowbit.load", "plan.restore", "é.quantize", None, 3])
def test_resolve_refuses_all_but_quantizers(name):
    with pytest.raises(ValueError, match="got"): resolve(name)


@pytest.mark.parametrize("plan, sentence", [({"c": (4, 0, ABS)}, "'c', which has no weight matrix"), ({"a": (4, 5, ABS)}, "a: a group must divide"), ({"a": (7, 0, ABS)}, "a: a width is one of"),
    ({"a": (True, 0, ABS)}, "got True"), ({"a": ("4", 0, ABS)}, "got '4'"), ({"a": (1.58, 0, ABS)}, "a: absmax keeps"), ({"a": (4, 0, "os.system")}, "a: "), ({"a": 4}, "a: an entry is"),
    ({"embed": (4, 0, ABS), "head": (4, 0, ABS)}, "embed.weight twice"), ({"a": (16, 0, "nothing.here")}, "a: "), ([], "a plan is a dict")])
def test_plans_that_cannot_be_carried_out(plan, sentence):
    with pytest.raises(ValueError, match=sentence): compress(Net(), plan)


def test_restore_changes_nothing_when_it_refuses():
    net, state = Net(), compress(Net(), {"b": (4, 0, ABS)})
    before = copy.deepcopy(net.state_dict())
    b = state["b.weight"]
    worse = LowBit((torch.full_like(b.packed[0], 255),), b.scales, b.grid, b.shape, b.bits, b.group)      # code 15 of 15 levels
    cases = ((state | {"b.weight": worse}, "b.weight: codes of 4 bits must be below 15"), (state | {"x": b}, "no x"), (state | {"a.bias": torch.ones(3)}, "a.bias has shape"),
        ({n: t for n, t in state.items() if n != "embed.weight"}, "lacks embed.weight, head.weight"))
    for bad, sentence in cases:
        with pytest.raises(ValueError, match=sentence): restore(net, bad)
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("bits, embed_bits, megabytes", [(16, 16, 249.3), (8, 8, 128.8), (4, 8, 75.5), (2, 4, 39.7)])
def test_mobilellm_125m_costs_what_the_page_says(bits, embed_bits, megabytes):
    from paretolab.models.mobilellm import MobileLLM, mobilellm
    with torch.device("meta"): model = MobileLLM(mobilellm("125M"))
    assert round(model_bytes(uniform(model, bits, 64, embed_bits=embed_bits), shapes(model)) / 1e6, 1) == megabytes
