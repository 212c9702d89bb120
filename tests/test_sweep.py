"""Sweeps killed in every place a journal can be in, torn and damaged journals, and trials that misbehave."""
import os, random, signal, sys, time

import pytest
from paretolab.engine import sweep as S
from paretolab.engine.sweep import local, sweep, trial

MODULE = """import os, sys, threading, time
def work(c):
    time.sleep(c.get("sleep", 0))
    with open(c["file"], "a") as f: f.write(f"{c['n']}\\n")
    print("a trial may print")
    return dict(square=c["n"]**2, threads=os.environ["OMP_NUM_THREADS"])
def dies(c):
    if c:
        with open(c, "a") as f: f.write("1")
    os.kill(os.getpid(), 9)
def odd(c): return {1, 2}
def loud(c): sys.stderr.write("x"*10**6); return "done"
"""

@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trials"); (folder/"trials_of_a_test.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    import trials_of_a_test
    yield trials_of_a_test
    sys.path.remove(str(folder))

def here(name, todo):
    "Trials in this process: the journal is what is tested."
    for key,c in todo: yield key, trial(name, c)

def killed(how, k, *args):
    "A sweep in a fork that dies at the k-th line: before it is synced, after, with half of it written, or at a random time."
    if (pid := os.fork()) == 0:
        real, left = os.fsync, [k]
        def sync(fd):
            left[0] -= 1
            if left[0] >= 0: return real(fd)
            if how == "torn": os.ftruncate(fd, os.fstat(fd).st_size - random.randrange(1, 20))
            if how == "after": real(fd)
            os.kill(os.getpid(), signal.SIGKILL)
        if how != "time": S.os.fsync = sync
        try: sweep(*args)
        finally: os._exit(0)
    if how == "time": time.sleep(random.uniform(0, .1)); os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def campaign(trials, folder, points, seed):
    random.seed(seed); kills = runs = 0
    while kills < points:
        configs = [dict(n=n, file=str(folder/f"ran{runs}"), sleep=.004) for n in range(9)]; journal = folder/f"{runs}.jsonl"; whole = set()
        while kills < points and len(whole) < 7:
            kills += killed(random.choice(["before", "after", "torn", "time"]), random.randrange(3), trials.work, configs, journal, here)
            found = S._read(journal)[0]
            assert whole <= set(found); whole = set(found)
            count = [int(l) for l in open(configs[0]["file"])] if os.path.exists(configs[0]["file"]) else []
            for r in found.values(): r["times"] = count.count(r["config"]["n"])
        outs = sweep(trials.work, configs, journal, here)
        assert [o["result"]["square"] for o in outs] == [n*n for n in range(9)] and len(journal.read_bytes().splitlines()) == 9
        after = [int(l) for l in open(configs[0]["file"])]
        for r in found.values(): assert after.count(r["config"]["n"]) == r["times"]           # finished, so not repeated
        runs += 1
    return kills

def test_what_is_finished_is_not_repeated(trials, tmp_path): assert campaign(trials, tmp_path, 8, 0) >= 8

@pytest.mark.soak
def test_fifty_kill_points(trials, tmp_path, record_property): record_property("kills", campaign(trials, tmp_path, 50, 1))

def test_processes_have_one_thread_may_print_and_may_die(trials, tmp_path):
    c = [dict(n=n, file=str(tmp_path/"ran")) for n in range(2)]
    assert [o["result"] for o in sweep(trials.work, c, tmp_path/"a", local(2))] == [dict(square=n*n, threads="1") for n in range(2)]
    assert "ended with -9" in sweep(trials.dies, [None], tmp_path/"b")[0]["error"]
    assert sweep(trials.loud, [0], tmp_path/"c")[0]["result"] == "done"                       # a full pipe does not hold it up
    assert "not JSON serializable" in sweep(trials.odd, [0], tmp_path/"d")[0]["error"]

def test_a_killed_sweep_leaves_no_trial_running(trials, tmp_path):
    c = [dict(n=0, file=str(tmp_path/"ran"), sleep=1.5)]
    if (pid := os.fork()) == 0:
        try: sweep(trials.work, c, tmp_path/"j", local(1))
        finally: os._exit(0)
    time.sleep(.7); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); time.sleep(2)
    assert not (tmp_path/"ran").exists()

def test_a_damaged_journal_is_refused_and_kept(trials, tmp_path):
    c = [dict(n=n, file=str(tmp_path/"ran")) for n in range(3)]; sweep(trials.work, c, j := tmp_path/"j", here)
    lines = j.read_bytes().splitlines(keepends=True); j.write_bytes(lines[0] + b"garbage\n" + lines[2]); before = j.read_bytes()
    with pytest.raises(ValueError, match="is damaged, or none of a sweep, after .* bytes .got b'garbage"): sweep(trials.work, c, j, here)
    assert j.read_bytes() == before

@pytest.mark.parametrize("line", ['{"key": ' + "["*100_000, '{"key": ["a"], "result": 1, "seconds": 0}', '{"key": "a", "seconds": 0}', "3", '{"key": "a", "result": 1}'], ids=["deep", "a list as key", "no result", "a number", "no seconds"])
def test_a_line_no_sweep_writes_is_refused_by_the_journals_name(trials, tmp_path, line):
    (j := tmp_path/"journal").write_text(line + "\n")
    with pytest.raises(ValueError, match="the journal .*journal is damaged, or none of a sweep, after 0 bytes"): sweep(trials.work, [0], j, here)
    assert j.read_text() == line + "\n"

def test_the_same_numbers_under_another_function_are_other_trials(trials, tmp_path):
    assert [o.get("result") for f in (abs, len) for o in sweep(f, [[1], [2, 3]], tmp_path/"j", here)][2:] == [1, 2]

def elsewhere(trials, folder, executor):
    "The same outcomes on the same journal: results, errors, a trial whose process dies, and nothing twice."
    c = [dict(n=n, file=str(folder/"ran")) for n in (-3, 4)]; j = folder/"j"; outs = sweep(trials.work, c, j, executor)
    assert [o["result"]["square"] for o in outs] == [9, 16] and sweep(trials.work, [*c, dict(n=5, file=str(folder/"ran"))], j, executor)[2]["result"]["square"] == 25
    assert sorted(map(int, open(folder/"ran"))) == [-3, 4, 5]
    assert [o.get("result") for o in sweep(abs, [-3, "x"], j, executor)] == [3, None] and "TypeError" in sweep(abs, ["x"], j, executor)[0]["error"]
    assert len(sweep(trials.dies, [str(folder/"tries")], j, executor)[0]["error"]) > 20 and open(folder/"tries").read() == "1"
    assert len(j.read_bytes().splitlines()) == 6

def test_submitit_runs_the_same(tmp_path):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    outs = sweep(abs, [-3, 4, "x"], tmp_path/"j", S.submitit(submitit.DebugExecutor(tmp_path/"logs")))
    assert [o.get("result") for o in outs] == [3, 4, None] and "TypeError" in outs[2]["error"]

@pytest.mark.soak
def test_submitit_runs_the_same_in_processes(trials, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))                # which a job of a batch system has from its shell
    elsewhere(trials, tmp_path, S.submitit(submitit.LocalExecutor(tmp_path/"logs")))

@pytest.mark.soak
def test_ray_runs_the_same(trials, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try: elsewhere(trials, tmp_path, S.ray())
    finally: ray.shutdown()
