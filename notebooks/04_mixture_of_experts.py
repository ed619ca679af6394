# %% [markdown]
# # 4. A mixture of experts
#
# **The 26B-A4B has 26 billion weights. Why does a token read only a sixth of them, who chooses which, and when does that
# stop being cheap?**
#
# In every layer of this model the feed-forward network is split: a small dense one, which every token uses, and 128 *experts*,
# networks of the same form and a third of the width, of which a *router* picks 8 for each token. This notebook looks at real choices:
# those of the small model that ships with the package, which has the same 128 experts and the same router in each of its 6 layers, on
# Python code that it has never seen.

# %%
import numpy as np

import refimpl
from refimpl.lab.explain import experts
from refimpl.lab.explain.show import source, table
from refimpl.lab.explain.weight_traffic import distinct_if_independent, read_by_part, read_bytes
from refimpl.model import gemma4
from refimpl.reference import moe
from refimpl.tiny.corpus import read_corpus
from refimpl.tiny.evaluate import model_bits

# %% [markdown]
# ## The formula
#
# For the state $x$ of one token, with a matrix $W$ that has a row for each of $E$ experts:
#
# $$ p = \text{softmax}(W \hat x), \qquad w_e = \frac{s_e \, p_e}{\sum_{j \in \text{top}_8(p)} p_j}, \qquad
# y = \sum_{e \in \text{top}_8(p)} w_e \, \text{FFN}_e(x) $$
#
# Shazeer et al. 2017 (arXiv:1701.06538, section 2.1) have the same sum with the softmax over the chosen only, which is equal on
# paper, and with noise on the router for training. $\hat x$ is the normalised state, $s_e$ a learnt factor of each expert. These are
# the classes `Gemma4TextRouter` and `Gemma4TextExperts` of transformers. Choosing and running are two functions here:

# %%
source(moe.route, moe.run_experts)

# %% [markdown]
# Around them: the router reads the residual stream after a norm without a weight, the experts after a norm of their own,
# the dense network runs beside them, and both results are normalised before they are added.

# %%
source(gemma4.moe_ffn)

# %% [markdown]
# ## Real choices
#
# The text: 256 tokens from the middle of every longer file of Python's own library that was held out when the model was trained.
# `tap` reports what the routers decided.

# %%
source(experts.tapped, experts.route)

# %% tags=["text"]
model = refimpl.load(threads=1)
passages = [experts.passage(model, text, 256) for text in read_corpus().heldout.values() if len(text) > 6000]
texts = [part.ids for part in passages]
kinds = np.concatenate([part.kind_T for part in passages])
chunks = [chunk for part in passages for chunk in part.chunks]
routes = experts.route(model, texts)
n_layer, n_tok, n_used = routes.id_LTX.shape
n_expert = routes.logit_LTE.shape[-1]
table(["files", "tokens", "layers with experts", "experts", "chosen"], [[len(texts), f"{n_tok:,}", n_layer, n_expert, n_used]])

# %% [markdown]
# ## Who is chosen for what
#
# Python's own tokenizer says of every letter whether it belongs to a keyword, a name, a number, an operator, a string or a comment; a
# token of the model is what its first visible letter is.

# %%
source(experts.kinds_of, experts.share_by_kind)

# %% tags=["text"]
shares = {f"layer {i}": experts.share_by_kind(routes.id_LTX[i], kinds, n_expert) for i in (0, 2, 5)}
experts.kinds_picture(shares, kinds)

# %% [markdown]
# A column is an expert, a row a kind of token (in brackets how many there are). The router was never taught what a keyword is, and yet the
# bright blocks along the diagonal are experts that one kind of token visits far more often than the others do. (A row of few tokens
# is noisy.) The choice is made from the state of the token, so it is about words more than about kinds. For each kind, the expert of
# layer 2 that prefers it most (of those with at least 25 of its tokens), and what goes through it most often:

# %% tags=["text"]
table(["kind", "expert", "times as often as any token", "most frequent tokens"],
      [[kind, expert, f"{times:.1f}", " ".join(f"`{token!r}`" for token in common)]
       for kind, expert, times, common in experts.specialists(routes.id_LTX[2], kinds, chunks, n_expert, 25)])

# %% [markdown]
# ## Is the work shared evenly?
#
# A router left to itself tends to send everything to a few experts, which then learn more and are chosen even more. Training
# therefore adds a loss that is smallest when all are used alike (Fedus et al. 2021, arXiv:2101.03961, section 2.2): with $f_e$ the
# share of all picks that expert $e$ got and $P_e$ the mean probability it was given,
#
# $$ \text{balance} = E \sum_e f_e P_e $$
#
# which is 1 for perfect balance and $E$ if one expert got everything.

# %%
source(experts.load, experts.balance_loss)

# %% tags=["text"]
loads = [experts.load(id_TX, n_expert) for id_TX in routes.id_LTX]
experts.load_picture(loads)

# %% tags=["text"]
table(["layer", "busiest expert, mean = 1", "idlest expert", "experts never chosen", "balance"],
      [[i, f"{load_E.max():.2f}", f"{load_E.min():.2f}", int((load_E == 0).sum()),
        f"{experts.balance_loss(routes.id_LTX[i], routes.probability_LTE[i]):.3f}"] for i, load_E in enumerate(loads)])

# %% [markdown]
# ## How much do the first few carry?
#
# Of the weights that the 8 experts of a token get, this is the share of the first, the second, ... on average:

# %% tags=["text"]
kept = np.take_along_axis(routes.probability_LTE, routes.id_LTX, axis=-1)
kept = (kept / kept.sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
table(["expert", *range(1, n_used + 1)], [["share of the weight", *(f"{100 * share:.0f} %" for share in kept)],
                                          ["together with those before", *(f"{100 * share:.0f} %" for share in kept.cumsum())]])

# %% [markdown]
# What would change if the router chose fewer, or more? Nothing has to be trained for that: the sum just has fewer members, and the
# weights are divided by their new sum. Left, the probability that the first $k$ experts hold before that division; in the middle, how
# far the experts' output of a layer is from that with 8 (mean over tokens, the band from the best to the worst layer); right, what
# the whole model then needs for the text, in bits per token: less is better.

# %%
source(experts.with_used, experts.shortened_error)

# %% tags=["text"]
counts = [1, 2, 3, 4, 6, 8, 16, 32]
error = experts.shortened_error(model, texts, counts)
n_scored = sum(len(ids) - 1 for ids in texts)
bits = [sum(model_bits(experts.with_used(model, k), ids) for ids in texts) / n_scored for k in counts]
experts.fewer_picture(routes.probability_LTE, n_used, counts, error, bits)

# %% tags=["text"]
table(["experts", *counts], [["error of the output", *(f"{100 * e:.0f} %" for e in error.mean(axis=1))],
                             ["bits per token", *(f"{b:.3f}" for b in bits)]])

# %% [markdown]
# Fewer experts change what a layer puts out far more than they change what the model says: the dense branch, the residual stream and
# the other layers carry on. More than 8, with which it was never trained, make next to no difference. This is a small model; what the
# real one would lose cannot be read off here.
#
# ## What it saves: bytes
#
# A token must read every weight that it uses, and on most machines that is what takes the time. The true shapes, with the types of
# Google's Q4_0 files:

# %%
source(read_by_part, read_bytes)

# %%
needed = {"26B-A4B, 8 of 128 experts": read_bytes("26B-A4B"),
          "26B-A4B, if all experts ran": read_bytes("26B-A4B", all_experts=True),
          "12B, dense": read_bytes("12B"), "31B, dense": read_bytes("31B")}
experts.bytes_picture(needed)

# %%
total = {name: sum(parts.values()) for name, parts in needed.items()}
least = total["26B-A4B, 8 of 128 experts"]
table(["", "GB per token", "times the 26B-A4B"],
      [[name, f"{n_bytes / 1e9:.2f}", f"{n_bytes / least:.1f}"] for name, n_bytes in total.items()])

# %% [markdown]
# ## When it stops being cheap: several rows at once
#
# A dense model reads the same weights for one row as for five, so that verifying four draft tokens costs little more than writing one token
# (notebook 5). Experts are different: every row picks its own. If $n$ rows chose 8 of 128 evenly and independently, an expert would
# be missed by all of them with probability $(1 - 8/128)^n$, and they would need
#
# $$ 128 \left(1 - \left(1 - \tfrac{8}{128}\right)^n\right) $$
#
# different experts. What do real rows need?

# %%
source(experts.distinct, distinct_if_independent)

# %% tags=["text"]
shuffled = routes.id_LTX[:, np.random.default_rng(0).permutation(n_tok)]
experts.rows_picture(routes.id_LTX, shuffled, n_expert, 16)

# %% tags=["text"]
rows = [1, 2, 3, 5, 9, 16]
table(["rows", *rows], [
    ["neighbouring tokens", *(f"{np.mean([experts.distinct(id_TX, n) for id_TX in routes.id_LTX]):.1f}" for n in rows)],
    ["tokens from anywhere", *(f"{np.mean([experts.distinct(id_TX, n) for id_TX in shuffled]):.1f}" for n in rows)],
    ["by the formula", *(f"{float(distinct_if_independent(n_expert, n_used, n)):.1f}" for n in rows)]])

# %% [markdown]
# Neighbours share experts, because they are about the same thing. Tokens from anywhere share hardly more than chance makes them, and
# that little comes from the uneven load. So the formula is an upper estimate, and for the few rows of a draft
# a close one (this is a small trained model; the measurements in `refimpl/lab/bench/README.md` take tokens from anywhere, the formula's
# case). With it, a
# call of $n$ rows of the true shapes reads this many bytes of weights, as a multiple of what one row reads:

# %%
table(["rows in a call", 1, 2, 3, 4, 5, 9],
      [[name, *(f"{sum(read_bytes(name, n).values()) / sum(read_bytes(name).values()):.2f}" for n in (1, 2, 3, 4, 5, 9))]
       for name in ("26B-A4B", "12B", "31B")])

# %% [markdown]
# As far as reading goes, a dense model verifies draft tokens for free; the 26B-A4B pays for every one. That is why drafting helps it less
# (notebook 5).

# %% [markdown]
# ## Exercises
#
# **1. Many rows.** Predict from the formula how many of the 128 experts 32 rows need, and whether neighbouring tokens need more or fewer.
# Then:
#
# ```python
# float(distinct_if_independent(128, 8, 32)), float(np.mean([experts.distinct(id_TX, 32) for id_TX in routes.id_LTX]))
# ```
#
# <details><summary>Answer</summary>
#
# By the formula 111.8. Neighbouring tokens need 92.4: they are about the same thing and share experts.
#
# </details>
#
# **2. The same token twice.** Take the token `self` wherever it stands. How many of its 8 experts does it share with the next `self`?
# Predict for the first layer, which knows little but the token, and for the last. Then:
#
# ```python
# tokens = np.concatenate([part.ids[1:] for part in passages])
# at = np.flatnonzero(tokens == model.tokenizer.encode("self", bos=False)[0])
# [round(float(np.mean([len(np.intersect1d(id_TX[a], id_TX[b])) for a, b in zip(at, at[1:])])), 1) for id_TX in routes.id_LTX[[0, 5]]]
# ```
#
# <details><summary>Answer</summary>
#
# 6.5 in the first layer, where the state is nearly the embedding; 3.0 in the last, where it is about what comes next.
#
# </details>
#
# **3. A long prompt.** A prompt is read in calls of 512 rows. Predict how many times the bytes of one row such a call of the 26B-A4B
# reads. Then:
#
# ```python
# sum(read_bytes("26B-A4B", 512).values()) / sum(read_bytes("26B-A4B").values())
# ```
#
# <details><summary>Answer</summary>
#
# 6.1 times. All 128 experts are read, 16 times those of one row; everything else is read once as before.
#
# </details>
