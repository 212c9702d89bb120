"""Forgetting and adaptation under replay and re-warming, metadata and its cooldown, and objectives at equal positions, three seeds each. Trials are kept in a journal and made once."""
import json, shutil, statistics, sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import small, torch
from paretolab.data import tokens
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import fit
from paretolab.engine.schedules import cosine, rewarmed
from paretolab.engine.sweep import local, sweep
from paretolab.mixers.curricula import Conditioned, Stages, conditioned, replay
from paretolab.mixers.objectives import UL2, Objective, denoise, meap
from paretolab.mixers.spans import documents

OLD, NEW, FIRST, SECOND, STEPS = ("fiction", "government", "legal", "scripture"), "code", 150, 80, 100

def going_on(seed):
    "One first stage, and from it every share of replay with and without warming again."
    train, valid, β = small.files(); text = {d: train[d] for d in (*OLD, NEW)}; held = {d: valid[d] for d in text}; out = []
    even = {d: 1/len(OLD) for d in OLD}; flat = cosine(FIRST, 15); schedules = dict(rewarmed=rewarmed((FIRST, SECOND), 15), kept_low=lambda t: flat(min(t, FIRST)))
    def run(folder, steps, share, schedule):
        m = small.model(seed); s = MixedStream(text, {**dict.fromkeys(text, 0.), **even}, small.B, small.L, seed)
        fit(m, s, torch.optim.AdamW(m.parameters(), lr=small.LR, betas=(.9, .95), weight_decay=.1, fused=True), schedule, [Stages(s, {0: even, FIRST: replay(even, {NEW: 1.}, share)})], steps=steps, run=folder)
        bpb = small.judge(m, held, β); return dict(old=statistics.mean(bpb[d] for d in OLD), new=bpb[NEW])
    with tempfile.TemporaryDirectory() as f:
        begun = run(Path(f)/"first", FIRST - 1, 0., schedules["kept_low"])          # the last step sets the second stage's weights
        for name,schedule in schedules.items():
            for share in (0., .05, .25): shutil.copytree(Path(f)/"first", to := Path(f)/f"{name}{share}"); out.append(dict(schedule=name, share=share, **run(to, FIRST + SECOND, share, schedule)))
    return dict(begun=begun, then=out)

def metadata(seed): return {w: _metadata(seed, w) for w in ("plain", "meco", "always")}

def _metadata(seed, way):
    "Plain text, or sources before it for 90 % of the steps."
    train, valid, β = small.files(); tok = tokens.tokenizer(small.HERE/"tokenizer.json"); m, even = small.model(seed), {d: 1/len(train) for d in train}
    if way == "plain": small.train(m, train, STEPS, seed=seed)
    else:
        corpus, *_ = small.text(); heads = {f"{d}_url": conditioned(t, documents(t), corpus[d]["source"], tok) for d,t in train.items()}
        stages = {0: {f"{d}_url": p for d,p in even.items()}, **({STEPS*9//10: even} if way == "meco" else {})}
        small.train(m, {**train, **heads}, STEPS, [lambda s: Stages(s, stages), Conditioned(small.V)], {**even, **dict.fromkeys(heads, 0.)}, seed)
    return statistics.mean(small.judge(m, valid, β).values())

def objective(seed): return {n: _objective(seed, n) for n in ("next_token", "meap", "ul2")}

def _objective(seed, name):
    "An objective for all steps."
    train, valid, β = small.files(); m = small.model(seed, extra=32); V = small.V
    ul2 = Objective([lambda x, rng, d=d: denoise(x, d, V, rng) for d in UL2], seed)
    hooks = dict(next_token=[], meap=[Objective([meap(V)], seed)], ul2=[ul2])[name]
    small.train(m, train, STEPS, hooks, seed=seed); return statistics.mean(small.judge(m, valid, β).values())

def trial(c): return dict(going_on=going_on, metadata=metadata, objective=objective)[c["study"]](c["seed"])

if __name__ == "__main__":
    import curricula
    configs = [dict(study=k, seed=s) for s in range(3) for k in ("going_on", "metadata", "objective")]
    runs = [dict(c, **(r.get("result") or r)) for c,r in zip(configs, sweep(curricula.trial, configs, small.HERE/"curricula.jsonl", local(int(*(sys.argv[1:] or ["1"])))))]
    (small.ROOT/"bench"/"results"/"curricula.json").write_text(json.dumps(dict(first=FIRST, second=SECOND, steps=STEPS, batch=small.B, length=small.L, runs=runs), indent=1) + "\n")
    for r in runs: print(r, flush=True)
