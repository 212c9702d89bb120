"""A training step of the shape "tiny" against transformers' Llama of the same shape, against its own matrix products, and by kind of work.
CPU time on one thread, all in one process, taken in turns."""
import json, platform, time
from pathlib import Path

import torch, torch.nn.functional as F, transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from machine import processor
from paretolab.engine.fit import losses
from paretolab.models.linear import linear
from paretolab.models.mobilellm import MobileLLM, mobilellm

torch.set_num_threads(1)
torch.manual_seed(0)
B, L, ROUNDS, s = 8, 512, 7, mobilellm("tiny")
tokens = torch.randint(s.vocab, (B, L + 1))

def stepper(model, call):
    "What `engine.fit` does in a step, on any model."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    def step():
        ℓ = losses(call, tokens)
        (ℓ.sum()/len(tokens)).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.).item()
        optimizer.step()
        optimizer.zero_grad()
        return ℓ.mean().item()
    return step

def seconds(f):
    start = time.thread_time()
    f()
    return time.thread_time() - start

def median(x): return sorted(x)[len(x)//2]

ours = MobileLLM(s)
theirs = LlamaForCausalLM(LlamaConfig(vocab_size=s.vocab, hidden_size=s.dim, intermediate_size=s.ff, num_hidden_layers=s.layers, num_attention_heads=s.heads,
    num_key_value_heads=s.kv_heads, max_position_embeddings=s.context, rms_norm_eps=s.eps, rope_theta=s.theta, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa"))
assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == s.parameters

# The linear products of one step: forward, and the two of the backward pass
kv, n = s.kv_heads*s.head_dim, B*L
products = [(s.dim, s.dim, 2*s.layers), (s.dim, kv, 2*s.layers), (s.dim, s.ff, 2*s.layers), (s.ff, s.dim, s.layers), (s.dim, s.vocab, 1)]  # in, out, how many
flops = sum(6*n*k*m*times for k,m,times in products)

def product(call, k, m):
    x, W, dy = torch.randn(n, k, requires_grad=True), torch.randn(m, k, requires_grad=True), torch.randn(n, m)
    def f():
        for _ in range(4): torch.autograd.grad(call(x, W), (x, W), dy)
    return f

def bare(call, k, m):
    "The three products and nothing else: operands already lie as they are needed."
    x, W, dy = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)
    pairs = [(x, W), (dy, W.t().contiguous()), (dy.t().contiguous(), x.t().contiguous())]
    @torch.no_grad()
    def f():
        for _ in range(4):
            for a,b in pairs: call(a, b)
    return f

runs = {"ours": stepper(ours, ours), "theirs": stepper(theirs, lambda x: theirs(input_ids=x).logits)}
norm, x = nn.RMSNorm(s.dim), torch.randn(n, s.dim, requires_grad=True)
runs["norm"] = lambda: [torch.autograd.grad(norm(x), (x, norm.weight), x) for _ in range(4)]
for k,m,_ in products:
    for lib,call in (("torch", F.linear), ("ours", linear)): runs[k, m, lib], runs[k, m, lib, "bare"] = product(call, k, m), bare(call, k, m)
for f in runs.values(): f()
taken = {name: [] for name in runs}
for _ in range(ROUNDS):
    for name,f in runs.items(): taken[name].append(seconds(f))

ratios = sorted(b/a for a,b in zip(taken["ours"], taken["theirs"]))
step = median(taken["ours"])
spent = {lib: sum(times*median(taken[k, m, lib])/4 for k,m,times in products) for lib in ("torch", "ours")}
roof = sum(times*min(median(taken[k, m, lib, "bare"]) for lib in ("torch", "ours"))/4 for k,m,times in products)

KINDS = {"matrix products": ("_linear_pointwise", "mm", "addmm"), "attention": ("_scaled_dot_product",), "loss": ("_log_softmax", "nll_loss"), "copies": ("copy_",),
    "norms, rotation, gate, residuals": ("mul", "add", "sub", "neg", "cat", "silu", "pow", "rsqrt", "mean", "sum", "div", "slice_backward"),
    "optimizer and clipping": ("_fused_adamw", "_foreach", "linalg_vector_norm", "Optimizer"), "embedding": ("embedding", "index")}
def kind(op): return next((name for name,parts in KINDS.items() if op.split("::")[-1].startswith(parts)), "other")

def shares(f, times=3):
    "Share of the step by kind of work, and the operations that take most."
    with profile(activities=[ProfilerActivity.CPU]) as p:
        for _ in range(times): f()
    ops = {e.key: e.self_cpu_time_total for e in p.key_averages()}
    total, out = sum(ops.values()), {name: 0. for name in (*KINDS, "other")}
    for op,t in ops.items(): out[kind(op)] += t/total
    return {k: round(v, 4) for k,v in out.items()}, {k: round(v/total, 4) for k,v in sorted(ops.items(), key=lambda x: -x[1])[:25]}

work, ops = shares(runs["ours"])
cpu = processor()
result = dict(machine=platform.machine(), cpu=cpu, capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, transformers=transformers.__version__,
    shape="tiny", parameters=s.parameters, batch=B, length=L, rounds=ROUNDS, ratio=round(ratios[ROUNDS//2], 3), ratio_lowest=round(ratios[0], 3), ratio_highest=round(ratios[-1], 3),
    step_s=round(step, 4), tokens_per_s=round(n/step), peer_step_s=round(median(taken["theirs"]), 4),
    linear_gflop=round(flops/1e9, 1), roof_gflops_per_s=round(flops/roof/1e9, 1), roof_s=round(roof, 4), torch_linear_s=round(spent["torch"], 4), our_linear_s=round(spent["ours"], 4),
    share_of_roof=round(roof/step, 3), norms_s=round((2*s.layers + 1)*median(taken["norm"])/4, 4), work=work, operations=ops)
(Path(__file__).parent/"results"/"train_step.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"{result['ratio']} times the tokens a second of transformers {transformers.__version__} ({ratios[0]:.3f} to {ratios[-1]:.3f}); {result['tokens_per_s']} tokens/s; {result['share_of_roof']:.0%} of the roof of {result['roof_gflops_per_s']} GFLOP/s")
print(work)
