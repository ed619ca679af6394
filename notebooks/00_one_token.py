# %% [markdown]
# # 0. One token
#
# **A text goes in, the next token comes out. What happens in between, number by number?**
#
# This is the map. One token goes through the small model that ships with the package, from text to text, and every station is
# small enough to be computed again by hand. Each one ends with links: to the notebook that goes deeper, and to the line of source. You
# need Python and to know what a matrix product is. At the end are ten questions.

# %%
import numpy as np

import refimpl
from refimpl.decode import drafter, sampling, speculative
from refimpl.formats.quants.basic import q4_0
from refimpl.lab.explain import attention_maps, one_token
from refimpl.lab.explain.show import deeper, source, table
from refimpl.lab.explain.weight_traffic import read_bytes
from refimpl.model import gemma4
from refimpl.reference import attention, moe, ops
from refimpl.text import tokenizer

model = refimpl.load(backend="reference")
one_token.map_picture(model.config)

# %% [markdown]
# ## From text to ids
#
# A tokenizer cuts the text into pieces of its vocabulary, here 4,096 of them. It starts with all letters apart and joins the pair
# that is first in a list of merges, again and again (byte-pair encoding; Sennrich et al. 2016, arXiv:1508.07909, section 3.2). In front
# stands `<bos>`, the beginning. Dots are spaces.

# %%
text = "for i in range(len(items)):\n    item = items["
run = one_token.follow(model, text)
one_token.ids_picture(run)

# %%
deeper("", tokenizer.Tokenizer.encode)

# %% [markdown]
# ## A row of a table
#
# An id is the number of a row. The row of the last token, `[`, has 128 numbers, and in the file they are stored as Q4_0: blocks of 32
# weights with one 16-bit scale $d$ and 4 bits $q$ for each. So a block is $2 + 16 = 18$ bytes for 32 weights: 4.5 bits each. A weight is
# $d (q - 8)$, and the first layer reads it times $\sqrt{128}$. The first four, by hand and from the model:

# %%
block = model.file.raw("token_embd.weight")[run.ids[-1], :18]
d = float(block[:2].view("<f2")[0])
codes = block[2:6] & 15
table(["weight", "q", f"(q - 8) times d = {d:.6f}", "times sqrt(128)", "the model's"],
      [[i, q, f"{d * (int(q) - 8):.6f}", f"{d * (int(q) - 8) * 128**0.5:.4f}", f"{run.seen['inp_scaled'][-1, i]:.4f}"]
       for i, q in enumerate(codes)])

# %%
deeper("01_a_block_of_q4", gemma4.embed, q4_0.dequantize_q4_0)

# %% [markdown]
# From here on a token is a row of 128 numbers, its *state*. Each layer adds something to it, twice: what attention found in other
# tokens, and what the feed-forward network makes of it.
#
# ## The norm
#
# Before every matrix the state is brought to one length: divided by the root of its mean square, then multiplied by a learnt weight for
# each channel (RMSNorm; Zhang and Sennrich 2019, arXiv:1910.07467, section 3):
#
# $$ y = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \epsilon}} \cdot w $$

# %%
x_D, w_D = run.seen["inp_scaled"][-1], model.weights.layers[0].attention.norm_before_D
length = np.sqrt(np.mean(x_D**2) + model.config.norm_eps)
table(["channel", "x", "root of the mean square", "x / root", "w", "by hand", "the model's"],
      [[i, f"{x_D[i]:.4f}", f"{length:.4f}", f"{x_D[i] / length:.4f}", f"{w_D[i]:.4f}", f"{x_D[i] / length * w_D[i]:.4f}",
        f"{run.seen['attn_norm-0'][-1, i]:.4f}"] for i in (1, 2)])

# %%
deeper("", ops.rms_norm)

# %% [markdown]
# ## Attention
#
# Three matrices make a query, a key and a value of every token. Query times key is a score; the softmax turns the scores of one query into
# weights that sum to 1; what the token gets is the weighted mean of the values. In five layers it sees the latest 64 tokens, in the
# last one all of them. Where `[` looks, head by head:

# %%
maps = attention_maps.attention_maps(model, run.ids)
one_token.heads_picture(run, {f"layer {i}, {'everything' if model.config.layers[i].window is None else 'the latest 64'}": maps[i][:, -1]
                              for i in (0, 4, 5)})

# %% [markdown]
# The text can only go on with `i`, and in layer 4 two heads look at just that token. By hand, for head 0 of the last layer: the
# five highest scores, each less the highest, and what the softmax makes of them.

# %%
query_H, key_SH = run.seen["Qcur_pos-5"][-1, 0], run.seen["Kcur_pos-5"][:, 0]
score_S = key_SH @ query_H
share_S = np.exp(score_S - score_S.max())
table(["token", "query times key", "e^(score - highest)", "over the sum: weight", "the model's"],
      [[f"`{run.tokens[s]}`", f"{score_S[s]:.3f}", f"{share_S[s]:.4f}", f"{share_S[s] / share_S.sum():.4f}", f"{maps[5][0, -1, s]:.4f}"]
       for s in np.argsort(-score_S)[:5]])

# %% [markdown]
# Keys and values stay in memory, so that the next token need not compute them again: the cache. It is the only thing that grows with the
# text. (In the last layer values are not even made by a matrix of their own: they are the keys before their norm and turn.)

# %%
deeper("03_attention_in_gemma4", gemma4.attention, attention.attend_one)

# %% [markdown]
# ## Eight experts of 128
#
# The feed-forward part of a layer has a small network for all tokens, and 128 *experts*. A matrix gives each expert a logit, the softmax a
# probability; the best 8 run, and their outputs are added with weights that sum to 1 (times a learnt factor of each expert).

# %%
probability_TE = ops.softmax(run.seen["ffn_moe_logits-0"])
chosen = run.seen["ffn_moe_topk-0"]
one_token.router_picture(probability_TE[-1], chosen[-1])

# %%
factor_E = model.weights.layers[0].ffn.expert_scale_E
p_X = probability_TE[-1, chosen[-1]]
table(["expert", *map(int, chosen[-1])],
      [["probability", *(f"{p:.3f}" for p in p_X)], ["over their sum", *(f"{p:.3f}" for p in p_X / p_X.sum())],
       ["times its factor", *(f"{p:.3f}" for p in p_X / p_X.sum() * factor_E[chosen[-1]])],
       ["the model's", *(f"{w:.3f}" for w in run.seen["ffn_moe_weights-0"][-1])]])

# %% [markdown]
# So a token reads 8 of 128 experts, and that is what makes a large mixture cheap. But each token makes its own choice. If two rows are
# computed together, a dense network is read once for both, while the experts of both must be read:

# %%
table(["layer", *range(6)],
      [["different experts of the last two tokens", *(len({*run.seen[f"ffn_moe_topk-{i}"][-2:].ravel().tolist()}) for i in range(6))]])

# %%
one, two = (sum(read_bytes("26B-A4B", n).values()) for n in (1, 2))
dense = [sum(read_bytes("31B", n).values()) for n in (1, 2)]
table(["bytes of weights read", "one row, GB", "two rows, GB", "times"],
      [["26B-A4B, experts", f"{one / 1e9:.2f}", f"{two / 1e9:.2f}", f"{two / one:.2f}"],
       ["31B, dense", f"{dense[0] / 1e9:.2f}", f"{dense[1] / 1e9:.2f}", f"{dense[1] / dense[0]:.2f}"]])

# %%
deeper("04_mixture_of_experts", gemma4.moe_ffn, moe.route)

# %% [markdown]
# ## Six layers
#
# This is one layer as code, and how large the state of `[` is in each, beside what the layer adds to it:

# %%
source(gemma4.run_layer)

# %%
one_token.stream_picture(run, model.config.n_layer)

# %% [markdown]
# When does the model know what comes next? The head (below) can be applied after any layer, although only the last was trained for it.
# Until layer 3 the state still says `[`; what the two heads of layer 4 found turns it into `i`:

# %%
table(["if the model stopped after", "it would say", "with probability"],
      [[where, f"`{token!r}`", f"{p:.2f}"] for where, token, p in one_token.lens(model, run)])

# %%
deeper("06_reading_another_engine", gemma4.forward)

# %% [markdown]
# ## The head and the soft cap
#
# The head is the table of the embedding once more: the logit of a token is its row times the final normed state, limited by a soft cap
# (Gemma 2, arXiv:2408.00118, section 2), $30 \tanh(x / 30)$. It keeps the order of the tokens.

# %%
state_D = run.seen["result_norm"][-1]
before_V = model.weights.head_VD.float32() @ state_D
best = np.argsort(-run.logit_TV[-1])[:3]
names = [repr(model.tokenizer.decode([int(i)])) for i in best]
table(["token", "row times state", "30 tanh(x / 30)", "the model's logit"],
      [[f"`{name}`", f"{before_V[i]:.4f}", f"{30 * np.tanh(before_V[i] / 30):.4f}", f"{run.logit_TV[-1, i]:.4f}"]
       for name, i in zip(names, best)])

# %%
one_token.cap_picture(before_V, 30, dict(zip(names, best)))

# %%
deeper("", gemma4.head, ops.softcap)

# %% [markdown]
# ## The draw
#
# The logits are divided by the temperature, here 0.7, and become probabilities; a random number between 0 and 1 hits one of them. At
# temperature 0 the largest is taken and nothing is drawn.

# %%
chooser = sampling.Sampler(sampling.Sampling(temperature=0.7, top_k=0, top_p=1.0, seed=3))
logit_V = run.logit_TV[-1].astype(np.float64)
id_K, p_K = chooser.distribution(run.logit_TV[-1])
by_hand_V = np.exp((logit_V - logit_V.max()) / 0.7)
token = chooser.pick(run.logit_TV[-1])
table(["token", "e^((logit - highest) / 0.7)", "over the sum", "the sampler's"],
      [[f"`{name}`", f"{by_hand_V[i]:.4f}", f"{by_hand_V[i] / by_hand_V.sum():.4f}", f"{p_K[i]:.4f}"] for name, i in zip(names, best)])

# %% [markdown]
# After `[` there is hardly a choice. Two tokens earlier, after `item = `, there was one; this is how it would have been drawn:

# %%
u = np.random.Generator(np.random.PCG64(3)).random()
earlier_K = chooser.distribution(run.logit_TV[-3])[1]
one_token.draw_picture([model.tokenizer.decode([int(i)]) for i in id_K], earlier_K, u)

# %% [markdown]
# And the text, with its new token:

# %%
print(text + model.tokenizer.decode([token]))

# %%
deeper("", sampling.Sampler.distribution)

# %% [markdown]
# ## The next ones, faster: the drafter
#
# The model could now run the new token. A *drafter*, a much smaller model, first guesses the tokens after it, and the model checks them
# all in one call. It is so small because it starts from what the model knows already:

# %%
small = refimpl.load_drafter(None, model)
cache = model.new_cache()
state_C = model.prefill(run.ids, cache)[-1]
seen = {}
proposed = small.draft(token, state_C, cache, 3, tap=seen.setdefault)
table(["what the drafter reads", "numbers"],
      [["the embedding of the new token", model.config.n_embd], ["the model's final normed state of the token before", len(state_C)],
       ["the model's keys and values of layer 4 (sliding)", f"{2 * len(run.ids)} x {model.config.layers[4].n_kv} x 32"],
       ["and of layer 5 (full)", f"{2 * len(run.ids)} x {model.config.layers[5].n_kv} x 64"]])

# %%
print(text + model.tokenizer.decode([token]) + " | " + model.tokenizer.decode(proposed))

# %%
deeper("05_draft_and_verify", drafter.Drafter.draft, speculative.accept)

# %% [markdown]
# ## Where to go on
#
# [1](01_a_block_of_q4.ipynb) and [2](02_quantization_aware_training.ipynb): the 4 bits. [3](03_attention_in_gemma4.ipynb): attention.
# [4](04_mixture_of_experts.ipynb): experts. [5](05_draft_and_verify.ipynb): drafting. [6](06_reading_another_engine.ipynb): finding
# where another engine departs. [7](07_how_it_sees_and_hears.ipynb): pictures and sounds.
# [8](08_embeddings_in_every_layer.ipynb): what E2B and E4B do otherwise. [9](09_find_the_bug.ipynb): puzzles.
#
# ## Ten questions
#
# 1. As how many numbers does a token enter the first layer?
# 2. Where do the 4.5 bits of a weight go?
# 3. What does a norm keep of a state, and what does it throw away?
# 4. Which tokens does the last token see in layer 0, and which in layer 5, in a text of 1,000 tokens?
# 5. Of all that is computed for a token, what must be kept for later tokens?
# 6. Why are two rows dearer than one for experts, and not for a dense network?
# 7. Do the weights of the 8 experts sum to 1?
# 8. Why can the soft cap be left out if the temperature is 0?
# 9. The same logits, the same temperature: what decides which token is drawn?
# 10. What does the drafter read, and what does it not have?
#
# <details><summary>Answers</summary>
#
# 1. 128, a row of the embedding times the root of 128.
# 2. 4 bits are the weight's own code; the 16 bits of the scale are shared by 32 weights, which is half a bit each.
# 3. It keeps the direction and throws the length away; then each channel gets a learnt factor.
# 4. In layer 0 itself and the 63 before it; in layer 5 all 1,000.
# 5. Its keys and values in every layer.
# 6. A dense network's weights are read once, for as many rows as there are. Each row picks its own experts, and those of two rows overlap
#    little.
# 7. The probabilities over their sum do; each is then multiplied by a learnt factor of its expert.
# 8. It is a rising function: the largest logit stays the largest.
# 9. The random number, which follows from the seed and from how many were drawn before.
# 10. The embedding of the newest token, the model's final state of the token before, and the model's keys and values of one sliding and
#     one full layer. It has no keys and values of its own.
#
# </details>

# %% [markdown]
# ## Exercises
#
# **1. Another name.** Call the variable `j` instead of `i`. Predict what the heads of layer 4 look at, and what comes next. Then:
#
# ```python
# other = one_token.follow(model, text.replace("for i", "for j"))
# looks_NS = attention_maps.attention_maps(model, other.ids)[4][:, -1]
# p_V = ops.softmax(other.logit_TV[-1])
# [other.tokens[s] for s in looks_NS.argmax(axis=1)], {name: round(float(p_V[model.tokenizer.encode(name)[1]]), 3) for name in "ij"}
# ```
#
# <details><summary>Answer</summary>
#
# Heads 0 and 2 find `j`, as they found `i`. And yet `i` stays ahead, 0.55 to 0.26: `items[i]` is so frequent in the training text that
# the weights say it without looking back. What comes out is the sum of both.
#
# </details>
#
# **2. Ten times as long.** Multiply the state by 10 before the norm. Predict by how much the result changes. Then:
#
# ```python
# before_D, after_D = (ops.rms_norm(x, w_D, model.config.norm_eps) for x in (x_D, 10 * x_D))
# float(np.abs(before_D).max()), float(np.abs(after_D - before_D).max())
# ```
#
# <details><summary>Answer</summary>
#
# Not at all, but for the last bits (1e-6 of 2.6), and for $\epsilon$, which is small beside the mean square.
#
# </details>
#
# **3. Hotter.** At temperature 0.7 `i` has a probability of 0.99. Predict it for 2, and whether the order of the tokens changes. Then:
#
# ```python
# hot_V = np.exp((logit_V - logit_V.max()) / 2)
# [round(float(p), 3) for p in (hot_V / hot_V.sum())[best]]
# ```
#
# <details><summary>Answer</summary>
#
# 0.375. The order stays, because dividing all logits by the same number keeps it; but 4,093 unlikely tokens together now have half of
# the probability. That is why top-k and top-p cut them off.
#
# </details>
