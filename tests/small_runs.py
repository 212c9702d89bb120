"""What tests of small runs share: tokens in memory, a run's log, and processes that die at a step or at a call."""
import json, os, signal

import numpy as np

class Text:
    "Tokens of one domain."
    def __init__(self, t): self.t = np.asarray(t)
    def __len__(self): return len(self.t)
    def read(self, start, n): assert 0 <= start <= start + n <= len(self.t); return self.t[start:start+n]

def log(run): return [{k: v for k,v in json.loads(l).items() if k != "seconds"} for l in open(run/"log.jsonl")]

class Kill:
    "A hook that dies at a step, in one of the places a run can be in."
    def __init__(self, where, step): self.where, self.step = where, step
    def __getattr__(self, name):
        if name != self.where: raise AttributeError(name)
        def die(step, *_):
            if step >= self.step: os.kill(os.getpid(), signal.SIGKILL)
        return die

def kill_at(module, name, k):
    "Let k more calls of a function through; SIGKILL at the next one."
    real, left = getattr(module, name), [k]
    def hook(*a, **kw):
        left[0] -= 1
        if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **kw)
    setattr(module, name, hook)
