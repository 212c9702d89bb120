"""Bits against bits per byte: small models trained for nine tenths of a budget at 16 bits, the last tenth through the rounding or not; nearest levels, GPTQ, learned rotations and GPTQ. Three seeds, two sizes. Writes results/bits.json; its journal lets a run that was stopped go on. Arguments: a size, and seeds."""
import copy, json, sys, tempfile
import small, torch
from safetensors.torch import load_file, save_file
from paretolab.data.stream import MixedStream
from paretolab.engine.evaluate import bits_per_byte, macro, windows
from paretolab.engine.fit import fit
from paretolab.engine.schedules import cosine
from paretolab.quantizers import absmax, gptq, paretoq, plan as plans, spinquant
from paretolab.quantizers.hadamard import Hadamard, random_signs
from shipped import Journal, RESULTS

SIZES, WIDTHS, RATES, SEEDS, FIRST, LAST, ROTATE = dict(small=(64, 2), large=(160, 4)), (1, 1.58, 2, 3, 4, 6, 8), (5e-4, 2e-3), (0, 1, 2), 270, 30, 8
train, valid, β = small.files()
trial, held = Journal("bits"), windows(valid, small.L, 24)
quality = lambda model: {k: round(macro(bits_per_byte(model, {d: w[i::2] for d, w in held.items()}, β)), 5) for i, k in enumerate(("chosen_on", "bpb"))}
size = lambda plan, model: plans.model_bytes(plan, {n: p.shape for n, p in model.named_parameters()})


def plan(model, bits, quantizer):
    "One scale for each row; embedding and head at 8 bits."
    return {n: (8, 0, "absmax.quantize") if n in ("embed", "head") else (bits, 0, quantizer) for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2}


def go_on(model, steps, seed, lr, schedule, weight_decay):
    "Train. A scale that is small beside its weights, as from 4 bits on, gets as much smaller a rate: Adam moves each number by about the rate."
    stream = MixedStream(train, {d: 1/len(train) for d in train}, small.B, small.L, seed)
    learned = [m for m in model.modules() if isinstance(m, paretoq._Learned)]
    α = [m.scale for m in learned]; slow = min([1.] + [(m.scale.mean()/w.pow(2).mean().sqrt()).item() for m, w in zip(learned, (p for n, p in model.named_parameters() if n.endswith("original")))])
    groups = [dict(params=[p for p in model.parameters() if not any(p is a for a in α)])] + ([dict(params=α, lr=lr*slow)] if α else [])
    o = torch.optim.AdamW(groups, lr=lr, betas=(.9, .95), fused=True, weight_decay=weight_decay)
    with tempfile.TemporaryDirectory() as f: fit(model, stream, o, schedule, steps=steps, run=f)
    stream.close(); return model


def begun(name, seed):
    "The model after nine tenths of its training, from a file if there is one."
    model, file = small.model(seed, *SIZES[name]), small.HERE/f"bits-{name}-{seed}.safetensors"
    if not file.exists(): save_file(go_on(model, FIRST, seed, small.LR, cosine(FIRST, 20), .1).state_dict(), file)
    model.load_state_dict(load_file(file)); return model


def moved(was, now, codes):
    "Distance of the blocks' matrices over their size, and the share of codes that are others."
    far = sum((now[n] - w).square().sum().item() for n, w in was.items()), sum(w.square().sum().item() for w in was.values())
    return dict(distance=(far[0]/far[1])**.5, codes=sum((a != b).sum().item() for a, b in codes)/max(1, sum(a.numel() for a, b in codes)))


def trained(name, seed, bits, lr):
    "The last tenth at `bits`: quality of the file, and how far the weights went."
    model = begun(name, seed)
    was = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2}
    if bits != 16: paretoq.convert(model, plan(model, bits, "paretoq.quantize"))
    go_on(model, LAST, 1000 + seed, lr, cosine(LAST, 0, 0.), 0.)
    now = {n.replace(".parametrizations.weight.original", ".weight"): p.detach() for n, p in model.named_parameters()}
    if bits == 16: return dict(quality(model), bytes=2*model.shape.parameters, **moved(was, now, [])), model
    state = paretoq.pack(model) | {"embed.weight": absmax.quantize(model.embed.weight, 8)}
    file = plans.restore(small.model(seed, *SIZES[name]), state)
    return dict(quality(file), bytes=size(plan(file, bits, "paretoq.quantize"), file), **moved(was, now, [(paretoq.quantize(w, bits).codes(), state[n].codes()) for n, w in was.items()])), None


def text(seed, n, T):
    "n sequences of T tokens, from training text."
    s = MixedStream(train, {d: 1/len(train) for d in train}, n, T, 2000 + seed); x, _ = next(s); s.close(); return x


def rounded(model, bits, calibration=None):
    "Nearest levels, or GPTQ's; quality and bytes of the file."
    p = plan(model, bits, "gptq.quantize")
    state = plans.compress(model, p) if calibration is None else gptq.compress(model, p, calibration)[0]
    return dict(quality(plans.restore(copy.deepcopy(model), state)), bytes=size(p, model))


def turned(model, bits, seed):
    "Norms folded; R1 and R2 learned on the rounded model from random Hadamard matrices."
    s, folded = model.shape, spinquant.fold(model)
    start = lambda n, i: Hadamard(n, random_signs(n, 100*seed + i)).matrix()
    fake = lambda w: w + (gptq.quantize(w.detach(), bits).dequantize() - w).detach()
    R1, R2, _ = spinquant.learn(folded, start(s.dim, 0), fake, [text(100*seed + i, small.B, small.L) for i in range(ROTATE)], .1, [start(s.head_dim, i + 1) for i in range(s.layers)])
    return spinquant.rotate(folded, R1, R2)


def study(name, seed):
    full = {lr: trial(f"{name} {seed} ParetoQ 16 {lr}", lambda: trained(name, seed, 16, lr)[0]) for lr in RATES}
    file = small.HERE/f"bits-{name}-{seed}-full.safetensors"
    if not file.exists(): save_file(trained(name, seed, 16, min(full, key=lambda lr: full[lr]["chosen_on"]))[1].state_dict(), file)
    model, calibration = small.model(seed, *SIZES[name]), text(seed, 32, small.L - 1)
    model.load_state_dict(load_file(file))
    for b in WIDTHS:
        trial(f"{name} {seed} nearest {b}", lambda: rounded(model, b))
        trial(f"{name} {seed} GPTQ {b}", lambda: rounded(model, b, calibration))
        trial(f"{name} {seed} SpinQuant+GPTQ {b}", lambda: rounded(turned(model, b, seed), b, calibration))
        for lr in RATES: trial(f"{name} {seed} ParetoQ {b} {lr}", lambda: trained(name, seed, b, lr)[0])


def write():
    keys = [k.split() for k in trial.done]
    rows = [dict(size=k[0], seed=int(k[1]), method=k[2], bits=float(k[3]), **(dict(lr=float(k[4])) if len(k) > 4 else {}), **trial.done[" ".join(k)]) for k in keys]
    (RESULTS/"bits.json").write_text(json.dumps(dict(sizes={n: small.model(0, *s).shape.parameters for n, s in SIZES.items()}, steps=[FIRST, LAST], tokens=small.B*small.L, rates=RATES, rows=rows)) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:2] or SIZES:
        for seed in map(int, sys.argv[2:] or SEEDS): study(name, seed); write()
