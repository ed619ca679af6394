# %% [markdown]
# # 1. A block of Q4
#
# **What is in a quantized block, and what does it cost?**
#
# The largest mixture of experts of Gemma 4 has 26 billion weights. As 16-bit numbers they are 52 GB; the file that people download has
# 14. Nearly all of it is blocks like the two that are taken apart here, first into bits, then into weights. At the end all block types
# that GGUF files know are compared: the bits they take, the error they make, and how fast a processor multiplies with them.

# %%
import numpy as np

from refimpl.formats.gguf import open_gguf
from refimpl.formats.quants import blocks
from refimpl.formats.quants.basic import q4_0
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.formats.quants.iq import codebooks, iq2
from refimpl.formats.quants.k import q4_k
from refimpl.lab.explain import quant_table
from refimpl.lab.explain.blocks import bits_picture, error_picture, kernels_picture, number_of, speed_picture, weights_picture
from refimpl.lab.explain.show import source, table
from refimpl.loading.model import BUILT_IN

# %% [markdown]
# ## Eighteen bytes
#
# A matrix of the small model that ships with the package. The file says its name, its type and its shape; the bytes are those of its
# rows, one after the other.

# %%
file = open_gguf(BUILT_IN)
matrix = file.tensors["blk.0.ffn_gate.weight"]
raw = file.raw(matrix.name)
table(["tensor", "type", "weights", "bytes", "bytes of a row"],
      [[matrix.name, matrix.type, " x ".join(map(str, matrix.shape)), f"{matrix.n_bytes:,}", raw.shape[1]]])

# %% [markdown]
# A row of Q4_0 is a row of blocks, and a block is `block_q4_0` of llama.cpp's `ggml-common.h`: one 16-bit float and 32 numbers of 4
# bits. This is how the package describes it, and how it decodes it:

# %%
print(q4_0.__doc__)

# %%
source(q4_0.dequantize_q4_0, q4_0.codes_q4_0, blocks.unpack)

# %% [markdown]
# The first block of the first row, every bit of it. Outlined is what weight 17 is made of: the scale, and four bits of its own, which are
# the upper half of byte 3.

# %%
block = raw[0, :18]
bits_picture(block, "Q4_0", range(18), per_line=6, marked=("d", "q17"))

# %% [markdown]
# By hand: the first two bytes are the scale $d$, low byte first. Each weight is $d \cdot (q - 8)$, so that the 16 numbers that four bits
# can be reach from $-8d$ to $7d$. The last column is what the package's decoder says.

# %%
d = float(block[:2].view("<f2")[0])
weights = dequantize(block, "Q4_0")
table(["weight", "q", "q - 8", f"times d = {d:.6f}", "decoder"],
      [[j, q, q - 8, f"{d * (q - 8):.6f}", f"{weights[j]:.6f}"]
       for j in (0, 1, 2, 16, 17, 18) for q in [number_of(block, "Q4_0", f"q{j}")]])

# %% [markdown]
# ## From weights to bytes
#
# Which $d$? The codes reach one step further down than up. So the weight of largest magnitude is sent to the far end, where it is
# exact, and $d$ takes the sign that this needs; all others are rounded to the nearest code.

# %%
source(q4_0.symmetric_codes)

# %% [markdown]
# On random weights (normal, standard deviation 1), over the 16 values that this block can hold (grey lines):

# %%
x = quant_table.weights()["normal"][0, :256]
small = quantize(x[:32], "Q4_0")
values = float(small[:2].view("<f2")[0]) * (np.arange(16) - 8)
weights_picture(x[:32], dequantize(small, "Q4_0"), values[None], "A block of Q4_0")

# %% [markdown]
# What does it cost? A number that falls anywhere between two values that are $d$ apart is off by at most $d / 2$, and in the root of the
# mean square by $d / \sqrt{12}$ (Bennett 1948, "Spectra of quantized signals"). That is all there is to the error of this type, and it
# shows its weakness: $d$ belongs to the one largest weight of 32, and all the others pay for it.

# %%
sample = quant_table.weights()["normal"]
stored = quantize(sample, "Q4_0")
d_of_all = blocks.fields_of(stored, blocks.BLOCKS["Q4_0"])["d"].astype(np.float64)
table(["RMS error of 262,144 normal weights", ""],
      [["measured", f"{quant_table.relative_error(sample, dequantize(stored, 'Q4_0')):.4f}"],
       ["d / sqrt(12), root of the mean square over the blocks", f"{np.sqrt(np.mean(d_of_all**2) / 12):.4f}"]])

# %% [markdown]
# ## Q4_K: scales of scales
#
# Q4_K spends the same 4.5 bits a weight in another way. Its block has 256 weights in 8 sub-blocks of 32. Each sub-block has a scale and a
# minimum, which are themselves only 6-bit numbers, under two 16-bit floats for the whole block. A minimum lets the values lie where the
# weights are, instead of on both sides of zero.

# %%
print(q4_k.__doc__)

# %%
source(q4_k.restore, q4_k.unpack_scales)

# %% [markdown]
# A block of 144 bytes: its first 16, where all scales are, and 16 of the 128 with weights. Outlined is everything that weight 160 is made
# of, the first of sub-block 5: both floats, its own four bits, and the scale and the minimum of its sub-block, each of which lies in two
# bytes.

# %%
large = quantize(x, "Q4_K")
bits_picture(large, "Q4_K", [*range(16), *range(80, 96)], per_line=8, marked=("d", "dmin", "s5", "m5", "q160"))

# %%
d, dmin = (float(half) for half in large[:4].view("<f2"))
s, m, q = (number_of(large, "Q4_K", owner) for owner in ("s5", "m5", "q160"))
table(["d", "s", "q", "dmin", "m", "(d s) q - (dmin m)", "decoder", "before"],
      [[f"{d:.6f}", s, q, f"{dmin:.6f}", m, f"{d * s * q - dmin * m:.6f}", f"{dequantize(large, 'Q4_K')[160]:.6f}", f"{x[160]:.6f}"]])

# %% [markdown]
# Two of its sub-blocks. Their values have different distances and offsets; the largest weight of one no longer costs the other
# anything.

# %%
steps = np.array([[number_of(large, "Q4_K", f"s{k}"), number_of(large, "Q4_K", f"m{k}")] for k in (0, 1)])
values = d * steps[:, :1] * np.arange(16) - dmin * steps[:, 1:]
weights_picture(x[:64], dequantize(large, "Q4_K")[:64], values, "Two sub-blocks of Q4_K")

# %% [markdown]
# Nothing says which scale, minimum and integers are best for given weights. The package searches for them
# (`affine_search` in `refimpl/formats/quants/search.py`);
# llama.cpp's search is another one, with nearly the same error.
#
# ## All types
#
# Every type that a GGUF file may hold, on normal weights and on Laplace weights (of which more are large). Errors are relative: the root
# of the mean square of the difference over that of the weights. Where the package has no quantizer of its own, ggml's was asked, once;
# `refimpl/lab/explain/quant_table.py` says how.

# %%
rows = quant_table.rows()
table(quant_table.HEAD, quant_table.cells(rows))

# %% [markdown]
# As a picture. There is a least possible error: no code with $R$ bits a number can bring normal numbers back with a relative error
# below $2^{-R}$ (Shannon's rate-distortion function; Cover and Thomas, *Elements of Information Theory*, theorem 10.3.2). Every bit more
# halves it.

# %%
error_picture(rows)

# %% [markdown]
# Three things to see. The K types (green) lie below the types with one scale (blue) at the same bits. A type may be far from the line on
# these weights and good on its own: TQ1_0 and TQ2_0 are made for models trained with the three weights $-d, 0, d$, and lose nothing there.
# And below 3 bits the codebooks (red) keep closest to the line. (An error is that of a quantizer, not of what its type could hold: IQ1_M
# can hold whatever IQ1_S can, and yet ggml's search for it does worse on these weights.)
#
# ## What a codebook buys, and what it costs
#
# Four bits can be spent on one weight at a time. With two bits a weight has four values, which is little; so IQ2_XXS rounds eight
# weights together, to one of 256 vectors, and keeps eight bits of index and the signs. Here are the first four vectors:

# %%
codebooks.codebook("IQ2_XXS", iq2.MAGNITUDES)[:4].astype(int)

# %%
source(iq2.dequantize_iq2_xxs, codebooks.with_parity, codebooks.signed_steps)

# %% [markdown]
# The list must be looked up for every eight weights, at an address that depends on the data. Processors are slow at that. On one
# thread of an AMD EPYC with AVX-512, out of its cache, ggml multiplies so many weights a second:

# %%
speed_picture(rows)

# %% [markdown]
# Decoding reads every weight once for each token, so what counts is the slower of two things: how fast the bytes come out of memory, and
# how fast they are multiplied. The memory of that machine gives about 34 GB a second, 17 to each of its two threads. Q4_K takes 4.5 bits a
# weight, so that 30 billion weights a second arrive at a thread, and 40 could be multiplied: the memory is what it waits for. IQ3_S takes
# 3.44 bits, so that 40 billion could arrive, and 10 can be multiplied: it waits for the arithmetic, and with a file a quarter smaller a
# token takes three times as long. So on a machine with few threads: with 4 bits Q4_K, IQ4_NL or IQ4_XS (whose table of 16 values
# is one instruction), otherwise a K type. Where a model does not fit otherwise, a codebook is what is left.
#
# The table's third column says what this package does. It has kernels for the types that it holds with the bits of the file. All others
# it can read: it holds them as 32-bit floats, which is simple and right, and neither small nor fast.

# %% [markdown]
# This is how fast these kernels are, decoding with two threads from the memory of the same machine, Q4_0 being 1. Up to Q3_K the order is
# that of the bits: memory is what they wait for. Q3_K and Q2_K need more arithmetic for a weight, and win less than their bits promise.

# %%
kernels_picture(rows)

# %% [markdown]
# ## Exercises
#
# **1. One large weight.** In a block of 32 weights, make the largest four times as large. Predict the error of the 31 others. Then:
#
# ```python
# spoilt = x[:32].copy()
# most = np.abs(spoilt).argmax()
# spoilt[most] *= 4
# [float(np.sqrt(np.mean(np.delete(dequantize(quantize(b, "Q4_0"), "Q4_0") - b, most)**2))) for b in (x[:32], spoilt)]
# ```
#
# <details><summary>Answer</summary>
#
# It grows from 0.095 to 0.32. The scale is four times as large, and so are the distances between the values; the error follows, a little
# less, because some small weights now become exactly 0.
#
# </details>
#
# **2. One bit.** Flip the highest bit of byte 3 of the first block. Predict which weights change, and by how many times $d$. Then:
#
# ```python
# flipped = block.copy()
# flipped[3] ^= 0x80
# change = dequantize(flipped, "Q4_0") - weights
# np.flatnonzero(change), float(change[17] / block[:2].view("<f2")[0])
# ```
#
# <details><summary>Answer</summary>
#
# Only weight 17, by exactly $8d$: the upper half of byte 3 is its code, and the highest of four bits counts 8.
#
# </details>
#
# **3. Twice.** Quantize the decoded weights again. Predict whether the bytes are the same. Then:
#
# ```python
# again = quantize(dequantize(stored, "Q4_0"), "Q4_0")
# float((again.reshape(-1, 18) == stored.reshape(-1, 18)).all(axis=1).mean())
# ```
#
# <details><summary>Answer</summary>
#
# In every block. The largest weight is exactly $-8d$, so the rule finds the same $d$, and all others fall on their codes. Notebook 2
# has a grid for which this is not so.
#
# </details>
