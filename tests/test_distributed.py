"""Several processes train one model: they agree with one, resume to the bit, and survive kills, bad numbers, full disks and hostile files. The runs are in distributed_run.py."""
import json, pickle, random, shutil, signal

import pytest, torch
from paretolab.engine import commits, pieces
from processes import ask

def apart(a, b): return max(abs(x - y)/abs(y) for x,y in zip(a, b, strict=True))

# Agreement

def test_any_number_of_processes_makes_the_run_of_one():
    found = ask("agree")
    assert len(found) == 9
    for k,r in found.items():
        one = found["fsdp 1 1"]
        assert r["tokens"] == one["tokens"]                                             # the order of the data does not know how many read it
        assert apart(r["loss"], one["loss"]) < 1e-6 and apart(r["norm"], one["norm"]) < 1e-5
        assert max(apart(list(a.values()), list(b.values())) for a,b in zip(r["per"], one["per"])) < 1e-6
        assert max(abs(a - b) for a,b in zip(r["weights"], one["weights"])) < 1e-4      # 8 Adam steps of 3e-3; near-zero gradients amplify rounding

def check_resharding(found, optimizers):
    pairs = {(x["optimizer"], x["saved"], x["loaded"]) for x in found}
    assert {(o, f"fsdp {K}", f"fsdp {L}") for o in optimizers for K in (1, 2, 3) for L in (1, 2, 3)} <= pairs
    one = {x["optimizer"]: x["loss"] for x in found if x["saved"] == "fsdp 1" and x["loaded"] == "fsdp 1"}
    assert [x for x in found if not x["same"]] == []                                    # weights and moments, bit for bit
    return {o: max(apart(x["loss"], one[o]) for x in found if x["optimizer"] == o) for o in optimizers}

def test_commits_of_any_number_of_processes_load_at_any_other():
    assert max(check_resharding(ask("reshard", "AdamW"), ["AdamW"]).values()) < 1e-6

@pytest.mark.soak
def test_commits_load_at_any_other_number_with_every_kind_of_state(record_property):
    optimizers = ["AdamW", "Lion", "APOLLO", "GaLore", "AdamW8", "SGD"]
    off = check_resharding(ask("reshard", *optimizers), optimizers)
    record_property("apart", dict(off))
    assert off.pop("AdamW8") < 1e-5 and max(off.values()) < 1e-6                        # a code of 8 bits may fall on the other side

# Kills

def test_killed_at_two_processes_it_ends_with_the_same_bits():
    found = ask("kills", "2", "0")
    assert found["kills"] == 2 and found["lost"] == 0

@pytest.mark.soak
@pytest.mark.parametrize("world", ["2", "3"])
def test_twenty_kills_at_several_processes(record_property, world):
    found = ask("kills", "20", "1", world)
    for k,v in found.items(): record_property(k, v)
    assert found["kills"] == 20 and found["lost"] == 0

# Bad numbers, in the background, full disks

def check_bad(found, wheres):
    assert found[0] == found[1]
    for how in ("fsdp", "ddp"):
        for where in wheres:
            same, skipped, finite, _ = found[0][f"{how} {where}"]
            assert same == [4] and skipped == [0]*4 + [1]*3 and finite
            assert "3 steps in a row" in found[0][f"{how} {where} row"] and "the last at step 4 " in found[0][f"{how} {where} row"]

def test_a_bad_gradient_on_one_process_costs_all_exactly_one_step(): check_bad(ask("bad", "gradient"), ["gradient"])

@pytest.mark.soak
def test_a_bad_loss_on_one_process_costs_all_exactly_one_step(record_property):
    check_bad(ask("bad", "loss", "gradient"), ["loss", "gradient"]); record_property("steps", 1)

def test_commits_in_the_background_are_those_made_at_once():
    found = ask("background")
    for r in found["out"]:
        assert len(set(r["digests"])) == 1 and r["steps"] == [[2, 4, 6, 8]]*2
        assert r["at"] == [[1, 3, 5, 7], [3, 5, 7, 7]]                                  # told when it is safe: before the next one, or at the end
    assert found["same"] == [True, True]                                                 # each holds its own step's numbers, not later ones
    assert [n[:13] for n in found["names"][0]] == [n[:13] for n in found["names"][1]]

def test_a_disk_that_is_full_for_one_process_is_told_to_all():
    found = ask("disk")
    for r in found: assert "the state after step 4 could not be saved (process 1: File too large)" in r["says"] and r["left"] == ["step-00000002"]
    assert found[0]["digest"] == found[1]["digest"]

def test_an_error_of_any_kind_on_one_process_is_heard_by_all():
    first, second = ask("told")
    assert all(after == [0, 1] for found in (first, second) for _,after in found.values())
    assert {k: v for k,(v,_) in second.items()} == dict(undecodable="UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte", empty="Empty: something", key="KeyError: 'w'")
    assert first["undecodable"][0] == "RuntimeError: process 1: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    assert first["empty"][0] == "RuntimeError: process 1: Empty: something" and first["key"][0].startswith("KeyError: ") and "process 1" in first["key"][0]

def test_fit_leaves_no_thread_and_no_file_behind():
    for seen in ask("repeated"): assert seen[1:] == [seen[0]]*4

@pytest.mark.soak
def test_dead_and_stopped_processes_end_the_others(record_property):
    found = ask("stuck")
    for how,(out,ends) in found.items():
        assert ends == [1, -signal.SIGKILL], (how, ends)
        record_property(how, f"{out[0]['after']} s")
        assert ("closed by peer" in out[0]["error"] or "reset by peer" in out[0]["error"]) if how == "dies" else "Timed out waiting 5000ms" in out[0]["error"]

@pytest.mark.soak
def test_background_commits_on_the_group_of_training_do_not_work(record_property):
    "The negative control: with one group for both the run dies."
    ends = ask("trap"); record_property("ends", ends); assert any(ends)

# Damage and strangers

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Two commits of two processes."
    run = tmp_path_factory.mktemp("saved")/"run"
    ask("save", str(run))
    return run

def damaged(c, kind, rng):
    p = rng.choice(sorted(c.iterdir())); raw = bytearray(p.read_bytes())
    if kind == "flip": raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8); p.write_bytes(raw)
    if kind == "cut": p.write_bytes(raw[:rng.randrange(len(raw))])
    if kind == "delete": p.unlink()
    if kind == "swap": p = c/rng.choice(["model-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "state.json"]); q = next(c.parent.glob("step-00000006*"))/p.name; p.write_bytes(q.read_bytes())
    return p.name

def test_every_damaged_file_of_several_processes_is_named(saved, tmp_path):
    newest, rng = commits.commits(saved/"commits")[-1], random.Random(0)
    assert sorted(p.name for p in newest.iterdir()) == ["manifest.json"] + [f"{s}-0000{r}-of-00002.safetensors" for s in ("model", "optimizer") for r in (1, 2)] + ["state.json"]
    for kind,n in dict(flip=60, cut=20, delete=5, swap=5).items():
        for i in range(n):
            folder = tmp_path/f"{kind}{i}"; shutil.copytree(saved/"commits", folder)
            name = damaged(c := commits.commits(folder)[-1], kind, rng)
            with pytest.raises(ValueError, match=f"commit {c.name} is damaged: .*{name}"): commits.read(c)
            with pytest.warns(UserWarning, match=f"{c.name} is damaged.*{name}.*going back"): assert commits.latest(folder)[1]["counts"]["step"] == 6
            with pytest.warns(UserWarning, match=name): assert pieces._newest(folder).name.startswith("step-00000006")      # what several processes ask
            shutil.rmtree(folder)

class Evil:
    def __init__(self, sentinel): self.sentinel = sentinel
    def __reduce__(self): return open, (str(self.sentinel), "w")

def test_a_hostile_metadata_or_pickle_runs_nothing(saved, tmp_path):
    sentinel = tmp_path/"ran"
    for name in (".metadata", "model-00003-of-00003.safetensors", "__0_0.distcp", "state.pt"):
        shutil.copytree(saved/"commits", folder := tmp_path/name/"commits")
        c = commits.commits(folder)[-1]; (c/name).write_bytes(pickle.dumps(Evil(sentinel)))
        with pytest.raises(ValueError, match="missing or additional files"): commits.read(c)
        with pytest.warns(UserWarning): assert pieces._newest(folder) != c
        manifest = json.loads((c/"manifest.json").read_text()); manifest[name] = commits._said(c/name)      # forged to fit
        (c/"manifest.json").write_text(json.dumps(manifest)); c = c.rename(c.with_name(c.name[:14] + commits._hash(c/"manifest.json")[:16]))
        if name.endswith("safetensors"):
            with pytest.raises(ValueError, match="is damaged"): commits.read(c)
        else: commits.read(c)                                                             # no word of it is read
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Evil(sentinel))); assert sentinel.exists()                  # the pickle does work

def test_torch_runs_a_hostile_metadata(tmp_path):
    "The negative control, and why our commits hold none."
    import torch.distributed.checkpoint as dcp
    dcp.save({"w": torch.zeros(3)}, checkpoint_id=str(tmp_path/"c"), no_dist=True)
    (tmp_path/"c"/".metadata").write_bytes(pickle.dumps(Evil(tmp_path/"ran")))
    with pytest.raises(dcp.api.CheckpointException): dcp.load({"w": torch.zeros(3)}, checkpoint_id=str(tmp_path/"c"), no_dist=True)
    assert (tmp_path/"ran").exists()

def test_pieces_that_do_not_make_a_whole_are_refused(saved, tmp_path):
    c = commits.commits(saved/"commits")[-1]; files = commits._stems(c)["model"]
    whole = pieces.gathered(files)
    assert all(t.isfinite().all() for t in whole.values())
    with pytest.raises(ValueError, match="the pieces of .* do not make up a tensor"): pieces.gathered(files[1:])
