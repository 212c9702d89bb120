"""Does selection pay? Students of equal tokens on text chosen by each method and at random, three seeds, on the corpus as it is and with half of its windows shuffled; and how many tokens a minute are scored. Trials are kept in a journal and made once."""
import copy, json, platform, statistics, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np, small, torch
from paretolab.engine.evaluate import windows
from paretolab.engine.sweep import local, sweep
from paretolab.mixers.likelihood_ratio import log_ratio
from paretolab.mixers.rho1 import Rho1
from paretolab.mixers.salt import Salt, learnable
from paretolab.mixers.select import draw, nll, score, top
from paretolab.mixers.spans import Picked, cut
from paretolab.models.mobilellm import MobileLLM, Shape

STEPS, SHARE, L = 100, .4, small.L
TARGET, JUDGE = slice(0, None, 2), slice(1, None, 2)                     # of the held-out windows: what methods may see, and what they are judged on

def pool(setting):
    "Windows of all domains in one file without labels; which of them were shuffled."
    train, *_ = small.files(); rng = np.random.default_rng(0)
    t = np.concatenate([x.read(0, 80_000//(L + 1)*(L + 1)) for x in train.values()]); spans = cut([[0, len(t)]], L + 1, L + 1)
    bad = rng.random(len(spans)) < .5 if setting == "shuffled" else np.zeros(len(spans), bool)
    for a,b in spans[bad]: t[a:b] = rng.permutation(t[a:b])
    return small.Numbers(t), spans, bad

def scorers(setting):
    "Prior, conditional and teacher, trained once and kept."
    file, sizes = small.HERE/f"{setting}.pt", dict(prior=(64, 2), conditional=(64, 2), teacher=(96, 3))
    models = {k: small.model(100, *s) for k,s in sizes.items()}
    if file.exists(): [m.load_state_dict(s) for m,s in zip(models.values(), torch.load(file, weights_only=True).values())]; return models
    text, (_, valid, _) = dict(t=pool(setting)[0]), small.files()
    target = dict(t=small.Numbers(torch.cat([w[TARGET] for w in windows(valid, L, 24).values()]).flatten()))
    small.train(models["prior"], text, 300, seed=100); small.train(models["teacher"], text, 900, seed=101)
    models["conditional"] = small.train(copy.deepcopy(models["prior"]), target, 60, seed=102, lr=1e-3)
    torch.save({k: m.state_dict() for k,m in models.items()}, file); return models

def scores(setting):
    "One number a window from every method, made once and kept."
    file = small.HERE/f"{setting}.npz"
    if not file.exists():
        text, spans, bad = pool(setting); m = scorers(setting); s = lambda f, **k: score(f, text, spans, L, 16, **k)
        np.savez(file, oracle=1.*~bad, color_filter=s(log_ratio(m["conditional"], m["prior"])), miniplm=s(log_ratio(m["teacher"], m["prior"])), salt_ds=s(learnable(m["prior"]), over=np.median))
    return dict(np.load(file))

def trial(c):
    "One student; its bits per byte on held-out text, and the share of shuffled windows it was given."
    setting, method, seed = c["setting"], c["method"], c["seed"]
    text, spans, bad = pool(setting); size = np.full(len(spans), L + 1); budget = int(SHARE*size.sum())
    random = draw(np.zeros(len(spans)), size, budget, 1., seed)
    s = scores(setting); took = top(s[method], size, budget) if method in ("color_filter", "miniplm") else draw(s[method], size, budget, .01, seed) if method == "oracle" else random
    hooks = [Rho1(scorers(setting)["conditional"])] if method == "rho1" else [Salt(scorers(setting)["prior"], STEPS//3)] if method == "salt" else []
    m, start = small.model(seed), time.thread_time()
    small.train(m, dict(t=Picked(text, spans[took])), STEPS, hooks, seed=seed)
    _, valid, β = small.files(); bpb = small.judge(m, valid, β, JUDGE)
    return dict(macro=statistics.mean(bpb.values()), per_domain=bpb, shuffled=float(bad[took].mean()), seconds=round(time.thread_time() - start, 1))

def speed():
    "Tokens a minute on one thread, for a scorer of a million parameters."
    shape, out = Shape(vocab=4096, dim=96, ff=256, layers=6, heads=3, kv_heads=1, context=512), []
    rng = np.random.default_rng(0); text = small.Numbers(rng.integers(0, 4096, 16*513)); models = dict(float32=MobileLLM(shape), bfloat16=MobileLLM(shape).bfloat16())
    for length in (128, 512):
        spans = cut([[0, len(text)]], length + 1, length + 1); n = len(spans)*length; rounds = []
        for r in range(6):
            rounds.append({})
            for k,m in models.items(): t = time.thread_time(); score(lambda x: nll(m, x), text, spans, length, 1024//length); rounds[-1][k] = 60*n/(time.thread_time() - t)
        out += [dict(length=length, dtype=k, median=statistics.median(v := [r[k] for r in rounds[1:]]), least=min(v), most=max(v)) for k in models]
    return dict(parameters=shape.parameters, tokens_per_minute=out)

if __name__ == "__main__":
    import selection
    start, file = time.perf_counter(), small.HERE/"speed.json"; small.files()
    if not file.exists(): file.write_text(json.dumps(speed()))
    fast = json.loads(file.read_text()); print(fast, flush=True)
    methods = dict(shuffled=("random", "oracle", "color_filter", "miniplm", "rho1"), plain=("random", "color_filter", "salt"))
    for setting in methods: scores(setting); print(setting, "scored", round(time.perf_counter() - start), flush=True)
    configs = [dict(setting=s, method=m, seed=seed) for seed in range(3) for s,ms in methods.items() for m in ms]
    runs = [dict(c, **(r.get("result") or r)) for c,r in zip(configs, sweep(selection.trial, configs, small.HERE/"selection.jsonl", local(int(*(sys.argv[1:] or ["1"])))))]
    result = dict(machine=platform.machine(), cpu=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, speed=fast, steps=STEPS, tokens=STEPS*small.B*L, share=SHARE, seconds=sum(r["seconds"] for r in runs), runs=runs)
    (small.ROOT/"bench"/"results"/"selection.json").write_text(json.dumps(result, indent=1) + "\n")
    for s in methods:
        for m in methods[s]: v = [r["macro"] for r in runs if (r["setting"], r["method"]) == (s, m)]; print(s, m, np.round(v, 4), flush=True)
