"""What a method believes training on domain j does for loss i, against brute force, in the planted setting of scoreboard.py: copies of the run trained on each domain alone."""
import copy, json, statistics, sys, tempfile
from pathlib import Path

import numpy as np, torch
sys.path.insert(0, str(Path(__file__).parent))
import scoreboard as S
from machine import processor
from paretolab.data.stream import MixedStream
from paretolab.engine.evaluate import windows
from paretolab.engine.fit import fit, losses
from paretolab.engine.gradients import gram
from paretolab.engine.steer import Steer, excess, held_out
from paretolab.mixers.aioli import Aioli
from paretolab.mixers.skill_it import SkillIt

torch.set_num_threads(1)
s = S.setting("planted"); D, NAMES = len(s["tokens"]), list(s["tokens"]); TIMES, SEEDS, ALONE, REPEATS = (20, 60, 240), (0, 1, 2), 8, 6
fresh = {d: S.Part(S.chain(c, 9_000, 50 + j), 0, 9_000) for j,(d,c) in enumerate(zip(NAMES, S.C))}                              # text of the same domains that is not trained on
LOOKS, JUDGE = (windows({d: S.Part(t.t, a, n) for d,t in fresh.items()}, 1, k) for a,n,k in ((0, 1500, 128), (1500, 7500, 4000)))     # what a mixer has, and what brute force has
pearson = lambda a, b: float(np.corrcoef(np.ravel(a), np.ravel(b))[0,1]) if np.std(a) > 0 else 0.
ranks = lambda x: np.argsort(np.argsort(x))

def again(model, optimizer, p, seed):
    "A copy of the run at this moment, on a mixture and batches of its own."
    m = copy.deepcopy(model); m.zero_grad(); o = s["optimizer"](m.named_parameters()); o.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return m, MixedStream(s["tokens"], dict(zip(NAMES, p)), s["batch"], s["length"], seed), o

def run(model, stream, optimizer, steps, hooks=()):
    with tempfile.TemporaryDirectory() as folder: fit(model, stream, optimizer, lambda t: 1., hooks, steps=steps, run=folder)
    stream.close()

def vector(x): return np.array([x[d] for d in NAMES])

def truth(model, optimizer):
    "A, (D, D): fall of loss i a step of training on j alone, the mean of several repeats; and the similarity of its two halves."
    before, half = vector(held_out(model, JUDGE, 1000)), []
    for r in range(REPEATS):
        A = np.zeros((D, D))
        for j in range(D):
            m, x, o = again(model, optimizer, np.eye(D)[j], 500 + r); run(m, x, o, ALONE); A[:,j] = (before - vector(held_out(m, JUDGE, 1000)))/ALONE
        half.append(A)
    return np.mean(half, 0), np.mean(half[::2], 0), np.mean(half[1::2], 0)

def steered(mixer, model, optimizer, seed, steps):
    m, x, o = again(model, optimizer, np.full(D, 1/D), seed); h = Steer(mixer, m, x, LOOKS, seed); run(m, x, o, steps, [h]); return h.state

def estimates(model, optimizer, reference, seed):
    "Each method's A, (D, D), at its own price."
    rng = np.random.default_rng(seed); L = vector(held_out(model, LOOKS, 1000)); m, *_ = again(model, optimizer, np.full(D, 1/D), seed)
    batch = lambda n: [torch.from_numpy(np.stack([t.read(int(i), 2) for i in rng.integers(0, len(t) - 1, n)])) for t in s["tokens"].values()]
    def gradients(n):
        look = [w[rng.integers(0, len(w), n)] for w in LOOKS.values()]; Γ = gram(m, [*batch(n), *look]).numpy()
        return Γ[D:,:D], np.sqrt(Γ.diagonal()[:D])
    G, norm = gradients(32)
    tokens = torch.cat(batch(51)); e = excess(m, reference, tokens, torch.arange(D).repeat_interleave(51), NAMES)
    return {"Aioli": np.array(steered(Aioli(eta=0., every=99, steps=4, passes=2), model, optimizer, 700 + seed, 45)["law"]),
        "Skill-it": np.array(steered(SkillIt(steps=4), model, optimizer, 800 + seed, 25)["graph"])*L[:,None],
        "DoGE": np.clip(G/norm.mean(), 0, 5), "DGA": G, "DGA, 8 times the sequences": gradients(256)[0], "DoReMi": np.diag([max(x or 0., 0.) for x in vector(e)])}

rows = []
for seed in SEEDS:
    reference = S.reference("planted", 1000 + seed); model = S.new(s, seed); o = s["optimizer"](model.named_parameters()); x = MixedStream(s["tokens"], S.uniform(s), s["batch"], s["length"], seed)
    for t in range(TIMES[-1] + 1):
        if t in TIMES:
            A, one, two = truth(model, o)
            for name,B in {"brute force again": one, **estimates(model, o, reference, seed)}.items():
                T = two if name == "brute force again" else A; b, a = B.sum(0), T.sum(0)
                rows.append(dict(method=name, seed=seed, step=t, entries=pearson(B, T), effects=pearson(b, a), rank=float(np.corrcoef(ranks(b), ranks(a))[0,1]), A=np.round(B, 6).tolist()))
            rows.append(dict(method="truth", seed=seed, step=t, A=np.round(A, 6).tolist())); print(seed, t, flush=True)
        losses(model, next(x)[0]).mean().backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.); o.step(); o.zero_grad()
    x.close()
for name in dict.fromkeys(r["method"] for r in rows if r["method"] != "truth"):
    print(f"{name:28}", "  ".join(f"{k} {statistics.fmean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for k in ("entries", "effects", "rank") for v in [[r[k] for r in rows if r["method"] == name]]))
cpu = processor()
(Path(__file__).parent/"results"/"fidelity.json").write_text(json.dumps(dict(cpu=cpu, torch=torch.__version__, times=TIMES, seeds=SEEDS, alone=ALONE, repeats=REPEATS, domains=NAMES, rows=rows)) + "\n")
