# %% [markdown]
# # 7. How it sees and hears
#
# **How does a picture, or a sound, become something that a model of words can read? And what does it cost?**
#
# A text model reads rows: one row of numbers for each token, taken from a table. It does not care where a row comes from. So a second
# network, the *projector*, makes rows out of a picture, as many as its size asks for, and they are put between the rows of the words.
# They are called *soft tokens*, because no entry of the vocabulary stands behind them.
#
# The model here is the small one that ships with the package, and a projector that was trained for it in a few minutes: it reads
# pictures of 48 words. Everything it does, the large ones do with more numbers.

# %%
import numpy as np

import refimpl
from refimpl.lab.explain import hearing, seeing
from refimpl.lab.explain.show import RED, source, table, visible
from refimpl.media import mel, patches
from refimpl.media.parts import Image
from refimpl.model.towers import conformer, vision
from refimpl.reference import tower_attention
from refimpl.text.prompt import encode_prompt
from refimpl.tiny import pictures
from refimpl.tiny.evaluate_projector import read

# %% [markdown]
# ## A picture becomes patches
#
# The picture is a card of 144 x 60 pixels with a word in a bitmap font. First it is scaled. A picture has a *budget* of tokens, here
# 70, and is stretched until it fills it: both sides become multiples of 48 pixels, and no more than 70 squares of 48 x 48 fit in.
# Small pictures grow, large ones shrink.

# %%
source(patches.size_for, patches.patches)

# %%
card = pictures.draw("return", 50, 25, ink=(20, 40, 90), paper=(250, 240, 215))
scaled = patches.pixels(card, 70)
patches_TP, pos_T2 = patches.patches(scaled)
on_letter, on_paper = 7 * 36 + 16, 2 * 36 + 4
seeing.grid_picture(scaled, marks=[(on_letter, RED)])

# %%
table(["", "shape", "numbers"],
      [["the card", card.shape, f"{card.size:,}"], ["scaled", scaled.shape, f"{scaled.size:,}"],
       ["patches", patches_TP.shape, f"{patches_TP.size:,}"],
       ["soft tokens", (len(patches_TP) // 9, 128), f"{len(patches_TP) // 9 * 128:,}"]])

# %% [markdown]
# Thin lines cut the picture into **patches** of 16 x 16 pixels, thick ones into what will be a soft token, 3 x 3 patches. A patch is
# a row of 16 x 16 x 3 = 768 numbers, and one matrix makes a row of the width of the network out of it: it is the network's table of
# words. Each row of that matrix is a little picture itself, and says what it responds to:

# %%
model = refimpl.load(threads=1)
projector = refimpl.load_projector(None, model)
seeing.filters_picture(seeing.numbers_of(projector.file, "v.patch_embd.weight"))

# %% [markdown]
# ## Where a patch is
#
# The rows of the patches know nothing of places. Gemma 4 says it twice. First, a row is added for the column the patch is in and one
# for its line, from two tables (this projector has 256 of each, the published ones 10,240). Second, in each layer queries and keys are
# turned by the place (RoPE, notebook 3): the first half of a head by the column, the second half by the line.

# %%
source(vision.rotate)

# %% [markdown]
# What does that do? If query and key are equal in all their pairs, the turn alone makes this of the score between the marked patch and
# every other:

# %%
by_x, by_y = seeing.rotation_scores(projector.config.vision.head_dim, pos_T2, on_letter)
seeing.places_picture({"half that turns by x": by_x, "half that turns by y": by_y}, 36, on_letter, "share of the score")

# %% [markdown]
# Only the distance counts, not the place; so a word is the same word anywhere on the card, and the network can ask for "the patch to
# the right of me". The tables of places matter less in this small network. The size of what they add, beside the row of a patch:

# %%
seen = {}
projector.image_tokens(patches_TP, pos_T2, tap=seen.__setitem__)
added_TD = seen["pos_embd"] - seen["inp"]
table(["", "mean length of a row"], [["of patches", f"{np.linalg.norm(seen['inp'], axis=1).mean():.2f}"],
                                     ["of places", f"{np.linalg.norm(added_TD, axis=1).mean():.2f}"]])

# %% [markdown]
# ## Attention between patches
#
# The layers are those of the text model (norms in front and behind, unscaled scores, a gated feed-forward network), with one great
# difference: nothing is hidden. A picture has no past and no future, so every patch sees all patches.

# %%
source(tower_attention.attend_all, vision.run_layer)

# %% [markdown]
# Where does the patch with the red frame above look? One panel for each head: the redder, the more weight.

# %%
maps = seeing.attention_of(projector, patches_TP, pos_T2)
seeing.looks_picture(scaled, maps, on_letter)

# %%
inked = (patches_TP.reshape(len(patches_TP), -1, 3).mean(axis=-1).min(axis=-1) < 0.6)
distance_T = np.linalg.norm(pos_T2 - pos_T2[on_letter], axis=1)
table(["layer", "head", "of its weight on patches with ink", "patches away, on average"],
      [[i, n, f"{weight_NTT[n, on_letter, inked].sum():.0%}", f"{weight_NTT[n, on_letter] @ distance_T:.1f}"]
       for i, weight_NTT in enumerate(maps) for n in range(len(weight_NTT))])

# %% [markdown]
# For comparison: ink covers this share of the patches, and the mean distance to all patches is this.

# %%
table(["patches with ink", "mean distance, patches"], [[f"{inked.mean():.0%}", f"{distance_T.mean():.1f}"]])

# %% [markdown]
# One head of the first layer looks at ink, most of all at where the word begins. In the second layer the same patch spreads its weight
# over the paper. What has become of its row behind the layers? Below, how similar it is to the rows of all other patches. In front of the
# layers a stroke is like few others. Behind them the patches of the word are like each other: each tells less of its own stroke, and more
# of the word that it is a part of.

# %%
seeing.similarity_picture(seen["pos_embd"], seen[f"layer_out-{projector.config.vision.n_layer - 1}"], 36, on_letter)

# %% [markdown]
# ## Nine patches become one soft token
#
# The text model would have to read every patch. So squares of 3 x 3 patches are averaged, and one more matrix brings the result to the
# width of the text model. Without a class token, as the first vision transformers had one (Dosovitskiy et al. 2020, arXiv:2010.11929,
# section 3.1): a picture becomes many tokens, row by row, and the text model decides which to look at.

# %%
source(vision.pool)

# %% [markdown]
# What does the mean throw away? Here is the share of the differences between patches that lies *within* squares and is lost, and the
# share between squares that is kept; before the layers and behind them.

# %%
rows = []
for name, x_TD in (("in front of the first layer", seen["pos_embd"]), ("behind the last layer", seen["layer_out-1"])):
    mean_TD = np.repeat(vision.pool(x_TD, 36).reshape(5, 12, -1), 3, axis=1).repeat(3, axis=0).reshape(x_TD.shape)
    lost = ((x_TD - mean_TD)**2).sum() / ((x_TD - x_TD.mean(axis=0))**2).sum()
    rows.append([name, f"{lost:.0%}", f"{1 - lost:.0%}"])
table(["differences between patches", "lost by the mean", "kept"], rows)

# %% [markdown]
# The mean of raw patches would lose most of it. Behind the layers, which have spread what the patches know, it loses less; and training
# sees to it that what the text model needs survives.
#
# ## What the budget costs
#
# Five budgets were trained: 70, 140, 280, 560 and 1,120 tokens. This is what becomes of three pictures:

# %%
sizes = {"512 x 512": (512, 512), "1920 x 1080": (1080, 1920), "4032 x 3024 (a phone's)": (3024, 4032)}
table(["picture", *map(str, patches.BUDGETS)],
      [[name, *("{1} x {0} = {2}".format(*patches.size_for(*size, budget), patches.n_tokens(*size, budget)) for budget in patches.BUDGETS)]
       for name, size in sizes.items()])

# %% [markdown]
# Twice the tokens cost twice the matrix products, in the projector and in the text model. Attention between patches grows with the
# square: nine patches a token, each with each. For the phone's picture:

# %%
seeing.work_picture(patches.BUDGETS, sizes["4032 x 3024 (a phone's)"])

# %%
rows = []
for budget in patches.BUDGETS:
    n = patches.n_tokens(*sizes["4032 x 3024 (a phone's)"], budget)
    works = [seeing.tower_work(config, 9 * n) for config in seeing.TOWERS.values()]
    rows.append([budget, n, f"{9 * n:,}", *(f"{sum(work) / 1e12:.2f} ({work[1] / sum(work):.0%})" for work in works),
                 f"{seeing.cells_work(n) / 1e12:.3f}"])
table(["budget", "tokens", "patches", *(f"{name}: 10^12 operations (attention)" for name in seeing.TOWERS), "12B"], rows)

# %% [markdown]
# A processor that does 10^11 operations a second, which two cores can, needs ten seconds for 10^12. So on a CPU the wait for an answer
# about a picture is often the wait for the projector. The 12B has none of this: it has no tower, only two matrices that take squares
# of 48 x 48 pixels at once, and leaves the seeing to the text model.
#
# ## Soft tokens in the text
#
# Now the picture stands in a prompt. In the list of ids a soft token is a negative number, made of a hash of the picture; the text
# model looks up a row for ids, and takes the projector's rows for the others. Markers stand around them.

# %%
encoded = encode_prompt(model.tokenizer, None, ["# ", Image(card, 70), "\n"], projector)
ids = encoded.ids
table(["place", "id", "token"],
      [[i, ids[i], f"`{visible(model.tokenizer.decode(ids[i:i + 1], special=True))}`" if ids[i] >= 0 else f"soft token {i - 3}"]
       for i in (0, 1, 2, 3, 4, 5, len(ids) - 3, len(ids) - 2, len(ids) - 1)])

# %% [markdown]
# A text model never looks ahead. For the rows of a picture that makes no sense: its upper left corner would know nothing of the rest.
# In the 12B, the 26B-A4B and the 31B, and so in the small model here, the rows of one picture see each other in the **sliding** layers,
# to the right as well. Full layers stay causal, and so does everything in E2B and E4B. For a picture between two texts:

# %%
window = model.config.layers[0].window
longer = encode_prompt(model.tokenizer, None, ["x = 1\n" * 10, Image(card, 70), "y = 2\n" * 20], projector)
seeing.sight_picture({f"sliding layer, window {window}": seeing.sight(longer.soft, longer.ids, window, True),
                      "full layer": seeing.sight(longer.soft, longer.ids, None, True),
                      "sliding layer of E2B, E4B": seeing.sight(longer.soft, longer.ids, window, False)})

# %% [markdown]
# The square in the first panel is the picture. It is also why a picture has to be read in one piece: its first row needs the keys of its
# last.
#
# ## It reads
#
# What follows `# `, with and without the picture behind it? The model is not told that there is a word to be read.

# %%
shown = ["return", "yield", "raise", "This", "The", "self"]
first = [model.tokenizer.encode(word, bos=False)[0] for word in shown]
blank = pictures.draw("", 0, 0, paper=(250, 240, 215))
other = pictures.draw("yield", 20, 8, ink=(120, 10, 10), paper=(225, 235, 255))
prompts = {"no picture": ["# "], "the card above": ["# ", Image(card, 70)], "a card with yield": ["# ", Image(other, 70)],
           "a card without a word": ["# ", Image(blank, 70)]}
chances = {name: seeing.next_probabilities(model, projector, parts)[first] for name, parts in prompts.items()}
seeing.next_picture(shown, chances)

# %% [markdown]
# The text model was frozen while the projector was trained. Nothing in it was made for pictures: the projector learned to write rows
# that make it say the word.
#
# Which soft tokens carry the word? Each in turn is replaced with the one of the blank card in the same place, and the probability of
# the word is computed again. Blue: it falls; the dot is where it falls most. No token has the word alone: the tower has told many.

# %%
soft_TD, blank_TD = projector.image(card, 70), projector.image(blank, 70)
falls = seeing.falls_without(model, soft_TD, blank_TD, ids, first[0])
seeing.places_picture({"change of the probability, the largest = 1": falls / np.abs(falls).max()}, 12, int(falls.argmin()), "change")

# %%
table(["", "probability of the word"],
      [["all soft tokens", f"{seeing.chance_of(model, soft_TD, ids, first[0]):.3f}"],
       ["without the most important one", f"{seeing.chance_of(model, soft_TD, ids, first[0]) + falls.min():.3f}"],
       ["all from the blank card", f"{seeing.chance_of(model, blank_TD, ids, first[0]):.3f}"]])

# %% [markdown]
# Now 48 cards that the training did not have, one for each word: other places, colours and noise.

# %%
cards = list(pictures.held_out(48, seed=7))
read_as = [read(model, projector, held) for _, held in cards]
right = sum(word == text for (word, _), text in zip(cards, read_as))
wrong = ", ".join(f"{word} as {text!r}" for (word, _), text in zip(cards, read_as) if word != text)
table(["cards", "read", "misread"], [[len(cards), right, wrong or "none"]])

# %% [markdown]
# It has learned 48 words, and no more than that. Words it does not know it reads as others:

# %%
unknown = [[word, read(model, projector, pictures.draw(word, 40, 20))] for word in ("returns", "lass", "spam", "nope", "xyzzy")]
table(["a word it was not taught", "read as"], unknown)

# %% [markdown]
# And it knows letters of one size, 24 pixels wide as the tower sees them, on cards of 60 tokens. A larger budget makes the same letters
# larger. On a page of four times the area, with letters as large as on the card, it takes four times the tokens to see them as
# large.

# %%
rng = np.random.default_rng(0)
pages = [(word, pictures.random_card(word, rng, (288, 120))) for word in pictures.WORDS[::3]]
rows = []
for name, these in (("card", cards[::3]), ("page of four times the area", pages)):
    for budget in (70, 280):
        height, width = patches.size_for(*these[0][1].shape[:2], budget)
        letter = width * pictures.LETTER[0] / these[0][1].shape[1]
        hits = sum(word == read(model, projector, held, budget) for word, held in these)
        rows.append([name, budget, height * width // 48**2, f"{letter:.0f} pixels wide", f"{hits} of {len(these)}"])
table(["picture", "budget", "tokens", "a letter", "read"], rows)

# %% [markdown]
# A budget of 70 leaves too little of the page's letters. With 280 they have their size again, but among so many patches and tokens as it
# never had in training it is lost. The published models were trained with all five budgets: this one pays for its few minutes.

# %% [markdown]
# ## Sound
#
# E2B, E4B and the 12B hear. The built-in model does not, so this part shows what is done to a sound, and not what a model makes of it.
# Here is a tune: eight notes of 0.25 s.

# %%
notes = [261.6, 293.7, 329.6, 349.2, 392.0, 440.0, 493.9, 523.3]
samples = hearing.tune(notes, 0.25)
frames = mel.mel_frames(samples)
hearing.sound_picture(samples, frames, 6)

# %% [markdown]
# Every 10 ms, a window of 20 ms is cut out, and its spectrum is summed up by 128 filters that stand close together where pitch is low and
# wide apart where it is high, as in the ear (the mel scale). Their logarithm is a column of the lower picture. Each note is a
# set of lines: its pitch and its overtones. Thin white lines cut what will be the first six tokens: four columns, 40 ms each.

# %%
source(mel.mel_frames)

# %% [markdown]
# Two convolutions of 3 x 3 numbers make one row of four columns, each with a stride of 2 in time and in pitch. The sizes, as in E2B:

# %%
n = len(frames)
half, quarter = -(-n // 2), mel.n_tokens(len(samples))
table(["", "rows in time", "in pitch", "channels", "numbers"],
      [["samples", f"{len(samples):,}", "", "", f"{len(samples):,}"], ["mel frames", n, 128, 1, f"{n * 128:,}"],
       ["first convolution", half, 64, 128, f"{half * 64 * 128:,}"], ["second convolution", quarter, 32, 32, f"{quarter * 32 * 32:,}"],
       ["one matrix", quarter, "", "", f"{quarter * 1024:,}"], ["soft tokens", quarter, "", "", f"{quarter * 1536:,}"]])

# %% [markdown]
# So a second of sound is 25 tokens, and the 30 s that E2B and E4B hear at most are 750. The 12B takes frames of 640 samples as they are,
# which is 25 a second as well.
#
# The layers are a *conformer* (Gulati et al. 2020, arXiv:2005.08100): half a feed-forward network, attention, a convolution in time, the
# other half. In its attention a row sees itself and the 11 rows before it, and nothing ahead:

# %%
source(conformer.run_layer, tower_attention.attend_band)

# %%
seeing.sight_picture({"conformer: the latest 12 rows": hearing.band(quarter)})

# %% [markdown]
# Keys are not turned. Instead each distance, 0 to 11, has a key of its own, which a matrix makes of this code:

# %%
hearing.code_picture(conformer.distance_code(64))

# %%
one, twelve = hearing.reach_ms(12, 5)
table(["layers", "a token has heard at most"], [[1, f"{one / 1000:.2f} s"], [12, f"{twelve / 1000:.1f} s"]])

# %% [markdown]
# A vision tower gives every patch the whole picture. The conformer gives a row half a second in a layer, a few seconds in all: what a
# sound of half a minute means as a whole is left to the text model.

# %% [markdown]
# ## Exercises
#
# **1. Another side.** Turn the card upside down, mirror it, and exchange light and dark. Predict what is read. Then:
#
# ```python
# [read(model, projector, np.ascontiguousarray(changed)) for changed in (card, card[::-1, ::-1], card[:, ::-1], 255 - card)]
# ```
#
# <details><summary>Answer</summary>
#
# Upright it is `return`. Turned and mirrored, both are read as `yield`, a word that is not there; light on dark it reads nothing, and
# goes on with `with with`. It has seen dark, upright letters only, and says some word for whatever looks like one.
#
# </details>
#
# **2. Two cards.** Put both cards behind `# `, first the one and then the other. Predict which word comes. Then:
#
# ```python
# both = [["# ", Image(a, 70), Image(b, 70)] for a, b in ((card, other), (other, card))]
# [{word: round(float(p), 2) for word, p in zip(shown[:2], seeing.next_probabilities(model, projector, parts)[first])} for parts in both]
# ```
#
# <details><summary>Answer</summary>
#
# `yield`, the later one, has 0.60 in the first order; in the second neither word has more than 0.01. It was trained with one picture in a
# prompt, and two are something else for it.
#
# </details>
#
# **3. Twice the budget.** A picture of 1920 x 1080 with a budget of 280 and of 560: predict how many times the work of E2B's tower grows,
# and how many times that of its attention alone. Then:
#
# ```python
# counts = [patches.n_tokens(1080, 1920, budget) for budget in (280, 560)]
# works = [seeing.tower_work(next(iter(seeing.TOWERS.values())), 9 * n) for n in counts]
# counts, sum(works[1]) / sum(works[0]), works[1][1] / works[0][1]
# ```
#
# <details><summary>Answer</summary>
#
# 2.5 times for twice the tokens (264 and 527). Attention alone grows four times, and the matrices twice.
#
# </details>
