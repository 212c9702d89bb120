"""Error of training through the rounding, from the start, against size, tokens and group: four sizes, three lengths, three groups, at 4 and 2 bits, each beside the same run at 16 bits. Writes results/scaling.json; its journal lets a run that was stopped go on. Arguments: seeds."""
import json, sys
import small
from torch import nn
from torch.nn.utils import parametrize
from paretolab.engine.evaluate import bits_per_byte, macro, windows
from paretolab.quantizers import paretoq
from shipped import Journal, RESULTS

SIZES, STEPS, GROUPS, WIDTHS = ((32, 2), (48, 2), (64, 2), (80, 2)), (60, 120, 240), (4, 8, 16), (4, 2)
train, valid, β = small.files()
trial, held = Journal("scaling"), windows(valid, small.L, 24)


class Rounded(nn.Module):
    "ParetoQ's levels at the scale of the weights as they are; the gradient as if nothing were rounded."
    def __init__(self, bits, group): super().__init__(); self.bits, self.group = bits, group
    def forward(self, w):
        v = w.detach()
        return w + (paretoq.fake(v, paretoq.scale(v, self.bits, self.group), self.bits) - v)


def run(seed, size, steps, bits, group):
    model = small.model(seed, *size)
    for n, m in list(model.named_modules()):
        if bits < 16 and isinstance(m, nn.Linear): parametrize.register_parametrization(m, "weight", Rounded(bits, group))
    return round(macro(bits_per_byte(small.train(model, train, steps, seed=seed), held, β)), 5)


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:] or ["0"]):
        for size in SIZES:
            for steps in STEPS:
                for bits, group in [(16, 0), *((b, g) for b in WIDTHS for g in GROUPS)]: trial(f"{seed} {size[0]} {steps} {bits} {group}", lambda: run(seed, size, steps, bits, group))
    N = {d: small.model(0, d, l).shape.block_parameters*l for d, l in SIZES}
    keys = [tuple(map(int, k.split())) for k in trial.done]
    rows = [dict(seed=s, dim=d, N=N[d], D=t*small.B*small.L, bits=b, group=g, bpb=trial.done[f"{s} {d} {t} {b} {g}"], full=trial.done[f"{s} {d} {t} 16 0"]) for s, d, t, b, g in keys if b < 16]
    (RESULTS/"scaling.json").write_text(json.dumps(dict(lr=small.LR, batch=[small.B, small.L], rows=rows)) + "\n")
