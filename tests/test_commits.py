"""Commits under kills, full disks, damage and strangers in the folder."""
import errno, hashlib, json, os, random, resource, shutil, signal, time, warnings

import pytest, torch
from paretolab.engine import commits as C
from small_runs import kill_at

def tensors(step): return dict(model={f"w{i}": torch.full((500,), float(step)) for i in range(5)}, optimizer=dict(m=torch.arange(1000) + step))

def whole(folder):
    "The step of the newest commit, all of whose numbers are those of that step; -1 if there is none."
    if (saved := C.latest(folder)) is None: return -1
    t, state = saved
    want = tensors(state["step"])
    assert t.keys() == want.keys() and all(torch.equal(t[f][k], want[f][k]) for f in want for k in want[f])
    return state["step"]

def killed(folder, start, after):
    "Commit step after step in a child until it is killed; the last step it was told to be safe."
    r, w = os.pipe()
    if (child := os.fork()) == 0:
        try:
            for step in range(start, start + 10_000):
                C.commit(folder, step, tensors(step), dict(step=step))
                os.write(w, step.to_bytes(8, "little"))
        finally: os._exit(1)
    os.close(w)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    told = b""
    while part := os.read(r, 2**16): told += part
    os.close(r)
    return int.from_bytes(told[-8:], "little") if told else start - 1

def campaign(folder, kills):
    rng, acknowledged, start = random.Random(0), 0, time.perf_counter()
    C.commit(folder, 0, tensors(0), dict(step=0))
    one = time.perf_counter() - start
    for _ in range(kills):
        acknowledged = max(acknowledged, killed(folder, acknowledged + 1, rng.uniform(0, 8*one)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")                               # a kill leaves nothing damaged that counts
            assert whole(folder) in (acknowledged, acknowledged + 1)     # the next one may be there, not yet told
        acknowledged = whole(folder)
    return acknowledged

def test_what_was_acknowledged_survives_any_kill(tmp_path): assert campaign(tmp_path, 20) > 0   # how far it gets depends on the machine; nowhere would test nothing

@pytest.mark.soak
def test_what_was_acknowledged_survives_two_hundred_kills(tmp_path, record_property):
    record_property("kills", 200)
    record_property("commits", campaign(tmp_path, 200) + 1)

def points():
    "Where a commit calls the system: a name in a module, and how many calls to let through."
    for module, name, n in ((C, "_sync", 6), (C, "_hash", 4), (C, "save_file", 2), (os, "rename", 1)):
        for k in range(n): yield pytest.param(module, name, k, id=f"{name} {k}")

@pytest.mark.parametrize("module, name, k", points())
def test_killed_at_each_call_of_a_commit(tmp_path, module, name, k):
    C.commit(tmp_path, 1, tensors(1), dict(step=1))
    if (child := os.fork()) == 0:
        kill_at(module, name, k)
        C.commit(tmp_path, 2, tensors(2), dict(step=2))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert whole(tmp_path) == (2 if (name, k) == ("_sync", 5) else 1)    # the last sync is after the rename
    C.commit(tmp_path, 3, tensors(3), dict(step=3))
    assert whole(tmp_path) == 3 and not list(tmp_path.glob(".writing*"))

@pytest.mark.parametrize("module, name, k", points())
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["ENOSPC", "EIO", "EROFS"])
def test_a_full_or_broken_disk_leaves_earlier_commits_and_nothing_else(tmp_path, monkeypatch, module, name, k, number):
    C.commit(tmp_path, 1, tensors(1), dict(step=1))
    real, left = getattr(module, name), [k]
    def fail(*a):
        left[0] -= 1
        if left[0] < 0: raise OSError(number, os.strerror(number))
        return real(*a)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError) as e: C.commit(tmp_path, 2, tensors(2), dict(step=2))
    monkeypatch.undo()
    assert e.value.errno == number and os.strerror(number) in str(e.value)
    assert not list(tmp_path.glob(".writing*"))
    if (name, k) != ("_sync", 5): assert "the state after step 2 could not be saved" in str(e.value) and whole(tmp_path) == 1

def test_a_file_that_cannot_grow_is_told_as_such(tmp_path):
    "The system itself refuses here, through the library that writes the tensors."
    C.commit(tmp_path, 1, tensors(1), dict(step=1))
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try: C.commit(tmp_path, 2, tensors(2), dict(step=2))
        except OSError as e: os._exit(7 if "after step 2 could not be saved" in str(e) and "File too large" in str(e) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert whole(tmp_path) == 1 and not list(tmp_path.glob(".writing*"))

def test_a_state_that_is_not_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError): C.commit(tmp_path, 1, tensors(1), dict(step={1}))
    assert not list(tmp_path.iterdir())

# Damage

def cut(raw, rng): return raw[:rng.randrange(len(raw))]
def flip(raw, rng): i = rng.randrange(len(raw)); return raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i+1:]
def longer(raw, rng): return raw + b" "
def zeros(raw, rng): return bytes(len(raw))
FILES = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"

@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage, times", [(cut, 6), (flip, 25), (longer, 1), (zeros, 1), (None, 1)], ids=lambda d: getattr(d, "__name__", None))
def test_damage_is_named_and_the_commit_before_is_taken(tmp_path, file, damage, times):
    for step in (1, 2): last = C.commit(tmp_path, step, tensors(step), dict(step=step))
    raw, rng = (last/file).read_bytes(), random.Random(file)
    for _ in range(times):
        (last/file).unlink() if damage is None else (last/file).write_bytes(damage(raw, rng))
        with pytest.raises(ValueError, match=f"commit {last.name} is damaged: .*{file}"): C.read(last)
        with pytest.warns(UserWarning, match=f"{last.name} is damaged.*going back"): assert whole(tmp_path) == 1
    C.commit(tmp_path, 2, tensors(2), dict(step=2))
    assert whole(tmp_path) == 2 and C.commits(tmp_path)[-1] == last

@pytest.mark.parametrize("file", FILES)
def test_files_of_another_commit_are_refused(tmp_path, file):
    one, two = (C.commit(tmp_path, step, tensors(step), dict(step=step)) for step in (1, 2))
    shutil.copy(one/file, two/file)
    with pytest.raises(ValueError, match="is damaged"): C.read(two)

@pytest.mark.parametrize("add", [lambda c: (c/"evil.pt").write_bytes(b"\x80\x04"), lambda c: (c/"sub").mkdir(), lambda c: (c/"x").symlink_to("/etc/passwd"), lambda c: os.mkfifo(c/"pipe")])
def test_additional_files_are_refused(tmp_path, add):
    add(last := C.commit(tmp_path, 1, tensors(1), dict(step=1)))
    with pytest.raises(ValueError, match="missing or additional files"): C.read(last)

# Strangers

def forge(folder, manifest, **files):
    "A directory whose name fits its manifest, whatever that says."
    raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    c = folder/f"step-00000099-{hashlib.sha256(raw).hexdigest()[:16]}"
    c.mkdir(parents=True)
    (c/"manifest.json").write_bytes(raw)
    for n,b in files.items(): (c/n.replace("_", ".")).write_bytes(b)
    return c

def said(**files): return {n.replace("_", "."): dict(bytes=len(b), sha256=hashlib.sha256(b).hexdigest()) for n,b in files.items()}

FORGED = {"no files": ({}, {}), "a list": ([], {}), "a number": (3, {}), "no json": (b"\xff", {}), "deep": (b"["*100_000, {}), "outside": ({"../x": dict(bytes=0, sha256="")}, {}),
    "no hash": ({"state.json": {}}, dict(state_json=b"{}")), "no dict": ({"state.json": 3}, dict(state_json=b"{}")),
    "state cut": (said(state_json=b"{"), dict(state_json=b"{")), "tensors cut": (said(state_json=b"{}", model_safetensors=b"x"), dict(state_json=b"{}", model_safetensors=b"x")),
    "pickle": (said(state_json=b"{}", model_safetensors=b"\x80\x04cos\nsystem\n"), dict(state_json=b"{}", model_safetensors=b"\x80\x04cos\nsystem\n"))}

@pytest.mark.parametrize("manifest, files", FORGED.values(), ids=FORGED)
def test_forged_commits_are_refused_by_name_and_passed_over(tmp_path, manifest, files):
    C.commit(tmp_path, 1, tensors(1), dict(step=1))
    bad = forge(tmp_path, manifest, **files)
    with pytest.raises(ValueError, match=f"commit {bad.name} is damaged"): C.read(bad)
    with pytest.warns(UserWarning, match=bad.name): assert whole(tmp_path) == 1
    forge(tmp_path, [1]); forge(tmp_path, [2])
    for step in (2, 3, 4): C.commit(tmp_path, step, tensors(step), dict(step=step))
    with pytest.warns(UserWarning): assert whole(tmp_path) == 4          # newer strangers push no commit out

def test_names_that_are_not_commits_are_left_alone(tmp_path):
    names = ["step-1", "step-00000005", "step-00000005-0123456789ABCDEF", "step-00000005-0123456789abcdef.bak", "xstep-00000005-0123456789abcdef", "notes.txt"]
    for n in names: (tmp_path/n).mkdir()
    (tmp_path/"step-00000007-0123456789abcdef").write_text("a file")
    (tmp_path/"step-00000008-0123456789abcdef").symlink_to(tmp_path/"step-1")
    for step in (1, 2, 3): C.commit(tmp_path, step, tensors(step), dict(step=step))
    assert whole(tmp_path) == 3 and len(C.commits(tmp_path)) == 2 and all((tmp_path/n).is_dir() for n in names)

def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001): C.commit(tmp_path, step, tensors(step), dict(step=step))
    assert whole(tmp_path) == 100_000_001 and len(C.commits(tmp_path)) == 2

def test_the_same_state_twice_is_one_commit(tmp_path):
    assert C.commit(tmp_path, 5, tensors(5), dict(step=5)) == C.commit(tmp_path, 5, tensors(5), dict(step=5))
    assert len(list(tmp_path.iterdir())) == 1

def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0"): C.commit(tmp_path, 1, tensors(1), dict(step=1), keep=0)

@pytest.mark.parametrize("folder", [None, "nothing/here"])
def test_no_commits_is_none(tmp_path, folder): assert C.latest(tmp_path/folder if folder else tmp_path) is None


@pytest.mark.parametrize("stem", ["../evil", "a/b", "", "a.b"])
def test_a_commit_stays_in_its_folder(tmp_path, stem):
    with pytest.raises(ValueError, match="files of a commit are named"): C.commit(tmp_path/"c", 1, {stem: {"w": torch.zeros(1)}}, {})
    assert not list(tmp_path.rglob("*.safetensors"))
