"""What mixers cost: their own arithmetic at 1,000 domains, weights that change at every step in the loader, and measurements as a share of training. CPU time on one thread."""
import json, platform, statistics, time
from pathlib import Path

import numpy as np, torch
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import losses
from paretolab.engine.steer import align, excess, held_out
from paretolab.mixers.aioli import Aioli
from paretolab.mixers.dga import DGA
from paretolab.mixers.doge import DoGE
from paretolab.mixers.doremi import DoReMi
from paretolab.mixers.mixing_laws import MixingLaws
from paretolab.mixers.regmix import RegMix
from paretolab.mixers.requests import DomainGradients, Probe
from paretolab.mixers.select import nll
from paretolab.mixers.skill_it import SkillIt
from paretolab.mixers.static import Static
from paretolab.models.mobilellm import MobileLLM, mobilellm
from paretolab.optimizers.muon import Muon

torch.set_num_threads(1); rng = np.random.default_rng(0)

def answer(r, names):
    numbers = lambda: dict(zip(names, rng.uniform(1, 2, len(names)).tolist()))
    return dict(align=numbers(), norm=numbers()) if r == DomainGradients() else dict(before=numbers(), after=numbers()) if isinstance(r, Probe) else numbers()

def arithmetic(m, D=1000, steps=100):
    "Milliseconds a step of plan, observe and weights at the method's own interval, answers not counted; a round of probes is spread over its steps."
    names = [f"domain {i}" for i in range(D)]; s = m.init(names, dict.fromkeys(names, 1/D), 0); spent, t, probed = 0., 0, False
    while t < steps or (t < getattr(m, "every", 1) and probed):
        start = time.thread_time(); plan = m.plan(s, t + 1); spent += time.thread_time() - start
        told = {r: answer(r, names) for r in plan}; t += 1
        for r in plan:
            if isinstance(r, Probe): t += r.steps; probed = True
        start = time.thread_time()
        if plan: s = m.observe(s, told)
        m.weights(s); spent += time.thread_time() - start
        if probed and not s.get("done") and not plan: t = max(t, m.every if isinstance(m, Aioli) else t); break
    return 1e3*spent/max(t, 1)

D = 1000
methods = dict(static=Static(), doremi=DoReMi(floor=1e-5), doge=DoGE(), dga=DGA(every=1), skill_it=SkillIt(graph=tuple(map(tuple, np.eye(D).tolist()))), aioli=Aioli(every=9000))
milliseconds = {k: round(statistics.median(arithmetic(m) for _ in range(1 if k == "aioli" else 3)), 3) for k,m in methods.items()}

def offline(m, D=1000):
    "Seconds of the one fit, and milliseconds of plan and weights in each step after it."
    names, rng = [f"domain {i}" for i in range(D)], np.random.default_rng(1); s = m.init(names, dict.fromkeys(names, 1/D), 0)
    plan, A = m.plan(s, 0), rng.uniform(0, 3, D)
    told = {r: dict(loss=2 + np.exp(-float(A @ r.weights)) + rng.normal(0, 1e-3)) for r in plan}
    start = time.thread_time(); s = m.observe(s, told); once = time.thread_time() - start
    start = time.thread_time()
    for t in range(100): assert m.plan(s, t + 1) == []; m.weights(s)
    return once, 1e3*(time.thread_time() - start)/100

once = {}
for k,m in dict(regmix=RegMix(runs=512, targets=("loss",)), mixing_laws=MixingLaws(runs=1100, targets=("loss",))).items(): s, ms = offline(m); once[k], milliseconds[k] = round(s, 2), round(ms, 3)
print("1,000 domains, milliseconds a step:", milliseconds, "and once, in seconds:", once, flush=True)

class Numbers:
    def __init__(self, n): self.t = rng.integers(0, 4096, n)
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]

names, B, L = [f"d{i}" for i in range(10)], 4, 512
text = {d: Numbers(200_000) for d in names}; windows = {d: torch.from_numpy(np.stack([t.read(i, L + 1) for i in (0, 50_000, 100_000, 150_000)])) for d,t in text.items()}
stream = MixedStream(text, dict.fromkeys(names, .1), B, L)
def cpu(f, clock=time.thread_time): start = clock(); f(); return clock() - start
mixtures = [dict(zip(names, rng.dirichlet(np.ones(10)))) for _ in range(200)]
def deliver(change):
    for p in mixtures:
        if change: stream.weights = p
        next(stream)
loader = [[cpu(lambda: deliver(c), time.process_time)/200 for c in (False, True)] for _ in range(5)]
same, changed = (statistics.median(x) for x in zip(*loader))

torch.manual_seed(0); model, reference = MobileLLM(mobilellm("nano")), MobileLLM(mobilellm("nano")); o = Muon(model.named_parameters(), lr=4e-3)
def step():
    tokens, _ = next(stream); losses(model, tokens).mean().backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.).item(); o.step(); o.zero_grad()
tokens, δ = next(stream); step(); known = nll(model, tokens)
def forward():
    with torch.no_grad(): losses(model, tokens)
def backward(): losses(model, tokens).mean().backward(); model.zero_grad()
work = dict(step=step, forward=forward, backward=backward, evaluate=lambda: held_out(model, windows), gradients=lambda: align(model, stream, windows, 2, [0, 0]), excess=lambda: excess(model, reference, tokens, δ, names, known))
rounds = [{k: cpu(f) for k,f in work.items()} for _ in range(4)]
in_steps = {k: [round(x, 3) for x in (lambda v: (statistics.median(v), min(v), max(v)))([r[k]/r["step"] for r in rounds])] for k in work if k != "step"}
N, W, n = len(names), 4, 2                                              # domains; held-out windows of each; sequences of a domain in its gradient
once_forward, once_backward = (in_steps[k][0]/B for k in ("forward", "backward"))                # of one sequence
a, d, k = Aioli(), DGA(), SkillIt()
plain = dict(evaluate=N*W*once_forward, gradients=(N*n + N)*once_backward, excess=B*once_forward)  # the sequences a measurement is made of, at the price training pays for them
asks = dict(doremi=("excess", 1, 1), doge=("gradients", 1, DoGE().every), dga=("gradients", 1, d.every), skill_it=("evaluate", 1, k.every), aioli=("evaluate", 1 + N*a.passes, a.every))
share, least = ({m: round(c*times/every, 4) for m,(what,times,every) in asks.items() for c in (cost[what],)} for cost in ({w: v[0] for w,v in in_steps.items()}, plain))
step_s = statistics.median(r["step"] for r in rounds)
print(f"next() with the same weights {same*1e3:.3f} ms, with new ones each step {changed*1e3:.3f} ms: {(changed - same)/step_s:+.3%} of a training step")
print("measurements in training steps (median, least, most):", in_steps); print("share of training at default intervals:", {k: f"{v:.1%} (its sequences alone: {least[k]:.1%})" for k,v in share.items()})
result = dict(machine=platform.machine(), torch=torch.__version__, milliseconds_a_step_at_1000_domains=milliseconds, fit_s_at_1000_domains=once, next_s=same, next_changed_s=changed, step_s=step_s, loader_share_of_step=(changed - same)/step_s,
    domains=N, windows=W, minibatch=n, batch=B, measurements_in_steps=in_steps, asks={m: dict(measurement=w, times=t, every=e) for m,(w,t,e) in asks.items()}, share_of_training=share, least_share=least, aioli_probe_share=N*a.passes*a.steps/a.every)
(Path(__file__).parent/"results"/"mixers.json").write_text(json.dumps(result, indent=1) + "\n")
assert max(milliseconds.values()) < 1, milliseconds
