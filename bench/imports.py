"""What an import costs and loads: CPU time in fresh processes, taken in turns."""
import json, platform, subprocess, sys
from pathlib import Path

import torch
from machine import processor

ROUNDS, NAMES = 9, ("torch", "paretolab", "paretolab.models.mobilellm", "paretolab.engine.fit")

def fresh(module):
    "Import in a new process: CPU time, and what was loaded."
    run = f"import time, sys; t = time.process_time(); import {module}; print(time.process_time() - t, *({{'torch', 'datasets'}} & set(sys.modules)))"
    seconds, *loaded = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), sorted(loaded)

for name in NAMES: fresh(name)                                           # files into the cache
taken, loaded = {name: [] for name in NAMES}, {}
for _ in range(ROUNDS):
    for name in NAMES:
        t, loaded[name] = fresh(name)
        taken[name].append(t)

median = lambda x: sorted(x)[len(x)//2]
table = []
for name in NAMES:
    ratios = sorted(a/b for a,b in zip(taken[name], taken["torch"]))
    table.append(dict(module=name, seconds=round(median(taken[name]), 4), ratio=round(median(ratios), 3), ratio_lowest=round(ratios[0], 3), ratio_highest=round(ratios[-1], 3), loads=loaded[name]))
    print(f"{name:>28}: {table[-1]['seconds']:.3f} s, {table[-1]['ratio']:.3f} times torch; loads {', '.join(loaded[name]) or 'neither torch nor datasets'}")
cpu = processor()
result = dict(machine=platform.machine(), cpu=cpu, torch=torch.__version__, python=platform.python_version(), rounds=ROUNDS, modules=table)
(Path(__file__).parent/"results"/"imports.json").write_text(json.dumps(result, indent=1) + "\n")
