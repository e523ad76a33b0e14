# %% [markdown]
# # 7. Four bits: NF4, blocks, double quantization, QLoRA end to end
# # 7. 4 位：NF4、分块、双重量化，QLoRA 从头到尾

# %%
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import torch

import fitune
from fitune import quant, show

BUNDLED = Path(str(files("fitune"))) / "bundled"
MODEL, DATA = BUNDLED / "model", BUNDLED / "data"
WORK = Path(mkdtemp())

# %% [markdown]
# ## Sixteen values
# ## 十六个值
#
# NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): quantiles of the normal distribution, so that each of the sixteen is
# used about equally often by weights, which are nearly normal. Zero is one of them.
#
# NormalFloat（QLoRA，Dettmers 等 2023，arXiv:2305.14314）：正态分布的分位数。权重接近正态，所以十六个值被用到的次数差不多。零是其中之一。

# %%
print(" ".join(f"{value:+.3f}" for value in quant.nf4_values()))
weights = torch.randn(64 * 400, generator=torch.Generator().manual_seed(0))
used = torch.bincount(torch.tensor(quant.nf4(weights).values), minlength=16) / len(weights)
even = torch.bincount(((weights.clamp(-3, 3) + 3) / 6 * 15).round().long(), minlength=16) / len(weights)
print("share of each value, NF4:       ", " ".join(f"{share:.0%}" for share in used.tolist()))
print("share of each of 16 even steps: ", " ".join(f"{share:.0%}" for share in even.tolist()))

# %% [markdown]
# ## Blocks of 64
# ## 每 64 个一块
#
# Each block has a scale of its own, so an outlier spoils 63 neighbours and not the whole row.
#
# 每块有自己的缩放，所以一个离群值只影响同块的 63 个，而不是整行。

# %%
spoiled = weights[:640].clone()
spoiled[100] = 40.0
rounded = quant.nf4(spoiled)
off = torch.tensor(abs(rounded.given - rounded.back)).view(10, 64).mean(1)
print("mean error of each block:", " ".join(f"{value:.3f}" for value in off.tolist()))
print("scales:", " ".join(f"{value:.1f}" for value in rounded.scales))

# %% [markdown]
# ## Double quantization: bytes a weight
# ## 双重量化：每个权重多少字节
#
# 4 bits, and a float32 scale for 64 weights: 0.5 + 4/64 = 0.5625 bytes. With the scales in 8 bits, in blocks of 256:
# 0.5 + 1/64 + 4/(64 x 256) = 0.516.
#
# 4 位，加上每 64 个权重一个 float32 缩放：0.5 + 4/64 = 0.5625 字节。缩放再用 8 位、每 256 个一块：0.5 + 1/64 + 4/(64 x 256) = 0.516。

# %%
for double in (False, True):
    plan = fitune.plan(
        "llama-3.2-1b", method="lora", quant={"name": "nf4", "double": double}, precision="bf16", max_length=128, gpu="8GB"
    )
    constants = max(phase.parts.get("quantization constants", 0) for phase in plan.phases)
    frozen = max(phase.parts.get("frozen weights", 0) for phase in plan.phases)
    print(f"double quantization {double!s:<5}: constants {constants / 2**20:>5.1f} MiB beside {frozen / 2**20:,.0f} MiB of weights")

# %% [markdown]
# ## QLoRA end to end
# ## QLoRA 从头到尾
#
# The base in NF4, LoRA in float32 beside every linear layer, states in 8 bits that a GPU may page out.
#
# 基座用 NF4，每个线性层旁边是 float32 的 LoRA，状态用 8 位，GPU 装满时可以换出。

# %%
done = fitune.train(
    model=MODEL, data=str(DATA / "train.jsonl"), eval_data=str(DATA / "held_out.jsonl"), output=WORK / "qlora", quant="nf4",
    method="lora", lora={"targets": "all-linear"}, optimizer="paged-adamw-8bit", precision="fp32", lr=5e-3, max_steps=100,
    batch_size=8, sample_prompts=0,
)  # fmt: skip
print(f"held-out loss {done.base_held_out_loss:.2f} -> {done.held_out_loss_after:.2f}")
score = fitune.evaluate(done.run, str(DATA / "held_out.jsonl"), max_new_tokens=24)
print(f"exact answers: {score.scores.exact_match:.0%}")
show.memory(
    plain=fitune.plan("qwen3-8b", method="lora", precision="bf16", max_length=512, batch_size=1, gpu="24GB"),
    qlora=fitune.plan("qwen3-8b", method="lora", quant="nf4", precision="bf16", max_length=512, batch_size=1, gpu="24GB"),
)

# %% [markdown]
# ## Merging the right way
# ## 正确地合并
#
# The base's 4 bits become plain weights, then LoRA is added: the same answers. Who needs 4 bits again pays with rounding, which
# is measured here. (Adding to the 4-bit numbers themselves would round each change to the nearest of 16 values.)
#
# 先把 4 位的基座还原成普通权重，再加 LoRA：答案不变。还想要 4 位，就要付出舍入的代价，这里量出来。（直接加到 4 位数上，每个改动都会被舍入到
# 16 个值之一。）

# %%
merged = fitune.merge(done.run, WORK / "merged")
print(f"plain weights: largest difference of logits {merged.merge_error:.1e}")
plain = fitune.evaluate(str(WORK / "merged"), str(DATA / "held_out.jsonl"), max_new_tokens=24)
again = fitune.quantize(WORK / "merged", WORK / "merged-nf4")
rounded = fitune.evaluate(str(WORK / "merged-nf4"), str(DATA / "held_out.jsonl"), max_new_tokens=24)
print(f"exact answers: the run {score.scores.exact_match:.0%}, merged {plain.scores.exact_match:.0%}, merged and 4 bits again {rounded.scores.exact_match:.0%}")

# %% [markdown]
# ## The same on your GPU
# ## 在你的 GPU 上
#
# ```
# fitune train --model Qwen/Qwen3-8B --data my.jsonl --quant nf4 --method lora --output runs/qlora
# fitune merge runs/qlora --output merged
# ```

# %%
for name in ("llama-3.2-1b", "qwen3-8b", "bloom-1b4-zh", "chatglm3-6b"):
    plan = fitune.plan(name, method="lora", quant="nf4", precision="bf16", batch_size=2, max_length=512, gpu="8GB", checkpointing=True)
    print(f"{name:<14} {plan.needed / 2**30:>5.1f} GiB  {'fits' if plan.fits else 'does not fit'} 8 GB")
