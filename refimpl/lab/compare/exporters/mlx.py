"""Writes values of a Gemma 4 in MLX as .npz, for `refimpl compare`. MLX has no hooks: for the length of a `with` block the modules'
classes are called through a function that keeps what comes out.

    with Dump(model) as dump:
        logits = model(mx.array([ids]))
    dump.save("dump.npz", ids, "bfloat16", result_output=logits)

Names of modules are mlx-lm's; others: change OUTPUTS and INPUTS. `refimpl trace --names` lists all names and shapes. Save this under
another name than mlx.py, which would hide MLX. It has run on MLX 0.32.4 with mlx-lm 0.32.2, on a CPU.
"""

import re

import mlx.core as mx
import numpy as np

OUTPUTS = {"": "l_out", "input_layernorm": "attn_norm", "self_attn.q_proj": "Qcur", "self_attn.k_proj": "Kcur",
           "post_attention_layernorm": "attn_post_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
           "router.proj": "ffn_moe_logits", "experts": "ffn_moe_out", "post_feedforward_layernorm": "ffn_post_norm"}
INPUTS = {"self_attn.o_proj": "kqv_out", "pre_feedforward_layernorm": "attn_out", "mlp.down_proj": "ffn_geglu"}


class Dump:
    """Keeps what the modules of `model` compute inside of a `with` block."""

    def __init__(self, model):
        self.kept, self.calls, self.names = {}, {}, {}
        for path, module in model.named_modules():
            layer = re.match(r"(?!.*(?:vision|audio))(?:.+\.)?layers\.(\d+)(?:\.(.+))?$", path)
            found = [(f"{table[layer[2] or '']}-{layer[1]}", table is INPUTS) for table in (OUTPUTS, INPUTS)
                     if layer and (layer[2] or "") in table]
            if path in ("norm", "model.norm", "language_model.model.norm"):
                found = [("result_norm", False)]
            if found:
                self.names[id(module)] = found
                self.calls[type(module)] = type(module).__call__

    def __enter__(self):
        for kind, call in self.calls.items():
            kind.__call__ = self.watched(call)
        return self

    def watched(self, call):
        """A class's call that keeps values of the modules which have a name."""
        def watched(module, *args, **options):
            out = call(module, *args, **options)
            for name, inputs in self.names.get(id(module), ()):
                self.kept[name] = array(args[0] if inputs else out[0] if isinstance(out, tuple) else out)
            return out
        return watched

    def __exit__(self, *error):
        for kind, call in self.calls.items():
            kind.__call__ = call

    def save(self, path, ids, arithmetic, **more):
        """Writes the file. `arithmetic`: float32, bfloat16 or float16; `more`: other values, such as result_output, the logits."""
        np.savez(path, ids=np.array(ids), arithmetic=arithmetic, **self.kept, **{name: array(x) for name, x in more.items()})


def array(x):
    """An array of MLX as one of NumPy, which has no bfloat16."""
    return np.array(x.astype(mx.float32))
