# %% [markdown]
# # 5. Draft and verify
#
# **How can a small model that is often wrong make a large one faster, without changing a single token? And when does it not?**
#
# Writing a token means reading all the weights that it uses. Checking five tokens at once means reading them once (notebook 4 shows
# what experts change about that). So a small *drafter* proposes the next few tokens, and the large *target* runs all of them in one
# call. Where it would have chosen the same, the proposals are kept; at the first difference its own choice is taken and the rest is
# thrown away. The target here is the small model that ships with the package, the drafter the one that was trained for it.

# %%
import math

import numpy as np

import refimpl
from refimpl.decode import draft_length, drafter, speculative
from refimpl.lab.explain import drafting
from refimpl.lab.explain.show import source, table
from refimpl.lab.explain.weight_traffic import drafter_bytes, read_bytes
from refimpl.model import drafter as network

# %% [markdown]
# ## The loop
#
# A round is: draft $k$ tokens, run the latest token and all draft tokens through the target, let it choose after each of these $k + 1$
# rows, keep the choices up to the first one that differs from the draft token. So a round gives at least 1 token, and at most $k + 1$.
# Rows after the first difference are never committed to the cache.

# %%
source(speculative.accept, speculative.speculative)

# %% [markdown]
# Drafting is greedy: the drafter's most probable token, then the most probable one after that.

# %%
source(drafter.Drafter.draft)

# %% [markdown]
# ## What the drafter is
#
# It is no small language model of its own. It stands on the target, and reads three things of it: the embedding of the newest token,
# the final state of the token before, from which the target itself chose, and the keys and values of the target's last sliding
# and last full layer. The first two, side by side, are brought to its own width; four layers with queries of their own look into the
# target's cache; a head gives logits, and one more matrix the state for the next step. (Multi-token prediction; Gloeckle et al. 2024,
# arXiv:2404.19737, train such heads with the model; a drafter that feeds on its own states is that of Li et al. 2024, EAGLE,
# arXiv:2401.15077, section 3. The form here is transformers' `Gemma4AssistantForCausalLM`.)

# %%
source(network.draft_step)

# %%
model = refimpl.load(threads=1)
small = refimpl.load_drafter(None, model)
trunk = small.config.trunk
n_weights = [sum(math.prod(info.shape) for info in m.file.tensors.values()) for m in (model, small)]
table(["", "target", "drafter"],
      [["weights", *(f"{n / 1e6:.2f} million" for n in n_weights)], ["width", model.config.n_embd, trunk.n_embd],
       ["layers", model.config.n_layer, trunk.n_layer], ["experts", "128 in each layer", "none"],
       ["keys and values of layers", "its own, 0 to 5", ", ".join(str(layer.kv_from) for layer in trunk.layers) + " of the target"]])

# %% [markdown]
# That makes it cheap in three ways. It has few weights, and no experts. It has no cache, and never runs over the prompt: what the target
# knows of the text is in the keys it reads. And all its steps in a round look at the same keys, from the same position.
#
# ## How it was trained
#
# The target stays as it is, and first writes 800 texts, because what it writes is what a drafter has to predict. On these, and on the
# library's own text, the drafter makes four steps from every position, each from its own state of the step before; so it learns to go
# on from what it will really have. It is told the target's probabilities $P$, not the one token that came:
#
# $$ L = - \tfrac14 \sum_{j=0}^{3} \sum_v P_j(v) \log Q_j(v), \qquad P_j = \operatorname{softmax}(\text{logits}_j / 0.7) $$
#
# Dividing by 0.7 sharpens $P$, since only the most probable token is ever proposed (Hinton et al. 2015, arXiv:1503.02531, section 2,
# divide by more than 1 for the opposite). The last fifth is on the Q4_0 grid (notebook 2). Figures and commands: the
# [model card](../refimpl/tiny/README.md).

# %%
source("refimpl.tiny.training.train_drafter.rollout")

# %% [markdown]
# What does it need of all it reads? Six beginnings of Python code, 64 tokens after each, with one input replaced by zeros:

# %%
beginnings = [
    '"""Read and write tables of numbers."""\n\nimport os\nimport sys\n\n',
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of the file, without their ends."""\n',
    'class Node:\n    def __init__(self, value, left=None, right=None):\n        self.value = value\n',
    'class TestStack(unittest.TestCase):\n    def test_empty(self):\n        with self.assertRaises(IndexError):\n',
    '    try:\n        data = self.sock.recv(1024)\n    except OSError as err:\n',
    'def main():\n    parser = argparse.ArgumentParser(description=__doc__)\n']
prompts = [model.tokenizer.encode(text) for text in beginnings]
blinded = {"all": small, "without the newest token": drafting.Blinded(small, "embedding"),
           "without the target's state": drafting.Blinded(small, "state"),
           "without the target's keys and values": drafting.Blinded(small, "keys")}
four = draft_length.FixedDraftLength(4)
first = {name: drafting.acceptance([r for ids in prompts for r in drafting.run(model, ids, 64, which, four).rounds], 4)[0][0]
         for name, which in blinded.items()}
drafting.inputs_picture(first)

# %% [markdown]
# ## One text, round by round
#
# The loop above yields its rounds; all that follows is taken from them.

# %%
source(drafting.run)

# %%
prompt = model.tokenizer.encode('''def read_lines(path, encoding="utf-8"):
    """Return the lines of the file, without their ends."""
''')
drafted = drafting.run(model, prompt, 56, small, draft_length.FixedDraftLength(4))
drafting.rounds_picture(model.tokenizer, drafted.rounds)

# %% [markdown]
# Every line is a round of 4 draft tokens (the last is cut short where the text ends). Green ones were accepted; after them comes the
# target's own token, which replaces a red one or follows four green ones. Dots are spaces, arrows newlines. The same as a text:

# %%
drafting.authors_picture(model.tokenizer, prompt, drafted)

# %%
n_accepted = sum(r.n_accepted for r in drafted.rounds)
table(["tokens", "calls of the target", "accepted draft tokens", "draft tokens made"],
      [[len(drafted.ids), len(drafted.rounds), n_accepted, sum(len(r.drafted) for r in drafted.rounds)]])

# %% [markdown]
# ## Why the text is the same
#
# The target's choice after an accepted draft token is made from the same tokens as without a drafter. What is left is arithmetic: does a
# row give the same logits in a call of five rows as in a call of one? Here yes, to the last bit, because no sum depends on how many
# rows are computed together. And the sampler draws one random number for each token that is emitted, as it does without a drafter, so
# sampled text is the same as well. Leviathan et al. 2023 (arXiv:2211.17192, section 2.3) accept by a ratio of probabilities, which
# keeps the distribution, but not the very text.

# %%
plain = drafting.run(model, prompt, 56)
warm = {"temperature": 0.7, "seed": 1}
plain_warm = drafting.run(model, prompt, 56, **warm)
drafted_warm = drafting.run(model, prompt, 56, small, draft_length.FixedDraftLength(4), **warm)
table(["", "ids equal", "logits compared", "logits that differ in a bit"],
      [[name, a.ids == b.ids, f"{a.logit_TV.size:,}", int((a.logit_TV.view(np.uint32) != b.logit_TV.view(np.uint32)).sum())]
       for name, a, b in (("greedy", plain, drafted), ("temperature 0.7", plain_warm, drafted_warm))])

# %% [markdown]
# The sampled text, to see that it is another one:

# %%
drafting.authors_picture(model.tokenizer, prompt, drafted_warm)

# %% [markdown]
# ## How many are accepted
#
# The six beginnings from above, 64 tokens after each, greedy and at temperature 0.7, with 1 to 8 draft tokens in a round.
# `acceptance` gives $a_i$, the share of rounds in which draft tokens 1 to $i$ were all accepted, and $\alpha$, the share of accepted ones
# among all that were judged. (The model card, `refimpl/tiny/README.md`, has the same for 120 prompts of held-out modules: other texts,
# slightly other figures.)

# %%
source(drafting.acceptance)

# %%
ways = {"greedy": {}, "temperature 0.7": warm}
lengths = [1, 2, 3, 4, 6, 8]
found = {way: {k: [r for ids in prompts
                   for r in drafting.run(model, ids, 64, small, draft_length.FixedDraftLength(k), **options).rounds] for k in lengths}
         for way, options in ways.items()}
chances, alphas = ({way: drafting.acceptance(found[way][8], 8)[part] for way in ways} for part in (0, 1))
drafting.acceptance_picture(chances, alphas)

# %% [markdown]
# Dashed, what would follow if every draft token were accepted with the same probability $\alpha$, whatever came before. Real acceptance is
# not like that: some places are easy and others are hard, and a round that has come far is in an easy place.
#
# ## Tokens a round
#
# With independent draft tokens of the same $\alpha$, the expected number of tokens in a round of $k$ of them is
#
# $$ E = 1 + \alpha + \alpha^2 + \dots + \alpha^k = \frac{1 - \alpha^{k+1}}{1 - \alpha} $$
#
# (Leviathan et al. 2023, section 3.1, equation 1). Without that assumption it is $E = 1 + a_1 + a_2 + \dots + a_k$, which is no more
# than counting: a round gives one token of the target, and draft token $i$ if the first $i$ were all accepted.

# %%
source(drafting.expected_tokens)

# %%
measured = {way: {k: drafting.tokens_per_round(found[way][k], k) for k in lengths} for way in ways}
formula = {way: {k: drafting.expected_tokens(drafting.acceptance(found[way][k], k)[1], k) for k in lengths} for way in ways}
predicted = {way: {k: 1 + sum(chances[way][:k]) for k in lengths} for way in ways}
drafting.tokens_picture(measured, formula, predicted)

# %%
counted = {way: {k: 1 + sum(drafting.acceptance(found[way][k], k)[0]) for k in lengths} for way in ways}
table(["tokens a round, draft length:", *lengths],
      [[f"{way}: {name}", *(f"{values[way][k]:.2f}" for k in lengths)] for way in ways
       for name, values in (("measured", measured), ("1 + a_1 + ... of the same rounds", counted), ("equation 1", formula))])

# %% [markdown]
# The sum is exact for the rounds it was counted in. It is not for rounds of another length (dotted in the picture): longer rounds
# begin more often just after a difference, where the text is hard to predict, and so have other $a_i$. That is why `auto` goes on
# measuring while it drafts.
#
# ## When it does not pay
#
# A round of $k$ draft tokens costs $k$ steps of the drafter and one call of $k + 1$ rows. Plain decoding gets one token for a call of one
# row. So
#
# $$ \text{rate}(k) = \frac{1 + a_1 + \dots + a_k}{\text{verify}(k) + k \cdot \text{draft}} $$
#
# and the best $k$ is the one with the largest rate, 0 included (Leviathan et al. 2023, section 3.3 and 3.5, with the same $\alpha$
# everywhere).

# %%
source(draft_length.best_draft_length)

# %% [markdown]
# Both costs are measured here, on the machine that ran this notebook, one row after the other. **All times and speeds from here on
# belong to that machine and that minute**; yours will differ. The third curve is a drafter that is never right: it takes the same
# time and adds nothing.

# %%
source(drafting.costs)

# %% tags=["machine"]
cost = drafting.costs(model, small, prompts[2] + plain.ids)
curves = chances | {"never right": [0.0] * 8}
drafting.costs_picture(cost, curves)

# %% tags=["machine"]
table(["", "best draft length", "tokens a second, plain", "tokens a second, best"],
      [[way, drafting.best(cost.verify, cost.draft, accepted), f"{1 / cost.verify[0]:.0f}",
        f"{max(drafting.rates(cost.verify, cost.draft, accepted)):.0f}"] for way, accepted in curves.items()])

# %% [markdown]
# A ring marks the best draft length of each curve. `--draft-max auto` finds it while it writes. Below, how many tokens it drafted in each
# round, with the trained drafter, and with a stubborn one that always proposes the same token. It begins with three rounds without a draft
# token and three with one, to learn both costs; then it drafts what pays, and now and then one more, to see whether that has changed. While
# nothing pays, it tries the drafter so rarely that all trials together cost half a percent of the time. (`Charged`: every round costs what
# was measured above, so that other programs on the machine do not blur the picture.)

# %%
source(drafting.Charged, drafting.Stubborn)

# %% tags=["machine"]
stubborn = drafting.Stubborn(small, token=model.tokenizer.bos)
chosen = {"the trained drafter": drafting.run(model, prompt, 128, small, drafting.Charged(cost)),
          "a drafter that is never right": drafting.run(model, prompt, 128, stubborn, drafting.Charged(cost))}
drafting.lengths_picture(chosen)

# %%
again = drafting.run(model, prompt, 128)
table(["", "text the same as without"], [[name, run.ids == again.ids] for name, run in chosen.items()])

# %% [markdown]
# ## The true sizes, by their bytes
#
# This model is so small that much of its time is not spent on reading weights. The large ones are bound by it, so that the bytes that
# a call reads stand for its time: an estimate, which leaves out everything else. The acceptance is what users of the real drafters
# reported, for the 31B on code (.92 .79 .68 .59, two RTX 3090, club-3090 pull request 68) and for the 26B-A4B (.84 .60 .39 .27, DGX
# Spark, spark-vllm-docker number 343); for the 12B the 31B's is assumed. (The simulations in
# `refimpl/lab/bench/README.md` take 0.9 for each draft token of the 12B and the 31B instead.)

# %%
source(read_bytes, drafter_bytes)

# %%
reported = {"12B": (0.92, 0.79, 0.68, 0.59), "26B-A4B": (0.84, 0.60, 0.39, 0.27), "31B": (0.92, 0.79, 0.68, 0.59)}
verify = {name: [sum(read_bytes(name, n + 1).values()) for n in range(5)] for name in reported}
gains = {name: [verify[name][0] * rate for rate in drafting.rates(verify[name], drafter_bytes(name), accepted)]
         for name, accepted in reported.items()}
drafting.gains_picture(gains)

# %%
table(["draft tokens", *range(5), "a step of the drafter reads, of what a token reads"],
      [[name, *(f"{ratio:.2f}" for ratio in gains[name]), f"{100 * drafter_bytes(name) / verify[name][0]:.0f} %"] for name in gains])

# %% [markdown]
# The dense models gain with every draft token. In the mixture of experts each further row brings its own experts to read, and the drafter
# is large beside what a token reads, so that a draft token must be accepted often to pay for itself. With an acceptance of 0 nothing ever
# pays.

# %% [markdown]
# ## Exercises
#
# **1. Always right.** Suppose every draft token were accepted. Predict how much faster four of them would make the 26B-A4B, by its bytes.
# Then:
#
# ```python
# [round(verify["26B-A4B"][0] * rate, 2) for rate in drafting.rates(verify["26B-A4B"], drafter_bytes("26B-A4B"), (1, 1, 1, 1))]
# ```
#
# <details><summary>Answer</summary>
#
# 1.88 times, where a dense model would get nearly 5 tokens for the price of one: five rows read more than twice the bytes of one, and the
# drafter's four steps come on top.
#
# </details>
#
# **2. The least that pays.** How often must a single draft token of the 26B-A4B be accepted, so that it costs nothing? Predict; then
# solve $(1 + a) / (\text{verify}(1) + \text{draft}) = 1 / \text{verify}(0)$:
#
# ```python
# (verify["26B-A4B"][1] + drafter_bytes("26B-A4B")) / verify["26B-A4B"][0] - 1
# ```
#
# <details><summary>Answer</summary>
#
# 44 times of 100. For the dense 31B it is only the drafter's own share, a few percent.
#
# </details>
#
# **3. Hotter.** At temperature 0.7 the first draft token was accepted less often than greedily. Predict the share at 1.5. Then:
#
# ```python
# hot = [r for ids in prompts for r in drafting.run(model, ids, 64, small, four, temperature=1.5, seed=1).rounds]
# [round(way[0], 2) for way in (*chances.values(), drafting.acceptance(hot, 4)[0])]
# ```
#
# <details><summary>Answer</summary>
#
# 0.20, after 0.67 (greedy) and 0.54 (at 0.7). The drafter proposes the most probable token, and at 1.5 the target mostly draws another one.
#
# </details>
