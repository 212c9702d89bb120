"""Runs for the law of effective tokens: nine kinds of text by three counts of tokens, and a second size of model, with the text's diversity and syntheticity. Trials are kept in a journal and made once."""
import json, statistics, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np, small, torch
from paretolab.data import tokens
from paretolab.engine.sweep import local, sweep
from paretolab.mixers.effective_tokens import diversity
from paretolab.mixers.select import nll
from paretolab.models.generate import generate

L, COUNTS = small.L, (40_960, 81_920, 163_840)
KINDS = ["natural", "shuffled", "repeated", "generated", "generated_cold", "half_generated", "fiction", "code", "scripture"]

def natural(skip=0):
    "Equal parts of all domains."
    train, *_ = small.files(); n = 166_400//len(train)
    return np.concatenate([t.read(skip, n)[:n//L*L].reshape(-1, L) for t in train.values()])

def teacher():
    "Trained on other text than the students see."
    file, m = small.HERE/"teacher.pt", small.model(200)
    if file.exists(): m.load_state_dict(torch.load(file, weights_only=True)); return m
    train, *_ = small.files(); small.train(m, {d: small.Numbers(t.read(60_000, len(t) - 60_000)) for d,t in train.items()}, 700, seed=200)
    torch.save(m.state_dict(), file); return m

def texts():
    "All kinds, made once and kept."
    file = small.HERE/"kinds.npz"
    if not file.exists():
        rng, x, m = np.random.default_rng(0), natural(), teacher(); train, *_ = small.files()
        def made(temperature):
            torch.manual_seed(0); heads = torch.from_numpy(x[rng.permutation(len(x)), :8])
            return torch.cat([generate(m, h, L - 8, temperature=temperature) for h in heads.split(200)]).numpy()
        hot, cold = made(1.), made(.6)
        one = {d: train[d].read(0, len(train[d])//L*L).reshape(-1, L)[:len(x)] for d in ("fiction", "code", "scripture")}
        np.savez(file, natural=x, shuffled=np.stack([rng.permutation(r) for r in x]), repeated=x,
            generated=hot, generated_cold=cold, half_generated=np.where(rng.random((len(x), 1)) < .5, x, cold[rng.permutation(len(x))]), **one)
    return dict(np.load(file))

def pieces(kind, steps):
    "The windows of a run, a batch a step."
    x = np.random.default_rng(0).permutation(texts()[kind])
    if kind == "repeated": x = np.random.default_rng(1).permutation(np.tile(x[:steps + 1], (8, 1)))         # an eighth of it, eight times
    return x[:steps*small.B + 2]

def trial(kind):
    "Models on one kind of text, one pass each, judged on held-out text of all domains."
    tok, m0, out = tokens.tokenizer(small.HERE/"tokenizer.json"), teacher(), []
    for dim,layers,n in [(32, 2, n) for n in COUNTS] + [(64, 2, COUNTS[1])]:
        steps = n//(small.B*L); seen, m = pieces(kind, steps), small.model(0, dim, layers); small.train(m, dict(t=small.Numbers(seen.flatten())), steps)
        _, valid, β = small.files(); ℓ = torch.cat([nll(m0, b) for b in torch.from_numpy(seen[:160]).split(16)]).mean().item()
        out.append(dict(kind=kind, parameters=m.shape.parameters, tokens=steps*small.B*L, diversity=diversity("".join(tok.decode_batch(seen.tolist()))), syntheticity=float(np.exp(-ℓ)), macro=statistics.mean(small.judge(m, valid, β).values())))
    return out

if __name__ == "__main__":
    import effective_tokens
    texts(); print("texts made", flush=True)
    runs = [r for out in sweep(effective_tokens.trial, KINDS, small.HERE/"effective_tokens.jsonl", local(int(*(sys.argv[1:] or ["1"])))) for r in out.get("result") or [out]]
    (small.ROOT/"bench"/"results"/"effective_tokens.json").write_text(json.dumps(dict(runs=runs), indent=1) + "\n")
    for r in runs: print(r, flush=True)
