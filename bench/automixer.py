"""AutoMixer where the answer is planted: samples of three rules and noise hidden in four domains. Groups found, weights against brute force, and what the mixture buys. Ten seeds; a seed that is in the results is not made again."""
import copy, json, platform, statistics, tempfile, time
from pathlib import Path

import numpy as np, torch
from paretolab.data.stream import MixedStream
from paretolab.data.synthetic import walk
from paretolab.engine.commits import read
from paretolab.engine.fit import fit, losses
from paretolab.engine.influence import influence
from paretolab.engine.steer import Steer, held_out
from paretolab.mixers.automixer import AutoMixer, densities, regroup
from paretolab.mixers.requests import Influence, Keep
from paretolab.models.mobilellm import MobileLLM, Shape

RULES, JUMP, DOCS, STEPS, SEEDS = ("red", "green", "blue"), (.05, .15, .4, 1.), 60, 125, 10          # the fourth kind is noise
SHARE = dict(web=(.1, .1, .1, .7), forum=(.4, .1, .1, .4), book=(.1, .4, .3, .2), news=(.25, .25, .25, .25))
FILE = Path(__file__).parent/"results"/"automixer.json"
torch.set_num_threads(1)

class Text:
    def __init__(self, t): self.t = np.asarray(t)
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]

def plant(seed):
    "Tokens of each domain, what each sample teaches, and windows of each task, to steer by and to judge."
    rng, text, label = np.random.default_rng(seed), {}, {}
    for i,(d,share) in enumerate(SHARE.items()):
        kinds, docs = rng.permutation(np.searchsorted(np.cumsum(share)[:3], (np.arange(DOCS) + .5)/DOCS)), [iter(walk(k, DOCS, 16, JUMP[k], seed=10*seed + i)) for k in range(4)]
        text[d] = Text(np.concatenate([next(docs[k]) for k in kinds] + [[0]])); label |= {f"{d}:{16*n}": int(k) for n,k in enumerate(kinds)}
    look, judge = ({r: torch.from_numpy(walk(k, n, 17, .05, seed=10*seed + at)) for k,r in enumerate(RULES)} for n,at in ((24, 8), (100, 9)))
    return text, label, look, judge

def train(seed, text, weights, mixer=None, look=None):
    torch.manual_seed(seed); model, folder = MobileLLM(Shape(vocab=24, dim=16, ff=16, layers=1, heads=2, kv_heads=1, context=16)), tempfile.mkdtemp()
    stream = MixedStream(text, weights, 8, 16, seed); hooks = [Steer(mixer, model, stream, look, seed, kept=f"{folder}/kept")] if mixer else []
    fit(model, stream, torch.optim.AdamW(model.parameters(), lr=1e-2), lambda t: 1., hooks, steps=STEPS, run=f"{folder}/run"); stream.close()
    return (model, hooks[0], folder) if mixer else model

def falls(model, X, window, η=.01):
    "By how much the loss falls in one step for each sample that counts twice in it."
    grads = lambda x: torch.autograd.grad(losses(model, x).mean(), list(model.parameters()))
    def after(g):
        m = copy.deepcopy(model)
        with torch.no_grad():
            for p,d in zip(m.parameters(), g): p -= η*d
            return losses(m, window).mean().item()
    base = grads(X); plain = after(base)
    return [plain - after([b + g/len(X) for b,g in zip(base, grads(x[None]))]) for x in X]

def run(seed):
    text, label, look, judge = plant(seed); uniform = dict.fromkeys(text, .25); m = AutoMixer(every=20, checkpoints=6, samples=DOCS, targets=RULES)
    model, hook, folder = train(seed, text, uniform, m, look); s = hook.state
    group = {x: RULES.index(r) for r,xs in s["groups"].items() for x in xs}; xs = list(group); at = lambda x: (x.split(":")[0], int(x.split(":")[1]))
    X, y, g = torch.from_numpy(np.stack([text[d].read(i, 17) for d,i in map(at, xs)])), np.array([label[x] for x in xs]), np.array([group[x] for x in xs])
    measured, told = [], []
    for r,t in zip(RULES, m._best(s)): model.load_state_dict(read(Path(folder)/"kept"/hook.run["kept"][str(t)])[0]["model"], strict=False); measured.append(falls(model, X, look[r])); told.append(influence(model, X, [look[r]])[0].numpy())
    measured, told = np.array(measured), np.array(told); assert (regroup(told) == g).all(); t = np.array(m._best(s), float); brute = densities(t/t.sum() @ measured, np.ones(len(xs)), regroup(measured), 3)[1]
    helps = y < 3
    those = lambda keep: {r: Text(np.concatenate([text[d].read(i, 16) for j,x in enumerate(xs) if keep(k, j) for d,i in [at(x)]] + [[0]])) for k,r in enumerate(RULES)}
    groups, thinned, clean = those(lambda k, j: g[j] == k), those(lambda k, j: g[j] == k and told[k, j] > np.sqrt(np.mean(told[k]**2))), those(lambda k, j: y[j] == k)
    arms = dict(uniform=(text, uniform), domains=(text, dict(zip(text, s["p"]))), groups=(groups, s["shares"]), even=(groups, dict.fromkeys(RULES, 1/3)), thinned=(thinned, dict.fromkeys(RULES, 1/3)), clean=(clean, dict.fromkeys(RULES, 1/3)))
    loss = {a: float(np.mean(list(held_out(train(100 + seed, *how), judge).values()))) for a,how in arms.items()}
    return dict(seed=seed, best=m._best(s), accuracy=float(np.mean(g[helps] == y[helps])), brute_accuracy=float(np.mean(regroup(measured)[helps] == y[helps])), by_domain=float(np.mean([max(np.bincount([label[x] for x in xs if at(x)[0] == d and label[x] < 3]))/sum(label[x] < 3 for x in xs if at(x)[0] == d) for d in text])),
        noise_left=float(np.mean(y[[j for j in range(len(xs)) if told[g[j], j] > np.sqrt(np.mean(told[g[j]]**2))]] == 3)), shares=list(s["shares"].values()), brute=brute.tolist(), p=s["p"], loss=loss)

rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
for seed in range(SEEDS):
    if any(r["seed"] == seed for r in rows): continue
    start = time.thread_time(); rows.append(run(seed)); print(f"seed {seed}: {time.thread_time() - start:.0f} CPU seconds", {k: v for k,v in rows[-1].items() if k != "p"}, flush=True)
    (part := FILE.with_suffix(".part")).write_text(json.dumps(dict(machine=platform.machine(), torch=torch.__version__, rows=rows), indent=0) + "\n"); part.replace(FILE)

def arithmetic(D=1000, steps=1000):
    "Milliseconds a step of plan, observe and weights with so many tasks, domains and samples, answers not counted."
    names, rng, spent = [f"domain {i}" for i in range(D)], np.random.default_rng(0), 0.
    m = AutoMixer(samples=1); s = m.init(names, dict.fromkeys(names, 1/D), 0); numbers = lambda: dict(zip(names, rng.normal(size=D).tolist()))
    for t in range(1, steps + 1):
        start = time.thread_time(); plan = m.plan(s, t); spent += time.thread_time() - start
        told = {r: {} if isinstance(r, Keep) else dict(tokens={d: {d: 16} for d in names}, influence={k: numbers() for k in r.targets}) if isinstance(r, Influence) else numbers() for r in plan}
        start = time.thread_time()
        if plan: s = m.observe(s, told)
        m.weights(s); spent += time.thread_time() - start
    return 1e3*spent/steps

found = json.loads(FILE.read_text())
if "milliseconds_a_step_at_1000_tasks" not in found: FILE.write_text(json.dumps({**found, "milliseconds_a_step_at_1000_tasks": round(statistics.median(arithmetic() for _ in range(3)), 3)}, indent=0) + "\n")
