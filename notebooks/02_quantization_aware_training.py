# %% [markdown]
# # 2. Quantization-aware training
#
# **A model that was trained in 16 or 32 bits loses something when its weights are rounded to 4. Does it help to round while training,
# and where does it not?**
#
# The models that this package reads in Q4_0 come from Google as "QAT" releases: the rounding took part in the last stretch of their
# training. This notebook repeats that on a small scale, with the model family that ships with the package, against a fair opponent: the
# same network, trained for just as long on the same text without rounding, and rounded afterwards. All trainings were done before, by
# `python -m refimpl.tiny.training.qat`; what they found ships with the package. This notebook needs no torch; to
# repeat the training, install the `train` extra.

# %%
import numpy as np

import refimpl
from refimpl.files import qat_grid, recover_scales
from refimpl.formats.quants.basic import q4_0
from refimpl.lab.explain import qat_figures
from refimpl.lab.explain.show import source, table
from refimpl.tiny import qat_results

# %% [markdown]
# ## The grid
#
# Q4_0 cuts every row of a matrix into blocks of 32 weights. A block stores one scale $d$ in 16 bits and a code $q$ of 4 bits for each
# weight. The scale is chosen so that the weight of largest magnitude, with its sign, gets the code $-8$:
#
# $$ d = \frac{x_{\max}}{-8}, \qquad q_j = \operatorname{round}(x_j / d) \in \{-8, \dots, 7\}, \qquad w_j = d\, q_j $$
#
# With $-4$ in place of $-8$ and the codes $-4 \dots 3$ this is a grid of 3 bits, with $-2$ one of 2 bits. Their codes are some of Q4_0's,
# so a Q4_0 file can hold them. (Source: ggml's `quantize_row_q4_0_ref`.) The code of
# the training is in torch; its source is shown without importing it.

# %%
source("refimpl.tiny.training.grids.SignedMaximum")

# %% [markdown]
# One block of the model that ships, shifted off its grid a little so that there is something to round:

# %%
model = refimpl.load(backend="reference")
matrix = model.weights.layers[0].attention.query_AD.float32()
noisy = matrix + np.random.default_rng(0).normal(0, 0.01, matrix.shape).astype(np.float32)
qat_figures.block_picture(noisy[0, :32], {"4 bits": 8, "3 bits": 4, "2 bits": 2})

# %% [markdown]
# Two other grids take part. **W4A16**, in which checkpoints for GPUs are released, has codes $-8 \dots 7$ too, but a scale of
# $|x|_{\max} / 7.5$ in bfloat16. **Q4_K** has a minimum besides the scale, $w = d\,s\,q - d_{\min} m$, so that
# no code is wasted on one side.
#
# ## Training through the rounding
#
# Rounding is a staircase: its derivative is 0 almost everywhere, and a weight would never learn anything. The *straight-through
# estimator* (Bengio et al. 2013, arXiv:1308.3432, section 4) computes the loss with the rounded weights, and then treats the staircase as
# if it were the identity: the gradient found at the rounded weight $w(x)$ moves the unrounded weight $x$.
#
# $$ \frac{\partial L}{\partial x} := \frac{\partial L}{\partial w}\bigg|_{w = w(x)} $$
#
# So many small steps in one direction add up in $x$ until the code changes. (Learned step size quantization, Esser et al. 2020,
# arXiv:1902.08153, trains the scale too; here it follows from the weights in every step, because that is what the file's rule does.)

# %%
source("refimpl.tiny.training.grids.on_grid", "refimpl.tiny.training.qat.train_branch")

# %% [markdown]
# ## The comparison
#
# From one float checkpoint (of the run that made the model that ships, a third of the way, at full learning rate), three times with three
# seeds for the order of the text: a float control and one training on each grid. Same batches, same number of steps, and a learning rate
# that falls to 0 in each. The control is then rounded to every grid ("rounded"); the others end on theirs ("trained"). Measured on modules
# of Python's library that no training has seen: bits per byte, and against the control of the same seed the mean KL divergence and how
# often the most probable token is the same (top-1).

# %%
found = qat_results.results()
found["settings"]

# %%
print(qat_results.as_text(found).split("\n\nweights")[0])

# %%
qat_figures.comparison_picture(found, qat_results.TITLES)

# %% [markdown]
# ## Where it helps, and where not
#
# **At 2 bits** training on the grid wins back more than half of what rounding costs, in every seed. **At 3 bits** it is a third, in every
# seed too. **At 4 bits** rounding costs about a hundredth of a bit per byte, and there is little to win back: a fifth of it on W4A16's
# grid in every seed; on Q4_0's grid the seeds disagree about the sign; on Q4_K's, the finest of the three, training on the grid made the
# network worse in every seed. Whoever has 4 bits and little time may as well round. These trainings are short (100 steps of 4,096
# tokens) and the network is small: this is no statement about Google's releases.
#
# The other two columns point the other way, and that is not an error. A rounded control stays close to the control: at 4 and 3 bits it
# agrees with it more often than the network that was trained on the grid, which has learned something else with its own errors. Two
# controls that saw the same text in another order differ much more still:

# %%
table(["compared", "KL, nats", "same top-1"],
      [[f"control of seed {row['seed']} and of seed 0", f"{row['kl']:.3f}", f"{row['top1']:.1%}"]
       for row in found["releases"] if row["converted"] == "control of seed 0"])

# %% [markdown]
# So closeness to a float model says how faithful a conversion is, and not how good a model is. And rounding itself can be done better
# without any training: a scale chosen by least squares in place of the rule.

# %%
table(["control to Q4_0", "bits per byte", "KL, nats", "same top-1"],
      [[m["converted"], f"{m['bits_per_byte']:.4f} ± {m['bits_per_byte_sd']:.4f}", f"{m['kl']:.4f} ± {m['kl_sd']:.4f}", f"{m['top1']:.1%}"]
       for m in found["releases_mean"] if m["converted"].startswith("Q4_0 by")])

# %% [markdown]
# ## What the weights do meanwhile
#
# All weights in units of their block's scale, after the last step of the training to 2 bits and to 4, and those of the float control. The
# dotted lines are the borders between codes. (The spike of the largest weights at $-2$ and $-8$, there by definition, is cut off.)

# %%
history = found["history"]
grids = {"2 bits": (history["2-bit"]["histograms"], history["float"]["histograms"], "2-bit", 2),
         "4 bits": (history["q4_0"]["histograms"], history["float"]["histograms"], "q4_0", 8)}
qat_figures.histogram_picture(grids)

# %% [markdown]
# The weights do **not** gather on the grid points, although one might expect it. Nothing pulls a weight towards one: the loss depends on
# the code only, and is the same for all weights between two borders. The rounded weights, with which the model computes and which the file
# holds, are on the grid. The unrounded ones do the opposite, more clearly the fewer codes there are. Here is the density of the weights at
# the last step, divided by the float control's:

# %%
qat_figures.density_picture(grids)

# %% [markdown]
# Weights gather at the *borders*. One that would like to lie between two grid points is pushed up while it counts as the lower one, and
# down while it counts as the upper one, and so it stays where it changes sides (Nagel et al. 2022, arXiv:2203.11086, section 2, who call it
# oscillation). Each change of sides is a code that flips. The codes settle only because the learning rate falls:

# %%
qat_figures.flips_picture({name: history[name] for name in ("q4_k", "w4a16", "q4_0", "3-bit", "2-bit")}, qat_results.TITLES)

# %% [markdown]
# ## From the training to a file
#
# The file gets the codes and scales of the last step. Rounding numbers that are on a grid a second time is not safe, and that is the trap
# of releases that hold only the products $d\,q$ as bfloat16 numbers ("unquantized" QAT checkpoints). The rule gives the largest weight the
# code $-8$. If its code in the training was $+7$ or $-7$, all other weights now fall between the grid points of the new scale.
# Finding the scale from the numbers themselves is possible, because they are on a quantization grid:

# %%
source(recover_scales.recover_grid, recover_scales._on_grid)

# %% [markdown]
# A live example: a matrix of the built-in model on the W4A16 grid, as bfloat16 numbers. What the conversion to Q4_0 loses by the rule, and
# by finding the grid:

# %%
release = qat_figures.on_w4a16(noisy)
distance = qat_grid.distance_of(release).described()
table(["blocks on a grid", "lost by finding it", "lost by the rule", "weights that the rule moves"],
      [[f"{distance[key]:.2%}" for key in ("on_grid", "grid_rms", "rule_rms", "moved_by_rule")]])

# %%
source(q4_0.symmetric_codes)

# %% [markdown]
# And with the trained networks, each released as bfloat16 numbers and converted to Q4_0 in both ways. Compared with the release itself:

# %%
qat_figures.releases_picture(found, qat_results.TITLES)

# %%
means = found["releases_mean"]
table(["trained on", "converted", "KL, nats", "same top-1"],
      [[qat_results.TITLES[m["trained"]], m["converted"], f"{m['kl']:.4f}", f"{m['top1']:.1%}"] for m in means
       if m["converted"] in qat_results.RELEASES])

# %% [markdown]
# Grids that always put their largest weight on $-8$, $-4$ or $-2$ survive the rule, because the rule finds their scale or an exact
# fraction of it. W4A16's does not: the rule moves more than half of all weights. `refimpl inspect --grid -m FILE` shows for any file of
# float weights which case it is.

# %% [markdown]
# ## Exercises
#
# **1. On its own grid.** The matrix of the built-in model, before it was shifted, is on Q4_0's grid. Predict how many weights the rule
# for Q4_0 moves. Then:
#
# ```python
# own = qat_grid.distance_of(matrix).described()
# {key: f"{own[key]:.2%}" for key in ("on_grid", "moved_by_rule")}
# ```
#
# <details><summary>Answer</summary>
#
# None: it is where the rule puts it.
#
# </details>
#
# **2. Through bfloat16.** Round that matrix to bfloat16, as a release would. Does the rule find its grid then? Then:
#
# ```python
# rounded = ((matrix.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
# own = qat_grid.distance_of(rounded).described()
# {key: f"{own[key]:.2%}" for key in ("on_grid", "moved_by_rule", "rule_rms")}
# ```
#
# <details><summary>Answer</summary>
#
# Yes. All blocks are found on a grid, the rule moves no weight to another code, and what is left, 0.17 %, is the rounding to bfloat16.
# The codes of Q4_0's own training have their largest weight at $-8$; W4A16's, above, do not.
#
# </details>
#
# **3. Fewer bits still.** From the table: training on the grid won back a third of the loss at 3 bits and more than half at 2. Is that
# the same in every seed? Predict, then read it off:
#
# ```python
# {row["grid"]: [round(-d / row["rounding_costs"], 2) for d in row["difference"]] for row in found["against"]}
# ```
#
# <details><summary>Answer</summary>
#
# At 3 and 2 bits it is: 0.29 to 0.40, and 0.53 to 0.61. At 4 bits only W4A16's grid wins in every seed, by 0.08 to 0.31, and Q4_0's
# seeds differ in sign. Three seeds are few; one would have told any story.
#
# </details>
