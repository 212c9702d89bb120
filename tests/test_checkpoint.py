"""The shipped checkpoint: the file that was recorded, and better than everything cheap."""
import hashlib, json
from dataclasses import replace

from paretolab.engine.evaluate import bits_per_byte, macro
from paretolab.engine.settings import Settings
from paretolab.frontier.job import prepare
from paretolab.frontier.references import reference_lines
from paretolab.models.hf import load, shipped


def test_the_checkpoint_is_the_recorded_file(pytestconfig):
    result = json.loads((pytestconfig.rootpath/"bench/results/checkpoint.json").read_text())
    assert hashlib.sha256((shipped()/"model.safetensors").read_bytes()).hexdigest() == result["sha256"]
    assert (shipped()/"model.safetensors").stat().st_size <= 12e6
    assert 4e6 <= load(shipped()).shape.parameters <= 5e6


def test_the_checkpoint_beats_every_reference_line(tmp_path):
    text = prepare(replace(Settings(), out=str(tmp_path)))
    model = macro(bits_per_byte(load(shipped()), text.windows, text.nbytes))
    lines = reference_lines(text.train, text.valid, text.tokens, text.windows, text.nbytes)
    assert len(lines) >= 5
    for name,bpb in lines.items(): assert model < macro(bpb), (name, model, macro(bpb))
