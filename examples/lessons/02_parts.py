# %% [markdown]
# # 2. Tuning all, a part, or layers that are added; BitFit
# # 2. 全量微调、部分微调、尾部加层与 BitFit
#
# What is trained decides memory, time and what can be learned. Here each way trains the same rows with the same steps.
#
# 训练哪些参数，决定了显存、时间和能学到什么。这里每种办法用同样的数据、同样的步数。

# %%
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

import fitune

BUNDLED = Path(str(files("fitune"))) / "bundled"
MODEL, DATA = BUNDLED / "model", BUNDLED / "data"
WORK = Path(mkdtemp())
COMMON = {"precision": "fp32", "max_steps": 60, "batch_size": 8, "sample_prompts": 0, "eval_data": str(DATA / "held_out.jsonl")}


def train(name, model=MODEL, **settings):
    done = fitune.train(model=model, data=str(DATA / "train.jsonl"), output=WORK / name, **{**COMMON, **settings})
    share = done.trainable_parameters / done.total_parameters
    print(f"{name:<16} {done.trainable_parameters:>9,} of {done.total_parameters:,} ({share:>6.2%})   "
          f"held-out loss {done.base_held_out_loss:.2f} -> {done.held_out_loss_after:.2f}")  # fmt: skip
    return done


# %% [markdown]
# ## Freezing layers: what is trained, as the notes print it
# ## 冻结层：逐个打印哪些参数参与训练

# %%
frozen = fitune.load_model(MODEL)
from fitune.core.config import build
from fitune.models import adapters

tuned = adapters.attach(frozen, build({"model": "m", "data": ["d"], "method": "freeze", "freeze": {"blocks": 1}}))
for name, parameter in tuned.named_parameters():
    if "layers.3" in name or "layers.2.mlp" in name or "embed" in name or (name.endswith("norm.weight") and "layers" not in name):
        print(f"{name:<55} {tuple(parameter.shape)!s:<14} {parameter.numel():>9,} {'trained' if parameter.requires_grad else 'frozen'}")
by_layer = {}
for name, parameter in tuned.named_parameters():
    where = f"layer {name.split('layers.')[1].split('.')[0]}" if "layers." in name else "outside"
    trained, total = by_layer.get(where, (0, 0))
    by_layer[where] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())
print({where: f"{trained:,} of {total:,}" for where, (trained, total) in by_layer.items()})

# %% [markdown]
# ## All, a part, added layers
# ## 全部、部分、加层
#
# `tail` adds blocks behind the last one. They begin as no change at all (their output layers are zero), so training starts
# exactly at the base model: the same loss before the first step.
#
# `tail` 在最后一层之后加层。它们一开始什么也不改（输出层为零），所以训练正好从基座模型出发：第一步之前损失相同。

# %%
results = {
    "full": train("full", method="full", lr=1e-3),
    "freeze 1 block": train("freeze", method="freeze", lr=2e-3),
    "tail 1 block": train("tail", method="tail", lr=2e-3),
}
tail = results["tail 1 block"]
print(f"tail begins at the base: {tail.base_held_out_loss:.4f} and {tail.held_out_loss_before:.4f}")

# %% [markdown]
# ## BitFit, on a model that has biases
# ## BitFit，用一个有偏置的模型
#
# Llama's layers have no biases, so plain BitFit has nothing to train there, and fitune says so. BLOOM's layers have them
# (Ben Zaken et al. 2021, arXiv:2106.10199): under one percent of the parameters.
#
# Llama 的线性层没有偏置，普通 BitFit 无从下手，fitune 会直接说明。BLOOM 有偏置（Ben Zaken 等 2021，arXiv:2106.10199）：不到百分之一的参数。

# %%
try:
    train("bitfit-llama", method="bitfit")
except fitune.FituneError as error:
    print(error)
torch.manual_seed(0)
bloom = BloomForCausalLM(BloomConfig(vocab_size=1792, hidden_size=192, n_layer=4, n_head=6))
bloom.save_pretrained(WORK / "bloom")
AutoTokenizer.from_pretrained(MODEL).save_pretrained(WORK / "bloom")
train("bitfit", model=WORK / "bloom", method="bitfit", lr=1e-2)
names = [name for name, _ in bloom.named_parameters() if name.endswith("bias")]
print(len(names), "biases, such as", ", ".join(names[2:6]))

# %% [markdown]
# ## When is full tuning worth it?
# ## 什么时候值得全量微调？
#
# Tokens beside parameters, the machine, and how far the domain is. `fitune.advise` weighs them for your data and says why.
#
# 看 token 数与参数量之比、机器、领域差多远。`fitune.advise` 针对你的数据权衡并说明理由。

# %%
for name, data in (("llama-3.2-1b", str(DATA / "train.jsonl")),):
    found = fitune.advise(name, data=data, gpu="24GB", tokenizer=MODEL, only_best=True)
    print(found.suggestions[0].name)
    for one in found.advice:
        print(f"- {one.about}: {one.text}")

# %% [markdown]
# ## The same on your GPU
# ## 在你的 GPU 上
#
# ```
# fitune train --model meta-llama/Llama-3.2-1B --data my.jsonl --method freeze --freeze.blocks 2 --output runs/freeze
# fitune train --model Langboat/bloom-1b4-zh --data my.jsonl --method bitfit --output runs/bitfit
# fitune train --model Qwen/Qwen3-8B --data my.jsonl --fit --output runs/fits      # the best that fits, chosen by plan
# ```

# %%
for name, method in (("llama-3.2-1b", "freeze"), ("bloom-1b4-zh", "bitfit"), ("qwen3-8b", "tail"), ("chatglm3-6b", "freeze")):
    plan = fitune.plan(name, method=method, precision="bf16", batch_size=4, max_length=512, gpu="24GB", checkpointing=True)
    print(f"{name:<14} {method:<7} {plan.trainable:>13,} trained, {plan.needed / 2**30:>5.1f} GiB")
