"""Settings, the job and the command: what a user can get wrong, and that a job is repeatable."""
import json
from dataclasses import fields, replace

import pytest, torch

from paretolab.data.corpus import load as corpus
from paretolab.engine.settings import Settings, member, parse, read
from paretolab.frontier import job, points
from paretolab.frontier.command import domains, main, preset
from paretolab.models import hf
from paretolab.models.mobilellm import MobileLLM, mobilellm
from paretolab.quantizers import gptq, lowbit
from paretolab.quantizers.plan import model_bytes, uniform


@pytest.fixture(scope="module")
def globs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for d in ("scripture", "formalmath"):
        (folder/d).mkdir()
        for i,t in enumerate(corpus()[d]["text"][:50]): (folder/d/f"{i}.txt").write_text(t)
    return {d: f"{folder}/{d}/*.txt" for d in ("scripture", "formalmath")}

@pytest.fixture
def small(tmp_path): return Settings(steps=6, warmup=2, batch=2, length=64, windows=2, widths=(16, 4), threads=1, every=2, out=str(tmp_path/"out"))


@pytest.mark.parametrize("f", fields(Settings), ids=lambda f: f.name)
def test_every_setting_can_be_overridden_and_refuses_the_wrong_type(f, tmp_path):
    text = ",".join(map(str, f.default)) if f.type is tuple else str(f.default)
    assert getattr(read(None, {f.name: text}), f.name) == f.default
    (ini := tmp_path/"s.ini").write_text(f"[{f.metadata['section']}]\n{f.name} = {text}\n")
    assert read(ini) == Settings()
    if f.type is not str:
        with pytest.raises(ValueError, match=f"{f.name!r}.*got 'x1'"): parse(f.name, "x1")
    (ini := tmp_path/"s.ini").write_text(f"[elsewhere]\n{f.name} = {text}\n")
    with pytest.raises(ValueError, match="elsewhere.*corpus, model, train, frontier"): read(ini)


def test_the_file_of_the_repository_is_read(pytestconfig):
    assert read(pytestconfig.rootpath/"settings.ini") == Settings()


@pytest.mark.parametrize("name", ["muon", "muon.", ".Muon", "muon.Muon.x", "../muon.Muon", "os.system", "muon.torch", "muon.__doc__", "nothere.X", "MUON.Muon", ""])
def test_a_member_comes_from_its_family_only(name):
    with pytest.raises(ValueError, match="got"): member("optimizers", name)


def test_a_killed_job_goes_on_and_a_finished_one_is_found(globs, small):
    text = job.prepare(small, globs)
    model, record = job.train(small, text)
    lines = (run := next((job.Path(small.out)/"training").iterdir())/"log.jsonl").read_text()
    again, same = job.train(small, text)
    assert record == same and all(torch.equal(a, b) for a,b in zip(model.parameters(), again.parameters()))
    assert run.read_text() == lines
    job.train(replace(small, lr=0.001), text)                       # another recipe: another run, the first untouched
    assert run.read_text() == lines and len(list((job.Path(small.out)/"training").iterdir())) == 2


def test_training_state_is_counted(globs, small):
    text = job.prepare(small, globs)
    for optimizer in ("muon.Muon", "adamw.AdamW"):
        model, record = job.train(replace(small, optimizer=optimizer), text)
        state = member("optimizers", optimizer).state_bytes({n: p.shape for n,p in model.named_parameters()})
        assert record["training_state_bytes"] == 2*4*model.shape.parameters + state


def test_a_failed_point_stays_and_the_job_goes_on(globs, small):
    found = job.frontier(replace(small, widths=(16, 1, 4)), globs)
    assert [bool(p.failed) for p in found] == [False, True, False]*2
    assert points.read(job.Path(small.out)/"points.parquet") == found
    assert "starts at 2 bits (got bits=1" in found[1].failed
    for p in found:
        if not p.failed: assert p.model_bytes < (2.1*p.parameters if p.bits == 16 else p.parameters*1.2)
    assert "http" not in {l.split(":")[0] for l in (job.Path(small.out)/"frontier.svg").read_text().split('src="')[1:]}


@pytest.mark.parametrize("argv,says", [
    (["--steps", "-3"], "steps"), (["--batch", "0"], "batch=0"), (["--shape", "9B"], "'9B'"), (["--length", "600"], "at most 512"), (["--widths", "4,4"], "(4, 4)"), (["--widths", "nan"], "nan"), (["--seconds", "nan"], "seconds=nan"), (["--quantizer", "absmax.os"], "'absmax.os'"),
    (["--optimizer", "os.system"], "'os.system'"), (["--widths", "four"], "list of numbers"), (["--share", "2"], "share=2.0"), (["--settings", "nowhere.ini"], "cannot be read"), (["--widths", "5"], "widths=(5,)"), (["--group", "-4"], "group=-4"),
    (["--temperature", "1e6"], "temperature=1000000.0"), (["--threads", "-2"], "threads=-2"), (["--threads", "99999999"], "threads=99999999"), (["--seed", str(10**22)], "seed=1"), (["--batch", "10000000000"], "paretolab: "), (["--plan", "nowhere.json"], "nowhere.json"), (["--out", "/proc/x"], "cannot be made: /proc/x")])
def test_the_command_refuses_by_a_sentence(argv, says, globs, small, capsys):
    data = [x for d,g in globs.items() for x in ("--data", f"{d}={g}")]
    small_args = ["--steps", "6", "--warmup", "2", "--batch", "2", "--length", "64", "--threads", "1", "--out", small.out]
    assert main(["train", *data, *small_args, *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_other_text_of_the_same_length_is_trained_on_anew(tmp_path, small):
    import numpy as np
    rng, models = np.random.default_rng(0), []
    for _ in range(2):
        for i in range(30): (tmp_path/f"{i}.txt").write_text("".join(map(str, rng.integers(0, 10, 400))))      # a digit is a token
        text = job.prepare(small, {"mine": f"{tmp_path}/*.txt"})
        models.append((len(text.tokens["mine"]), job.train(small, text)[0]))
    (n, a), (m, b) = models
    assert n == m and not all(torch.equal(x, y) for x,y in zip(a.parameters(), b.parameters()))


def test_a_training_that_diverges_fails_its_own_points_alone(globs, small):
    found = job.frontier(replace(small, steps=30, lr=1e30, widths=(16,)), globs)
    assert [(p.name, bool(p.failed)) for p in found] == [("mine-16bit", True), ("shipped-16bit", False)]
    assert "not finite" in found[0].failed and points.read(job.Path(small.out)/"points.parquet") == found


def test_what_is_judged_is_held_out_text(globs, small):
    text = job.prepare(small, globs)
    for d in globs:
        held, seen = "".join(text.valid[d]["text"]), "".join(text.train[d]["text"])
        for w in text.windows[d]:
            piece = text.tokenizer.decode(w[w != 0].tolist())[100:160]
            assert piece in held and piece not in seen


def test_ctrl_c_is_a_sentence(globs, small, capsys, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(job, "train", stop)
    assert main(["train", *[x for d,g in globs.items() for x in ("--data", f"{d}={g}")], "--out", small.out]) == 130
    assert "goes on from the last commit" in capsys.readouterr().err


def test_a_cut_note_of_the_steps_is_made_again(globs, small):
    text = job.prepare(timed := replace(small, steps=0, seconds=0.01), globs)
    _, record = job.train(timed, text)
    note = next((job.Path(small.out)/"training").iterdir())/"steps.json"
    steps = note.read_text(); note.write_text("")
    assert job.train(timed, text)[1]["tokens"] == record["tokens"] and note.read_text() == steps


def test_a_mixer_moves_the_mixture_and_a_killed_job_with_one_goes_on(globs, small):
    s = replace(small, mixer="aioli.Aioli", steps=20, every=3); text = job.prepare(s, globs)
    model, record = job.train(s, text)
    calm, = (job.Path(s.out)/"training").iterdir(); log = [json.loads(l) for l in open(calm/"log.jsonl")]
    assert log[0]["weights"] != log[19]["weights"] != log[1]["weights"] and {round(log[t]["weights"]["scripture"], 6) for t in range(1, 17)} == {.25, .75}    # probes, then what they found
    assert all(abs(record["mixture"][d] - sum(r["weights"][d] for r in log)/20) < 1e-12 for d in globs)
    other = replace(s, out=s.out + "2"); job.prepare(other, globs)
    model2, stream, optimizer = job._make(other, text)
    from paretolab.engine.fit import fit
    from paretolab.engine.schedules import wsd
    fit(model2, stream, optimizer, wsd(20, 2, s.decay), job._hooks(other, text, model2, stream, job.Path(other.out)), steps=11, run=job.Path(other.out)/"training"/calm.name, every=3)     # in the middle of a probe
    again, same = job.train(other, text)
    assert all(torch.equal(a, b) for a,b in zip(model.parameters(), again.parameters())) and same["mixture"] == record["mixture"]


def test_a_mixer_sees_neither_what_is_trained_on_nor_what_is_judged(globs, small):
    s = replace(small, mixer="dga.DGA"); text = job.prepare(s, globs)
    model, stream, _ = job._make(s, text); hook, = job._hooks(s, text, model, stream, job.Path(s.out))
    for d,w in hook.windows.items():
        start = len(stream.tokens[d]); assert start + job._aside(text.tokens[d], s) == len(text.tokens[d])
        tail = torch.from_numpy(text.tokens[d].read(start, len(text.tokens[d]) - start))
        assert all((tail.unfold(0, w.shape[1], 1) == row).all(1).any() for row in w)
    assert job._hooks(small, text, model, stream, None) == () and job._make(small, text)[1].tokens is text.tokens


@pytest.mark.parametrize("mixer, says", [("doremi.DoReMi", "needs a reference model"), ("aioli.probes", "is no mixer"), ("os.system", "'os.system'")])
def test_a_mixer_that_cannot_run_is_refused(mixer, says, globs, small, capsys):
    assert main(["train", *[x for d,g in globs.items() for x in ("--data", f"{d}={g}")], "--steps", "3", "--warmup", "1", "--batch", "2", "--length", "64", "--threads", "1", "--mixer", mixer, "--out", small.out]) == 2
    assert says in capsys.readouterr().err


def test_what_is_judged_does_not_move_with_the_seed(globs, small):
    a, b = (job.prepare(replace(small, seed=seed), globs) for seed in (0, 1))
    assert all(torch.equal(a.windows[d], b.windows[d]) for d in globs)
    assert all(a.train[d]["text"] == b.train[d]["text"] for d in globs)


def test_the_shipped_checkpoint_is_not_judged_on_what_it_has_seen(small, capsys):
    assert main(["frontier", "--share", "0.1", "--out", small.out]) == 2
    assert "one split" in capsys.readouterr().err and not job.Path(small.out).exists()


def test_a_job_without_a_measured_point_is_no_success(globs, small, capsys):
    data = [x for d,g in globs.items() for x in ("--data", f"{d}={g}")]
    assert main(["frontier", *data, "--widths", "1", "--steps", "2", "--warmup", "1", "--batch", "2", "--length", "64", "--threads", "1", "--out", small.out]) == 1
    assert "2 points, 0 measured" in capsys.readouterr().out


def test_too_little_text_is_refused(tmp_path, capsys):
    (tmp_path/"a.txt").write_text("one short note"); (tmp_path/"b.txt").write_text("another short note, quite different")
    assert main(["train", "--data", f"mine={tmp_path}/*.txt", "--out", str(tmp_path/"out")]) == 2
    assert "domain 'mine' holds" in capsys.readouterr().err


def test_the_shipped_recipe_is_the_one_recorded():
    from paretolab.models import hf
    legs, record = [preset(n) for n in ("tiny", "tiny-on", "tiny-on-2")], json.loads((hf.shipped()/"training.json").read_text())
    assert [s.start for s in legs] == ["", *(f"{s.out}/model" for s in legs[:-1])] and [(s.steps, s.seed) for s in legs] == [(1700, 0), (1600, 1), (2400, 2)]
    assert (record["shape"], record["optimizer"], record["seed"]) == (legs[-1].shape, legs[-1].optimizer, legs[-1].seed)
    assert record["tokens"] == sum(s.steps*s.batch*s.length for s in legs)


def test_domains_need_a_name_and_a_glob():
    for bad in ("x", "=x", "x="):
        with pytest.raises(ValueError, match="NAME=GLOB"): domains([bad])


def test_training_goes_on_from_a_saved_model(globs, small):
    text = job.prepare(small, globs)
    model, record = job.train(small, text)
    folder = hf.save(model, job.Path(small.out)/"model", text.tokenizer)
    (folder/"training.json").write_text(json.dumps(record))
    on = replace(small, start=str(folder), lr=1e-9)
    further, total = job.train(on, text)
    for a,b in zip(hf.load(folder).parameters(), further.parameters()): assert (a - b).abs().max() < 1e-5 and a.dtype == b.dtype
    assert total["tokens"] == 2*record["tokens"] and total["train_seconds"] >= record["train_seconds"]
    with torch.no_grad(): model.norm.weight.mul_(2)
    hf.save(model, folder, text.tokenizer)                          # other weights in the same folder: another run
    other, _ = job.train(on, text)
    assert not torch.equal(other.norm.weight, further.norm.weight)
    with pytest.raises(ValueError, match="same shape.*'tiny'"): job.prepare(replace(on, shape="tiny"), globs)
    with pytest.raises(FileNotFoundError, match="nowhere is no model"): job.prepare(replace(on, start="nowhere"), globs)


def test_a_plan_is_one_more_point_of_each_model_it_fits(globs, small, capsys):
    text, model = job.prepare(small, globs), MobileLLM(mobilellm("nano"))
    shapes = {n: tuple(p.shape) for n,p in model.named_parameters()}
    plan = uniform(model, 3, 64, "gptq.quantize") | {n: ([2, 4]*(l.weight.shape[1]//128), 64, "allocate.mixed") for n,l in model.named_modules() if n.endswith("mlp.down")}
    (file := job.Path(small.out)/"plan.json").write_text(json.dumps(plan))
    found = job.frontier(replace(small, plan=str(file)), globs)
    assert [p.name for p in found] == ["mine-16bit", "mine-4bit", "shipped-16bit", "shipped-4bit", "mine-plan"] and not any(p.failed for p in found)
    p, folder = found[-1], job.Path(small.out)/"models"
    q, _ = lowbit.load(folder/"mine-plan"/"lowbit.safetensors")
    assert sum(t.nbytes for t in q.values()) == model_bytes(plan, shapes) and (p.bits, p.group, p.embed_bits, p.quantizer) == (3., 64, 8., "allocate.mixed, gptq.quantize")
    assert q["blocks.0.mlp.down.weight"].bits == tuple([2, 4]*(shapes["blocks.0.mlp.down.weight"][1]//128))
    trained = job.load(folder/"mine-16bit")
    assert not torch.equal(q["blocks.1.attn.q.weight"].codes(), gptq.quantize(trained.blocks[1].attn.q.weight, 3, 64).codes())      # calibrated
    job.train(small, text)                                           # a plan shapes no training: the run is found
    assert len(list((job.Path(small.out)/"training").iterdir())) == 1
    file.write_text(json.dumps(uniform(model, 3, 64, "gptq.quantize") | {"blocks.99.attn.q": (4, 64, "absmax.quantize")}))
    with pytest.raises(ValueError, match="mine: the plan names 'blocks.99.attn.q'.*shipped: the plan names"): job.prepare(replace(small, plan=str(file)), globs)
    for bad in ("[", "[1]", '{"embed": [4, "x", "absmax.quantize"]}', '{"embed": [5, 64, "absmax.quantize"]}', '{"embed": 4}', '{"embed": [4, 64, "os.system"]}'):
        file.write_text(bad)
        assert main(["frontier", "--plan", str(file)]) == 2 and "paretolab: " in (err := capsys.readouterr().err) and "Traceback" not in err


def test_a_quantizer_that_needs_text_is_calibrated(globs, small):
    text = job.prepare(small, globs)
    model = hf.load(hf.shipped())
    error = {}
    for q in ("absmax.quantize", "gptq.quantize"):
        p = job.measure(q.split(".")[0], model, dict(shape="tiny"), 2, replace(small, quantizer=q), text)
        assert not p.failed and p.quantizer == q
        error[q] = p.bpb_macro
    assert error["gptq.quantize"] < 0.9*error["absmax.quantize"]      # rounding to nearest at 2 bits ruins the model; compensation does not
