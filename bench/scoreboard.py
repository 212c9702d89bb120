"""Every mixer on one protocol: equal training tokens, equal tuning trials, three settings, five seeds; what each costs in extra passes.
One thread. Trials are entered into results/scoreboard/<setting>.jsonl as they end and are not made again."""
import functools, json, statistics, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np, torch
from machine import processor
from paretolab.data import corpus, split, tokens
from paretolab.data.stream import MixedStream
from paretolab.engine.evaluate import bits_per_byte, windows
from paretolab.engine.fit import fit
from paretolab.engine.schedules import wsd
from paretolab.engine.steer import Steer, held_out
from paretolab.engine.sweep import sweep, trial
from paretolab.mixers.aioli import Aioli
from paretolab.mixers.automixer import AutoMixer
from paretolab.mixers.dga import DGA
from paretolab.mixers.doge import DoGE
from paretolab.mixers.doremi import DoReMi
from paretolab.mixers.mixing_laws import MixingLaws
from paretolab.mixers.regmix import RegMix
from paretolab.mixers.skill_it import SkillIt
from paretolab.mixers.stacked import stacked
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.optimizers.muon import Muon

torch.set_num_threads(1); warnings.filterwarnings("ignore", message=".*saved under.*")
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
RESULT = HERE/"results"/"scoreboard.json"
TUNING, SEEDS, RUNS, SHORT = 100, (0, 1, 2, 3, 4), 24, .25                     # seed of the tuning trials; seeds of the score; small runs in a table, and their length as a share of a run's

# Three settings

class Part:
    "A stretch of tokens, in a file or in memory."
    def __init__(self, t, start, n): self.t, self.start, self.n = t, start, n
    def __len__(self): return self.n
    def read(self, start, n): return self.t.read(self.start + start, n) if hasattr(self.t, "read") else self.t[self.start+start:self.start+start+n]

@functools.cache
def text():
    "The corpus of the package in a vocabulary of 512: training tokens, what mixers look at, and what is judged."
    folder = ROOT/"runs"/"scoreboard"; train, valid = split.split(corpus.load("tiny"), .05)
    if not (folder/"tokenizer.json").exists(): folder.mkdir(parents=True, exist_ok=True); tokens.train_tokenizer(train, 512).save(str(folder/"tokenizer.json"))
    tok = tokens.tokenizer(folder/"tokenizer.json"); T, V = (tokens.build(c, tok, folder/k) for k,c in (("train", train), ("valid", valid)))
    cut = {d: len(t) - len(t)//20 for d,t in T.items()}
    return {d: Part(t, 0, cut[d]) for d,t in T.items()}, {d: Part(t, cut[d], len(t)//20) for d,t in T.items()}, V, torch.from_numpy(tokens.token_bytes(tok))

def real(left_out, targets, n):
    T, looks, V, nbytes = text()
    return dict(shape=Shape(vocab=512, dim=64, ff=192, layers=2, heads=4, kv_heads=2, context=64), batch=8, length=64, steps=120, optimizer=lambda named: Muon(named, lr=1e-2), nbytes=nbytes,
        tokens={d: t for d,t in T.items() if d not in left_out}, looks=windows({d: looks[d] for d in targets or T}, 64, n), tests=windows({d: V[d] for d in targets or T}, 64, 32 if not targets else 256))

V, JUMP, C, Q = 32, .05, np.array([[.8, .2, 0, 0, 0], [.2, .8, 0, 0, 0], [0, 0, .7, .3, 0], [0, 0, .3, .7, 0], [0, 0, 0, 0, 1.]]), np.array([.6, .05, .25, .05, .05])
ORDER = np.random.default_rng(0).permutation(V)
def chain(c, n, seed):
    "A Markov chain that takes the k-th of five permutations with probability c_k; one step in twenty leads anywhere, so that every chain visits every token equally often."
    rng = np.random.default_rng(seed); out, k, anywhere, jumps = np.zeros(n, np.int64), 7*rng.choice(len(c), n, p=c), rng.integers(0, V, n), rng.random(n) < JUMP
    for i in range(1, n): out[i] = anywhere[i] if jumps[i] else (ORDER[out[i-1]] + k[i]) % V
    return out

@functools.cache
def setting(name):
    if name == "uniform": return real((), (), 2)
    if name == "held-out": return real(("legal",), ("legal",), 20)
    world = {f"d{j}": Part(chain(c, 12_000*(5 - j), j), 0, 12_000*(5 - j)) for j,c in enumerate(C)}; goal = Part(chain(Q @ C, 12_000, 99), 0, 12_000)
    return dict(shape=Shape(vocab=V, dim=32, ff=64, layers=1, heads=2, kv_heads=1, context=1), batch=256, length=1, steps=320, optimizer=lambda named: torch.optim.AdamW([p for _,p in named], lr=1e-2, fused=True), nbytes=torch.ones(V, dtype=torch.int64), tokens=world,
        looks=windows(dict(goal=Part(goal.t, 0, 4000)), 1, 512), tests=windows(dict(goal=Part(goal.t, 4000, 8000)), 1, 8000))

def uniform(s): return dict.fromkeys(s["tokens"], 1/len(s["tokens"]))
def sizes(s, power): m = {d: len(t)**power for d,t in s["tokens"].items()}; return {d: x/sum(m.values()) for d,x in m.items()}
def targets(name): return () if name == "uniform" else ("legal",) if name == "held-out" else ("goal",)

# A run, and the passes it takes

class Count:
    "Tokens through the model as shares of the run's: with gradient 1, without 1/3."
    def __init__(self, s): self.tokens, self.run = 0., s["steps"]*s["batch"]*s["length"]
    def watch(self, model): model.register_forward_hook(lambda m, x, y: self.add(x[0].numel())); return model
    def add(self, n): self.tokens += n*(1 if torch.is_grad_enabled() else 1/3)
    @property
    def passes(self): return self.tokens/self.run

def new(s, seed): torch.manual_seed(seed); return MobileLLM(s["shape"])
def schedule(steps): return wsd(steps, steps//10, .3)

def train(s, seed, weights, mixer=None, reference=None, count=None):
    "One run; the model, the mean of its mixtures, and the mixer's last state."
    model, stream = new(s, seed), MixedStream(s["tokens"], weights, s["batch"], s["length"], seed); count and count.watch(model)
    with tempfile.TemporaryDirectory() as run, tempfile.TemporaryDirectory() as kept:
        hook = mixer and Steer(mixer, model, stream, s["looks"], seed, reference, minibatch=1 if s["length"] > 1 else 32, kept=kept)
        log = fit(model, stream, s["optimizer"](model.named_parameters()), schedule(s["steps"]), [hook] if hook else [], steps=s["steps"], run=run)
    stream.close()
    return model, {d: float(np.mean([r["weights"][d] for r in log])) for d in stream.domains}, hook and hook.state

@functools.cache
def reference(name, seed): return train(setting(name), seed, uniform(setting(name)))[0]

def score(s, model, p, count, extra=0.):
    passes = count.passes                                                 # what judging costs is the judge's
    looks, bpb = held_out(model, s["looks"], 64), bits_per_byte(model, s["tests"], s["nbytes"], 64)
    return dict(looks=statistics.fmean(looks.values()), bpb=statistics.fmean(bpb.values()), by_domain=bpb, weights=p, extra_passes=round(passes - 1 + extra, 4))

# The methods: three values of the one number each is most sensitive to

def static(name, s, seed, power): c = Count(s); model, p, _ = train(s, seed, sizes(s, power), count=c); return score(s, model, p, c)

def online(make):
    def method(name, s, seed, x): c = Count(s); model, p, _ = train(s, seed, uniform(s), make(targets(name), x), count=c); return score(s, model, p, c)
    return method

def by_proxy(make):
    "Loss weights in a proxy run, whose average is the mixture of the run that counts."
    def method(name, s, seed, x):
        proxy, c, m = Count(s), Count(s), make(x); r = reference(name, seed) if isinstance(m, DoReMi) else None
        hook = r and r.register_forward_hook(lambda m, x, y: proxy.add(x[0].numel()))
        _, _, state = train(s, seed + 1000, uniform(s), m, r, proxy); r and hook.remove()
        model, p, _ = train(s, seed, m.final(state), count=c)
        return score(s, model, p, c, proxy.passes + (1 if r else 0))
    return method

def by_samples(make):
    "What samples do for tasks at the checkpoints of a proxy run, and the mixture of the run that counts."
    def method(name, s, seed, x):
        proxy, c, m = Count(s), Count(s), make(s, x); *_, state = train(s, seed + 1000, uniform(s), m, count=proxy)
        model, p, _ = train(s, seed, m.weights(state), count=c)
        return score(s, model, p, c, proxy.passes)
    return method

def from_table(make):
    def method(name, s, seed, x):
        m, c, P = make(targets(name), x), Count(s), list(s["tokens"]); state = m.init(P, uniform(s), seed); plan = m.plan(state, 0)
        state = m.observe(state, dict(zip(plan, TABLES[name, seed])))
        model, p, _ = train(s, seed, m.weights(state), count=c)
        return score(s, model, p, c, RUNS*SHORT)
    return method

METHODS = dict(
    static=(static, (0., 1., .5)),                                            # 0 is uniform, which is stratified sampling; 1 is proportional
    doremi=(by_proxy(lambda η: DoReMi(eta=η)), (.01, .1, 1.)),
    doge=(by_proxy(lambda η: DoGE(eta=η, every=3)), (.05, .3, 1.)),
    dga=(online(lambda t, η: DGA(eta=η, every=16, beta=.2)), (.3, 3., 30.)),
    skill_it=(online(lambda t, η: SkillIt(eta=η, every=16, steps=2, targets=t)), (.1, .5, 2.)),
    aioli=(online(lambda t, x: Aioli(eta=x[0], every=40, steps=2, passes=1, ema=x[1], targets=t)), ((4., None), (8., .1), (1., None))),
    automixer=(by_samples(lambda s, n: AutoMixer(every=s["steps"]//5, checkpoints=4, samples=n)), (4, 16, 64)),          # of several targets: for one, its groups are one group and the mixture is the prior
    regmix=(from_table(lambda t, n: RegMix(runs=RUNS, targets=t, best=n)), (16, 128, 1024)),
    mixing_laws=(from_table(lambda t, ε: MixingLaws(runs=RUNS, targets=t, floor=ε)), (.002, .02, .05)))
TABLES = {}

# Trials

def one(config):
    "A trial: a run under a method, or a table of small runs."
    start, name = time.process_time(), config["setting"]; s, seed = setting(name), config["seed"]
    if config["method"] == "table":
        mixtures = [dict(zip(s["tokens"], r.weights)) for r in RegMix(runs=RUNS).plan(RegMix(runs=RUNS).init(list(s["tokens"]), uniform(s), seed), 0)]
        streams = [MixedStream(s["tokens"], p, s["batch"], s["length"], seed + i) for i,p in enumerate(mixtures)]
        models, short = [new(s, seed) for _ in mixtures], int(SHORT*s["steps"])
        for i in range(0, RUNS, 8): stacked(models[i:i+8], streams[i:i+8], schedule(short), steps=short, optimizer=s["optimizer"])
        for x in streams: x.close()
        out = [held_out(m, s["looks"], 64) for m in models]
    elif config["method"] == "given": c = Count(s); model, p, _ = train(s, seed, dict(zip(s["tokens"], config["x"])), count=c); out = score(s, model, p, c)
    else: out = METHODS[config["method"]][0](name, s, seed, config["x"])
    return dict(out=out, cpu=round(time.process_time() - start, 2))

def here(name, todo):
    "Trials in this process, one after the other, to spare a start of torch each."
    for key,config in todo:
        yield key, (r := trial(name, config))
        print({k: v for k,v in config.items()}, r.get("error") or {k: r["result"]["out"][k] for k in ("bpb", "extra_passes")} if config["method"] != "table" else "", r["seconds"], flush=True)

def ask(configs):
    import scoreboard                                                     # under the name a journal knows it by
    outs = sweep(scoreboard.one, configs, HERE/"results"/"scoreboard"/f"{configs[0]['setting']}.jsonl", here)
    if bad := [(c, o["error"]) for c,o in zip(configs, outs) if "error" in o]: raise SystemExit(f"{len(bad)} trials failed, the first: {bad[0]}")
    return [o["result"] for o in outs]

def board(name):
    "Tune on one seed by what the mixers may see, then judge on five others."
    cpu = 0
    for seed in (TUNING, *SEEDS):
        r, = ask([dict(setting=name, method="table", seed=seed)]); import scoreboard; scoreboard.TABLES[name, seed] = r["out"]; cpu += r["cpu"]
    found = {}
    for m,(_,grid) in METHODS.items():
        if m == "automixer" and name != "uniform": continue
        tuned = ask([dict(setting=name, method=m, seed=TUNING, x=x) for x in grid]); x = grid[int(np.argmin([r["out"]["looks"] for r in tuned]))]
        runs = ask([dict(setting=name, method=m, seed=seed, x=x) for seed in SEEDS]); cpu += sum(r["cpu"] for r in tuned + runs)
        found[m] = dict(tried=list(grid), tuning=[r["out"]["looks"] for r in tuned], chosen=x, runs=[r["out"] for r in runs])
    for label,x in (("uniform", 0.), ("temperature", .5), ("proportional", 1.)):
        runs = ask([dict(setting=name, method="static", seed=seed, x=x) for seed in SEEDS]); found[label] = dict(chosen=x, runs=[r["out"] for r in runs])
        cpu += sum(r["cpu"] for r in runs)*(x != found["static"]["chosen"])
    if name == "planted": found["known best"] = dict(chosen=Q.tolist(), runs=[r["out"] for r in ask([dict(setting=name, method="given", seed=seed, x=Q.tolist()) for seed in SEEDS])])
    s = setting(name)
    return dict(methods=found, cpu=round(cpu), steps=s["steps"], tokens=s["steps"]*s["batch"]*s["length"], parameters=s["shape"].parameters, domains={d: len(t) for d,t in s["tokens"].items()})

if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    names = sys.argv[1:] or ["planted", "held-out", "uniform"]
    boards = {n: board(n) for n in names}
    for n,b in boards.items():
        print(f"{n}: {b['cpu']/60:.1f} CPU-minutes")
        for m,f in b["methods"].items():
            v = [r["bpb"] for r in f["runs"]]; print(f"  {m:14} {np.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})  +{np.mean([r['extra_passes'] for r in f['runs']]):.2f} passes  chosen {f['chosen']}")
    had = json.loads(RESULT.read_text())["settings"] if RESULT.exists() else {}
    cpu = processor()
    RESULT.write_text(json.dumps(dict(cpu=cpu, torch=torch.__version__, small_runs=RUNS, small_share=SHORT, seeds=list(SEEDS), settings={**had, **boards}), indent=1) + "\n")
