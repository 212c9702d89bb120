"""Programs that run in several processes, forked from one that has loaded torch and every optimizer: `run` gives what rank 0 printed. As a script, this file is that process."""
import functools, importlib, json, os, signal, subprocess, sys, tempfile, traceback

@functools.cache
def server(): return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"))

def run(
    program, # its text; torch.distributed is ready when it begins
    world, # processes
    *arguments, # sys.argv[1:] of each
):
    "What rank 0 printed; all processes have to end well."
    p = server(); p.stdin.write(json.dumps([program, world, [*map(str, arguments)]]) + "\n"); p.stdin.flush()
    while not (line := p.stdout.readline()).startswith("[{"): assert line, "the process that forks is gone"
    ends = json.loads(line)
    assert not any(e["code"] for e in ends), "\n".join(f"rank {i}: {e['code']}\n{e['error']}" for i,e in enumerate(ends) if e["error"])[:4000]
    return ends[0]["said"]

def child(program, world, arguments, rank, folder):
    import torch.distributed as dist
    sys.stdout = open(f"{folder}/said{rank}", "w"); sys.argv = ["program", *arguments]; os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), TMPDIR=folder)
    try: dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world); exec(compile(program, "program", "exec"), dict(__name__="program")); dist.barrier()
    except BaseException:
        with open(f"{folder}/error{rank}", "w") as f: traceback.print_exc(file=f)
        os._exit(1)                                                            # at once, so that gloo's threads cannot hold it
    sys.stdout.flush(); os._exit(0)

def fork(program, world, arguments):
    folder, pids, ends = tempfile.mkdtemp(), {}, [dict(code=None, said="", error="") for _ in range(world)]
    for rank in range(world):
        if not (pid := os.fork()): child(program, world, arguments, rank, folder)
        pids[pid] = rank
    while pids:
        pid, status = os.wait(); rank = pids.pop(pid); ends[rank]["code"] = os.waitstatus_to_exitcode(status)
        if ends[rank]["code"]:                                                 # the others would wait for it
            for other in pids: os.kill(other, signal.SIGKILL)
    for key,name in (("said", "said"), ("error", "error")):
        for rank,e in enumerate(ends):
            if os.path.exists(file := f"{folder}/{name}{rank}"):
                with open(file) as f: e[key] = f.read()
    return ends

WARM = "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict", *(f"paretolab.optimizers.{n}" for n in ("apollo", "baselines", "distributed_lion", "galore", "low_bit_states", "muon", "scale", "sophia", "stochastic_rounding"))

if __name__ == "__main__":
    for name in WARM: importlib.import_module(name)
    import torch
    sys.modules["paretolab.optimizers.baselines"].SOAP([("w", torch.nn.Parameter(torch.zeros(4, 4)))])      # loads the library it calls
    for line in sys.stdin: print("\n" + json.dumps(fork(*json.loads(line))), flush=True)
