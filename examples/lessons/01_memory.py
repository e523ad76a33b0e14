# %% [markdown]
# # 1. Memory: what a run holds, and what takes less of it
# # 1. 显存：一次训练占用什么，怎样少占
#
# Every figure is planned by fitune before anything runs, and measured by torch's own profiler afterwards.
#
# 每个数字都由 fitune 在运行之前规划，之后再用 torch 自己的 profiler 测量。

# %%
import json
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import fitune
from fitune import show

BUNDLED = Path(str(files("fitune"))) / "bundled"
MODEL = BUNDLED / "model"
COMMON = {"precision": "fp32", "max_length": 64, "batch_size": 8}

# %% [markdown]
# ## 4 + 4 + 8 bytes a parameter, and activations
#
# In float32 with Adam each trained weight takes 4 bytes, its gradient 4, Adam's two states 8. The rest is what each block
# keeps for the backward pass: it grows with the tokens of a micro-batch.
#
# float32 加 Adam：每个要训练的权重占 4 字节，梯度 4，Adam 的两个状态 8。其余是各层为反向传播保留的激活，随微批次的 token 数增长。

# %%
full = fitune.plan(MODEL, method="full", **COMMON)
print(f"{full.total:,} parameters")
for part in ("trainable weights", "gradients", "optimizer states"):
    most = max(phase.parts.get(part, 0) for phase in full.phases)
    print(f"{part:<18} {most / full.total:>5.2f} bytes a parameter")
show.memory(full, tensors=True)

# %% [markdown]
# ## Rules of thumb, and how far off they are
# ## 经验公式差多少
#
# "6 x batch x parameters", "16 bytes a parameter": they know neither lengths nor activations. For a real model
# (Llama-3.2-1B, of which only the config is needed):
#
# “6 x batch x 参数量”、“每个参数 16 字节”：它们既不知道长度，也不知道激活。以真实模型为例（Llama-3.2-1B，只需要它的 config）：

# %%
from fitune.memory.rules import rules

for method, length in (("full", 128), ("full", 1024), ("lora", 128), ("lora", 1024)):
    plan = fitune.plan("llama-3.2-1b", method=method, precision="bf16", batch_size=8, max_length=length, gpu="80GB")
    shown = "   ".join(f"{rule.name}: {rule.off:+.0%}" for rule in rules(plan))
    print(f"{method:<5} {length:>5} tokens  needs {plan.needed / 2**30:>5.1f} GiB   {shown}")

# %% [markdown]
# ## The savers, one by one: planned and measured
# ## 逐个加上省显存的办法：规划与测量
#
# Accumulation makes a step of small micro-batches; checkpointing keeps no activations and computes them again; 8-bit states
# take 2 bytes instead of 8; a shorter input has fewer activations; what is frozen has neither gradients nor states.
#
# 梯度累积把一步分成小的微批次；激活检查点不保留激活，用到时重算；8 位状态占 2 字节而不是 8 字节；输入短，激活就少；冻结的部分没有梯度也没有状态。

# %%
from fitune.commands.verify import verify
from fitune.core.config import build
from fitune.core.quiet import quietly

texts = [json.loads(line) for line in (BUNDLED / "data" / "train.jsonl").read_text("utf-8").splitlines()][:64]
rows = [{"messages": [m for some in texts[n : n + 4] for m in some["messages"]]} for n in range(0, 64, 2)]
data = Path(mkdtemp()) / "rows.jsonl"
data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
SAVERS = {
    "nothing": {},
    "accumulation 4": {"batch_size": 4, "accumulation": 4},
    "and checkpointing": {"checkpointing": True},
    "and 8-bit states": {"optimizer": "adamw-8bit"},
    "and a shorter input": {"max_length": 48, "max_lost": 1.0},  # rows are cut, which is refused unless it is accepted
    "and only 1 block trained": {"method": "freeze"},
}
settings = {"model": str(MODEL), "data": [str(data)], "method": "full", "batch_size": 16, "max_length": 128}
settings |= {"precision": "fp32", "sample_prompts": 0, "checkpointing": False}
found = {}
for name, more in SAVERS.items():
    settings |= more
    found[name] = quietly(verify)(build(settings))
    seen = found[name]
    print(f"{name:<25} planned {seen.predicted / 2**20:>6.1f} MiB   measured {seen.allocated / 2**20:>6.1f}   {seen.error:+.2%}")

# %% [markdown]
# Paged states (`--optimizer paged-adamw-8bit`) lie in memory that a GPU may move to the host when it is full; on a CPU they are
# plain 8-bit states.
#
# 分页状态（`--optimizer paged-adamw-8bit`）放在 GPU 装满时可以换出到主机的内存里；在 CPU 上就是普通的 8 位状态。
#
# ## The same on your GPU
# ## 在你的 GPU 上

# %%
for name in ("llama-3.2-1b", "qwen3-8b", "bloom-1b4-zh", "chatglm3-6b"):
    for method, more in (("full", {}), ("lora", {}), ("lora", {"quant": "nf4", "checkpointing": True})):
        plan = fitune.plan(name, method=method, precision="bf16", batch_size=4, max_length=512, gpu="24GB", **more)
        how = " ".join([method, *(f"{k}={v}" for k, v in more.items())])
        print(f"{name:<14} {how:<32} {plan.needed / 2**30:>6.1f} GiB  {'fits 24 GB' if plan.fits else 'does not fit 24 GB'}")

# %% [markdown]
# ```
# fitune plan llama-3.2-1b --method lora --gpu 24GB --explain
# fitune plan qwen3-8b --data my.jsonl --gpu 24GB        # which methods fit, ranked, with reasons
# ```
