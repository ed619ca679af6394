"""The towers of transformers' Gemma 4 in a trace: hooks on their modules, which names.py maps to names, and what the whole model is given.

They are given what a trace of ours was (patches, frames), so preprocessing is not judged: transformers' own needs the file, and for sound
and for the 12B packages that are no part of it.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.extras import require
from refimpl.lab.compare.names import TOWERS, Name
from refimpl.lab.compare.trace import TraceError

Given = Mapping[str, Mapping[str, np.ndarray]]
"""What towers are given: "image0" -> {"patches", "positions"}, "audio0" -> {"frames"}, in the order of the prompt."""
LAYERS = {"image": "vision_tower.encoder.layers", "audio": "audio_tower.layers"}
UNIFIED = {"inp": ("embed_vision.patch_ln2", "out"), "pos_embd": ("embed_vision.pos_norm", "in"),       # of the 12B, which has no tower
           "projected": ("embed_vision.multimodal_embedder", "out")}


def traced(whole, given: Given, arrays: dict[str, np.ndarray]):
    """Runs every tower on its own and keeps all that has a name, what it is given too. `whole`: a Gemma4Model or Gemma4UnifiedModel."""
    torch = require("torch", "train")
    for name, parts in given.items():
        tower = name.rstrip("0123456789")
        if not hasattr(whole, "get_image_features") or (whole.embed_vision if tower == "image" else whole.embed_audio) is None:
            raise TraceError(f"transformers: this model has no part that takes {name}")
        arrays |= {f"{name}.{which}": array for which, array in parts.items()}
        tensors = [torch.from_numpy(array.copy())[None] for array in parts.values()]
        with torch.no_grad(), watched(whole, tower, f"{name}.", arrays):
            if tower == "image":
                whole.get_image_features(*tensors)
            else:
                whole.get_audio_features(tensors[0], torch.ones(tensors[0].shape[:2], dtype=torch.bool))


def inputs(model, ids: Sequence[int], given: Given) -> dict[str, object]:
    """The arguments of the whole model for ids with -1 - k for a soft token of number k of `given`, padded where sizes differ."""
    torch, config = require("torch", "train"), model.config
    placeholder = [config.image_token_id if name.startswith("image") else config.audio_token_id for name in given]
    found = {"input_ids": torch.tensor([[placeholder[-1 - i] if i < 0 else i for i in ids]])}
    images, sounds = ([parts for name, parts in given.items() if name.startswith(tower)] for tower in TOWERS)
    if images:
        found["pixel_values"], _ = padded([parts["patches"] for parts in images], 0.0)
        found["image_position_ids"], _ = padded([parts["positions"] for parts in images], -1)
    if sounds:
        found["input_features"], found["input_features_mask"] = padded([parts["frames"] for parts in sounds], 0.0)
    of_image = torch.tensor([[i < 0 and placeholder[-1 - i] == config.image_token_id for i in ids]])
    of_sound = torch.tensor([[i < 0 for i in ids]]) & ~of_image
    found["mm_token_type_ids"] = of_image.long() + 3 * of_sound
    if model.config.model_type == "gemma4_unified":         # `forward` itself takes the mask of an older release
        code, text = sys.modules[type(model).__module__], config.text_config
        number = torch.tensor([[-1 - i if image else -1 for i, image in zip(ids, of_image[0].tolist())]])
        x = torch.zeros(1, len(ids), text.hidden_size, dtype=model.dtype)
        found["attention_mask"] = code.create_masks_for_vision_model(text, x, None, None, None, number)
    return found


def padded(arrays: Sequence[np.ndarray], value: float):
    """(arrays of different lengths as one tensor, which rows are theirs)."""
    torch, longest = require("torch", "train"), max(map(len, arrays))
    whole = np.stack([np.pad(array, ((0, longest - len(array)), (0, 0)), constant_values=value) for array in arrays])
    return torch.from_numpy(whole), torch.tensor([[t < len(array) for t in range(longest)] for array in arrays])


@contextlib.contextmanager
def watched(whole, tower: str, prefix: str, arrays: dict[str, np.ndarray]):
    """Hooks on the modules of one tower for the length of a `with` block, which fill `arrays`."""
    from refimpl.lab.compare.engines.transformers import numpy, part_of

    code, hooks, rotations = sys.modules[type(whole).__module__], [], []
    rotate = getattr(code, "apply_multidimensional_rope", None)

    def keep(label: str, value):
        value = numpy(value)
        arrays[prefix + label] = value if value.ndim < 3 else value[0]

    def hook(module, side: str, label: str):
        side, _, item = side.partition(" ")

        def after(module, args, options, out):
            value = [*args, *options.values()] if side == "in" else out
            keep(label, value[int(item or 0)] if isinstance(value, list | tuple) else value)
        hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def rotated(x, *args, **options):
        out = rotate(x, *args, **options)
        keep(rotations.pop(0), out)
        return out

    layers = part_of(whole, LAYERS[tower])
    for name in TOWERS[tower]:
        for label, module, side in modules_of(whole, name, tower, layers):
            hook(module, side, label)
    if layers is not None and tower == "image":
        for i, layer in enumerate(layers):
            hooks.append(layer.self_attn.register_forward_pre_hook(
                lambda *_, i=i: rotations.__setitem__(slice(None), [f"Qcur_pos-{i}", f"Kcur_pos-{i}"])))
        code.apply_multidimensional_rope = rotated
    try:
        yield
    finally:
        if rotate is not None:
            code.apply_multidimensional_rope = rotate
        for h in hooks:
            h.remove()


def modules_of(whole, name: Name, tower: str, layers) -> list[tuple[str, object, str]]:
    """(label, module, side) of a name, for every layer that has it."""
    from refimpl.lab.compare.engines.transformers import part_of

    if layers is None:                                      # the 12B
        module, side = UNIFIED.get(name.name, ("", "")) if tower == "image" else (name.module, name.side)
        found = [(name.name, part_of(whole, module), side)] if module and not name.layered else []
    elif name.layered:
        found = [(f"{name.name}-{i}", part_of(layer, name.module), name.side) for i, layer in enumerate(layers) if name.side != "rotated"]
    elif name.name == "std_scaled":
        found = [(name.name, whole.embed_vision, "in")] if whole.config.vision_config.standardize else []
    else:
        below = whole if name.name == "projected" else part_of(whole, f"{tower}_tower".replace("image", "vision"))
        found = [(name.name, part_of(below, name.module), name.side)]
    return [(label, module, side) for label, module, side in found if module is not None]
