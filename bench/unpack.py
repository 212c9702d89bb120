"""Unpacking in C++ against the torch definition: CPU time on one thread, both in one process, taken in turns."""
import json, platform, time
from pathlib import Path

import torch
from paretolab.kernels.unpack import fast, naive, row_bytes

def seconds(f, *args):
    start = time.thread_time()
    f(*args)
    return time.thread_time() - start

torch.set_num_threads(1)
rows, columns, turns, table = 512, 4096, 7, []
for bits in (1, 1.58, 2, 3, 4, 6, 8):
    packed = torch.randint(256, (rows, row_bytes(bits, columns)), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fast(packed, bits, columns), naive(packed, bits, columns))
    taken = [(seconds(naive, packed, bits, columns), seconds(fast, packed, bits, columns)) for _ in range(turns)]
    slow, quick = sorted(t[0] for t in taken)[turns//2], sorted(t[1] for t in taken)[turns//2]
    table.append(dict(bits=bits, ratio=round(slow/quick, 1), fast_codes_per_s=round(rows*columns/quick)))
    print(f"{bits:>4} bits: {slow/quick:6.1f} times the definition's speed, {rows*columns/quick/1e9:5.2f} thousand million codes a second")

result = dict(rows=rows, columns=columns, turns=turns, torch=torch.__version__, machine=platform.machine(), widths=table)
(Path(__file__).parent/"results"/"unpack.json").write_text(json.dumps(result, indent=1) + "\n")
