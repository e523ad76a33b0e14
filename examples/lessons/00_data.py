# %% [markdown]
# # 0. Data: from a question and an answer to what is trained
# # 0. 数据：从一问一答到训练的内容
#
# A row becomes token ids; some of them are *labels*, the rest is only read. Everything here runs on a laptop with the
# model that fitune brings along.
#
# 一行数据变成 token id；其中一部分是*标签*（要学的），其余只是被读到。本课全部在笔记本电脑上、用 fitune 自带的模型运行。

# %%
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import fitune
from fitune import show

BUNDLED = Path(str(files("fitune"))) / "bundled"
MODEL = BUNDLED / "model"
WORK = Path(mkdtemp())

# %% [markdown]
# ## The -100 row: `a b c d | e f g h <end>`
#
# Below each token stand its id and its label. A label of -100 is not trained. The orange line is the border: the answer's
# **first** token is the first label, and the token that ends the answer is the last one.
#
# 每个 token 下面是它的 id 和标签，-100 表示不训练。橙色线是边界：回答的**第一个** token 是第一个标签，结束回答的 token 是最后一个。

# %%
row = {"instruction": "a b c d", "output": "e f g h"}
mask = show.mask([row], model=MODEL)
mask

# %% [markdown]
# Many collators count the border one too early (`labels[: seq_len - 1] = -100`): then the model is also trained to write the
# prompt's last token, which it never has to write.
#
# 很多 collator 把边界算早了一位（`labels[: seq_len - 1] = -100`）：模型还会被训练去写提示的最后一个 token，而它从来不需要写它。

# %%
ids, labels = mask.ids[0], mask.labels[0]
border = next(n for n, label in enumerate(labels) if label != -100)
early = [-100] * (border - 1) + ids[border - 1 :]
tokenizer = fitune.load(MODEL).tokenizer
print("right:", tokenizer.convert_ids_to_tokens([i for i in labels if i != -100]))
print("early:", tokenizer.convert_ids_to_tokens([i for i in early if i != -100]))

# %% [markdown]
# ## The end is an id, not a text
#
# A user may type the text of a stop token. It stays text: the row below has one end, at its end.
#
# 用户可能会输入结束符的文字。它仍然是文字：下面这一行只有一个结束符，在最后。

# %%
typed = show.mask([{"instruction": "what does <|end|> mean?", "output": "a sign"}], model=MODEL)
end = tokenizer.convert_tokens_to_ids("<|end|>")
print("ends that are trained:", typed.labels[0].count(end))
typed

# %% [markdown]
# Where the pad token is the EOS token, a collator that masks *by id* (`labels[ids == pad] = -100`) masks the real end too: the
# model never learns to stop (lesson 4 shows it). fitune masks by position.
#
# 如果填充符就是结束符，*按 id* 掩码的 collator（`labels[ids == pad] = -100`）会把真正的结束符也掩掉，模型学不会停（第 4 课会看到）。
# fitune 按位置掩码。

# %%
by_id = [-100 if number == end else label for number, label in zip(ids, labels, strict=True)]
print("ends trained, by position:", labels.count(end), "   by id:", by_id.count(end))

# %% [markdown]
# ## Padding, and a flat batch
#
# Rows of a padded batch are as long as the longest. fitune lays them one after the other: nothing is padded, positions begin
# anew in each row, and no row sees another one. The picture is measured: each token's embedding is replaced in turn.
#
# 填充的批次里每行都和最长的一样长。fitune 把各行首尾相接：没有填充，每行的位置从头开始，行与行互相看不见。这张图是量出来的：
# 逐个替换 token 的嵌入。

# %%
short, long = {"instruction": "1 + 1?", "output": "2"}, {"instruction": "Who is the king?", "output": "Mira of Norland"}
seen = show.attention_mask([short, long], model=MODEL)
print("rows are apart:", seen.apart, "  no token sees a later one:", seen.causal)
seen

# %%
show.positions([short, long], model=MODEL)

# %% [markdown]
# ## Lengths, and what a limit cuts
#
# Conversations of one to six questions: a few long rows decide how much padding wastes, and what a `max_length` cuts.
# "Mean x 1.5" is a rule that people use; here is what it would cut.
#
# 一到六个问题的对话：少数长行决定了填充浪费多少，以及 `max_length` 会截掉什么。“平均值 x 1.5”是常用的经验做法，这里是它会截掉的部分。

# %%
import json

lines = [json.loads(line)["messages"] for line in (BUNDLED / "data" / "train.jsonl").read_text("utf-8").splitlines()]
turns = [1, 1, 1, 2, 1, 1, 6, 1, 2, 3]
rows, at = [], 0
while at + 6 < len(lines):
    count = turns[len(rows) % len(turns)]
    rows.append({"messages": [message for some in lines[at : at + count] for message in some]})
    at += count
look = fitune.inspect(rows, model=MODEL, samples=0)
print({name: round(value) for name, value in look.lengths.items()})
for size, share in look.padding_wasted.items():
    print(f"padding in batches of {size}: {share:.0%} of the work is for nothing")
mean = round(1.5 * look.lengths["mean"])
cut = fitune.inspect(rows, model=MODEL, samples=0, max_length=mean).length_choices[0]
print(f"mean x 1.5 = {mean} tokens: {cut.cut:.0%} of the rows are cut, {cut.lose_answer:.0%} lose of an answer")
for choice in look.length_choices:
    print(f"{choice.name:<14} {choice.max_length:>4} tokens  {choice.cut:>5.1%} cut, {choice.lose_answer:>5.1%} lose of an answer")

# %% [markdown]
# ## Two kinds of tokenizer
#
# Byte-level BPE knows bytes: what is frequent becomes one token of **several characters**, what is rare stays **several tokens
# of one character**. SentencePiece begins with characters. Both are trained here on the same few sentences.
#
# 字节级 BPE 从字节出发：常见的合成**一个 token 多个字**，罕见的是**一个字多个 token**。SentencePiece 从字符出发。这里用同样的几句话各训练一个。

# %%
import io

import sentencepiece
from tokenizers import ByteLevelBPETokenizer

texts = [m["content"] for row in rows for m in row["messages"]]
bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator(texts, vocab_size=700, show_progress=False)
buffer = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=buffer, vocab_size=700, model_type="bpe", minloglevel=2,
    hard_vocab_limit=False, character_coverage=0.98, byte_fallback=True,
)  # fmt: skip
piece = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
text = "岛湾国的首都是哪里？鑫"
print(f"{'':<14} tokens of {text!r}")
print(f"{'byte-level BPE':<14} {len(bpe.encode(text).ids):>3}:", [bpe.decode([i]) for i in bpe.encode(text).ids])
print(f"{'SentencePiece':<14} {len(piece.encode(text)):>3}:", piece.encode(text, out_type=str))
print("鑫 alone:", len(bpe.encode("鑫").ids), "tokens by bytes,", len(piece.encode("鑫")) - 1, "by SentencePiece with byte fallback")

# %% [markdown]
# ## The same on your GPU
# ## 在你的 GPU 上
#
# ```
# fitune inspect my.jsonl --model Qwen/Qwen3-8B --samples 3
# fitune template Qwen/Qwen3-8B
# ```
# `inspect` counts and shows every row as a run would take it, before anything is trained, for every model: Llama-3.2-1B,
# Qwen3-8B, bloom-1b4-zh, chatglm3-6b.
