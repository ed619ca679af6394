# %% [markdown]
# # 6. Reading another engine
#
# **An engine writes text that is a little off. Where does it start to differ from the model, and is it rounding or a bug?**
#
# Two correct engines never agree to the last bit: they add up in another order, hold their values in fewer bits, look functions up in
# tables. So "different" means nothing by itself. This notebook measures how far a correct engine may be away, tensor by tensor, then
# breaks the forward pass in ways in which engines really were broken, and lets `compare` name the first tensor and the kind of mistake.

# %%
import numpy as np

import refimpl
from refimpl.cli.show.compare import as_text
from refimpl.lab.compare import compare, diagnoses, known_bugs, mismatch, names, record, tolerance
from refimpl.lab.compare.reports import heat_map
from refimpl.lab.explain.show import drawn, figure, legend, picture, source, table

model = refimpl.load(backend="reference", weights="quantized")
text = "def parse(self, text):\n    for line in text.splitlines():\n        if line.startswith('#'):\n            continue\n"
text += "        key, value = line.split('=')\n        self.items[key] = value\n    return self.items\n\n\ndef write(self, path):\n"
ids = model.tokenizer.encode(text + "    with open(path, 'w') as file:\n        for key, value in self.items.items():\n")
len(ids), model.config.n_layer

# %% [markdown]
# ## Every value has a name
#
# The forward pass calls `tap(name, value)` for each of its steps, under the names that llama.cpp gives its graph. A trace is all of them.

# %%
right = record.trace(model, ids)
order = names.graph_order(right.names())
print(len(order), "tensors:", ", ".join(order[:30]), "...")

# %% [markdown]
# ## How far away is a correct engine?
#
# Of a row $a_t$ (all heads and channels at position $t$) and another engine's $b_t$ take
#
# $$ \delta_t = \frac{\mathrm{rms}(a_t - b_t)}{\mathrm{rms}(a_t)}, \qquad \delta = \max_t \delta_t . $$

# %%
source(mismatch.row_errors)

# %% [markdown]
# An engine that keeps $p$ significant bits makes a relative error of up to $u = 2^{-p}$ in every step (Higham, *Accuracy and Stability of
# Numerical Algorithms*, section 2.2): $2^{-24}$ in float32, $2^{-8}$ in bfloat16. What becomes of such an error further down depends on
# the model: a norm scales it, attention averages it, a residual stream carries it along. So it is not bounded on paper but measured: the
# same run again, with every named value moved as rounding would move it.

# %%
source(tolerance.perturbing)

# %%
noise = {kind: tolerance.measured(model, ids, kind, compare.deviations) for kind in ("exact", "bfloat16", "q8")}
fig, axes = figure(9, 3.4)
for kind, label in (("q8", "8-bit activations"), ("bfloat16", "bfloat16"), ("exact", "float32")):
    axes.semilogy([noise[kind][name] or np.nan for name in order], label=label, linewidth=1)
axes.set_xticks([order.index(f"l_out-{i}") for i in range(6)], [f"l_out-{i}" for i in range(6)])
axes.set_ylabel("deviation of a correct engine")
legend(axes, loc="center right")
picture(fig, "Deviation of a correct engine from the reference, tensor by tensor: "
             "near 1e-2 in bfloat16 and with 8-bit activations, 1e-6 in float32.")

# %% [markdown]
# The tolerance of a tensor is this noise, of both engines together, times a safety factor (`tolerance.SAFETY`). A tensor that is further
# away did not get there by rounding. (Gaps are the ids of chosen experts, which are no quantities. The straight line is explained next.)
#
# Two cases need more care. Where two experts are as good as equal, a correct engine may take the other one, and everything after it is
# different; `compare` sees from the router's logits that it was a tie and judges nothing from that position on. (In bfloat16 that soon
# happens at the first positions, and the largest noise so far is taken for what could not be measured.) And where the prompts differ,
# nothing else matters.

# %% tags=["machine"]
same = compare.compare_with(model, right, record.trace(refimpl.load(arithmetic="exact"), ids))
print(as_text(same))

# %% [markdown]
# That was the compiled kernels against NumPy: the same to within float32.
#
# ## A bug
#
# The window of the sliding layers is one position too long: `pos - self.window` where it should say `pos - self.window + 1`. Engines
# shipped this one more than once. The text, with the bug above and without below, gives nothing away:

# %%
bug = known_bugs.BUGS["window one too long"]
with known_bugs.inject(bug):
    print(refimpl.generate(model, ids, max_new_tokens=40, temperature=0).text)
print("---")
print(refimpl.generate(model, ids, max_new_tokens=40, temperature=0).text)

# %% [markdown]
# The comparison does:

# %% tags=["machine"]
with known_bugs.inject(bug):
    theirs = record.trace(model, ids)
found = compare.compare_with(model, right, theirs)
print(as_text(found))

# %%
drawn(heat_map.plot(found), "Deviation over tolerance of every tensor, with the window one too long; framed is kqv_out of layer 0.")

# %% [markdown]
# Blue is nearer than the tolerance allows, red is further. Everything before the framed tensor is right, and everything after it is
# made of wrong values, which says nothing about how it was made.
#
# ## What does it look like?
#
# A difference has a shape. For each kind of mistake there is a test of a few lines that makes from our values what theirs would be, and
# asks whether that fits. A norm that was left out, for instance, leaves a factor for each row times one for each channel:

# %%
source(diagnoses.missing_norm)

# %%
shown = ["embedding scale rounded to bfloat16", "RoPE turns neighbours", "rope_freqs ignored", "values are keys after their norm",
         "no norm after attention", "GELU by erf", "weights not renormalised", "soft cap twice"]
rows = []
for name in shown:
    with known_bugs.inject(known_bugs.BUGS[name]):
        loaded = refimpl.load(backend="reference") if known_bugs.BUGS[name].at_load else model
        wrong = compare.compare(right, record.trace(loaded, ids), {key: 2 * size for key, size in noise["exact"].items()})
    rows.append([name, f"`{wrong.first.name}`", wrong.diagnosis.kind, wrong.diagnosis.text])
table(["bug", "departs first", "looks like", ""], rows)

# %% [markdown]
# ## Two bugs at once
#
# After the first wrong tensor everything is wrong, so a comparison of two runs finds one bug at a time. `compare_steps` finds them all:
# it computes each step from *their* values before it. A mistake then shows where it is made and nowhere else.

# %%
source(tolerance.replayed)

# %%
with known_bugs.inject(known_bugs.BUGS["values not normalised"]), known_bugs.inject(known_bugs.BUGS["expert scale dropped"]):
    theirs = record.trace(model, ids)
runs, steps = compare.compare_with(model, right, theirs), compare.compare_steps(model, theirs)
print("departing tensors, run against run:", sum(j.verdict == "departs" for j in runs.judged))
print("departing steps:", ", ".join(j.name for j in steps.judged if j.verdict == "departs"))

# %%
drawn(heat_map.plot(runs), "Two bugs, run against run: everything after the first wrong tensor is red.")

# %%
drawn(heat_map.plot(steps), "Two bugs, step by step: two red columns, one for each mistake, in every layer.")

# %% [markdown]
# The upper map has one framed tensor and red after it. The lower one has two stripes: two mistakes, made in every layer.
#
# ## What a comparison of layers' outputs does not see
#
# The second of these, or weights that are not renormalised at all, hardly changes what a layer puts out. The experts' sum passes a norm,
# which takes any common factor of a row out again:

# %%
with known_bugs.inject(known_bugs.BUGS["weights not renormalised"]):
    theirs = record.trace(model, ids)
for name in ("ffn_moe_weights-0", "ffn_moe_out-0", "ffn_moe-0", "l_out-0", "result_output"):
    print(f"{name:18} {np.max(mismatch.row_errors(right.arrays[name], theirs.arrays[name])):.1e}")

# %% [markdown]
# The weights are wrong by more than half, the layer's output by no more than rounding. Whoever compares hidden states and logits alone
# cannot see it, so the router's weights are in the trace; and so are the per-layer inputs of E2B and E4B, for the same reason.
#
# On the command line: `refimpl trace -m model.gguf -p TEXT -o right.safetensors`, then `refimpl compare right.safetensors` and one of
# another trace, `transformers:DIRECTORY`, `llama.cpp:model.gguf`, what llama.cpp's tools printed, or a `.npz` that any engine can write.
# `refimpl compare --help` says how, and `--html FILE` writes the map, the tensor and the line of code with the mistake on one page.

# %% [markdown]
# ## Exercises
#
# **1. Backwards.** In `RoPE backwards` queries and keys turn the other way. Predict which tensor departs first, whether the first
# position is wrong, and whether the attention's output is. Then:
#
# ```python
# with known_bugs.inject(known_bugs.BUGS["RoPE backwards"]):
#     theirs = record.trace(model, ids)
# tolerances = {key: 2 * size for key, size in noise["exact"].items()}
# wrong = compare.compare(right, theirs, tolerances)
# print(wrong.first.name, wrong.diagnosis.kind, [j.name for j in wrong.judged if j.verdict == "departs"][:4])
# print(mismatch.row_errors(right.arrays["Qcur_pos-0"], theirs.arrays["Qcur_pos-0"])[:2], f"{wrong.judged[-1].error:.1e}")
# ```
#
# <details><summary>Answer</summary>
#
# `Qcur_pos-0`, "other rotation". The first position is right, because its angle is 0. And the output is wrong: the product of two vectors
# that are turned backwards is that of vectors turned by the opposite distance, which is another number.
#
# </details>
#
# **2. A short prompt.** Trace the window that is one too long with 40 tokens. Predict what `compare` says. Then:
#
# ```python
# with known_bugs.inject(bug):
#     theirs = record.trace(model, ids[:40])
# print(compare.compare_with(model, record.trace(model, ids[:40]), theirs).first)
# ```
#
# <details><summary>Answer</summary>
#
# Nothing departs (`None`): no token sees further than 40 positions back, so the window of 64 is never reached. A trace must be longer
# than the window.
#
# </details>
#
# **3. Smaller than noise.** `embedding scale rounded to bfloat16` moves all values by a ten-thousandth. Predict whether it is seen between
# two engines in float32, and between two with 8-bit activations: the deviation, and the noise of both kinds, of the first named value and
# of the logits:
#
# ```python
# with known_bugs.inject(known_bugs.BUGS["embedding scale rounded to bfloat16"]):
#     deviation = compare.deviations(right, record.trace(model, ids))
# [[f"{size[name]:.1e}" for size in (deviation, noise["exact"], noise["q8"])] for name in ("inp_scaled", "result_output")]
# ```
#
# <details><summary>Answer</summary>
#
# In float32 it stands out: 1.1e-4 where noise is 8e-8. With 8-bit activations noise is 6e-4 at once and 7e-3 at the logits, and the bug is
# not seen. So an engine is compared in the most exact arithmetic that it has.
#
# </details>
