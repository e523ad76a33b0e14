# %% [markdown]
# # 3. Prompt tuning, P-tuning, prefix tuning, adapters, LoRA
# # 3. Prompt Tuning、P-Tuning、Prefix Tuning、Adapter 与 LoRA
#
# The base model stays as it is; a few parameters are added somewhere. Where, how many, and what they reach on one task.
#
# 基座模型保持不变，只在某处加上少量参数。加在哪里，加多少，在同一个任务上能到什么程度。

# %%
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import torch

import fitune
from fitune import show

BUNDLED = Path(str(files("fitune"))) / "bundled"
MODEL, DATA = BUNDLED / "model", BUNDLED / "data"
WORK = Path(mkdtemp())
COMMON = {"precision": "fp32", "max_steps": 80, "batch_size": 8, "sample_prompts": 0, "eval_data": str(DATA / "held_out.jsonl")}

# %% [markdown]
# ## A prompt of real words, and its virtual twin
# ## 真实文字的提示，与它的虚拟孪生
#
# "Today is sunny, 25 degrees. Can we play basketball?" is a prompt of words: each token has a row in the embedding. Prompt
# tuning (Lester et al. 2021, arXiv:2104.08691) puts rows of its own before every prompt. They begin as the embeddings of
# these words, and then move away from any word.
#
# “Today is sunny, 25 degrees. Can we play basketball?” 是文字提示：每个 token 在嵌入表里有一行。Prompt Tuning（Lester 等 2021，
# arXiv:2104.08691）在每个提示前放上自己的若干行。它们从这些词的嵌入开始，然后离开任何真实的词。

# %%
TEXT = "Today is sunny, 25 degrees. Can we play basketball"
show.mask([{"instruction": TEXT, "output": "Yes."}], model=MODEL)

# %%
prompt = fitune.train(
    model=MODEL, data=str(DATA / "train.jsonl"), output=WORK / "prompt", method="prompt", lr=0.05,
    prompt={"tokens": 29, "init": "text", "text": TEXT}, **COMMON,
)  # fmt: skip
tuned = fitune.load(prompt.run)
words = tuned.model.get_base_model().get_input_embeddings().weight.detach()
virtual = dict(tuned.model.named_parameters())["prompt_encoder.default.embedding.weight"].detach()
near = torch.cdist(virtual, words).min(dim=1)
begin = tuned.tokenizer(TEXT, add_special_tokens=False)["input_ids"][: len(virtual)]
print(f"{'began as':<12} {'is nearest to':<14} distance, beside {words.norm(dim=1).mean():.2f}, the size of a word's embedding")
for number, (distance, token) in enumerate(zip(near.values.tolist(), near.indices.tolist(), strict=True)):
    was = tuned.tokenizer.decode(begin[number % len(begin)])
    print(f"{was!r:<12} {tuned.tokenizer.decode(token)!r:<14} {distance:.2f}")

# %% [markdown]
# ## Where each one goes
# ## 各自加在哪里

# %%
WAYS = {
    "prompt": {"method": "prompt", "lr": 0.1},
    "p-tuning": {"method": "p-tuning", "lr": 5e-3},
    "prefix": {"method": "prefix", "lr": 3e-2},
    "adapter": {"method": "adapter", "lr": 1e-2},
    "lora": {"method": "lora", "lr": 1e-2},
    "lora all layers": {"method": "lora", "lr": 1e-2, "lora": {"targets": "all-linear"}},
}
WHERE = {
    "prompt": "rows before the prompt, at the input alone",
    "p-tuning": "the same, made by a small network (MLP or LSTM)",
    "prefix": "keys and values before the prompt, in every block",
    "adapter": "small layers behind attention and MLP of every block",
    "lora": "products of two thin matrices beside the attention's projections",
    "lora all layers": "the same beside every linear layer",
}
rows = []
for name, how in WAYS.items():
    done = fitune.train(model=MODEL, data=str(DATA / "train.jsonl"), output=WORK / name.replace(" ", "-") / "run", **COMMON, **how)
    score = fitune.evaluate(done.run, str(DATA / "held_out.jsonl"), max_new_tokens=24).scores.exact_match
    rows.append((name, done.trainable_parameters, done.held_out_loss_before, done.held_out_loss_after, score))
print(f"{'':<16} {'trained':>9}  held-out loss: before, after   exact answers")
for name, count, before, after, score in rows:
    print(f"{name:<16} {count:>9,}  {before:>13.2f} {after:>6.2f} {score:>18.0%}   {WHERE[name]}")

# %% [markdown]
# Virtual tokens change the model at once: their loss before the first step is not the base's. LoRA, adapters and IA3 begin as no
# change: the product of B = 0 and A is zero.
#
# 虚拟 token 一放上去就改变模型：第一步之前的损失已不是基座的损失。LoRA、Adapter、IA3 一开始什么也不改：B = 0，乘积为零。
#
# ## What LoRA's sizes mean
# ## LoRA 的大小

# %%
for rank in (2, 8, 32):
    plan = fitune.plan(MODEL, method="lora", lora={"rank": rank}, precision="fp32", max_length=32, gpu="8GB")
    print(f"rank {rank:>2}: {plan.trainable:>7,} parameters, {plan.trainable / plan.total:.2%} of the model")

# %% [markdown]
# ## The same on your GPU
# ## 在你的 GPU 上
#
# ```
# fitune methods --model Qwen/Qwen3-8B
# fitune train --model Qwen/Qwen3-8B --data my.jsonl --method prefix --output runs/prefix
# ```

# %%
for name in ("llama-3.2-1b", "qwen3-8b", "bloom-1b4-zh", "chatglm3-6b"):
    for method in ("prompt", "prefix", "adapter", "lora"):
        plan = fitune.plan(name, method=method, precision="bf16", batch_size=4, max_length=512, gpu="24GB", checkpointing=True)
        print(f"{name:<14} {method:<8} {plan.trainable:>12,} trained, {plan.needed / 2**30:>5.1f} GiB")
