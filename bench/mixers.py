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
from paretolab.mixers.requests import DomainGradients, Probe
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
print("1,000 domains, milliseconds a step:", milliseconds, flush=True)

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
tokens, δ = next(stream); step()
work = dict(step=step, evaluate=lambda: held_out(model, windows), gradients=lambda: align(model, stream, windows, 2, [0, 0]), excess=lambda: excess(model, reference, tokens, δ, names))
rounds = [{k: cpu(f) for k,f in work.items()} for _ in range(5)]
in_steps = {k: [round(x, 3) for x in (lambda v: (statistics.median(v), min(v), max(v)))([r[k]/r["step"] for r in rounds])] for k in work if k != "step"}
a, d, k = Aioli(), DGA(), SkillIt()
share = dict(doremi=in_steps["excess"][0], doge=in_steps["gradients"][0]/DoGE().every, dga=in_steps["gradients"][0]/d.every, skill_it=in_steps["evaluate"][0]/k.every,
    aioli=(1 + len(names)*a.passes)*in_steps["evaluate"][0]/a.every)
step_s = statistics.median(r["step"] for r in rounds)
print(f"next() with the same weights {same*1e3:.3f} ms, with new ones each step {changed*1e3:.3f} ms: {(changed - same)/step_s:+.3%} of a training step")
print("measurements in training steps (median, least, most):", in_steps); print("share of training at default intervals:", {k: f"{v:.1%}" for k,v in share.items()})
result = dict(machine=platform.machine(), torch=torch.__version__, milliseconds_a_step_at_1000_domains=milliseconds, next_s=same, next_changed_s=changed, step_s=step_s, loader_share_of_step=(changed - same)/step_s,
    domains=10, windows=4, minibatch=2, measurements_in_steps=in_steps, share_of_training={k: round(v, 4) for k,v in share.items()}, aioli_probe_share=len(names)*a.passes*a.steps/a.every)
(Path(__file__).parent/"results"/"mixers.json").write_text(json.dumps(result, indent=1) + "\n")
assert max(milliseconds.values()) < 1, milliseconds
