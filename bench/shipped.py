"""What the studies of the shipped checkpoint share: text it was not trained on, text to calibrate on, and a journal of finished trials."""
import json, tempfile
from pathlib import Path
import torch
from paretolab.data import corpus, split, tokens
from paretolab.engine.evaluate import bits_per_byte, macro, windows

RESULTS = Path(__file__).parent/"results"
torch.set_num_threads(1)


class Text:
    "Held-out windows of 256 tokens, `n` for each of ten domains, and a training window of each."
    def __init__(self, n):
        train, valid = split.split(corpus.load("tiny"))
        tok, self.folder = tokens.tokenizer(), Path(tempfile.mkdtemp())
        self.nbytes = torch.from_numpy(tokens.token_bytes(tok))
        self.held = windows(tokens.build(valid, tok, self.folder/"valid"), 256, n)
        self.train = tokens.build({d: ds.select(range(min(60, len(ds)))) for d, ds in train.items()}, tok, self.folder/"train")
        self.calibration = torch.cat(list(windows(self.train, 256, 1).values()))        # (10, 257)

    def quality(self, model): return round(macro(bits_per_byte(model, self.held, self.nbytes)), 5)


class Journal:
    "Results by name, one line each; a finished one is not computed again."
    def __init__(self, name):
        self.path = RESULTS/f"{name}.jsonl"
        self.done = dict(json.loads(line) for line in self.path.read_text().splitlines()) if self.path.exists() else {}

    def __call__(self, key, f):
        if key not in self.done:
            self.done[key] = f()
            with open(self.path, "a") as file: file.write(json.dumps([key, self.done[key]]) + "\n")
            print(key, str(self.done[key])[:80], flush=True)
        return self.done[key]
