"""A trace of transformers' Gemma 4: hooks on its modules, which names.py maps to names, and a look at its rotation.

Takes a Gemma4ForCausalLM (or the language model in a larger one), or a Hugging Face directory. torch and transformers are imported only
when this is used: they are no dependency.
"""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.extras import require
from refimpl.lab.compare.engines import transformers_towers as towers
from refimpl.lab.compare.names import NAMES, Name
from refimpl.lab.compare.trace import Trace, TraceError

TYPES = ("float32", "bfloat16", "float16")
# modules that are handed all positions as rows, without a batch axis
ROWS = ("router", "router.proj", "experts", "pre_feedforward_layernorm_2")


def trace(model, ids: Sequence[int], drafter=None, draft_max: int = 4, dtype: str = "float32", given: towers.Given | None = None) -> Trace:
    """Runs `ids` without a cache and keeps every value that has a name; then `draft_max` steps of `drafter`, a
    Gemma4AssistantForCausalLM or a directory, as `refimpl.propose` makes them. A directory is loaded in `dtype`. Where -1 - k is among
    the ids, `given` has what the towers take, which run first. Raises TraceError.
    """
    torch = require("torch", "train")
    model = load(model, dtype) if isinstance(model, str | os.PathLike) else model
    arrays: dict[str, np.ndarray] = {}
    text = model.model if hasattr(model.model, "layers") else model.model.language_model
    given = given or {}
    outside = [i for i in ids if not -len(given) <= i < text.config.vocab_size]
    if outside:
        raise TraceError(f"transformers: token id {outside[0]} is outside of the vocabulary (0 to {text.config.vocab_size - 1})")
    towers.traced(model.model, given, arrays)
    inputs = towers.inputs(model, ids, given) if given else {"input_ids": torch.tensor([list(ids)], device=model.device)}
    with torch.no_grad(), watched(text, arrays):
        if given:                       # soft tokens take their places behind the embedding: the first layer is given them
            first = text.layers[0].register_forward_pre_hook(lambda module, args: arrays.update(inp_scaled=numpy(args[0])[0]))
        out = model(**inputs, use_cache=False, return_shared_kv_states=drafter is not None)
    if given:
        first.remove()
    arrays["result_output"] = numpy(out.logits[0])
    if drafter is not None:
        drafter = load(drafter, dtype) if isinstance(drafter, str | os.PathLike) else drafter
        arrays |= drafts(text, drafter, list(ids), draft_max)
    import transformers

    return Trace("transformers", tuple(map(int, ids)), tuple(range(len(ids))), str(model.dtype).removeprefix("torch."), arrays,
                 {"engine": f"transformers {transformers.__version__}"})


def load(path: str | os.PathLike, dtype: str):
    """The model in a directory. Raises MissingExtra without torch and transformers, TraceError where they refuse it."""
    torch, transformers = require("torch", "train"), require("transformers", "train")
    if dtype not in TYPES:
        raise TraceError(f"transformers: no type {dtype!r}, expected {', '.join(TYPES)}")
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise TraceError(f"{path}: no config.json; transformers takes a Hugging Face directory")
    try:
        kinds = transformers.AutoConfig.from_pretrained(path).model_type
        cls = transformers.Gemma4AssistantForCausalLM if kinds.endswith("assistant") else transformers.AutoModelForCausalLM
        return cls.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise TraceError(f"{path}: transformers cannot load it: {' '.join(str(error).split())}") from None


def numpy(x) -> np.ndarray:
    """A tensor without the batch axis, as float32 or int64."""
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x.long()).numpy().copy()


@contextlib.contextmanager
def watched(text, arrays: dict[str, np.ndarray]):
    """Hooks on a Gemma4TextModel for the length of a `with` block, which fill `arrays`."""
    code = sys.modules[type(text).__module__]
    hooks, inputs, rotations, rotate = [], [], [], code.apply_rotary_pos_emb

    def hook(name: Name, module, label: str, head_dim: int | None = None):
        side, _, item = name.side.partition(" ")

        def after(module, args, out):
            value = args[0] if side == "in" else out
            value = numpy(value[int(item or 0)] if isinstance(value, tuple) else value)
            value = value if name.module in ROWS else value[0]
            arrays[label] = value if head_dim is None else value.reshape(len(value), -1, head_dim)
        hooks.append(module.register_forward_hook(after))

    def rotated(x, *args, **options):
        out = rotate(x, *args, **options)
        if rotations:                   # in a layer of text: vision towers rotate by the same function
            arrays[rotations.pop(0)] = numpy(out)[0]
        return out

    for name in NAMES:
        module = part_of(text, name.module.removeprefix("model.")) if name.module.startswith("model.") and not name.layered else None
        if module is not None:
            hook(name, module, name.name)
    for i, layer in enumerate(text.layers):
        kind, attention = "experts" if hasattr(layer, "router") else "dense", layer.self_attn
        # the rotation is a function and no module: an attention calls it for its queries, and then for its keys
        hooks.append(attention.register_forward_pre_hook(
            lambda *_, i=i: rotations.__setitem__(slice(None), [f"Qcur_pos-{i}", f"Kcur_pos-{i}"])))
        for name in NAMES:
            module = part_of(layer, name.module) if name.layered and name.side != "rotated" and name.only in ("", kind) else None
            if name.name == "Vcur" and module is None and not attention.is_kv_shared_layer:
                module = attention.k_proj
            if module is not None:
                hook(name, module, f"{name.name}-{i}", attention.head_dim if name.module.startswith("self_attn") else None)
        if getattr(text, "hidden_size_per_layer_input", 0):
            hooks.append(layer.register_forward_pre_hook(lambda module, args: inputs.append(numpy(args[1])[0])))
    code.apply_rotary_pos_emb = rotated
    try:
        yield
    finally:
        code.apply_rotary_pos_emb = rotate
        for h in hooks:
            h.remove()
    if inputs:
        arrays["inp_per_layer"] = np.stack(inputs, 1)
        arrays["inp_per_layer_selected"] = arrays["inp_per_layer_selected"].reshape(arrays["inp_per_layer"].shape)


def part_of(module, path: str):
    """A module below another, None where there is none of that path ("." is itself, "" is none)."""
    for part in path.strip(".").split(".") if path != "." else ():
        module = getattr(module, part, None) if part else None
    return module


def drafts(text, drafter, ids: list[int], n: int) -> Mapping[str, np.ndarray]:
    """The steps of a draft, on keys of exactly the positions before the last id, of which sliding layers see window - 1."""
    import torch

    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        out = text(input_ids=torch.tensor([ids[:-1]], device=text.device), use_cache=False, return_shared_kv_states=True)
        state, token, shared = out.last_hidden_state[:, -1:], ids[-1], dict(out.shared_kv_states)
        shared["sliding_attention"] = tuple(x[:, :, -(text.config.sliding_window - 1):] for x in shared["sliding_attention"])
        for step in range(n):
            values: dict[str, np.ndarray] = {}
            both = torch.cat([text.embed_tokens(torch.tensor([[token]], device=text.device)), state], -1)
            with watched(drafter.model, values):
                out = drafter(inputs_embeds=both, position_ids=torch.tensor([[len(ids) - 1]]), shared_kv_states=shared)
            state, token = out.last_hidden_state, int(out.logits[0, -1].argmax())
            values |= {"inp_xh": numpy(both[0]), "pre_proj": numpy(drafter.pre_projection(both)[0]), "h_nextn": numpy(state[0]),
                       "result_output": numpy(out.logits[0])}
            found |= {f"draft{step}.{name}": value for name, value in values.items()}
    return found
