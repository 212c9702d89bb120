"""Two jobs of a data loader, done by a loop, by stages on threads, by the same stages on `spdl`, by `datasets.map`, and by torch's DataLoader with 0, 1 and 2 workers: encoding documents into a token file, and delivering batches of windows. Throughput, CPU time and memory with all children, rounds interleaved; every contender has to give the same bytes. Argument: rounds."""
import hashlib, importlib.metadata, json, multiprocessing, os, platform, statistics, sys, tempfile, time
from pathlib import Path

import datasets, numpy as np, torch, torch.utils.data
from machine import processor
from paretolab.data import corpus, tokens
from paretolab.data.stages import Stage, one_by_one, over_spdl, staged
from spdl.pipeline import PipelineBuilder   # noqa: F401 (imported before any measurement)

DOMAINS, B, L, BATCHES, AHEAD, GROUP = ("fiction", "mathqa"), 8, 512, 1000, 8, 16
CORES = len(os.sched_getaffinity(0))
torch.set_num_threads(1); datasets.disable_progress_bars()

# Encoding: documents -> bytes of a token file

def documents():
    "All documents of two domains, one with long ones and one with short ones, and the tokenizer."
    ds = datasets.concatenate_datasets([corpus.load()[d] for d in DOMAINS]); tok = tokens.tokenizer()
    ds.set_format(None); return ds, tok

def encode(tok): return lambda texts: tok.encode_batch_fast(texts, add_special_tokens=False)
def pack(encodings): return b"".join(np.array(e.ids + [0], np.uint16).tobytes() for e in encodings)
def groups(ds, n): return ((f"documents from {i}", ds[i:i+n]["text"]) for i in range(0, len(ds), n))

def write(parts):
    "What every contender ends with: a file, synced; its hash and size."
    h, n = hashlib.sha256(), 0
    with tempfile.TemporaryFile() as f:
        for p in parts: f.write(p); h.update(p); n += len(p)
        f.flush(); os.fsync(f.fileno())
    return h.hexdigest(), n

def over(run, size, encoders=CORES): return lambda job: write(p for _,p in run(groups(job[0], size), [Stage(encode(job[1]), encoders), Stage(pack)]))

def mapped(processes):
    def run(job):
        ds, tok = job
        f = lambda b: dict(ids=[e.ids for e in tok.encode_batch_fast(b["text"], add_special_tokens=False)])
        out = ds.map(f, batched=True, remove_columns=ds.column_names, num_proc=processes, load_from_cache_file=False, new_fingerprint=f"{os.getpid()}{time.time_ns()}")
        result = write(np.array(r["ids"] + [0], np.uint16).tobytes() for r in out)
        for c in out.cache_files: Path(c["filename"]).unlink(missing_ok=True)
        return result
    return run

class Documents(torch.utils.data.Dataset):
    def __init__(self, ds, tok): self.ds, self.encode = ds, encode(tok)
    def __len__(self): return len(self.ds)
    def __getitems__(self, i): return [pack(self.encode(self.ds[i[0]:i[-1]+1]["text"]))]

def loader(workers): return lambda job: write(torch.utils.data.DataLoader(Documents(*job), batch_size=GROUP, num_workers=workers, collate_fn=b"".join))

# Delivering: places in a token file -> batches of windows

def places():
    "A token file of 32 MB, and where each window of each batch begins."
    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0); n = 2**24
    (folder/"a.tokens").write_bytes(rng.integers(0, 4096, n, np.uint16).tobytes()); (folder/"a.json").write_text(json.dumps(dict(tokens=n, dtype="uint16")))
    t = tokens.Tokens(folder/"a.tokens"); [f.unlink() for f in folder.iterdir()]; folder.rmdir()
    return t, rng.integers(0, n - L - 1, (BATCHES, B))

def consume(batches):
    "What every contender ends with: a look at each batch."
    h = hashlib.sha256(); n = 0
    for x in batches: h.update(x[:,::64].numpy().tobytes()); n += x.numel()*2
    return h.hexdigest(), n

def batch(t): return lambda starts: torch.from_numpy(np.stack([t.read(int(s), L + 1) for s in starts]))
def streamed(run, readers): return lambda job: consume(x for _,x in run(((i, s) for i,s in enumerate(job[1])), [Stage(batch(job[0]), readers)]))

class Windows(torch.utils.data.Dataset):
    def __init__(self, t, starts): self.batch, self.starts = batch(t), starts
    def __len__(self): return len(self.starts)
    def __getitem__(self, i): return self.batch(self.starts[i])

def windows(workers): return lambda job: consume(torch.utils.data.DataLoader(Windows(*job), batch_size=None, num_workers=workers))

ahead = lambda run: lambda source, stages: run(source, stages, AHEAD)
JOBS = dict(
    encode=(documents, {"loop": over(one_by_one, 1), "batches of 1000": over(one_by_one, 1000), "stages, single documents": over(ahead(staged), 1), "stages": over(ahead(staged), GROUP), "spdl": over(ahead(over_spdl), GROUP),
        "datasets.map": mapped(None), "datasets.map, 2 processes": mapped(2), "DataLoader, 0 workers": loader(0), "DataLoader, 1 worker": loader(1), "DataLoader, 2 workers": loader(2)}),
    deliver=(places, {"loop": streamed(one_by_one, 1), "stages, 1 thread": streamed(ahead(staged), 1), "stages, 2 threads": streamed(ahead(staged), 2), "spdl, 2 threads": streamed(ahead(over_spdl), 2),
        "DataLoader, 0 workers": windows(0), "DataLoader, 1 worker": windows(1), "DataLoader, 2 workers": windows(2)}))

# Measuring

def tree(pid):
    "A process and all below it."
    try: kids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if len(os.listdir(f"/proc/{pid}/task")) == 1 else [k for t in os.listdir(f"/proc/{pid}/task") for k in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
    except OSError: return []
    return [pid] + [q for k in kids for q in tree(int(k))]

def memory():
    "Bytes that this process and all below it hold; a page that several hold counts once."
    total = 0
    for p in tree(os.getpid()):
        try: total += next(int(line.split()[1]) for line in open(f"/proc/{p}/smaps_rollup") if line.startswith("Pss:"))*1024
        except (OSError, StopIteration): pass
    return total

def child(pipe, job, name):
    make, contenders = JOBS[job]; work = make(); pipe.send("ready"); pipe.recv()
    cpu = lambda: sum(os.times()[:4])
    before, start = cpu(), time.perf_counter()
    digest, n = contenders[name](work); seconds = time.perf_counter() - start
    pipe.send(dict(seconds=seconds, cpu_s=cpu() - before, bytes=n, digest=digest)); pipe.recv()

def measure(job, name, watch):
    "One contender in a process of its own; with `watch`, its memory instead of its speed."
    here, there = multiprocessing.Pipe(); p = multiprocessing.get_context("fork").Process(target=child, args=(there, job, name)); p.start(); assert here.recv() == "ready"
    before = peak = memory() if watch else 0; here.send("go")
    while watch and not here.poll(.02): peak = max(peak, memory())
    out = here.recv(); here.send("end"); p.join()
    return out | (dict(memory=peak - before, at_start=before) if watch else {})

if __name__ == "__main__":
    rounds, table = int(*(sys.argv[1:] or ["5"])), []
    runs, held = ({(job, n): [] for job,(_, contenders) in JOBS.items() for n in contenders} for _ in range(2))
    for r in range(rounds):
        for key in (list(runs) if r % 2 == 0 else list(runs)[::-1]): runs[key].append(measure(*key, False))
    for key in held: held[key].append(measure(*key, True))
    for job,n in runs:
        assert len({r["digest"] for k in runs if k[0] == job for r in runs[k] + held[k]}) == 1, "the contenders do not give the same bytes"
        s, c = ([r[k] for r in runs[job, n]] for k in ("seconds", "cpu_s")); size = runs[job, n][0]["bytes"]
        row = dict(job=job, contender=n, bytes=size, seconds=[round(x, 4) for x in s], cpu_s=[round(x, 3) for x in c], memory=[h["memory"] for h in held[job, n]], at_start=[h["at_start"] for h in held[job, n]])
        table.append(row); print(f"{job:8} {n:26} {size/1e6/statistics.median(s):7.2f} MB of tokens/s  {statistics.median(c):6.2f} CPU s  {statistics.median(row['memory'])/1e6:7.1f} MB", flush=True)
    cpu = processor()
    versions = {p: importlib.metadata.version(p) for p in ("torch", "datasets", "tokenizers", "spdl-core", "numpy")}
    result = dict(machine=platform.machine(), cpu=cpu, cores=CORES, python=platform.python_version(), versions=versions, rounds=rounds, domains=DOMAINS, batch=B, length=L, batches=BATCHES, ahead=AHEAD, group=GROUP, table=table)
    (Path(__file__).parent/"results"/"data.json").write_text(json.dumps(result, indent=1) + "\n")
