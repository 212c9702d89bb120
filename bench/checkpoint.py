"""The shipped checkpoint beside the reference lines, on the same held-out windows: bench/results/checkpoint.json."""
import hashlib, json, tempfile
from dataclasses import asdict, replace
from pathlib import Path
from paretolab.engine.evaluate import bits_per_byte, macro
from paretolab.engine.settings import Settings
from paretolab.frontier.command import preset
from paretolab.frontier.job import prepare
from paretolab.frontier.references import reference_lines
from paretolab.models.hf import load, shipped

with tempfile.TemporaryDirectory() as out:
    s = replace(Settings(), out=out)
    text = prepare(s)
    lines = reference_lines(text.train, text.valid, text.tokens, text.windows, text.nbytes)
    model = bits_per_byte(load(shipped()), text.windows, text.nbytes)
result = dict(settings=[asdict(preset(leg)) for leg in ("tiny", "tiny-on", "tiny-on-2")], sha256=hashlib.sha256((shipped()/"model.safetensors").read_bytes()).hexdigest(),
    windows={d: len(w) for d,w in text.windows.items()}, length=s.length, training_tokens=sum(map(len, text.tokens.values())), bits_per_byte={"shipped checkpoint": model, **lines})
(Path(__file__).parent/"results"/"checkpoint.json").write_text(json.dumps(result, indent=1) + "\n")
for name,bpb in result["bits_per_byte"].items(): print(f"{macro(bpb):.3f}  {name}  " + " ".join(f"{d} {v:.2f}" for d,v in bpb.items()))
