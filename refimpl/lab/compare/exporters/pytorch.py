"""Writes values of a Gemma 4 in PyTorch as .npz, for `refimpl compare`: hooks on modules that are called as in transformers.

    with Dump(model) as dump:
        logits = model(torch.tensor([ids])).logits
    dump.save("dump.npz", ids, "bfloat16", result_output=logits)

Other names of modules: change OUTPUTS and INPUTS. `refimpl trace --names` lists all names and shapes.
"""

import re

import numpy as np

OUTPUTS = {"": "l_out", "input_layernorm": "attn_norm", "self_attn.q_proj": "Qcur", "self_attn.q_norm": "Qcur_normed",
           "self_attn.k_proj": "Kcur", "self_attn.k_norm": "Kcur_normed", "self_attn.v_norm": "Vcur_normed",
           "post_attention_layernorm": "attn_post_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
           "router.proj": "ffn_moe_logits", "experts": "ffn_moe_out", "post_feedforward_layernorm": "ffn_post_norm"}
INPUTS = {"self_attn.o_proj": "kqv_out", "pre_feedforward_layernorm": "attn_out", "mlp.down_proj": "ffn_geglu"}
OUTSIDE = {"embed_tokens": "inp_scaled", "norm": "result_norm"}        # behind the last dot of a name that has no layer


class Dump:
    """Keeps what the modules of `model` compute inside of a `with` block."""

    def __init__(self, model):
        self.model, self.kept, self.hooks = model, {}, []

    def __enter__(self):
        for path, module in self.model.named_modules():
            layer = re.match(r"(?!.*(?:vision|audio))(?:.+\.)?layers\.(\d+)(?:\.(.+))?$", path)
            if layer:
                names = [(table.get(layer[2] or ""), table) for table in (OUTPUTS, INPUTS)]
                names = [(f"{name}-{layer[1]}", table is INPUTS) for name, table in names if name]
            else:
                names = [(OUTSIDE[path.rpartition(".")[2]], False)] if path.rpartition(".")[2] in OUTSIDE else []
            self.hooks += [module.register_forward_hook(self.keep(name, inputs)) for name, inputs in names]
        return self

    def keep(self, name, inputs):
        """A hook that keeps a value without its batch axis."""
        def hook(module, args, out):
            value = args[0] if inputs else out[0] if isinstance(out, tuple) else out
            self.kept[name] = value.detach().float().cpu().numpy().copy()
        return hook

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def save(self, path, ids, arithmetic, **more):
        """Writes the file. `arithmetic`: float32, bfloat16 or float16; `more`: other values, such as result_output, the logits."""
        more = {name: x.detach().float().cpu().numpy() if hasattr(x, "detach") else x for name, x in more.items()}
        np.savez(path, ids=np.array(ids), arithmetic=arithmetic, **self.kept, **more)
