"""Hand-offs: what others' tools make of our models. Pages that need large extras are run whole by `make soak`."""
import importlib.util, pickle
from dataclasses import replace
from pathlib import Path

import pytest, torch
from paretolab.models.hub import OnHub
from paretolab.models.shape import Shape
from test_pages import execute, problems

ROOT = Path(__file__).parent.parent
SMALL = Shape(vocab=64, dim=24, ff=32, layers=2, heads=3, kv_heads=1, context=32)

def made(shape, **about):
    torch.manual_seed(0); m = OnHub(shape)
    for k,v in dict(data=dict(a=(.25, "one thing"), b=(.75, "another")), about="A test.", **about).items(): setattr(m, k, v)
    for p in m.parameters(): p.data = p.data.half().float()
    return m

@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, repeat=2), replace(SMALL, tied=False, kv_heads=3, theta=5e5)])
def test_a_shared_model_comes_back_and_opens_elsewhere(tmp_path, shape):
    from transformers import AutoModelForCausalLM
    m, x = made(shape), torch.randint(64, (2, 20)); m.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(OnHub.from_pretrained(tmp_path)(x), m(x)) and torch.equal(OnHub.from_pretrained(str(tmp_path), local_files_only=True)(x), m(x))
        z = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(x).logits
    torch.testing.assert_close(m(x), z, rtol=0, atol=2e-5*z.std().item())

def test_the_card_names_the_training_data(tmp_path):
    from huggingface_hub import ModelCard
    made(SMALL).save_pretrained(tmp_path); card = ModelCard.load(tmp_path/"README.md")
    assert "| a | 25.0% | one thing |\n| b | 75.0% | another |\n" in card.text and f"{SMALL.parameters:,} parameters" in card.text and "A test." in card.text
    assert card.data.library_name == "transformers" and {"paretolab", "llama"} <= set(card.data.tags)

def test_a_model_without_data_is_not_saved(tmp_path):
    m = made(SMALL); m.data = {}
    with pytest.raises(ValueError, match="names the training data"): m.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    m.data, m.shape = dict(a=(1., "x")), replace(SMALL, post_ln=1)
    with pytest.raises(ValueError, match="post_ln"): m.save_pretrained(tmp_path)

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def test_a_folder_of_pickles_runs_nothing(tmp_path):
    made(SMALL).save_pretrained(tmp_path/"m"); (tmp_path/"m"/"model.safetensors").unlink()
    (tmp_path/"m"/"pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path/"ran")))
    with pytest.raises(FileNotFoundError, match="only safetensors are read"): OnHub.from_pretrained(tmp_path/"m")
    assert not (tmp_path/"ran").exists()
    pickle.loads((tmp_path/"m"/"pytorch_model.bin").read_bytes()); assert (tmp_path/"ran").exists()

@pytest.mark.soak
@pytest.mark.parametrize("page, package", [("lm_eval", "lm_eval"), ("executorch", "executorch"), ("onnxruntime", "onnxruntime")])
def test_a_page_of_a_hand_off_runs(page, package, record_property, monkeypatch):
    if not importlib.util.find_spec(package): pytest.skip(f"{package} is not installed")
    for k,v in dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PLOTLY_RENDERER="plotly_mimetype").items(): monkeypatch.setenv(k, v)
    nb = execute(ROOT/"nbs"/"handoffs"/f"{page}.ipynb", 1800)
    assert not list(problems(nb))
    said = [line for c in nb.cells for o in c.get("outputs", []) if o.get("name") == "stdout" for line in o["text"].splitlines()]
    record_property("said", said); assert said
