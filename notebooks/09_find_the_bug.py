# %% [markdown]
# # 9. Find the bug
#
# **Eight functions, each with one mistake that a real engine shipped. Which is it?**
#
# A reference can be read, and it can be broken on purpose. Here are eight broken functions of it, from easy to hard. Read one, find
# the line, repair it; `compare` (notebook 6) is the judge. It runs your version and the right one on the same 72 tokens and compares
# every named value on the way, about 290 of them, so a repair counts if it computes the same, however it is written.
#
# `grade(n)` says of puzzle n where the broken model departs first: that is the hint. `grade(n, "wrong", "right")` replaces a piece of
# the broken function that stands there once, and judges the result.

# %%
from refimpl.lab.explain import puzzles
from refimpl.lab.explain.show import source

# %% [markdown]
# ## 1, solved together

# %%
puzzles.broken(1)

# %%
print(puzzles.grade(1))

# %% [markdown]
# The very first named value, `inp_scaled`, is wrong at every position, by one constant factor: something is not multiplied. The docstring
# says by what.

# %%
print(puzzles.grade(1, "take(ids_T)", "take(ids_T) * np.float32(config.n_embd ** 0.5)"))

# %% [markdown]
# What does a wrong answer look like? The factor of the router, 1 over the root:

# %%
print(puzzles.grade(1, "take(ids_T)", "take(ids_T) * np.float32(config.n_embd ** -0.5)"))

# %% [markdown]
# This is how the judge works:

# %%
source(puzzles.compared)

# %% [markdown]
# ## 2
#
# Change the last line of the cell: what is wrong, what is right.

# %%
puzzles.broken(2)

# %%
print(puzzles.grade(2, "", ""))

# %% [markdown]
# <details><summary>Hint</summary>
#
# A pair of numbers is turned together. Which two are a pair: neighbours, or number $r$ of the first half and number $r$ of the second?
# Compare what is taken apart with what is put together.
#
# </details>
#
# <details><summary>Answer</summary>
#
# `puzzles.grade(2, "x_TNH[..., 0::2], x_TNH[..., 1::2]", "x_TNH[..., :n_pairs], x_TNH[..., n_pairs:]")`: halves, as in transformers'
# `rotate_half`. GPT-J's models pair neighbours; code that was copied from there has this bug.
#
# </details>
#
# ## 3

# %%
puzzles.broken(3)

# %%
print(puzzles.grade(3, "", ""))

# %% [markdown]
# <details><summary>Hint</summary>
#
# It is right up to position 62. The window is 64. How many positions does a token at 63 see?
#
# </details>
#
# <details><summary>Answer</summary>
#
# `puzzles.grade(3, "self.window + 2", "self.window + 1")`. A window of 64 is the token itself and 63 before it. This is what the first
# wrong position looks like in the whole model: blue is within rounding, red is not, and the frame is where it began.
#
# </details>

# %%
puzzles.heat_map(3)

# %% [markdown]
# ## 4

# %%
puzzles.broken(4)

# %%
print(puzzles.grade(4, "", ""))

# %% [markdown]
# <details><summary>Hint</summary>
#
# In a full layer values are made of keys. Of which: before their norm, or after it?
#
# </details>
#
# <details><summary>Answer</summary>
#
# `puzzles.grade(4, "k_TKH if spec.values_are_keys else v_TKH", "v_TKH")`. `v_TKH` was set to the keys three lines before, when they had
# neither norm nor turn. Here they are taken a second time, with the norm's weight in them.
#
# </details>
#
# ## 5

# %%
puzzles.broken(5)

# %%
print(puzzles.grade(5, "", ""))

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each row is wrong by a factor of its own. What has to sum to 1, and when?
#
# </details>
#
# <details><summary>Answer</summary>
#
# The factor of each expert has to come after the probabilities are divided by their sum, and here it comes before. Two pieces are
# wrong, but one replacement does it: `puzzles.grade(5, " * expert_scale_E[id_TX]; expert_scale_E = expert_scale_E * 0 + 1", "")`.
# Hidden states and
# logits hardly show this one, because the experts' sum passes a norm (notebook 6).
#
# </details>

# %%
puzzles.heat_map(5)

# %% [markdown]
# ## 6

# %%
puzzles.broken(6)

# %%
print(puzzles.grade(6, "", ""))

# %% [markdown]
# <details><summary>Hint</summary>
#
# All but the last tensor are right, and the order of the tokens too: greedy text never shows it.
#
# </details>
#
# <details><summary>Answer</summary>
#
# `puzzles.grade(6, "backend.softcap(backend.softcap(logit_TV, config.softcap), config.softcap)", "backend.softcap(logit_TV,
# config.softcap)")`: the cap is applied twice.
#
# </details>
#
# ## 7: a layer of E2B

# %%
puzzles.broken(7)

# %%
print(puzzles.grade(7, "", ""))

# %% [markdown]
# <details><summary>Hint</summary>
#
# The per-layer inputs of all layers are right (`inp_per_layer` is), and what comes of them is wrong from layer 0 on (notebook 8).
#
# </details>
#
# <details><summary>Answer</summary>
#
# `puzzles.grade(7, "(i + 1) % per_layer_TLP.shape[1]", "i")`: each layer reads the embedding of the next one.
#
# </details>
#
# ## 8: the drafter

# %%
puzzles.broken(8)

# %%
print(puzzles.grade(8, "", ""))

# %% [markdown]
# <details><summary>Hint</summary>
#
# The first draft token is right, the second is not. What stays the same for all steps of a round (notebook 5)?
#
# </details>
#
# <details><summary>Answer</summary>
#
# The target has run no further, so its keys end at the same place and the query stays at the same position:
# `puzzles.grade(8, "angles = network.angles_at(self.weights, cache.length + len(proposed)); ", "")`. The text is right with this bug, as
# with any bug of a drafter; only fewer tokens are accepted. That is why nobody notices.
#
# </details>

# %%
puzzles.heat_map(8)

# %% [markdown]
# ## Exercises
#
# **1. All of them.** There are more known bugs than these. Predict, for `no norm after attention`, which tensor departs first and what the
# difference looks like. Then:
#
# ```python
# from refimpl.lab.compare import known_bugs
# sound = puzzles.subject(known_bugs.MOE)
# with known_bugs.inject(known_bugs.BUGS["no norm after attention"]):
#     theirs = sound.trace(sound.model)
# found = puzzles.compare(sound.right, theirs, sound.noise)
# print(found.first.name, found.diagnosis.kind)
# ```
#
# <details><summary>Answer</summary>
#
# `attn_post_norm-0`, "missing norm": a factor for each row times one for each channel.
#
# </details>
#
# **2. Your own.** Break a function in a way that nobody has: in puzzle 6 take a cap of 31. Predict whether the judge sees it.
#
# ```python
# print(puzzles.grade(6, "backend.softcap(backend.softcap(logit_TV, config.softcap), config.softcap)",
#                     "backend.softcap(logit_TV, config.softcap + 1)"))
# ```
#
# <details><summary>Answer</summary>
#
# It departs at `result_output`. "None of the known kinds": there is a test for a cap left out or applied twice, not for another cap.
#
# </details>
#
# **3. Written otherwise.** Repair puzzle 3 in other words. Predict whether that counts as solved.
#
# ```python
# print(puzzles.grade(3, "pos - self.window + 2", "pos + 1 - self.window"))
# ```
#
# <details><summary>Answer</summary>
#
# Yes: the same numbers come out.
#
# </details>
