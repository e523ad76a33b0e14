# %% [markdown]
# # 6. Eight bits: absmax, outliers, and why merging rounds
# # 6. 8 位：absmax、离群值，以及为什么合并会舍入

# %%
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import torch

import fitune
from fitune import quant

BUNDLED = Path(str(files("fitune"))) / "bundled"
MODEL, DATA = BUNDLED / "model", BUNDLED / "data"
WORK = Path(mkdtemp())

# %% [markdown]
# ## There and back
# ## 量化与还原
#
# q = round(127 x / max|x|): the largest becomes 127, and every value lies on a grid of steps of max|x| / 127.
#
# q = round(127 x / max|x|)：绝对值最大的变成 127，其余落在步长为 max|x| / 127 的网格上。

# %%
five = quant.absmax([0.1, -0.3, 0.25, 0.15, -0.05])
print(five.values)
five

# %% [markdown]
# ## One outlier, and what absmax does to the rest
# ## 一个离群值，其余的怎么办
#
# A single 60 makes the grid so coarse that small values become 0.
#
# 只要有一个 60，网格就粗到让小的值都变成 0。

# %%
outlier = quant.absmax([0.1, -0.3, 0.25, 0.15, -0.05, 60.0])
print(outlier.values, f"error {five.error:.4f} -> {outlier.error:.4f}")
outlier

# %% [markdown]
# ## The decomposition of LLM.int8()
# ## LLM.int8() 的分解
#
# Dettmers et al. 2022 (arXiv:2208.07339): columns of the input with a value of 6 or more are multiplied in 16 bits, the rest in int8.
# Here a layer whose input has two such columns, made on purpose.
#
# Dettmers 等 2022（arXiv:2208.07339）：输入里有值达到 6 的列用 16 位相乘，其余用 int8。这里特意造一个有两列离群值的输入。

# %%
torch.manual_seed(0)
x, weight = torch.randn(64, 256), torch.randn(128, 256) / 16
x[:, [7, 90]] *= 30
exact = x @ weight.T


def int8(values, dim):
    """Values as int8 stands for them, with a scale for each row or column."""
    scale = values.abs().amax(dim=dim, keepdim=True) / 127
    return torch.round(values / scale) * scale


large = (x.abs() >= 6).any(0)
plain = int8(x, 1) @ int8(weight, 1).T
parts = int8(x[:, ~large], 1) @ int8(weight[:, ~large], 1).T + x[:, large] @ weight[:, large].T
only = x @ int8(weight, 1).T
for name, made in (("all in int8", plain), ("decomposed", parts), ("only weights in int8, as fitune trains", only)):
    print(f"{name:<40} error {float((made - exact).norm() / exact.norm()):.2%}")
print("columns with outliers:", large.nonzero().flatten().tolist())

# %% [markdown]
# ## A real model's inputs
# ## 真实模型的输入
#
# The largest value of each column of what the layers of the bundled model are given: small models have few outliers; from about
# 6.7 billion parameters on they are there in every layer.
#
# 自带模型各层输入每一列的最大值：小模型离群值少；大约从 67 亿参数起，每层都有。

# %%
tuned = fitune.load(MODEL)
largest = {}


def keep(name):
    def hook(module, given):
        largest[name] = given[0].detach().abs().reshape(-1, given[0].shape[-1]).amax(0)

    return hook


hooks = [m.register_forward_pre_hook(keep(n)) for n, m in tuned.model.named_modules() if isinstance(m, torch.nn.Linear)]
ids = tuned.tokenizer(["The cat sits on the mat.", "北国的首都是哪里？"], padding=True, return_tensors="pt")["input_ids"]
with torch.no_grad():
    tuned.model(ids)
for hook in hooks:
    hook.remove()
every = torch.cat(list(largest.values()))
for low, high in ((0, 1), (1, 2), (2, 4), (4, 6), (6, 20), (20, 1e9)):
    share = float(((every >= low) & (every < high)).float().mean())
    print(f"{low:>3} to {'more' if high > 1e6 else high:<4} {share:>6.1%} {'#' * round(60 * share)}")

# %% [markdown]
# ## Why merging into 8 bits rounds
# ## 为什么合并进 8 位会舍入
#
# LoRA's change of a weight is about a step of the grid, or less. Merged into plain weights it is exact; added and rounded to
# int8 again, a part of it is lost.
#
# LoRA 对一个权重的改动大约是网格的一步，或者更小。合并进普通权重是精确的；加上之后再舍入成 int8，就丢掉一部分。

# %%
done = fitune.train(
    model=MODEL, data=str(DATA / "train.jsonl"), output=WORK / "run", quant="int8", method="lora", precision="fp32", lr=1e-3,
    max_steps=40, batch_size=8, sample_prompts=0,
)  # fmt: skip
merged = fitune.merge(done.run, WORK / "merged")
print(f"merged into plain weights: largest difference of logits {merged.merge_error:.1e}")
base = fitune.load_model(MODEL, quant="int8", plain=True).state_dict()
whole = fitune.load_model(WORK / "merged").state_dict()
lost, steps = [], []
for name, was in base.items():
    if "q_proj" in name or "v_proj" in name:
        change = whole[name] - was
        if float(change.norm()) == 0:
            continue
        again = int8(whole[name], 1)
        lost.append(float((again - was - change).norm() / change.norm()))
        steps.append(float(change.abs().mean() / (whole[name].abs().amax(1).mean() / 127)))
print(f"LoRA's change is {sum(steps) / len(steps):.2f} steps of the grid on average")
print(f"rounded to int8 again, {sum(lost) / len(lost):.0%} of it is lost")

# %% [markdown]
# ## The same on your GPU
# ## 在你的 GPU 上
#
# ```
# fitune train --model Qwen/Qwen3-8B --data my.jsonl --quant int8 --method lora --output runs/int8
# fitune merge runs/int8 --output merged          # always into plain weights
# ```

# %%
for name in ("llama-3.2-1b", "qwen3-8b", "bloom-1b4-zh", "chatglm3-6b"):
    sizes = []
    for more in ({}, {"quant": "int8"}):
        plan = fitune.plan(name, method="lora", precision="bf16", batch_size=2, max_length=512, gpu="24GB", checkpointing=True, **more)
        sizes.append(plan.needed / 2**30)
    print(f"{name:<14} bf16 {sizes[0]:>5.1f} GiB   int8 {sizes[1]:>5.1f} GiB")
