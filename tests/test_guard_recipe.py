"""The guard recipe: pruning by definition, a cut head through training and packing, answers of several tokens."""
import pytest, torch
from dataclasses import replace
from paretolab.engine.fit import fit
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.quantizers import activations, paretoq, plan
from paretolab.quantizers.guard_recipe import Answers, cut_head, drop, importance, narrow

SHAPE, E = Shape(vocab=48, dim=32, ff=64, layers=4, heads=2, kv_heads=1, context=24), [5, 9, 40]


def model(**more):
    torch.manual_seed(0); m = MobileLLM(replace(SHAPE, **more))
    for n, p in m.named_parameters(): p.data = p.data*3 if p.ndim == 2 else torch.rand_like(p) + .5
    return m, torch.randint(48, (5, 16))


@pytest.mark.parametrize("more", [dict(), dict(repeat=2), dict(post_ln=2), dict(tied=False)])
@torch.no_grad()
def test_importance_is_one_minus_the_cosine(more):
    m, x = model(**more)
    s, y, cos, sin = importance(m, x), m.embed(x), m.cos[:16], m.sin[:16]
    for i, b in enumerate(m.blocks):
        turns = []
        for _ in range(m.shape.repeat):
            z = b(y, cos, sin); turns.append(1 - (y*z).sum(-1)/(y.norm(dim=-1)*z.norm(dim=-1))); y = z
        assert s[i].item() == pytest.approx(torch.stack(turns).mean().item(), abs=1e-5)
    assert not any(b._forward_hooks for b in m.blocks)


@pytest.mark.parametrize("more", [dict(), dict(repeat=2), dict(post_ln=2), dict(tied=False)])
@torch.no_grad()
def test_dropped_blocks_are_passed_by(more):
    m, x = model(**more)
    y = m.embed(x)
    for i in (0, 3):
        for _ in range(m.shape.repeat): y = m.blocks[i](y, m.cos[:16], m.sin[:16])
    before = {n: p.clone() for n, p in m.state_dict().items()}
    small = drop(m, [0, 3])
    assert torch.equal(small(x), m.norm(y) @ (m.embed if m.shape.tied else m.head).weight.T) or torch.allclose(small(x), m.norm(y) @ (m.embed if m.shape.tied else m.head).weight.T, atol=1e-5)
    for p in small.parameters(): p.zero_()
    assert all(torch.equal(p, before[n]) for n, p in m.state_dict().items())               # nothing is shared


@pytest.mark.parametrize("more", [dict(), dict(repeat=2), dict(post_ln=2)])
@torch.no_grad()
def test_neurons_that_do_nothing_go_first(more):
    m, x = model(**more)
    y = m(x)
    for b in m.blocks: b.mlp.down.weight[:, ::2] = 0
    half = narrow(m, x, 32)
    assert torch.allclose(half(x), m(x), atol=1e-5) and not torch.allclose(m(x), y, atol=1e-2) and half.shape.ff == 32
    for b, h in zip(m.blocks, half.blocks): assert torch.equal(h.mlp.gate.weight, b.mlp.gate.weight[1::2])


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_cut_head_gives_the_same_logits(tied):
    m, x = model(tied=tied)
    assert torch.allclose(cut_head(m, E)(x), m(x)[..., E], atol=1e-5)


class Stream:
    domains, weights, length = ["a", "b"], {"a": .5, "b": .5}, 12
    def __init__(self): self.step = 0
    def __next__(self):
        self.step += 1
        δ = torch.tensor([0, 1, 0, 1])
        return δ[:, None]*24 + torch.randint(24, (4, 13), generator=torch.Generator().manual_seed(self.step)), δ      # domain b is the upper half
    def state_dict(self): return dict(step=self.step)
    def load_state_dict(self, s): self.step = s["step"]


ANSWERS = torch.tensor([[5, 9], [40, 9]])


def test_a_cut_model_learns_at_four_bits_from_a_teacher_and_packs(tmp_path):
    torch.manual_seed(0)
    m, teacher = cut_head(MobileLLM(SHAPE), E), MobileLLM(SHAPE)
    p = {n: (4, 16, "paretoq.quantize") for n in plan.uniform(m, 4)}
    paretoq.convert(m, p); activations.attach(m, 8)
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    log = fit(m, Stream(), torch.optim.AdamW(m.parameters(), lr=3e-3), lambda t: 1., [Answers(3, ANSWERS, E, teacher, .2)], steps=25, run=tmp_path)
    assert log[-1]["loss"] < .5*log[0]["loss"] and all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    back = cut_head(MobileLLM(SHAPE), E); plan.restore(back, paretoq.pack(m)); activations.attach(back, 8)
    tokens, δ = next(s := Stream())
    assert torch.equal(Answers(3, ANSWERS, E).reply(back, tokens[:, :-1]), ANSWERS[δ])


@torch.no_grad()
def test_the_teacher_counts_by_its_share():
    m, x = model(); teacher = model(tied=False)[0]
    at = {}
    for share in (0., .25, 1.):
        h = Answers(3, ANSWERS, E, teacher, share); h.loss_weights(0, x, torch.tensor([0, 1, 1, 0, 0])); at[share] = h.losses(0, m, x)
    plain = Answers(3, ANSWERS, E); plain.loss_weights(0, x, torch.tensor([0, 1, 1, 0, 0]))
    assert torch.allclose(at[0.], plain.losses(0, m, x)) and torch.allclose(at[.25], .75*at[0.] + .25*at[1.], atol=1e-6) and (at[1.] > 0).all() and not torch.allclose(at[0.], at[1.], atol=.05)


@torch.no_grad()
def test_a_reply_reads_its_own_first_token():
    m, x = model()
    h = Answers(3, ANSWERS, E)
    for row, reply in zip(x, h.reply(m, x)):
        first = E[m(torch.cat([row, torch.tensor([3])])[None])[0, -1, E].argmax()]
        second = E[m(torch.cat([row, torch.tensor([3, first])])[None])[0, -1, E].argmax()]
        assert reply.tolist() == [first, second]


def test_what_is_refused():
    m, x = model()
    for keep in ([], [1, 0], [0, 0], [-1], [4]):
        with pytest.raises(ValueError, match="in order, each once"): drop(m, keep)
    for ff in (0, 65):
        with pytest.raises(ValueError, match=f"ff={ff}"): narrow(m, x, ff)
    for entries in ([], [1, 1], [48], [-1]):
        with pytest.raises(ValueError, match="each once"): cut_head(m, entries)
    h = Answers(3, ANSWERS, E); h.loss_weights(0, x, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="got 2 windows and 5 domains"): h.losses(0, m, x[:2])
