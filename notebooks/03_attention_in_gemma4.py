# %% [markdown]
# # 3. Attention in Gemma 4
#
# **How can a model look back over 262,144 tokens when the keys and values of each of them take memory in every layer?**
#
# Gemma 4's answer has four parts: most layers see only a window of the latest tokens; in the few layers that see everything, three
# quarters of each head do not turn with the position; those layers use their keys as values; and in the two smallest models the later
# layers keep no keys and values at all. This notebook goes through them, counts the bytes, and ends with what the heads of a small
# trained model look at.

# %%
import numpy as np

import refimpl
from refimpl.files.synth import SHAPES
from refimpl.lab.explain import attention_maps, cache_memory
from refimpl.lab.explain.show import source, table
from refimpl.loading import hf_names
from refimpl.model import blocks, cache, gemma4
from refimpl.reference import attention, ops

# %% [markdown]
# ## Attention
#
# Every token $t$ has a query $q_t$. Every token $s$ has a key $k_s$ and a value $v_s$. A score says how well query and key match, the
# softmax turns the scores of one query into weights that sum to 1, and the output is the weighted mean of the values:
#
# $$ a_{ts} = \frac{e^{q_t \cdot k_s}}{\sum_{u \in \text{sight}(t)} e^{q_t \cdot k_u}} \qquad
# o_t = \sum_{s \in \text{sight}(t)} a_{ts} v_s $$
#
# This is Vaswani et al. 2017 (arXiv:1706.03762, section 3.2.1) with two differences. Gemma 4 does not divide the scores by the square
# root of the head's width, because it normalises queries and keys before. And several query heads share one head of keys and values
# (Ainslie et al. 2023, arXiv:2305.13245, section 2.2), which makes the cache smaller by that factor.
#
# The reference computes it one query at a time. `first_T` and `end_T` say what a query sees; that is all there is to a mask.

# %%
source(attention.attend)

# %% [markdown]
# ## Sliding layers and full layers
#
# In a **sliding** layer a token sees itself and the tokens just before it, 512 or 1,024 in all (Beltagy et al. 2020,
# arXiv:2004.05150, section 3.1). In a **full** layer it sees everything. Information from far back still reaches every later layer: a
# full layer writes it into the residual stream, which all layers read. Gemma 3 used the same mixture (arXiv:2503.19786, section 2).

# %%
models = {name: cache_memory.true_config(name) for name in SHAPES}
cache_memory.layers_picture(models)

# %% [markdown]
# One square is one layer. The last layer of every model is full. In E2B and E4B the outlined layers have no keys and values of their
# own: they read those of the last filled layer of the same colour before them (the idea of Brandon et al. 2024, arXiv:2405.12981,
# section 2, where neighbouring layers share).

# %%
table(["model", "layers", "full", "with own keys and values", "window", "context"],
      [[name, len(config.layers), sum(layer.window is None for layer in config.layers),
        sum(layer.has_own_kv for layer in config.layers), config.layers[0].window, f"{config.n_ctx:,}"] for name, config in models.items()])

# %% [markdown]
# ## Rotation, and the pairs that stand still
#
# The score $q \cdot k$ alone does not know how far apart the two tokens are. Rotary position embedding (RoPE; Su et al. 2021,
# arXiv:2104.09864, section 3.2) takes the numbers of a head in pairs and turns pair $r$ of the token at position $p$ by the angle
#
# $$ \alpha_r(p) = p \cdot \theta_r, \qquad \theta_r = \text{base}^{-2r/H} $$
#
# where $H$ is the width of the head. Turning both vectors of a pair by the same angle changes nothing in their product, so the score
# depends on the distance between the tokens, and not on where they are.

# %%
source(ops.rope_frequencies, ops.rope_angles, ops.rotate)

# %% [markdown]
# Sliding layers of the published models turn all 128 pairs of their 256-wide heads. Full layers have 512-wide heads, and of their 256
# pairs only the first 64, the fastest, turn: transformers calls this "proportional" RoPE, and the GGUF file says it with a divisor of
# 1e30 for the others (`rope_freqs.weight`). Barbero et al. 2024 (arXiv:2410.06205, section 6) give the reason: in a long context the
# slow pairs, which carry what a token is about, would come out of step; those that stand still compare two tokens in the same way at
# any distance.

# %%
source(hf_names.rope_divisors)

# %%
divisors = hf_names.rope_divisors(512, 0.25)
frequencies = {"sliding layers: 128 pairs, base 10,000": ops.rope_frequencies(256, 1e4, np.ones(128)),
               "full layers: 256 pairs, base 1,000,000": ops.rope_frequencies(512, 1e6, divisors)}
attention_maps.turns_picture(frequencies, 512)

# %% [markdown]
# Each row is a pair; a change from red to blue and back is one turn. At the bottom the pairs turn every few positions; further up
# they turn more slowly. On the right everything from pair 64 on is still: the angle is 0 and its cosine 1 at every position.

# %%
attention_maps.periods_picture(frequencies, {"window of 1,024": 1024, "context of 262,144": 262_144})

# %%
table(["", "pairs", "that turn", "slowest turn, positions"],
      [[name.split(":")[0], len(f), int((f > 1e-20).sum()), f"{2 * np.pi / f[f > 1e-20].min():,.0f}"] for name, f in frequencies.items()])

# %% [markdown]
# Is it true that only the distance counts? Below, one random query and one random key are put at every pair of 200 positions and
# turned. The scores of equal distance (the diagonals of the matrix) should be equal.

# %%
rng = np.random.default_rng(0)
query_1NH, key_1NH = rng.standard_normal((2, 1, 1, 512), np.float32)
angles = ops.rope_angles(np.arange(200), frequencies["full layers: 256 pairs, base 1,000,000"])
score_TS = np.einsum("TNH,SNH->TS", *(ops.rotate(np.repeat(x, 200, axis=0), *angles) for x in (query_1NH, key_1NH)))
spread = max(np.ptp(np.diagonal(score_TS, -distance)) for distance in range(199))
table(["scores, all distances", "largest difference at one distance"], [[f"{score_TS.min():.1f} to {score_TS.max():.1f}", f"{spread:.3f}"]])

# %% [markdown]
# ## Keys as values
#
# In the full layers of the 12B, the 26B-A4B and the 31B there is no matrix that makes values. The key projection of a token is used
# twice: as its value, normalised without a weight; and as its key, normalised with a weight and turned. Here is the whole attention
# block:

# %%
source(gemma4.attention)

# %% [markdown]
# The built-in model does the same in its only full layer, the last one. So its keys can be made from its values: multiply by the
# weight of the key norm, and turn.

# %%
model = refimpl.load(threads=1)
code = '''class Stack:
    """A list of items; the newest one comes first."""

    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        """Put item on the top of the stack."""
        self.items.append(item)

    def pop(self):
        """Remove the newest item and return it."""
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def __len__(self):
        return len(self.items)
'''
ids = model.tokenizer.encode(code)
seen = {}
logits = model.logits(ids, tap=seen.__setitem__)

full = model.config.layers[-1]
angles = ops.rope_angles(np.arange(len(ids)), model.weights.rope_frequency_R[full.attention])
weight_H = model.weights.layers[full.index].attention.kv.key_norm_H
from_values = ops.rotate(seen[f"Vcur_normed-{full.index}"] * weight_H, *angles)
keys = seen[f"Kcur_pos-{full.index}"]
table(["layer", "largest key", "largest difference to the key made from the value"],
      [[full.index, f"{np.abs(keys).max():.2f}", f"{np.abs(keys - from_values).max():.4f}"]])

# %% [markdown]
# What it saves are the weights of the value projections, which a token would have to read. It does not make the cache smaller: turned
# keys and values are kept beside each other, because working one out from the other would cost a turn for every key at every token.

# %%
table(["model", "weights saved, millions"],
      [[name, f"{cache_memory.value_projections(config) / 1e6:.1f}"] for name, config in models.items()])

# %% [markdown]
# ## What the cache holds, and what it costs
#
# Keys and values lie in blocks of 64 positions (Kwon et al. 2023, arXiv:2309.06180): position $p$ in row $p \bmod 64$ of block
# $\lfloor p / 64 \rfloor$. A full layer keeps all blocks, a sliding one those that the next token sees, and those of the rows that are
# not certain yet (4 drafts and the token before them, notebook 5). Sequences with a common beginning share its blocks.

# %%
source(blocks.LayerCache, cache.cache_bytes)

# %%
cache_memory.cache_picture(models, (131_072, 262_144), max_rows=5)

# %% [markdown]
# Most of it belongs to the full layers; the windows cost the same at any context. Without windows, and with keys and values in every
# layer, the whole context of each model would take (GB, float16):

# %%
table(["model", "context", *cache_memory.savings(models["31B"], 1, 5)],
      [[name, f"{config.n_ctx:,}", *(f"{n_bytes / 1e9:.2f}" for n_bytes in cache_memory.savings(config, config.n_ctx, 5).values())]
       for name, config in models.items()])

# %% [markdown]
# ## What the heads look at
#
# Now the small model that ships with the package: five sliding layers with a window of 64, one full layer, four heads in each. The
# text is the class above. `tap` shows its queries and keys, and the reference's own `attend` gives the weights when the values are an
# identity matrix.

# %%
source(attention_maps.weights_of, attention_maps.attention_maps)

# %%
maps = attention_maps.attention_maps(model, ids)
attention_maps.maps_picture(model.config, maps)

# %% [markdown]
# A row is a token that looks, a column a token it looks at; the brighter, the more weight. Above the diagonal nothing is seen: that
# is the future. In the sliding layers the band ends 63 tokens back. The full layer sees the whole triangle, and some heads give much
# of their weight to the very first token, `<bos>`, which says nothing: a place to look when there is nothing to look for (an
# "attention sink", Xiao et al. 2023, arXiv:2309.17453, section 3).
#
# Where does the weight of each head go, on average over the text?

# %%
source(attention_maps.habits)

# %%
shares = attention_maps.habits(maps, ids)
attention_maps.habits_picture(shares)

# %% [markdown]
# Head 2 of layer 1 does one thing only: it looks at the token before. The heads 1 and 2 of the full layer look *after the same
# token*: at what followed when the token that is looking stood here earlier. Both together are the pair that Olsson et al. 2022
# (arXiv:2209.11895) call an induction head: one head gives every token the token before it, the other finds the token that
# came after an earlier copy, and the model can copy it.
#
# Three examples. The token on red is the query; the darker the blue, the more weight a token gets. First, a newline in
# layer 1, head 1: it looks at the spaces that began its line, and the next thing to write are the spaces of the next line.

# %%
tokens = [model.tokenizer.decode([token], special=True) for token in ids]
newline = tokens.index(":", 100) + 1
attention_maps.look_picture(tokens, maps[1][1, newline], newline)

# %% [markdown]
# Layer 4, head 0, at the quotes that open a docstring: the name of the function.

# %%
quotes = tokens.index("pop") + tokens[tokens.index("pop"):].index('"""')
attention_maps.look_picture(tokens, maps[4][0, quotes], quotes)

# %% [markdown]
# The full layer, head 3, at the second `new`: what followed the first one. It is further back than the window of the other layers
# reaches.

# %%
new = tokens.index("new", tokens.index("new") + 1)
attention_maps.look_picture(tokens, maps[5][3, new], new)

# %%
best = int(maps[5][3, new].argmax())
table(["token", "looks most at", "tokens back", "its weight", "the model's next token"],
      [[tokens[new], tokens[best], new - best, f"{maps[5][3, new, best]:.2f}", model.tokenizer.decode([int(logits[new].argmax())])]])

# %% [markdown]
# ## Exercises
#
# **1. A wider window.** Double the window of the 31B. Predict how much larger its cache becomes at full context. Then:
#
# ```python
# from dataclasses import replace
# big = models["31B"]
# wide = replace(big, layers=tuple(replace(layer, window=layer.window and 2 * layer.window) for layer in big.layers))
# [sum(cache_memory.by_kind(config, config.n_ctx, 5)) / 1e9 for config in (big, wide)]
# ```
#
# <details><summary>Answer</summary>
#
# From 22.4 to 23.3 GB, by 4 %: nearly all of it belongs to the full layers, which have no window.
#
# </details>
#
# **2. Further on.** Put the 200 positions of the test above at 1,000 to 1,199. Predict what becomes of the scores. Then:
#
# ```python
# later = ops.rope_angles(np.arange(1000, 1200), frequencies["full layers: 256 pairs, base 1,000,000"])
# moved_TS = np.einsum("TNH,SNH->TS", *(ops.rotate(np.repeat(x, 200, axis=0), *later) for x in (query_1NH, key_1NH)))
# float(np.abs(moved_TS - score_TS).max())
# ```
#
# <details><summary>Answer</summary>
#
# Nothing: they differ by 0.001, the rounding of large angles in float32. Only distances count.
#
# </details>
#
# **3. Without a sink.** Leave `<bos>` away. Where does the weight go that it got from head 3 of the full layer? Predict, then:
#
# ```python
# without = attention_maps.attention_maps(model, ids[1:])[5][3]
# most = np.argsort(-without[20:].mean(axis=0))[:4]
# float(maps[5][3, 20:, 0].mean()), {int(s): (tokens[1:][s], round(float(without[20:, s].mean()), 3)) for s in most}
# ```
#
# <details><summary>Answer</summary>
#
# `<bos>` had 0.42 of it. `class`, now the first token, gets nothing (it is not among the four listed): the head's sink is that one token
# and not the first place. Its weight goes to names and pieces of names, most of all to the `St` of `Stack`.
#
# </details>
