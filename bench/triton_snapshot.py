"Compile every Triton kernel of the library for every target and keep what it became. Nothing is timed."
import importlib, json
from dataclasses import asdict
from pathlib import Path
from paretolab.kernels import aot

MODULES = "dequant", "hadamard", "mxfp4", "states", "s2_attention", "apollo_step"
SNAPSHOT = Path(__file__).parent/"results"/"triton.json"

def jobs(): return [(c, t) for m in MODULES for c in importlib.import_module(f"paretolab.kernels.{m}").cases for t in c.targets]

def name(case, target): return f"{case.kernel.fn.__module__.rpartition('.')[2]}.{case.kernel.fn.__name__} | {case.name} | {target}"

def main():
    work = jobs()
    found = aot.reports(work)
    bad = [line for (c, t), r in zip(work, found) for line in aot.problems(c, t, r)]
    rows = {name(c, t): dict(key=aot.key(c, t), **asdict(r)) for (c, t), r in zip(work, found)}
    SNAPSHOT.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + "\n}\n")
    print(f"{len(rows)} kernels compiled, {len(bad)} problems", *bad, sep="\n")
    if bad: raise SystemExit(1)

if __name__ == "__main__": main()
