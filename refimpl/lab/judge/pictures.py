"""Pictures for an endpoint: drawn here, sent as data URLs in a conversation, judged by the probabilities of the answer, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refimpl.lab.compare.towers.inputs import TowerInput, traced_prompt
from refimpl.lab.judge.ask import N_NEW, PICTURE, Answers, Asked, Asking
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.measure import Position
from refimpl.lab.judge.verdicts.probabilities import judged
from refimpl.lab.judge.verdicts.verdict import LEAST, UNKNOWN, Verdict, reason
from refimpl.loading.model import Model
from refimpl.loading.projector import Projector
from refimpl.media.images import data_url
from refimpl.media.parts import Image
from refimpl.text.chat import ChatError
from refimpl.text.prompt import encode_messages

TEXT = "What is in this picture?"


def drawn() -> dict[str, np.ndarray]:
    """Pictures, uint8 (H, W, 3): of a size that a budget of 280 tokens leaves as it is, a small one, and one that is long and noisy."""
    y, x = np.mgrid[0:768, 0:768]
    discs = np.stack([(x // 3) % 256, (y // 3) % 256, np.where((x - 300)**2 + (y - 400)**2 < 200**2, 230, 40)], axis=2)
    y, x = np.mgrid[0:90, 0:150]
    stripes = np.stack([np.where((x + y) % 24 < 12, 250, 20), np.where(y % 30 < 15, 200, 90), (x * 255) // 149], axis=2)
    noise = np.random.default_rng(7).integers(0, 256, (24, 60, 3)).repeat(10, axis=0).repeat(10, axis=1)
    return {"discs": discs.astype(np.uint8), "stripes": stripes.astype(np.uint8), "noise": noise.astype(np.uint8)}


def with_picture(model: Model, projector: Projector, rgb_HWC: np.ndarray) -> tuple[list[int], list[TowerInput]]:
    """A conversation with one, as `lab.compare.record.trace` takes it: ids with -1 for a soft token, and what the tower is given. Raises
    ChatError, ValueError.
    """
    image, template = Image(rgb_HWC), model.file.metadata.get("tokenizer.chat_template")
    encoded = encode_messages(model.tokenizer, template, [{"role": "user", "content": [image, TEXT]}], projector)
    return [max(i, -1) for i in encoded.ids], traced_prompt(model, projector, [image])[1]


def ask_pictures(asking: Asking, projector: Projector):
    """Asks for all of them."""
    for name, rgb_HWC in drawn().items():
        try:
            ids, media = with_picture(asking.model, projector, rgb_HWC)
        except (ChatError, ValueError) as error:
            asking.found.not_rendered[name] = str(error)
            continue
        content = [{"type": "image_url", "image_url": {"url": data_url(rgb_HWC)}}, {"type": "text", "text": TEXT}]
        if len(ids) <= asking.room:
            messages = [{"role": "user", "content": content}]
            answer = asking.tried(f"picture {name}", lambda messages=messages: asking.end.chat(messages, N_NEW))
            if answer is not None:
                asking.found.asked.append(Asked(name, ids, answer, PICTURE, media=tuple(media)))


def picture(end: Endpoint, found: Answers, positions: Sequence[Position], name: str) -> Verdict:
    """Preprocessing, tower and forward pass together, by the pictures that have as many tokens as here. What an engine makes of a size is
    its own affair, and often a setting.
    """
    others = {each.name: each for each in found.of(PICTURE) if each.answer.n_prompt not in (None, len(each.ids))}
    known = [p for p in positions if p.asked.way == PICTURE and p.asked.name not in others]
    said = "; ".join(f"the prompt with {name!r} has {each.answer.n_prompt} tokens, here {len(each.ids)}" for name, each in others.items())
    if len(known) < LEAST:
        why = (found.failed or [f"{len(known)} positions have probabilities"])[-1]
        return Verdict("picture", UNKNOWN, said or reason(end, found, "chat", why))
    result = judged("picture", known, name)
    return replace(result, evidence=f"{result.evidence}; {said}") if said else result
