"""How far influence forecasts retraining: one more look at a sample from a checkpoint on, for 1 to 30 steps, and training anew without it. Rank correlations, five seeds; a seed that is in the results is not made again."""
import json, platform, time, warnings
from pathlib import Path

import numpy as np, torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from paretolab.data.synthetic import walk
from paretolab.engine.influence import exact, influence
from paretolab.models import linear
from paretolab.models.mobilellm import MobileLLM, Shape

RULES, EACH, LOOKED, AT, FURTHER, SEEDS = 3, 20, 40, (10, 20, 40), (1, 3, 10, 30), 5
FILE = Path(__file__).parent/"results"/"influence.json"
torch.set_num_threads(1); linear.wide = lambda: False; warnings.simplefilter("ignore")     # its operator knows no stacks of models
def small(seed, tied=True): torch.manual_seed(seed); return MobileLLM(Shape(vocab=24, dim=16, ff=16, layers=1, heads=2, kv_heads=1, context=16, tied=tied))

def stacked(P, samples, tasks, W, steps, lr, looks, adam=False):
    "Many models at once on the same samples, each with its own weights of them (R, n); losses on the tasks after each of `looks` steps, (R, K), and the parameters then."
    model, out, M, Q = small(0), {}, {k: torch.zeros_like(p) for k,p in P.items()}, {k: torch.zeros_like(p) for k,p in P.items()}
    def ℓ(p, x): return F.cross_entropy(functional_call(model, p, (x[:,:-1],)).transpose(1, 2), x[:,1:], reduction="none").mean(1)
    g, look = vmap(grad(lambda p, w: (w*ℓ(p, samples)).mean())), vmap(lambda p: torch.stack([ℓ(p, x).mean() for x in tasks]))
    for t in range(1, steps + 1):
        for k,G in g(P, W).items():
            if adam: M[k].lerp_(G, .1); Q[k].lerp_(G*G, .001); G = (M[k]/(1 - .9**t))/((Q[k]/(1 - .999**t)).sqrt() + 1e-8)
            P = {**P, k: P[k] - lr*G}
        if t in looks: out[t] = (look(P), P)
    return out

def spearman(a, b): r = lambda x: np.argsort(np.argsort(x)); return float(np.corrcoef(r(a), r(b))[0,1])

def run(seed):
    walks = [walk(k, EACH + 24, seed=seed) for k in range(RULES)]
    samples, tasks = torch.from_numpy(np.concatenate([*[w[:EACH] for w in walks], walk(0, EACH, jump=1., seed=seed)])), [torch.from_numpy(w[EACH:]) for w in walks]
    n, who = len(samples), torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:LOOKED]
    less, more = torch.ones(LOOKED + 1, n), torch.ones(LOOKED + 1, n); less[1:][range(LOOKED), who] = 0; more[1:][range(LOOKED), who] = 2
    start = {k: p.detach() for k,p in small(seed).named_parameters()}; many = lambda P: {k: p.expand(LOOKED + 1, *p.shape).clone() for k,p in P.items()}
    rows = []
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        anew = stacked(many(start), samples, tasks, less, max(AT), 1e-2, AT, adam=True)
        truth = {("anew", t): (L[1:] - L[0]).T.numpy() for t,(L,_) in anew.items()}           # the loss rises without it
        for t,(_,P) in anew.items():
            here = {k: p[0] for k,p in P.items()}
            truth |= {(s, t): (L[0] - L[1:]).T.numpy() for s,(L,_) in stacked(many(here), samples, tasks, more, max(FURTHER), .1, FURTHER).items()}
    for t,(L,P) in anew.items():
        m, two = small(seed), small(seed, tied=False); here = {k: p[0] for k,p in P.items()}
        m.load_state_dict(here, strict=False); two.load_state_dict({**here, "head.weight": here["embed.weight"]}, strict=False)
        inner = lambda B, Γ, λ: B
        ways = {"DataInf": influence(m, samples, tasks), "DataInf, the shared table as two layers": influence(two, samples, tasks), "exact inverse": influence(m, samples, tasks, solve=exact),
            "inner product": influence(m, samples, tasks, solve=inner), "inner product, all layers": influence(m, samples, tasks, [k for k,_ in m.named_parameters()], inner)}
        for name,I in ways.items():
            for s in (*FURTHER, "anew"): rows.append(dict(seed=seed, at=t, further=s, way=name, rank=float(np.mean([spearman(I[k][who].numpy(), truth[s, t][k]) for k in range(RULES)]))))
        rows.append(dict(seed=seed, at=t, loss=L[0].mean().item()))
    return rows

done = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
for seed in range(SEEDS):
    if any(r["seed"] == seed for r in done): continue
    start = time.thread_time(); done += run(seed); print(f"seed {seed}: {time.thread_time() - start:.0f} CPU seconds", flush=True)
    (part := FILE.with_suffix(".part")).write_text(json.dumps(dict(machine=platform.machine(), torch=torch.__version__, samples=RULES*EACH + EACH, looked_at=LOOKED, rows=done), indent=0) + "\n"); part.replace(FILE)
