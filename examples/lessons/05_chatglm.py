# %% [markdown]
# # 5. ChatGLM 1, 2, 3: prefix attention, two rows of positions, and what a sample is
# # 5. ChatGLM 1、2、3：前缀注意力、两行位置，以及一个样本是什么
#
# A small random ChatGLM-6B (its native classes, no remote code) with a tokenizer of a few words.
#
# 一个小的随机 ChatGLM-6B（原生类，不执行远程代码），配一个只有几个词的分词器。

# %%
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fitune
from fitune import show
from fitune.models.families.chatglm_model import ChatGLMConfig, ChatGLMForConditionalGeneration

WORK = Path(mkdtemp())
special = ["<pad>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<sop>", "[gMASK]", "[MASK]"]
special += ["sop", "<unk>"]
words = [f"x{n}" for n in range(1, 9)] + "hello hi there [ ] Round 0 1 2 ： : 问 答 \n . ? ,".split(" ")
table = {word: number for number, word in enumerate([*special, *words])}
made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eop>", pad_token="<pad>", unk_token="<unk>")
tokenizer.add_special_tokens({"additional_special_tokens": special[2:9]})
MODEL = WORK / "chatglm"
tokenizer.save_pretrained(MODEL)
config = ChatGLMConfig(
    vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_attention_heads=4, inner_hidden_size=64, max_sequence_length=64,
    bos_token_id=table["<sop>"], eos_token_id=table["<eop>"], mask_token_id=table["[MASK]"], gmask_token_id=table["[gMASK]"],
    pad_token_id=0,
)  # fmt: skip
ChatGLMForConditionalGeneration(config).save_pretrained(MODEL)

# %% [markdown]
# ## x1 x2 [MASK] x4 [MASK], filled in
#
# GLM (Du et al. 2022, arXiv:2103.10360) hides spans and writes them behind the text. Each token has two positions: the place (of
# the gap that it fills in) and the position inside its block. They are printed by the model itself.
#
# GLM（Du 等 2022，arXiv:2103.10360）把若干片段挖掉，在文本后面补写。每个 token 有两个位置：它所填的空在文中的位置，以及在自己块内的位置。
# 下面由模型自己打印。

# %%
row = {"prompt": "x1 x2 [MASK] x4 [MASK]", "completion": ["x3", "x5 x6"]}
positions = show.positions([row], model=MODEL, template="chatglm")
for name, values in zip(("place", "in block"), positions.rows, strict=True):
    print(f"{name:<9}", values)
positions

# %% [markdown]
# The prompt attends both ways (every token sees all of it), the answer only backwards: a prefix language model. Measured:
#
# 提示内部双向可见（每个 token 都看得到整个提示），回答只能向前看：这就是前缀语言模型。以下为实测：

# %%
attention = show.attention_mask([row], model=MODEL, template="chatglm")
print("causal:", attention.causal)
attention

# %% [markdown]
# ## Versions 1, 2 and 3: what a sample is
# ## 第 1、2、3 版：一个样本是什么
#
# Version 1 sees its prompt both ways, so an earlier answer inside a prompt would see what comes after it: each answer needs a
# sample of its own. Version 2 is causal, but its rounds are one text in which an earlier answer has no end: again a sample for
# each answer. Version 3 marks roles by single ids, with a line end first, and ends every answer: one sample has them all.
#
# 第 1 版的提示双向可见，提示里较早的回答会看到后面的内容，所以每个回答要有自己的样本。第 2 版是因果的，但它的各轮是一整段文本，较早的回答没有
# 结束符：仍然每个回答一个样本。第 3 版用单个 id 表示角色，正文以换行开头，每个回答都有结束：一个样本包含全部回答。

# %%
turns = {"messages": [
    {"role": "user", "content": "hello ?"}, {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "x1 ?"}, {"role": "assistant", "content": "x2"},
]}  # fmt: skip
for version in ("chatglm", "chatglm2", "chatglm3"):
    try:
        mask = show.mask([turns], model=MODEL, template=version, samples=4)
    except fitune.FituneError as error:
        print(version, error)
        continue
    trained = [sum(label != -100 for label in labels) for labels in mask.labels]
    print(f"{version}: {len(mask.ids)} sample(s), trained tokens {trained}")

# %%
show.mask([turns], model=MODEL, template="chatglm", samples=2)

# %% [markdown]
# ## Tools
# ## 工具
#
# In version 3 a call is an assistant's turn with the function's name, and what it gives back an `<|observation|>`.
# `fitune template THUDM/chatglm3-6b` prints roles, ids and stops, as `model.chat` builds them.
#
# 第 3 版里，一次调用是带函数名的 assistant 轮，返回值是 `<|observation|>`。`fitune template THUDM/chatglm3-6b` 会像 `model.chat` 那样打印
# 角色、id 与结束符。
#
# ## TaskType, remove_unused_columns, and other errors of these notebooks
# ## TaskType、remove_unused_columns 等常见错误
#
# `TaskType.CAUSAL_LM` missing: PEFT then wraps the model without `prepare_inputs_for_generation` and passes labels on wrongly.
# `remove_unused_columns=True`: the Trainer drops columns that the forward's signature does not name, and ends up with an empty
# batch. Neither can occur here: there is no Trainer, no columns are guessed, the batch holds ids, positions and bounds, and the
# label rows are the encoder's. LoRA trains and answers:
#
# 漏写 `TaskType.CAUSAL_LM`：PEFT 包装后没有 `prepare_inputs_for_generation`，标签也传错。`remove_unused_columns=True`：Trainer 会删掉 forward
# 签名里没有的列，批次变空。这里都不会发生：没有 Trainer，不猜列名，批次里只有 id、位置与边界，标签来自编码器。LoRA 能训练，也能回答：

# %%
rows = [{"prompt": "x1 x2 [MASK]", "completion": "x3"}, {"prompt": "hello ?", "completion": "hi there"}] * 12
done = fitune.train(
    model=MODEL, data=rows, template="chatglm", method="lora", lora={"targets": "all-linear"}, lr=2e-2, max_steps=80,
    batch_size=4, precision="fp32", sample_prompts=0, output=WORK / "run",
)  # fmt: skip
print(f"loss {done.first_loss:.2f} -> {done.last_loss:.2f}")
for question in ("x1 x2 [MASK]", "hello ?"):
    print(question, "->", fitune.generate(done.run, question))

# %% [markdown]
# ## The same on your GPU
# ## 在你的 GPU 上
#
# ```
# fitune train --model THUDM/chatglm3-6b --data my.jsonl --method lora --output runs/chatglm3
# ```

# %%
for name in ("chatglm3-6b", "llama-3.2-1b", "qwen3-8b", "bloom-1b4-zh"):
    for more in ({}, {"quant": "int8"}, {"quant": "nf4", "checkpointing": True}):
        plan = fitune.plan(name, method="lora", precision="bf16", batch_size=2, max_length=512, gpu="24GB", **more)
        print(f"{name:<14} {more.get('quant', 'bf16'):<5} {plan.needed / 2**30:>5.1f} GiB  {plan.trainable:,} trained")
