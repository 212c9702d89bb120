"""Stacked proxies on odd shapes against one by one, one model that diverges, and a saved mixture in a job."""
import json
from dataclasses import replace

import numpy as np, pytest, torch
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import losses
from paretolab.engine.settings import Settings
from paretolab.frontier import job
from paretolab.frontier.command import main
from paretolab.mixers.stacked import clip, stacked
from paretolab.models.mobilellm import MobileLLM, Shape

torch.set_num_threads(1)

class Text:
    def __init__(self, n, seed): self.t = np.random.default_rng(seed).integers(0, 19, n)
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]

TEXT = dict(a=Text(400, 0), b=Text(300, 1))
sgd = lambda named: torch.optim.SGD([p for _,p in named], lr=.1)

def pair(shape, batch, length, n):
    made = []
    for i in range(n): torch.manual_seed(i); made.append((MobileLLM(shape), MixedStream(TEXT, dict(a=i/n, b=1 - i/n), batch, length, i)))
    return [list(x) for x in zip(*made)]

@pytest.mark.parametrize("n, batch, length, how", [(1, 1, 1, {}), (3, 2, 7, dict(repeat=2)), (2, 5, 3, dict(tied=False)), (2, 1, 9, dict(post_ln=1))])
def test_a_stack_is_its_models(n, batch, length, how):
    shape = Shape(vocab=19, dim=8, ff=12, layers=2, heads=2, kv_heads=1, context=length, **how); (a, s), (b, r) = (pair(shape, batch, length, n) for _ in "ab")
    stacked(a, s, lambda t: 1., steps=3, optimizer=sgd)
    for m,x in zip(b, r):
        o = sgd(m.named_parameters())
        for _ in range(3): losses(m, next(x)[0]).mean().backward(); torch.nn.utils.clip_grad_norm_(m.parameters(), 1.); o.step(); o.zero_grad()
    for m,w in zip(a, b):
        for p,q in zip(m.parameters(), w.parameters()): assert (p - q).abs().max() <= 1e-5*q.abs().max()      # 32-bit sums in another order, three small steps
    for x in s + r: x.close()

def test_one_that_diverges_hurts_no_other():
    shape = Shape(vocab=19, dim=8, ff=12, layers=1, heads=2, kv_heads=1, context=4); (a, s), (b, r) = (pair(shape, 2, 4, 2) for _ in "ab")
    with torch.no_grad(): a[0].embed.weight.fill_(float("nan"))
    path, calm = (stacked(m, x, lambda t: 1., steps=3, optimizer=sgd) for m,x in ((a, s), (b, r)))
    assert path[:,0].isnan().all() and torch.equal(path[:,1], calm[:,1])
    for x in s + r: x.close()

def test_norms_are_the_models_own():
    g = [torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5)]; whole = torch.cat([x.flatten(1) for x in g], 1)
    assert torch.allclose(clip(g, .5), whole.norm(dim=1)) and torch.allclose(torch.cat([x.flatten(1) for x in g], 1).norm(dim=1), torch.full((4,), .5), atol=1e-5)

@pytest.fixture
def globs(tmp_path):
    for d,w in (("one", "alpha"), ("two", "beta")):
        (tmp_path/d).mkdir()
        for i in range(6): (tmp_path/d/f"{i}.txt").write_text(" ".join(f"{w}{j*j % (17 + i)}" for j in range(300)))
    return {d: f"{tmp_path}/{d}/*.txt" for d in ("one", "two")}

def test_a_job_trains_on_a_saved_mixture(globs, tmp_path, capsys):
    s = Settings(shape="nano", steps=2, warmup=1, batch=4, length=32, out=str(tmp_path/"out"), share=.2, threads=1)
    f = tmp_path/"mixture.json"; f.write_text(json.dumps(dict(method="regmix.RegMix", weights=dict(two=.75, one=.25))))
    plain, mixed = job.prepare(s, globs), job.prepare(replace(s, mixture=str(f)), globs)
    assert mixed.weights == dict(one=.25, two=.75) != plain.weights
    assert job.train(s, plain)[1]["mixture"] == plain.weights and job.train(replace(s, mixture=str(f)), mixed)[1]["mixture"] == mixed.weights
    assert len(list((tmp_path/"out"/"training").iterdir())) == 2                                   # another mixture is another run
    say = lambda: main(["train", *[x for d,g in globs.items() for x in ("--data", f"{d}={g}")], "--steps", "2", "--warmup", "1", "--length", "32", "--share", "0.2", "--mixture", str(f), "--out", s.out])
    for bad,says in (('{"weights": {"one": 1.0}}', "one weight for each"), ('{"weights": {"one": 0.9, "two": 0.9}}', "sum to 1"), ("[1]", "a JSON file with the key"), ("no", "a JSON file with the key")):
        f.write_text(bad); assert say() == 2 and says in capsys.readouterr().err
