"""The guard recipe on the shipped checkpoint: say after 16 tokens of held-out text whether it is plain or technical, and of which domain. Each step's accuracy and bytes, and without a teacher, without training, and with random blocks dropped; three seeds. Writes results/guard.json; its journal lets a run that was stopped go on. Argument: seeds."""
import copy, json, random, sys, tempfile
import torch
from torch import nn
from paretolab.data import tokens
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import fit
from paretolab.engine.schedules import cosine
from paretolab.models import hf
from paretolab.models.mobilellm import MobileLLM
from paretolab.quantizers import activations, paretoq, plan as plans
from paretolab.quantizers.guard_recipe import Answers, cut_head, drop, importance, narrow
from shipped import Journal, RESULTS, Text

T, B, LAYERS, FF, TEACHER, STUDENT, RATE = 16, 16, 7, 384, 60, 60, 1e-3
text, trial, tok = Text(3), Journal("guard"), tokens.tokenizer()
domains = sorted(text.train)
one = lambda s: tok.encode(s).ids[-1]
ask, verdicts, names = one("?"), (one("A"), one("B")), [one(c) for c in "0123456789"]
technical = ("code", "formalmath", "mathqa", "techdocs")
answers = torch.tensor([[verdicts[d in technical], names[i]] for i, d in enumerate(domains)])
ENTRIES = [*verdicts, *names]
assert len(set(ENTRIES)) == 12
held = {d: text.held[d][:, :256].reshape(-1, T)[::2] for d in domains}
few = torch.cat([text.calibration[:, :T], torch.full((10, 1), ask)], 1)
size = lambda model, plan: plans.model_bytes(plan, {n: tuple(p.shape) for n, p in model.named_parameters()})
hook = Answers(ask, answers, ENTRIES)


def train(model, steps, seed, rate, teacher=None):
    "Scales of weights get a rate as much smaller as they are."
    stream = MixedStream({d: text.train[d] for d in domains}, dict.fromkeys(domains, 1/len(domains)), B, T, seed)
    scales = [m.scale for m in model.modules() if isinstance(m, paretoq._Learned)]
    rest = [p for p in model.parameters() if not any(p is s for s in scales)]
    groups = [dict(params=rest)] + ([dict(params=scales, lr=rate*.3)] if scales else [])
    o = torch.optim.AdamW(groups, lr=rate, betas=(.9, .95), weight_decay=0., fused=True)
    with tempfile.TemporaryDirectory() as f: fit(model, stream, o, cosine(steps, 10, 0.), [Answers(ask, answers, ENTRIES, teacher)], steps=steps, run=f)
    stream.close(); return model.eval()


def judge(model, plan={}):
    "Share of right verdicts and of right domains, and bytes."
    y = {d: hook.reply(model, x) for d, x in held.items()}
    share = lambda j: round(sum((y[d][:, j] == answers[i, j]).float().mean().item() for i, d in enumerate(domains))/len(domains), 4)
    return dict(verdict=share(0), domain=share(1), bytes=size(model, plan))


def four(model, embed=4): return {n: (embed if n == "embed" else 4, 32, "paretoq.quantize") for n, m in model.named_modules() if n != "head" and (isinstance(m, (nn.Linear, nn.Embedding)))}


def quantized(model, seed, teacher, embed=4):
    "4-bit training with 8-bit activations; what the packed file does."
    plan, model = four(model, embed), copy.deepcopy(model)
    paretoq.convert(model, plan); activations.attach(model, 8)
    return packed(paretoq.pack(train(model, STUDENT, 100 + seed, RATE, teacher)), model.shape, plan)


def packed(state, shape, plan):
    model = MobileLLM(shape); model.head = nn.Linear(shape.dim, len(ENTRIES), bias=False)
    plans.restore(model, state); activations.attach(model, 8)
    return judge(model, plan)


def study(seed):
    steps = lambda: [f"{seed} {n}" for n in ("teacher", "depth", "width", "head", "trained", "nearest", "4 bits", "embedding", "no teacher", "random blocks")]
    if all(k in trial.done for k in steps()): return
    teacher = train(hf.load(hf.shipped()), TEACHER, seed, RATE)
    trial(f"{seed} teacher", lambda: judge(teacher))
    s = importance(teacher, few)
    trial(f"{seed} importance", lambda: [round(x, 5) for x in s.tolist()])
    keep = sorted(s.topk(LAYERS).indices.tolist())
    shallow = drop(teacher, keep); trial(f"{seed} depth", lambda: judge(shallow))
    thin = narrow(shallow, few, FF); trial(f"{seed} width", lambda: judge(thin))
    cut = cut_head(thin, ENTRIES); trial(f"{seed} head", lambda: judge(cut))
    def at16(): m = train(copy.deepcopy(cut), STUDENT, 100 + seed, RATE, teacher); return dict(judge(m), nearest=packed(plans.compress(m, four(m)), m.shape, four(m)))
    trial(f"{seed} trained", at16)
    trial(f"{seed} nearest", lambda: trial.done[f"{seed} trained"]["nearest"])
    trial(f"{seed} 4 bits", lambda: quantized(cut, seed, teacher, 8))
    trial(f"{seed} embedding", lambda: quantized(cut, seed, teacher))
    trial(f"{seed} no teacher", lambda: quantized(cut, seed, None))
    other = sorted(random.Random(seed).sample(range(teacher.shape.layers), LAYERS)); trial(f"{seed} other", lambda: other)
    trial(f"{seed} random blocks", lambda: quantized(cut_head(narrow(drop(teacher, other), few, FF), ENTRIES), seed, teacher))


def write():
    rows = [dict(seed=int(k.split()[0]), step=k.split(" ", 1)[1], **{n: x for n, x in v.items() if n != "nearest"}) for k, v in trial.done.items() if isinstance(v, dict)]
    lists = {k: v for k, v in trial.done.items() if isinstance(v, list)}
    (RESULTS/"guard.json").write_text(json.dumps(dict(layers=LAYERS, ff=FF, steps=[TEACHER, STUDENT], batch=[B, T], held=sum(map(len, held.values())), entries=len(ENTRIES), rows=rows, blocks=lists), indent=1) + "\n")


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:] or "012"): study(seed); write()
