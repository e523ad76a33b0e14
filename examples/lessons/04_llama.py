# %% [markdown]
# # 4. Llama in 16 bits: LoRA, and the pitfalls around it
# # 4. 16 位的 Llama：LoRA 与周边的坑
#
# Each pitfall is shown as it bites in a plain loop, and how it is closed in fitune.
#
# 每个坑先在普通训练循环里让它发生，再看 fitune 怎样从根上关掉它。

# %%
import json
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import fitune
from fitune import show

BUNDLED = Path(str(files("fitune"))) / "bundled"
MODEL, DATA = BUNDLED / "model", BUNDLED / "data"
WORK = Path(mkdtemp())

# %% [markdown]
# ## 851,968 of 1,236,666,368, and where 6.8 GB and 6 GB come from
# ## 851,968 / 1,236,666,368，以及 6.8 GB 与 6 GB 从哪里来
#
# LoRA of rank 8 on q and v of Llama-3.2-1B. How much it takes depends on the length, not on the rule that one remembers: the
# plan shows which length gives which figure.
#
# 秩为 8、加在 q 与 v 上。占多少取决于长度，而不是记住的某个公式：规划给出哪个长度对应哪个数字。

# %%
for length in (128, 256, 512, 768, 1024):
    plan = fitune.plan("llama-3.2-1b", method="lora", precision="bf16", batch_size=8, max_length=length, gpu="24GB")
    print(f"{length:>5} tokens: {plan.needed / 1e9:>5.2f} GB")
print(f"{plan.trainable:,} of {plan.total:,} parameters are trained ({plan.trainable / plan.total:.4%})")

# %% [markdown]
# ## pad = EOS: a model that never stops
# ## pad = EOS：停不下来的模型
#
# Llama has no pad token, so people write `tokenizer.pad_token = tokenizer.eos_token` and mask labels where the id is the pad:
# the real EOS is masked with it. The base model of this lesson has forgotten its end token, as one that never saw a chat.
#
# Llama 没有填充符，很多人写 `tokenizer.pad_token = tokenizer.eos_token`，再按 id 掩掉填充处的标签：真正的 EOS 也一起被掩掉了。
# 本课的基座模型忘掉了结束符，就像没见过对话的基座模型一样。

# %%
rows = [json.loads(line)["messages"] for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()][:64]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
end = tokenizer.convert_tokens_to_ids("<|end|>")
mask = show.mask([{"messages": row} for row in rows], model=MODEL, samples=len(rows))


def plain_loop(masked_by_id):
    """A plain loop over the same labels; masked_by_id: those whose id is the pad's, which is EOS, are -100."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.get_input_embeddings().weight.data[end].normal_(std=0.02)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(60):
        chosen = range(step * 8 % 64, step * 8 % 64 + 8)
        loss = 0.0
        for n in chosen:
            ids, labels = torch.tensor([mask.ids[n]]), torch.tensor(mask.labels[n])
            if masked_by_id:
                labels[ids[0] == end] = -100
            loss = loss + cross_entropy(model(ids).logits[0, :-1], labels[1:], ignore_index=-100) / 8
        loss.backward()
        adam.step()
        adam.zero_grad()
    model.generation_config.eos_token_id = end
    asked = torch.tensor([mask.ids[0][: mask.labels[0].index(next(i for i in mask.labels[0] if i != -100))]])
    answer = model.generate(asked, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, asked.shape[1] :]
    return answer


for name, by_id in (("masked by id", True), ("masked by position", False)):
    answer = plain_loop(by_id)
    stops = "stops" if end in answer else "never stops"
    print(f"{name:<19} {len(answer):>3} tokens, {stops}: {tokenizer.decode(answer)[:70]!r}")

# %% [markdown]
# fitune masks by position, stops by id, and checks both before the first step (`eos-trained`, `answers-whole`).
#
# fitune 按位置掩码、按 id 停止，并在第一步之前检查这两点（`eos-trained`、`answers-whole`）。
#
# ## `enable_input_require_grads`
#
# Frozen embeddings give hidden states without gradient. Reentrant checkpointing then drops the whole graph: LoRA's gradients are
# None, and the loss stays where it is.
#
# 冻结的嵌入给出不带梯度的隐藏状态。可重入的检查点因此丢掉整张图：LoRA 的梯度是 None，损失不动。

# %%
from torch.utils.checkpoint import checkpoint

frozen_embedding, lora = torch.nn.Embedding(100, 8).requires_grad_(False), torch.nn.Linear(8, 8)
for what, reentrant, asks in (
    ("reentrant", True, False),
    ("reentrant, with enable_input_require_grads", True, True),
    ("without reentrance, as in fitune", False, False),
):
    hidden = frozen_embedding(torch.arange(4))
    if asks:
        hidden.requires_grad_()
    lora.weight.grad = None
    out = checkpoint(lora, hidden, use_reentrant=reentrant)
    if out.requires_grad:
        out.sum().backward()
    print(f"{what:<45} gradient of the trained layer: {'there' if lora.weight.grad is not None else None}")

# %% [markdown]
# fitune checkpoints without reentrance, so it cannot happen, and `grad-reaches` proves it before step 1.
#
# fitune 使用非重入的检查点，这种情况不会发生；`grad-reaches` 在第一步之前证明这一点。
#
# ## float16 and epsilon 1e-8
# ## float16 与 1e-8
#
# Adam divides by sqrt(v) + epsilon. In float16, 1e-8 is zero: where a gradient is zero, 0 / 0 is NaN. 1e-5 is there; whether it is
# enough depends on v: squares of gradients below 2.4e-4 are zero in float16 too.
#
# Adam 除以 sqrt(v) + epsilon。在 float16 里 1e-8 就是 0：梯度为零处是 0 / 0，即 NaN。1e-5 存得下；够不够还要看 v：小于 2.4e-4 的梯度，
# 平方在 float16 里也是零。

# %%
print("1e-8 in float16:", torch.tensor(1e-8).half().item(), "   1e-5:", torch.tensor(1e-5).half().item())
for epsilon in (1e-8, 1e-5):
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    adam = torch.optim.AdamW([weight], lr=1e-3, eps=epsilon, weight_decay=0.0, foreach=False)
    weight.grad = torch.tensor([0.0, 1e-4, 1e-2], dtype=torch.float16)
    adam.step()
    print(f"epsilon {epsilon:g}: weights after a step {weight.tolist()}")
try:
    fitune.train(
        model=MODEL, data=str(DATA / "train.jsonl"), output=WORK / "fp16", precision="fp16", method="lora", max_steps=2,
        trainable_dtype="fp16", adam_epsilon=1e-8,
    )  # fmt: skip
except fitune.FituneError as error:
    print(error)

# %% [markdown]
# By default what is trained stays in float32 (master weights), whatever the model computes in: then 1e-8 is no problem, and small
# updates are not lost. bf16 keeps float32's range, so it needs no loss scale.
#
# 默认情况下，无论模型用什么精度计算，训练的参数都保留在 float32（主权重）：1e-8 不成问题，小的更新也不会丢。bf16 的范围与 float32 相同，
# 不需要损失缩放。

# %%
for precision in ("fp32", "bf16", "fp16"):
    done = fitune.train(
        model=MODEL, data=str(DATA / "train.jsonl"), output=WORK / precision, precision=precision, method="lora", lr=1e-2,
        max_steps=20, batch_size=8, sample_prompts=0,
    )  # fmt: skip
    print(f"{precision}: loss {done.first_loss:.2f} -> {done.last_loss:.2f}")

# %% [markdown]
# ## The same on your GPU
# ## 在你的 GPU 上
#
# ```
# fitune train --model meta-llama/Llama-3.2-1B --data my.jsonl --method lora --precision bf16 --output runs/llama
# ```

# %%
for name in ("llama-3.2-1b", "qwen3-8b", "bloom-1b4-zh", "chatglm3-6b"):
    plan = fitune.plan(name, method="lora", precision="bf16", batch_size=4, max_length=512, gpu="24GB")
    print(f"{name:<14} {plan.trainable:>10,} of {plan.total:,} trained, {plan.needed / 2**30:.1f} GiB")
