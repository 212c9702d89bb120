"""Small models on the shipped corpus cut small: what the studies of selection, curricula and objectives share. By itself it does nothing."""
import tempfile
from pathlib import Path

import numpy as np, torch
from datasets import disable_progress_bars
from paretolab.data import corpus, split, tokens
from paretolab.data.stream import MixedStream
from paretolab.engine.evaluate import bits_per_byte, windows
from paretolab.engine.fit import fit
from paretolab.engine.schedules import cosine
from paretolab.models.mobilellm import MobileLLM, Shape

ROOT = Path(__file__).parent.parent
HERE = ROOT/"build"/"studies"
V, L, B, LR = 1024, 128, 8, 3e-3
torch.set_num_threads(1); disable_progress_bars()

class Numbers:
    "Tokens in memory."
    def __init__(self, t): self.t = np.asarray(t, np.int64)
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]

def text(size=500_000):
    "Training and held-out text of every domain, about `size` bytes of it, and a vocabulary of V entries."
    rng, few = np.random.default_rng(0), {}
    for d,ds in corpus.load().items():
        order, total, took = rng.permutation(len(ds)), 0, []
        for i in order:
            took.append(int(i)); total += len(ds[int(i)]["text"].encode())
            if total > size: break
        few[d] = ds.select(took)
    train, valid = split.split(few, share=.15, seed=0)
    HERE.mkdir(parents=True, exist_ok=True); file = HERE/"tokenizer.json"
    if not file.exists(): tokens.train_tokenizer(train, V).save(str(file))
    return train, valid, tokens.tokenizer(file)

def files():
    "Token files of training and held-out text, and the bytes of each entry."
    if not (HERE/"train"/"done").exists():
        train, valid, tok = text(); tokens.build(train, tok, HERE/"train"); tokens.build(valid, tok, HERE/"valid"); (HERE/"train"/"done").touch()
    open_all = lambda f: {p.stem: tokens.Tokens(p) for p in sorted(f.glob("*.tokens"))}
    return open_all(HERE/"train"), open_all(HERE/"valid"), torch.from_numpy(tokens.token_bytes(tokens.tokenizer(HERE/"tokenizer.json")))

def model(seed, dim=96, layers=3, extra=0):
    torch.manual_seed(seed); return MobileLLM(Shape(vocab=V + extra, dim=dim, ff=2*dim, layers=layers, heads=dim//32, kv_heads=1, context=L))

def train(m, text, steps, hooks=(), weights=None, seed=0, lr=LR, schedule=None):
    "Train on domain -> tokens, in a folder that is thrown away."
    s = MixedStream(text, weights or {d: 1/len(text) for d in text}, B, L, seed); o = torch.optim.AdamW(m.parameters(), lr=lr, betas=(.9, .95), weight_decay=.1, fused=True)
    with tempfile.TemporaryDirectory() as f: fit(m, s, o, schedule or cosine(steps, min(20, steps//5)), [h(s) if callable(h) else h for h in hooks], steps=steps, run=f)
    s.close(); return m

def judge(m, valid, β, part=slice(None), n=24):
    "Bits per byte of every domain, on some of the held-out windows."
    return {d: v for d,v in bits_per_byte(m, {d: w[part] for d,w in windows(valid, L, n).items()}, torch.cat([β, β.new_zeros(m.shape.vocab - V)])).items()}
