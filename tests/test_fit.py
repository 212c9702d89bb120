"""Runs killed at random and resumed to the bit, bad numbers from everywhere, and resumes that must not be."""
import hashlib, json, math, os, random, shutil, signal, time, warnings

import numpy as np, pytest, torch
from paretolab.data.stream import MixedStream
from paretolab.engine import commits, fit as F
from paretolab.engine.fit import fit
from paretolab.engine.schedules import cosine, wsd
from paretolab.engine.spikes import Spikes
from paretolab.models.mobilellm import MobileLLM, Shape
from paretolab.optimizers.contract import Optimizer
from paretolab.optimizers.muon import Muon
from small_runs import Kill, Text, kill_at, log

torch.set_num_threads(1)
STEPS, EVERY = 24, 4

rng = np.random.default_rng(0)
TEXT = {d: Text(rng.integers(k, k + 20, 600)) for d,k in dict(a=0, b=40).items()}
adamw = lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, fused=True)
muon = lambda m: Muon(m.named_parameters(), lr=3e-3)

class Mixer:
    "A hook with a state that steers the stream: what a data mixing method does."
    def __init__(self, stream): self.stream, self.mean = stream, {"a": 0., "b": 0.}
    def on_losses(self, step, per_domain):
        for d,l in per_domain.items(): self.mean[d] = .9*self.mean[d] + .1*l
    def on_step(self, step, record):
        p = .5 + .4*math.sin(100*(self.mean["a"] - self.mean["b"]))
        self.stream.weights = dict(a=p, b=1 - p)
    def state_dict(self): return self.mean
    def load_state_dict(self, s): self.mean = dict(s)

class Noise:
    "Random numbers in a step: the generator's state belongs to the run."
    def on_gradients(self, step, model):
        for p in model.parameters(): p.grad += 1e-3*torch.randn_like(p)

def make(optimizer=adamw, seed=0, batch=4, **kw):
    torch.manual_seed(seed)
    model = MobileLLM(Shape(**{**dict(vocab=64, dim=16, ff=16, layers=2, heads=2, kv_heads=1, context=16), **kw}))
    return model, MixedStream(TEXT, dict(a=.5, b=.5), batch=batch, length=16), optimizer(model)

def flat(m): return torch.cat([p.detach().flatten() for p in m.parameters()])
def digest(m): return hashlib.sha256(flat(m).numpy().tobytes()).hexdigest()

def train(run, optimizer, *extra, steps=STEPS, **kw):
    m, s, o = make(optimizer)
    fit(m, s, o, cosine(STEPS, 5), (Mixer(s), Noise(), *extra), steps=steps, run=run, every=EVERY, **kw)
    s.close()
    return digest(m)

@pytest.fixture(scope="module", params=[adamw, muon], ids=["AdamW", "Muon"])
def calm(request, tmp_path_factory):
    "The run nobody disturbed: optimizer, digest, log, seconds."
    run, start = tmp_path_factory.mktemp("calm")/"run", time.perf_counter()
    d = train(run, request.param, object())
    assert len(log(run)) == STEPS
    return request.param, d, log(run), time.perf_counter() - start

# Kills

def child(run, optimizer, extra, after=None, before=lambda: None):
    "Train in a fork of this warm process until it ends or is killed; how it ended."
    if (pid := os.fork()) == 0:
        try: before(); train(run, optimizer, extra)
        finally: os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def campaign(calm, folder, points, seed):
    "Kill and resume over and over, several kills to a run; every run ends like the calm one."
    optimizer, want, lines, seconds = calm
    random.seed(seed)
    kills = runs = 0
    while kills < points:
        run = folder/f"{runs}"
        runs += 1
        for _ in range(min(3, points - kills)):
            step = random.randrange(STEPS)
            how = random.choice(["time", "on_losses", "on_gradients", "on_step", "on_commit", "commit", "commit"])
            if how == "time": code = child(run, optimizer, object(), after=random.uniform(0, seconds))
            elif how == "commit": code = child(run, optimizer, object(), before=lambda: kill_at(*random.choice([(commits, "_sync"), (commits, "_hash"), (commits, "save_file"), (os, "rename")]), random.randrange(8)))
            else: code = child(run, optimizer, Kill(how, step))
            kills += code == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert train(run, optimizer, object()) == want
        assert log(run) == lines
    return kills, runs

def test_killed_and_resumed_it_ends_with_the_same_bits(calm, tmp_path): assert campaign(calm, tmp_path, 12, seed=0)[0] >= 12

@pytest.mark.soak
def test_two_hundred_kills_end_with_the_same_bits(calm, tmp_path, record_property):
    kills, runs = campaign(calm, tmp_path, 200, seed=1)
    record_property("kills", kills); record_property("runs", runs)

def test_a_damaged_newest_commit_costs_only_its_steps(calm, tmp_path):
    optimizer, want, lines, _ = calm
    child(tmp_path, optimizer, Kill("on_step", 17))
    newest = commits.commits(tmp_path/"commits")[-1]
    assert newest.name.startswith("step-00000016")
    (newest/"optimizer.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="step-00000016-.* is damaged: optimizer.safetensors holds 4 bytes"): assert train(tmp_path, optimizer, object()) == want
    assert log(tmp_path) == lines
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for c in commits.commits(tmp_path/"commits"): commits.read(c)

def test_each_kind_of_state_counts(calm, tmp_path, monkeypatch):
    "If one of them did not come back, the end would be another: the test above can fail."
    optimizer, want, *_ = calm
    for what in ("rng", "stream", "hooks", "moments"):
        run = tmp_path/what
        child(run, optimizer, Kill("on_step", 13))
        if what == "rng": monkeypatch.setattr(torch, "set_rng_state", lambda s: None)
        if what == "stream": monkeypatch.setattr(MixedStream, "load_state_dict", lambda self, s: None)
        if what == "hooks": monkeypatch.setattr(Mixer, "load_state_dict", lambda self, s: None)
        if what == "moments":
            for kind in (torch.optim.Optimizer, Optimizer): monkeypatch.setattr(kind, "load_state_dict", lambda self, s: None)
        assert train(run, optimizer, object()) != want, what
        monkeypatch.undo()

def test_a_run_that_is_complete_makes_no_step(calm, tmp_path):
    optimizer, want, lines, _ = calm
    for _ in range(2): assert train(tmp_path, optimizer, object()) == want and log(tmp_path) == lines
    m, s, o = make(optimizer)
    assert fit(m, s, o, cosine(STEPS), (Mixer(s), Noise(), object()), steps=STEPS, run=tmp_path) == []

# Bad numbers

class Poison:
    def __init__(self, at, value, where): self.at, self.value, self.where, self.seen = at, value, where, {}
    def on_gradients(self, step, model):
        self.model, self.seen[step] = model, [flat(model)]
        if step in self.at and self.where == "gradient": model.blocks[1].mlp.up.weight.grad[3, 5] = self.value

class Spoiled(MobileLLM):
    "A model whose loss is not finite at some calls."
    at, value, calls = (), 0., 0
    def forward(self, x):
        y = super().forward(x)
        self.calls += 1
        if self.calls - 1 not in self.at: return y
        return y*self.value if self.value else y.masked_fill(torch.arange(y.shape[-1]) == 5, -math.inf)  # an infinite loss whose gradient is finite

@pytest.mark.parametrize("optimizer", [adamw, muon], ids=["AdamW", "Muon"])
@pytest.mark.parametrize("where, value", [(w, v) for w in ("gradient", "loss") for v in (math.nan, math.inf, -math.inf)] + [("loss alone", 0.)])
def test_one_bad_number_costs_exactly_one_step(tmp_path, optimizer, where, value):
    m, s, o = make(optimizer)
    if where != "gradient": m.__class__, m.at, m.value = Spoiled, {7}, value
    moments = []
    class Watch:
        def loss_weights(self, step, tokens, domain): moments.append([v.clone() for st in o.state.values() for v in st.values()] + [flat(m)])   # the first thing in a step
    records = fit(m, s, o, cosine(12), [Watch(), Poison({7}, value, where)], steps=12, run=tmp_path)
    assert [i for i in range(11) if moments[i] and len(moments[i]) == len(moments[i+1]) and all(torch.equal(a, b) for a,b in zip(moments[i], moments[i+1]))] == [7]
    assert [r["skipped"] for r in records] == [0]*7 + [1]*5 and flat(m).isfinite().all()

class Buffers(torch.nn.Module):
    "Attention under a mask of -inf in a buffer and a batch norm; NaN in one call, or a buffer that runs away."
    def __init__(self, bad=None, away=None):
        super().__init__(); self.bad, self.away, self.calls = bad, away, 0
        self.embed, self.attend, self.norm, self.head = torch.nn.Embedding(64, 16), torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 64)
        self.register_buffer("mask", torch.full((16, 16), -math.inf).triu(1)); self.register_buffer("sum", torch.zeros(1))
    def forward(self, x):
        y = self.embed(x)*(math.nan if self.calls == self.bad else 1)
        if self.calls == self.away: self.sum += math.inf
        self.calls += 1
        y = self.norm((y + self.attend(y, y, y, attn_mask=self.mask, need_weights=False)[0]).transpose(1, 2)).transpose(1, 2)
        return self.head(y)

def buffered(run, steps, **kw): m = Buffers(**kw); return m, fit(m, make()[1], adamw(m), cosine(12), steps=steps, run=run, every=3)

def test_a_mask_of_minus_infinity_is_committed_and_resumed(tmp_path):
    buffered(tmp_path, 3); m, records = buffered(tmp_path, 6)
    assert len(records) == 3 and m.mask.isinf().any()

def test_a_refused_step_leaves_no_trace_in_buffers(tmp_path):
    seen = []
    m = Buffers(bad=4)
    class Watch:
        def on_step(self, step, record): seen.append({k: v.clone() for k,v in m.named_buffers()})
    records = fit(m, make()[1], adamw(m), cosine(12), [Watch()], steps=8, run=tmp_path)
    assert [i for i in range(7) if all(torch.equal(seen[i][k], seen[i + 1][k]) for k in seen[i])] == [3]
    assert records[-1]["skipped"] == 1 and m.norm.running_var.isfinite().all()

def test_a_buffer_that_was_finite_has_to_stay_so(tmp_path):
    with pytest.raises(FloatingPointError, match="sum holds numbers that are not finite after step 5, written by the model .* nothing is committed"): buffered(tmp_path, 6, away=4)
    assert commits.latest(tmp_path/"commits")[1]["counts"]["step"] == 3
    forge(tmp_path, lambda t, s: t["model"]["sum"].fill_(math.nan))
    with pytest.raises(ValueError, match="the saved run's sum holds numbers that are not finite"): buffered(tmp_path, 6)

def test_bad_steps_in_a_row_end_the_run_and_single_ones_do_not(tmp_path):
    m, s, o = make()
    records = fit(m, s, o, cosine(30), [Poison(set(range(0, 30, 2)), float("nan"), "gradient")], steps=30, run=tmp_path/"a", patience=2)
    assert records[-1]["skipped"] == 15
    m, s, o = make()
    with pytest.raises(FloatingPointError, match="10 steps in a row .* the last at step 14 "): fit(m, s, o, cosine(30), [Poison(set(range(5, 30)), float("nan"), "gradient")], steps=30, run=tmp_path/"b", every=3)
    assert flat(m).isfinite().all() and o.param_groups[0]["lr"] == 3e-3 and len(log(tmp_path/"b")) == 15
    assert commits.latest(tmp_path/"b"/"commits")[1]["counts"] == dict(step=12, skipped=7, row=7)
    m, s, o = make()
    with pytest.raises(FloatingPointError, match="the last at step 14 "): fit(m, s, o, cosine(30), [Poison(set(range(5, 30)), float("nan"), "gradient")], steps=30, run=tmp_path/"b", every=3)  # also over a resume

class Tenfold:
    "Losses of some steps, times a number."
    def __init__(self, at, by): self.at, self.by, self.seen = at, by, []
    def losses(self, step, model, tokens): self.seen.append(flat(model)); return F.losses(model, tokens)*(self.by if step in self.at else 1)

def test_a_spike_costs_one_step_and_the_window_is_resumed(tmp_path):
    runs = {}
    for name, ends in (("whole", [16]), ("in parts", [9, 16])):
        for end in ends: fit(*(made := make()), cosine(16), [Spikes(8), tenfold := Tenfold({12}, 10)], steps=end, run=tmp_path/name, every=3)
        runs[name] = digest(made[0]), log(tmp_path/name)
        assert [r["skipped"] for r in log(tmp_path/name)] == [0]*12 + [1]*4
    assert runs["whole"] == runs["in parts"]
    still = [torch.equal(a, b) for a, b in zip(tenfold.seen, tenfold.seen[1:])]
    assert [9 + i for i, same in enumerate(still) if same] == [12]

def test_a_bad_number_does_not_blind_the_watch_for_spikes(tmp_path):
    records = fit(*make(), cosine(16), [spikes := Spikes(8), Tenfold({10}, math.nan)], steps=16, run=tmp_path)
    assert [r["skipped"] for r in records] == [0]*10 + [1]*6 and all(map(math.isfinite, spikes.state_dict()))

def test_losses_that_rise_for_good_are_taken_again(tmp_path):
    records = fit(*make(), cosine(30), [Spikes(4), Tenfold(set(range(10, 30)), 10)], steps=30, run=tmp_path)
    assert 1 <= records[-1]["skipped"] <= 2 and records[-1]["skipped"] == records[15]["skipped"]

# Hooks, parts, schedules

def test_several_hooks_are_called_in_order_and_keep_their_states(tmp_path):
    calls = []
    class Hook:
        def __init__(self, name): self.name, self.n = name, 0
        def on_losses(self, step, λ): self.n += 1; calls.append((step, "losses", self.name))
        def on_gradients(self, step, model): calls.append((step, "gradients", self.name)); assert all(p.grad is not None for p in model.parameters())
        def on_step(self, step, record): calls.append((step, "step", self.name)); assert record["step"] == step
        def on_commit(self, step): calls.append((step, "commit", self.name))
        def state_dict(self): return dict(n=self.n)
        def load_state_dict(self, s): self.n = s["n"]
    m, s, o = make()
    fit(m, s, o, cosine(9), [Hook("x"), object(), Hook("y")], steps=2, run=tmp_path, every=2)
    assert calls == [(t, k, n) for t in (0, 1) for k in ("losses", "gradients", "step") for n in "xy"] + [(2, "commit", n) for n in "xy"]
    x, y = Hook("x"), Hook("y"); y.n = 50
    fit(*make(seed=3), cosine(9), [x, object(), y], steps=5, run=tmp_path)
    assert x.n == y.n == 5
    with pytest.raises(ValueError, match=r"saved with 3 hooks, 2 of them with a state \(got 2, 2 "): fit(*make(), cosine(9), [x, y], steps=9, run=tmp_path)

def test_the_record_shows_the_weights_its_batch_was_drawn_with(tmp_path):
    m, s, o = make()
    class Turn:
        def on_losses(self, step, per_domain): s.weights = dict(a=1., b=0.) if step % 2 else dict(a=0., b=1.)
    records = fit(m, s, o, cosine(8), [Turn()], steps=8, run=tmp_path)
    for r in records[1:]: assert r["per_domain"].keys() == {d for d,w in r["weights"].items() if w}

@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_parts_add_up_to_the_batch(tmp_path, parts):
    ends = {}
    for a in (1, parts):
        m, s, o = make(seed=0)
        records = fit(m, s, o, wsd(10, 2), steps=10, run=tmp_path/f"{a}", accumulate=a)
        ends[a] = flat(m), torch.tensor([[r["loss"], r["norm"], *r["per_domain"].values()] for r in records])
    assert torch.allclose(ends[1][1], ends[parts][1], rtol=2e-4) and torch.allclose(ends[1][0], ends[parts][0], atol=2e-4)  # 10 steps of 3e-3

def test_a_resume_may_use_other_parts_and_the_rates_are_the_schedule(tmp_path):
    for η,name in ((cosine(20, 4), "cosine"), (wsd(20, 4), "wsd")):
        fit(*make(), η, steps=11, run=tmp_path/name, every=5)
        fit(*make(), η, steps=20, run=tmp_path/name, accumulate=2)
        assert [r["lr"] for r in log(tmp_path/name)] == [3e-3*η(t) for t in range(20)]

@pytest.mark.parametrize("lr", [torch.tensor(1e-3), np.float32(1e-3)], ids=["tensor", "numpy"])
def test_a_rate_that_is_no_plain_number_is_refused_before_anything_starts(tmp_path, lr):
    m, s, o = make(lambda m: torch.optim.AdamW(m.parameters(), lr=lr)); was = digest(m)
    with pytest.raises(ValueError, match=r"go into the commits as JSON.* \(got .*0\.001.* among them\); make it with lr=float"): fit(m, s, o, cosine(9), steps=2, run=tmp_path/"run")
    assert not (tmp_path/"run").exists() and digest(m) == was and s.state["step"] == 0

@pytest.mark.parametrize("number", [torch.tensor, np.float32], ids=["tensor", "numpy"])
def test_multipliers_and_weights_of_losses_may_be_any_kind_of_number(tmp_path, number):
    class Weigh:
        def __init__(self, kind): self.kind = kind
        def loss_weights(self, step, tokens, domain): return dict(a=self.kind(.5), b=self.kind(1.5))
    ends = []
    for kind in (float, number):
        fit((made := make())[0], *made[1:], lambda t: kind(.5), [Weigh(kind)], steps=2, run=tmp_path/kind.__name__); ends.append((digest(made[0]), log(tmp_path/kind.__name__)))
    assert ends[0] == ends[1] and [r["lr"] for r in ends[0][1]] == [1.5e-3]*2

@pytest.mark.parametrize("x", [None, "0.5", torch.ones(2), -1, math.inf, math.nan])
def test_what_is_no_multiplier_is_refused(tmp_path, x):
    with pytest.raises(ValueError, match=r"a schedule gives a finite multiplier of at least 0 \(got .* at step 0\)"): fit(*make(), lambda t: x, steps=2, run=tmp_path)

def test_an_interrupted_step_leaves_the_rates(tmp_path):
    m, s, o = make()
    class Stop:
        def on_gradients(self, step, model):
            if step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(m, s, o, cosine(20, 10), [Stop()], steps=20, run=tmp_path, every=2)
    assert o.param_groups[0]["lr"] == 3e-3
    assert fit(m, s, o, cosine(20, 10), [object()], steps=4, run=tmp_path)[0]["step"] == 2

class Parts(torch.nn.Module):
    "A buffer, and a part of it registered before the whole."
    def __init__(self):
        super().__init__(); self.embed, self.head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64)
        count = torch.zeros(10); self.register_buffer("first", count[:2]); self.register_buffer("count", count); self.register_buffer("same", count)
    def forward(self, x): self.count += 1; return self.head(self.embed(x))

def test_a_buffer_that_shares_memory_with_another_is_kept_whole(tmp_path):
    for steps in (4, 6): m = Parts(); fit(m, make()[1], adamw(m), cosine(9), steps=steps, run=tmp_path)
    assert m.count.tolist() == [6.]*10 and sorted(k for k in commits.latest(tmp_path/"commits")[0]["model"] if "." not in k) == ["count", "first"]

@pytest.mark.parametrize("damage", ["lost", "torn", "blank", "repeated"])
def test_the_log_after_a_crash_holds_whole_lines_each_step_once(tmp_path, damage):
    fit(*make(), cosine(12), steps=6, run=tmp_path); path = tmp_path/"log.jsonl"; raw = path.read_bytes(); lines = raw.splitlines(keepends=True)
    path.write_bytes(dict(lost=b"", torn=raw[:len(raw)*2//3], blank=b"\n\n\n" + raw, repeated=lines[0]*3 + b"[3]\n" + raw)[damage])
    fit(*make(), cosine(12), steps=9, run=tmp_path)
    fit(*make(), cosine(12), steps=12, run=tmp_path)
    steps = [r["step"] for r in log(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-6:] == list(range(6, 12)) and (damage in ("lost", "torn") or len(steps) == 12)

def test_the_log_is_on_disk_before_a_commit_is(tmp_path, monkeypatch):
    done, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), real(fd)))
    fit(*make(), cosine(9), steps=2, run=tmp_path)
    assert "log.jsonl" in done and done.index("log.jsonl") < done.index("model.safetensors")

def test_two_runs_in_one_folder_do_not_meet(tmp_path):
    class Again:
        says = None
        def on_step(self, step, record):
            try: fit(*make(), cosine(9), steps=9, run=tmp_path)
            except ValueError as e: self.says = str(e)
    records = fit(*make(), cosine(9), [hook := Again()], steps=3, run=tmp_path)
    assert "is being trained already; wait for it or use another folder" in hook.says
    assert len(records) == len(log(tmp_path)) == 3 and len(fit(*make(), cosine(9), [object()], steps=4, run=tmp_path)) == 1

# Resumes that must not be

OTHERS = {"a wider model": (dict(dim=32), "model has it"), "a deeper model": (dict(layers=3), r"blocks.2.* missing"), "a shallower model": (dict(layers=1), "model has it missing"), "a head": (dict(tied=False), r"head.weight missing"),
    "another optimizer": (dict(optimizer=muon), "parameter groups|in the optimizer's group"), "another rate": (dict(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)), r"lr=0.003 .*got 0.001"),
    "other betas": (dict(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, betas=(.8, .9), fused=True)), r"betas=\[0.9, 0.999\]"), "another class": (dict(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=3e-3)), "group 0"),
    "another batch": (dict(batch=8), "batch=4 but this one has 8")}

@pytest.mark.parametrize("kw, words", OTHERS.values(), ids=OTHERS)
def test_a_resume_with_something_else_is_refused_before_any_change(tmp_path, kw, words):
    fit(*make(), cosine(9), steps=3, run=tmp_path)
    lines = (tmp_path/"log.jsonl").read_bytes()
    m, s, o = make(**{"seed": 5, **kw})
    before, stream_was, rng_was = flat(m), s.state_dict(), torch.get_rng_state()
    with pytest.raises(ValueError, match=words): fit(m, s, o, cosine(9), steps=9, run=tmp_path)
    assert torch.equal(flat(m), before) and s.state_dict() == stream_was and not o.state and torch.equal(torch.get_rng_state(), rng_was)
    assert (tmp_path/"log.jsonl").read_bytes() == lines

def test_another_build_is_told(tmp_path, monkeypatch):
    fit(*make(), cosine(9), steps=3, run=tmp_path)
    monkeypatch.setattr(F, "_build", lambda: dict(torch="1.0"))
    with pytest.warns(UserWarning, match="goes on under .*1.0.* but was saved under"): fit(*make(), cosine(9), steps=4, run=tmp_path)

@pytest.mark.parametrize("kw", [dict(steps=0), dict(accumulate=0), dict(every=-1), dict(clip=0), dict(clip=float("nan"))])
def test_what_no_run_takes_is_refused(tmp_path, kw):
    with pytest.raises(ValueError, match=f"{next(iter(kw))}={next(iter(kw.values()))}"): fit(*make(), cosine(9), **{"steps": 9, **kw}, run=tmp_path/"run")
    assert not (tmp_path/"run").exists()

# Forged and foreign commits

def forge(folder, change):
    "Rewrite the newest commit with hashes that fit."
    path = commits.commits(folder/"commits")[-1]
    tensors, state = commits.read(path)
    change(tensors, state)
    commits.commit(folder/"commits", int(path.name.split("-")[1]) + 1, tensors, state)

def test_a_forged_commit_changes_nothing(tmp_path):
    fit(*make(), cosine(9), steps=2, run=tmp_path/"a")
    def moment(value): return lambda t, s: t["optimizer"].update({"0.exp_avg": value})
    bad = {r"the shape \(2,\)": moment(torch.zeros(2)), "exp_avg of parameter 0 holds": moment(torch.full((64, 16), float("nan"))),
        "names parameter '99'": lambda t, s: t["optimizer"].update({"99.exp_avg": torch.zeros(1)}),
        "float16 and this model": lambda t, s: t["model"].update({k: v.half() for k,v in t["model"].items()}),
        "holds numbers that are not finite": lambda t, s: next(iter(t["model"].values())).view(-1)[0].fill_(float("inf")),
        r"whole numbers of at least 0.*-3": lambda t, s: s["counts"].update(step=-3), "whole numbers": lambda t, s: s.update(counts="2")}
    for i,(says,change) in enumerate(bad.items()):
        shutil.copytree(tmp_path/"a", run := tmp_path/str(i)); forge(run, change)
        m, s, o = make(); before, at = flat(m).clone(), s.state_dict()
        with pytest.raises(ValueError, match=says): fit(m, s, o, cosine(9), steps=5, run=run)
        assert torch.equal(flat(m), before) and s.state_dict() == at and not o.state

def test_state_keeps_its_type_and_the_made_groups_decide(tmp_path):
    class Counting(torch.optim.SGD):
        "Holds 8-bit state and counts in its groups, as schedule-free methods do."
        def step(self, closure=None):
            super().step(closure)
            for g in self.param_groups:
                g["k"] = g.get("k", 0) + 1
                for p in g["params"]: self.state[p]["codes"] = torch.full(p.shape, g["k"], dtype=torch.int8)
    def run(n):
        m, s, _ = make(); o = Counting(m.parameters(), lr=.1)
        return m, o, fit(m, s, o, cosine(9), steps=n, run=tmp_path/"b", every=1)
    run(2); m, o, r = run(4)
    assert len(r) == 2 and o.param_groups[0]["k"] == 4
    assert all(v["codes"].dtype == torch.int8 and (v["codes"] == 4).all() for v in o.state.values())

def test_hooks_hear_nothing_of_a_bad_step_and_the_log_is_json(tmp_path):
    class Ear:
        def __init__(self): self.heard = []
        def on_losses(self, step, λ): assert all(math.isfinite(v) for v in λ.values()); self.heard.append((step, "losses"))
        def on_gradients(self, step, model): assert all(p.grad.isfinite().all() for p in model.parameters()); self.heard.append((step, "gradients"))
    m, s, o = make()
    m.__class__, m.at, m.value = Spoiled, (3,), math.nan
    fit(m, s, o, cosine(9), [ear := Ear()], steps=6, run=tmp_path)
    lines = [json.loads(l, parse_constant=lambda c: pytest.fail(c)) for l in open(tmp_path/"log.jsonl")]
    assert ear.heard == [(t, what) for t in (0, 1, 2, 4, 5) for what in ("losses", "gradients")]
    assert lines[3]["loss"] is None and lines[-1]["skipped"] == 1

@pytest.mark.parametrize("state", [dict(t=torch.zeros(2)), {1, 2}])
def test_a_hook_whose_state_is_no_json_is_refused_at_once(tmp_path, state):
    class Odd:
        def state_dict(self): return state
    with pytest.raises(ValueError, match="hook's state goes into the commits as JSON"): fit(*make(), cosine(9), [Odd()], steps=2, run=tmp_path)
    assert not (tmp_path/"commits").exists()

def test_an_optimizer_of_another_model_is_refused(tmp_path):
    m, s, _ = make(); _, _, o = make(seed=1)
    with pytest.raises(ValueError, match="trains the model it was made of"): fit(m, s, o, cosine(STEPS, 5), steps=2, run=tmp_path/"run")
    assert not (tmp_path/"run").exists()
    s.close()

def test_a_model_of_16_bits_is_trained(tmp_path):
    from paretolab.optimizers.adamw import AdamW
    m, s, _ = make(); m.bfloat16(); was = flat(m)
    records = fit(m, s, AdamW(m.named_parameters(), lr=.01), cosine(STEPS, 5), steps=3, run=tmp_path/"run"); s.close()
    assert len(records) == 3 and all(math.isfinite(v) for r in records for v in r["per_domain"].values()) and not torch.equal(flat(m), was)
