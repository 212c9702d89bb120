"""Measurements and mixtures with a sharded model: the same bits on every process, and those of one process up to rounding."""
import json, os, subprocess, sys

CHILD = r'''
import json, os, sys, tempfile, warnings, numpy as np, torch, torch.distributed as dist
from datetime import timedelta
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from paretolab.data.stream import MixedStream
from paretolab.engine.fit import losses
from paretolab.engine.gradients import gram
from paretolab.engine.influence import influence
from paretolab.engine.steer import Steer
from paretolab.mixers.aioli import Aioli
from paretolab.mixers.automixer import AutoMixer
from paretolab.mixers.dga import DGA
from paretolab.mixers.doremi import DoReMi
from paretolab.models.mobilellm import MobileLLM, Shape

torch.set_num_threads(1); warnings.simplefilter("ignore"); os.environ["GLOO_SOCKET_IFNAME"] = "lo"
class Text:
    def __init__(self, t): self.t = np.asarray(t)
    def __len__(self): return len(self.t)
    def read(self, start, n): return self.t[start:start+n]
TEXT = dict(count=Text(np.arange(900) % 23), noise=Text(np.random.default_rng(0).integers(0, 23, 900)))
WINDOWS = {d: torch.from_numpy(np.stack([t.read(i, 13) for i in (3, 400)])) for d,t in TEXT.items()}
BATCHES = [torch.from_numpy(np.stack([t.read(i, 13) for i in range(0, 60, 10)])) for t in TEXT.values()]
MIXERS = dict(dga=DGA(eta=20., every=3, beta=.5), doremi=DoReMi(eta=.3), aioli=Aioli(eta=2., every=9, steps=2, passes=1))
def make(tied=True): torch.manual_seed(0); return MobileLLM(Shape(vocab=23, dim=24, ff=20, layers=1, heads=3, kv_heads=1, context=12, tied=tied))

def whole(model, rows):
    "Gradients as long vectors, one sequence at a time."
    g = torch.stack([sum(torch.cat([d.flatten() for d in torch.autograd.grad(losses(model, x[None]).mean(), list(model.parameters()))]) for x in b)/len(b) for b in rows]).double()
    return g @ g.T

def steered(m, mixer, world, rank, steps=12):
    stream = MixedStream(TEXT, dict(count=.5, noise=.5), batch=6, length=12); h = Steer(mixer, m, stream, WINDOWS, reference=make(), minibatch=2, kept=None)
    o, path = torch.optim.AdamW(m.parameters(), lr=1e-2), []
    for t in range(steps):
        tokens, d = next(stream); path.append([*stream.weights.values(), *(h.loss_weights(t, tokens, d) or {}).values()])
        losses(m, tokens.chunk(world)[rank]).mean().backward(); o.step(); o.zero_grad(); h.on_step(t, {})
    stream.close(); return path

def child(rank, world, store, out):
    dist.init_process_group("cpu:gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (world,))
    def sharded(tied=True):
        m = make(tied)
        for b in m.blocks: fully_shard(b, mesh=mesh)
        return fully_shard(m, mesh=mesh)
    found = dict(gram=gram(sharded(), [x.chunk(world)[rank] for x in BATCHES]).tolist(), influence={str(tied): influence(sharded(tied), BATCHES[0], list(WINDOWS.values())).tolist() for tied in (True, False)}, paths={k: steered(sharded(), m, world, rank) for k,m in MIXERS.items() if world == 2})
    try: steered(sharded(), AutoMixer(every=2), world, rank, 4)
    except ValueError as e: found["says"] = str(e)
    open(f"{out}-{rank}", "w").write(json.dumps(found)); dist.barrier(); dist.destroy_process_group()

def spread(world):
    tmp, pids = tempfile.mkdtemp(), []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            try: child(rank, world, f"{tmp}/store", f"{tmp}/found"); os._exit(0)
            except BaseException: import traceback; traceback.print_exc(); os._exit(1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0]*world
    return [json.loads(open(f"{tmp}/found-{r}").read()) for r in range(world)]

result = {w: spread(w) for w in map(int, sys.argv[1:])}
one = dict(gram=whole(make(), BATCHES).tolist(), influence={str(t): influence(make(t), BATCHES[0], list(WINDOWS.values())).tolist() for t in (True, False)}, paths={k: steered(make(), m, 1, 0) for k,m in MIXERS.items()})
print(json.dumps(dict(one=one, worlds=result)), flush=True)
os._exit(0)
'''

def test_sharded_measurements_and_mixtures_are_those_of_one_process():
    done = subprocess.run([sys.executable, "-c", CHILD, "1", "2", "3"], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1]); one = found["one"]; scale = lambda M: max(abs(x) for r in M for x in r)
    apart = lambda a, b: max(abs(x - y) for r,q in zip(a, b, strict=True) for x,y in zip(r, q, strict=True))
    assert list(found["worlds"]) == ["1", "2", "3"]
    for world,ranks in found["worlds"].items():
        assert len(ranks) == int(world) and all(r == ranks[0] for r in ranks)                          # every number, on every process
        r = ranks[0]; assert apart(r["gram"], one["gram"]) < 1e-5*scale(one["gram"])
        for tied,I in one["influence"].items(): assert apart(r["influence"][tied], I) < 1e-4*scale(I)      # an inverse at condition 1/λ
        for k,path in one["paths"].items() if world == "2" else ():
            assert len({json.dumps(p) for p in path}) > 2
            assert apart(r["paths"][k], path) < (1e-3 if k == "aioli" else 1e-4), (world, k, apart(r["paths"][k], path))           # rounding, through 12 steps of Adam; Aioli normalises small differences
        assert "the model is sharded" in r["says"]
