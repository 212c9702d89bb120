"""The supervisor: relaunches what dies or hangs, gives up what does not get on, and leaves nothing behind."""
import json, os, random, subprocess, sys, time
from pathlib import Path

import pytest, torch
from paretolab.engine import commits, supervisor
from paretolab.engine.supervisor import supervise

def script(body): return [sys.executable, "-c", "import os, sys, time, pathlib; run = pathlib.Path(sys.argv[1]); n = len(list(run.glob('launch*'))); (run/f'launch{n}').touch()\n" + body]
def commit(run, step): commits.commit(run/"commits", step, dict(model=dict(w=torch.zeros(1))), dict(step=step))

def test_a_run_that_ends_is_launched_once(tmp_path):
    assert supervise([*script(""), tmp_path], tmp_path) == [] and len(list(tmp_path.glob("launch*"))) == 1

def test_what_dies_is_relaunched_until_it_ends(tmp_path):
    assert supervise([*script("n < 2 and os.kill(os.getpid(), 9)"), tmp_path], tmp_path) == ["ended with -9"]*2
    assert supervise([*script("sys.exit(7 if n < 4 else 0)"), tmp_path], tmp_path) == ["ended with 7"]

def test_what_does_not_get_on_is_given_up(tmp_path):
    with pytest.raises(RuntimeError, match=r"3 launches in a row brought no new commit, the last ended with 5"): supervise([*script("sys.exit(5)"), tmp_path], tmp_path, relaunches=2)
    assert len(list(tmp_path.glob("launch*"))) == 3

def test_a_new_commit_starts_the_count_again(tmp_path):
    new = "(c := run/'commits'/f'step-{n:08d}-0123456789abcdef').mkdir(parents=True)\n"
    assert len(supervise([*script(new + "sys.exit(n < 6)"), tmp_path], tmp_path, relaunches=0)) == 6

def test_what_hangs_is_ended(tmp_path):
    body = "(run/'log.jsonl').write_text('x'*n)\nif n == 0: time.sleep(1000)"
    assert supervise([*script(body), tmp_path], tmp_path, silence=1.5) == ["no step for 1.5 seconds"]
    body = "for i in range(8): time.sleep(.3); (run/'log.jsonl').write_text('x'*(i + 1))"
    assert supervise([*script(body), tmp_path], tmp_path, silence=1.5) == []                       # slow is not hung

def test_what_hangs_is_ended_where_there_is_no_proc(tmp_path):
    code = f"from paretolab.engine import supervisor as S; S._alive = lambda run: []; S.supervise(['sleep', '1000'], {str(tmp_path)!r}, relaunches=0, silence=.5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert "1 launches in a row brought no new commit, the last no step for 0.5 seconds" in done.stderr

def test_nothing_is_left_behind(tmp_path):
    "Workers live in sessions of their own, as torchrun's do, and outlive who started them."
    body = "import subprocess\nfor _ in range(3): print(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid, file=open(run/'pids', 'a'))\nsys.exit(n == 0)"
    supervise([*script(body), tmp_path], tmp_path)
    pids = (tmp_path/"pids").read_text().split()
    state = lambda p: Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[0] if Path(f"/proc/{p}").exists() else "gone"
    assert len(pids) == 6 and all(state(p) in ("gone", "Z") for p in pids) and supervisor._alive(tmp_path) == []

def test_one_supervisor_at_a_time_and_a_killed_ones_processes_are_ended(tmp_path):
    code = f"from paretolab.engine.supervisor import supervise; supervise([*{script('time.sleep(1000) if n == 0 else None')!r}, {str(tmp_path)!r}], {str(tmp_path)!r})"
    first = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path/"launch0").exists(): time.sleep(.05)
    with pytest.raises(ValueError, match="has a supervisor already"): supervise([*script(""), tmp_path], tmp_path)
    left = supervisor._alive(tmp_path); first.kill(); first.wait()
    assert len(left) == 1 and supervisor._alive(tmp_path) == left
    assert supervise([*script(""), tmp_path], tmp_path) == [] and supervisor._alive(tmp_path) == []

@pytest.mark.parametrize("kw", [dict(relaunches=-1), dict(silence=0), dict(silence=float("nan"))])
def test_what_no_supervisor_does_is_refused(tmp_path, kw):
    with pytest.raises(ValueError, match="launched once"): supervise(["true"], tmp_path, **kw)

# With torchrun

TRAIN = '''
import json, os, signal, sys; sys.path.insert(0, os.environ["TESTS"])
from distributed_run import *
from paretolab.engine.distributed import start
start(timeout=float(os.environ.get("TIMEOUT", 30))); run, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
R = dist.get_rank()
class Die:
    "Kills the process that the plan names, once at each of its steps."
    def on_gradients(self, step, model):
        for s,rank,how in plan:
            done = run/f"killed{s}"
            if step >= s and rank == R and not done.exists(): done.touch(); os.kill(os.getpid(), getattr(signal, how))
m, s, o = make(); m.train()
fit(m, s, o, cosine(STEPS, 3), (Mixer(s), Die()), steps=STEPS, run=run, every=EVERY, background=True)
d = digest(m)
if R == 0: (run/"digest").write_text(d)
dist.barrier()
os._exit(0)
'''

def trained(run, plan, launcher=("--standalone", "--nproc-per-node=2"), **kw):
    run.mkdir(exist_ok=True); (run/"train.py").write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(run/"train.py"), str(run), json.dumps(plan)]
    ends = supervise(command, run, **kw)
    return ends, (run/"digest").read_text()

@pytest.fixture
def env(monkeypatch):
    for k,v in dict(TESTS=str(Path(__file__).parent), OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in sys.path if p)).items(): monkeypatch.setenv(k, v)

@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_four_kills_under_torchrun(env, tmp_path, record_property, seed):
    rng = random.Random(seed); plan = [(s, rng.randrange(2), "SIGKILL") for s in rng.sample(range(8), 4)]
    _, want = trained(tmp_path/"calm", [])
    ends, found = trained(tmp_path/"run", plan, relaunches=4)
    record_property("kills", kills := len(list((tmp_path/"run").glob("killed*")))); record_property("relaunches", len(ends))
    assert found == want and len(ends) == kills == 4 and supervisor._alive(tmp_path/"run") == []

@pytest.mark.soak
@pytest.mark.parametrize("timeout, silence, says", [(300, 60, "no step for 60 seconds"), (30, 300, "ended with 1")], ids=["by the supervisor", "by the other process"])
def test_a_stopped_worker_is_noticed(env, tmp_path, monkeypatch, record_property, timeout, silence, says):
    _, want = trained(tmp_path/"calm", []); monkeypatch.setenv("TIMEOUT", str(timeout))
    start = time.perf_counter(); ends, found = trained(tmp_path/"run", [(3, 1, "SIGSTOP")], silence=silence)
    record_property("took", round(time.perf_counter() - start, 1)); assert ends == [says] and found == want

@pytest.mark.soak
def test_two_machines(env, tmp_path, record_property):
    "Two launchers that meet over the network, here on one machine: the same bits as one launcher of two."
    _, want = trained(tmp_path/"one", []); (run := tmp_path/"two").mkdir(); (run/"train.py").write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29517", "--local-addr=127.0.0.1", str(run/"train.py"), str(run), "[]"]
    both = [subprocess.Popen(command, env=os.environ | dict(GLOO_SOCKET_IFNAME="lo")) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0] and (run/"digest").read_text() == want
    record_property("machines", 2)
