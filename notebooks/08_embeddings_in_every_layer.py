# %% [markdown]
# # 8. Embeddings in every layer
#
# **E2B has 4.6 billion weights and is named after two. Where are the others, and what else makes it small enough for a phone?**
#
# Four things set E2B and E4B apart from the larger models: every layer has its own small embedding of each token; the upper layers have
# no keys and values; where they save these, E2B makes the feed-forward network twice as wide; and the drafter looks at only a part of
# the vocabulary. This notebook goes through them on a second small model, `built-in:e2b`, trained on the same text as the first
# ([model card](../refimpl/tiny/README.md)).

# %%
import numpy as np

import refimpl
from refimpl.decode import draft_length
from refimpl.lab.compare import known_bugs
from refimpl.lab.explain import attention_maps, cache_memory, drafting, experts, per_layer
from refimpl.lab.explain.show import source, table, visible
from refimpl.model import drafter, gemma4
from refimpl.tiny import groups
from refimpl.tiny.corpus import read_corpus

model = refimpl.load("built-in:e2b", threads=1)
print(model)

# %% [markdown]
# ## A table that is not read
#
# The published E2B by its parts, in the types of Google's Q4_0 file. Of the largest part a token reads one row:

# %%
parts = per_layer.parts_of("E2B")
per_layer.parts_picture(parts)

# %%
table(["part", "weights, billions", "in the file, GB", "a token reads, GB"],
      [[part, f"{n / 1e9:.2f}", f"{n_bytes / 1e9:.3f}", f"{read / 1e9:.6f}"] for part, (n, n_bytes, read) in parts.items()]
      + [["all", *(f"{sum(part[i] for part in parts.values()) / 1e9:.2f}" for i in range(3))]])

# %% [markdown]
# So half of the weights cost memory that may be slow (a phone's flash is enough), and next to no time.
#
# ## What a layer does with it
#
# The row of a token $t$ is cut into $L$ pieces $e_l$ of width $P$, one for each layer. A projection of the usual embedding $x_0$ is added:
#
# $$ p_l = \tfrac{1}{\sqrt 2} \Bigl( \operatorname{norm}\bigl(\tfrac{1}{\sqrt D} W_l \, x_0\bigr) + \sqrt P \, e_l[t] \Bigr) \qquad
# x \leftarrow x + \operatorname{norm}\bigl(W_o \, (\operatorname{gelu}(W_g \, x) \odot p_l)\bigr) $$
#
# On the left it depends on the token alone; on the right the state decides, number by number, how much of it gets in. There is no paper
# on it; the formula is that of transformers' `Gemma4TextModel` and `Gemma4TextDecoderLayer` (the idea came with Gemma 3n).

# %%
source(gemma4.per_layer_inputs, gemma4.per_layer_embedding)

# %% [markdown]
# Does the trained model use it? How large it is says nothing, because it passes a norm like all that a layer adds. So it is made zero
# while the model reads modules that it was not trained on: all of it, one of its two inputs, or one layer's. What is lost:

# %%
source(per_layer.erase)

# %% tags=["text"]
texts = [experts.passage(model, text, 256).ids for text in read_corpus().heldout.values() if len(text) > 6000][:12]
layers = range(model.config.n_layer)
whole = per_layer.bits_per_token(model, texts)
erased = {"without any of it": [f"per_layer_embd_out-{i}" for i in layers], "without the table": ["inp_per_layer_selected"],
          "without the projection": ["per_layer_proj"], **{f"layer {i} without it": [f"per_layer_embd_out-{i}"] for i in layers}}
per_layer.costs_picture({what: per_layer.bits_per_token(model, texts, per_layer.erase(values)) for what, values in erased.items()}, whole)

# %% [markdown]
# (The model was never trained without it, so this is what it relies on, and not what a model would be that had learned to do without.)
#
# What does the table know? For a few tokens, those with the most similar rows: in the embedding, which has learnt for long, and in the
# pieces of three layers. In this short training the table has hardly begun: rows of rare tokens are still as random as at the start.

# %%
table_VLP = per_layer.per_layer_table(model)
embedding_VD = model.weights.embedding_VD.take(np.arange(model.config.n_vocab))
rows = []
for word in ("def ", "self", "if ", "None", "0", "append"):
    token = model.tokenizer.encode(word, bos=False)[0]
    near = [per_layer.neighbours(part_VP, token, 3) for part_VP in (embedding_VD, *(table_VLP[:, i] for i in (0, 3, 7)))]
    rows.append([f"`{visible(word)}`", *(" ".join(f"`{visible(model.tokenizer.decode([i], special=True))}`" for i in ids) for ids in near)])
table(["token", "in the embedding", "in layer 0", "in layer 3", "in layer 7"], rows)

# %% [markdown]
# ## Keys and values of another layer
#
# The upper layers make queries only. Sliding ones read the keys and values of the last sliding layer below, full ones those of
# the last full layer (the idea: Brandon et al. 2024, arXiv:2405.12981, section 2):

# %%
cache_memory.layers_picture({"built-in:e2b": model.config, "E2B": cache_memory.true_config("E2B")})

# %%
table(["model", "context", *cache_memory.savings(model.config, 1, 5)],
      [[name, f"{config.n_ctx:,}", *(f"{n_bytes / 1e6:.2f} MB" for n_bytes in cache_memory.savings(config, config.n_ctx, 5).values())]
       for name, config in (("built-in:e2b", model.config), ("E2B", cache_memory.true_config("E2B")))])

# %% [markdown]
# The keys are the same, but each layer has its own queries, and so looks elsewhere. One token in the four layers that read the keys
# of layer 2 (the donor itself first):

# %%
code = "def total(prices, tax):\n    result = 0\n    for price in prices:\n        result += price\n    return result"
ids = model.tokenizer.encode(code)
tokens = [visible(model.tokenizer.decode([i], special=True)) for i in ids]
maps = attention_maps.attention_maps(model, ids)
readers = [layer.index for layer in model.config.layers if layer.kv_from == 2]
per_layer.shared_picture(maps, len(ids) - 1, tokens, readers)

# %% [markdown]
# Which layer they read matters: this is what becomes of the text if they read those of the *first* sliding and full layer, a bug that
# engines had.

# %% tags=["text"]
with known_bugs.inject(known_bugs.BUGS["keys shared from the wrong layer"]):
    wrong = refimpl.load("built-in:e2b", threads=1)
table(["bits per token", "as trained", "keys of the first layer of the kind"],
      [["", f"{whole:.3f}", f"{per_layer.bits_per_token(wrong, texts):.3f}"]])

# %% [markdown]
# There is one more saving. Of a prompt, only the keys and values are needed later, and the state of the last token. Above the last layer
# with its own keys, nothing of the other tokens is ever read: an engine may stop there for all tokens of the prompt but the last. (This
# one does not: it computes the states of all rows, which `eval` and `compare` show.)
#
# ## Twice as wide
#
# Layers without keys and values have fewer weights. E2B gives them a feed-forward network of twice the width:

# %%
table(["layer", *layers], [
    ["reads the keys of layer", *(layer.kv_from for layer in model.config.layers)],
    ["feed-forward width", *(layer.ffn.n_ff for layer in model.config.layers)],
    ["E2B's layers of this kind", *(cache_memory.true_config("E2B").layers[0 if layer.has_own_kv else -1].ffn.n_ff
                                    for layer in model.config.layers)]])

# %% [markdown]
# ## A drafter that reads a part of the vocabulary
#
# The drafter of E2B has a width of 256, and its head, with a row for each of 262,144 tokens, would be most of what a step reads. So its
# vocabulary is cut into 2,048 groups. Each has a *centroid*; the drafter scores the centroids and computes the logits of the tokens in
# the best 32 groups only.

# %%
source(drafter.CentroidHead, drafter.candidates)

# %%
small = refimpl.load_drafter(None, model)
head = small.weights.head
n_group, n_each = head.token_ZV.shape
table(["drafter of", "groups", "tokens in each", "groups looked into", "rows read", "of a whole head's"],
      [["built-in:e2b", n_group, n_each, head.n_top, (n := n_group + head.n_top * n_each), f"{n / (n_group * n_each):.0%}"],
       ["E2B", 2048, 128, 32, 2048 + 32 * 128, f"{(2048 + 32 * 128) / 262144:.1%}"]])

# %% [markdown]
# How Google made its groups is not published. In the drafter of `built-in:e2b`, tokens whose rows of the head point the same way are a
# group (k-means, all groups of one size):

# %%
source(groups.balanced_groups)

# %%
group_V = np.empty(n_group * n_each, int)
group_V[head.token_ZV] = np.arange(n_group)[:, None]
for name in (")", "0", "the ", "get_", "Error"):
    group = head.token_ZV[group_V[model.tokenizer.encode(name, bos=False)[0]]]
    print(f"{visible(name):8}", " ".join(visible(model.tokenizer.decode([int(i)], special=True)) for i in group[:14]))

# %% [markdown]
# Each line is the beginning of the group that a token is in; nobody told k-means what a bracket, a digit or a prefix is. The mean of a
# group's rows would do as a centroid. But what a centroid is for is to have a high score where its group has the token that the whole head
# would take, and this can be trained, with the drafter fixed:

# %%
source("refimpl.tiny.training.centroids.train_centroids", per_layer.with_groups)

# %% [markdown]
# How often is that token in a group that is looked into? The rank of its group among the scores, for means and for the trained centroids of
# the file:

# %% tags=["text"]
whole_head = refimpl.load_drafter(None, model, head="dense")
heads = {"means": per_layer.with_groups(whole_head, group_V, head.n_top), "trained": small}
z_TD = np.concatenate([per_layer.draft_states(model, small, ids) for ids in texts[:3]])
ranks = {name: per_layer.group_ranks(which, z_TD) for name, which in heads.items()}
per_layer.ranks_picture(ranks, n_group, head.n_top)

# %% tags=["text"]
three = draft_length.FixedDraftLength(3)
runs = {name: [drafting.run(model, ids[:96], 64, which, three) for ids in texts[:6]]
        for name, which in (heads | {"whole head": whole_head}).items()}
chances = {name: drafting.acceptance([r for run in made for r in run.rounds], 3)[0] for name, made in runs.items()}
table(["head", "first accepted", "first two", "all three", "texts equal"],
      [[name, *(f"{chance:.0%}" for chance in accepted), all(a.ids == b.ids for a, b in zip(runs[name], runs["whole head"]))]
       for name, accepted in chances.items()])

# %% [markdown]
# A token that is missed is a draft token less, and never a wrong text: the target decides.

# %% [markdown]
# ## Exercises
#
# **1. The wrong piece.** Let every layer read the piece of the next one, a bug that engines had. Predict whether that costs less or more
# than having none. Then:
#
# ```python
# with known_bugs.inject(known_bugs.BUGS["per-layer input of the next layer"]):
#     shifted = per_layer.bits_per_token(model, texts)
# round(whole, 2), round(shifted, 2), round(per_layer.bits_per_token(model, texts, per_layer.erase(erased["without any of it"])), 2)
# ```
#
# <details><summary>Answer</summary>
#
# More: 6.61 bits a token, 5.85 without any, 4.28 as trained. Wrong words are worse than none. (A comparison of the tensors finds it at
# once: puzzle 7 of notebook 9.)
#
# </details>
#
# **2. E4B.** In E4B 18 of 42 layers share. Predict what part of its cache that saves at 131,072 tokens. Then:
#
# ```python
# _, windows, shared = cache_memory.savings(cache_memory.true_config("E4B"), 131_072, 5).values()
# 1 - shared / windows
# ```
#
# <details><summary>Answer</summary>
#
# 43 %, which is 18 of 42: all layers of a kind take the same, and both kinds share in the same proportion.
#
# </details>
#
# **3. Fewer groups.** The drafter looks into 8 of 64 groups. Predict how often the token is there if it looks into 1, 4 and 16, and where
# the training of the centroids helps most. Then:
#
# ```python
# {name: [round(float((rank_T < n).mean()), 2) for n in (1, 4, 8, 16)] for name, rank_T in ranks.items()}
# ```
#
# <details><summary>Answer</summary>
#
# Means: 0.42, 0.79 and 0.98, and 0.92 with 8. Trained: 0.61, 0.87 and 0.99, and 0.94 with 8. It helps most where few groups are looked
# into; with a quarter of them nearly every way to score is good enough.
#
# </details>
