"""Pictures of words that the built-in projector was trained to read; drawn here, so nothing has to be downloaded.

A picture is a card of 144 x 60 dots with a word in Pillow's own bitmap font (a letter is 6 x 11 dots). A budget of 70 tokens enlarges it
fourfold, to 576 x 240 pixels: 36 x 15 patches, 60 soft tokens.
"""

from collections.abc import Iterator

import numpy as np

WIDTH, HEIGHT, TOKENS = 144, 60, 70
LETTER = 6, 11
WORDS = tuple("""
    and as break class def del elif else for from if import in is not or pass raise return True try while with yield None False self
    print len range list dict set tuple str int bytes open name value key item index path file line text data
""".split())


def draw(word: str, x: int, y: int, ink: tuple[int, int, int] = (0, 0, 0), paper: tuple[int, int, int] = (255, 255, 255),
         size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """A card with a word whose upper left corner is at (x, y): uint8 (height, width, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    card = Image.new("RGB", size, paper)
    ImageDraw.Draw(card).text((x, y), word, fill=ink, font=ImageFont.load_default_imagefont())
    return np.array(card)


def random_card(word: str, rng: np.random.Generator, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """A card with the word at a random place, in random colours (dark on light), with noise."""
    x, y = (int(rng.integers(0, side - letter + 1)) for side, letter in zip(size, (LETTER[0] * len(word), LETTER[1])))
    card = draw(word, x, y, tuple(rng.integers(0, 100, 3).tolist()), tuple(rng.integers(170, 256, 3).tolist()), size)
    noisy = card + np.float32(rng.uniform(0, 25)) * rng.standard_normal(card.shape, np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def held_out(n: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """`n` words, each as often as the others, and their cards, of random numbers that the training did not use."""
    rng = np.random.default_rng([seed, 1 << 20])
    for i in range(n):
        yield WORDS[i % len(WORDS)], random_card(WORDS[i % len(WORDS)], rng)
