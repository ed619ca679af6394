"""Wrong forward passes: small planted changes of the kind that engines really shipped. The comparison must catch every one."""

import contextlib
import inspect
from pathlib import Path

import pytest
from shapes import oracle, prompt, random_model, reference, worst, write_model

from refimpl.model import cache, config, gemma4, weights
from refimpl.reference import attention, moe, ops

MOE, PLE, KEYS = "26B-A4B", "E2B", "12B"
PLANTED = {
    "no norm after attention": (MOE, gemma4, "backend.rms_norm(attended_TD, layer.attention.norm_after_D, eps)", "attended_TD"),
    "norm before attention left out": (
        MOE, gemma4, "normed_TD = backend.rms_norm(x_TD, layer.attention.norm_before_D, eps)", "normed_TD = x_TD"),
    "neighbours rotated instead of halves": (
        KEYS, ops, "x_TNH[..., :n_pairs], x_TNH[..., n_pairs:]", "x_TNH[..., 0::2], x_TNH[..., 1::2]"),
    "all pairs of full layers rotated": (KEYS, ops, " / divisor_R)", " / np.ones_like(divisor_R))"),
    "window one too long": (KEYS, cache, "pos - self.window + 1", "pos - self.window"),
    "window one too short": (KEYS, cache, "pos - self.window + 1", "pos - self.window + 2"),
    "scores divided by sqrt(H)": (
        KEYS, attention, 'np.einsum("KGH,SKH->KGS", q_TKGH[t], k)', 'np.einsum("KGH,SKH->KGS", q_TKGH[t], k) / head_dim ** 0.5'),
    "query heads dealt out to the wrong keys": (
        KEYS, attention, "q_TKGH = q_TNH.reshape(n_tok, n_kv, n_head // n_kv, head_dim)",
        "q_TKGH = q_TNH.reshape(n_tok, n_head // n_kv, n_kv, head_dim).swapaxes(1, 2)"),
    "values are keys after the norm and rotation": (KEYS, gemma4, "backend.rms_normalise(v_TKH, eps)", "backend.rms_normalise(k_TKH, eps)"),
    "values not normalised": (MOE, gemma4, "v_TKH = backend.rms_normalise(v_TKH, eps)", "v_TKH = v_TKH"),
    "keys shared from the wrong layer": (PLE, config, "kv_from = donors[-1]", "kv_from = donors[0]"),
    "layer scalar left out": (KEYS, gemma4, "return x_TD * layer.output_scale", "return x_TD"),
    "per-layer input not scaled": (PLE, gemma4, " * np.float32(2 ** -0.5)", ""),
    "per-layer table not scaled": (PLE, gemma4, " * np.float32(config.n_ple ** 0.5)", ""),
    "router reads the normed input": (MOE, gemma4, "backend.rms_normalise(x_TD, eps) * w.router_scale_D", "normed_TD * w.router_scale_D"),
    "router not scaled by sqrt(D)": (MOE, gemma4, " * np.float32(x_TD.shape[1] ** -0.5)", ""),
    "experts read the dense branch's norm": (MOE, gemma4, "expert_in_TD = backend.rms_norm(x_TD, w.norm_before_experts_D, eps)",
                                             "expert_in_TD = normed_TD"),
    "weights not renormalised": (MOE, moe, "weight_TX = weight_TX / weight_TX.sum(axis=-1, keepdims=True, dtype=np.float32)", "pass"),
    "expert scale before renormalisation": (
        MOE, moe, "weight_TX = np.take_along_axis(probability_TE, id_TX, axis=-1)",
        "weight_TX = np.take_along_axis(probability_TE, id_TX, axis=-1) * expert_scale_E[id_TX]; expert_scale_E = expert_scale_E * 0 + 1"),
    "expert scale dropped": (MOE, moe, "return id_TX, weight_TX * expert_scale_E[id_TX]", "return id_TX, weight_TX"),
    "gate and up swapped": (MOE, moe, "gelu(matmul(x_TD[tok], gate_EMD.expert(e))) * matmul(x_TD[tok], up_EMD.expert(e))",
                            "gelu(matmul(x_TD[tok], up_EMD.expert(e))) * matmul(x_TD[tok], gate_EMD.expert(e))"),
    "one expert too few": (MOE, moe, "[:, :n_used]", "[:, :n_used - 1]"),
    "expert halves read in the wrong order": (MOE, weights, "fused.rows(0, m)", "fused.rows(m, 2 * m)"),
    "gelu with erf": (KEYS, ops, "return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))",
                      "import math; return (x * np.float32(0.5) * (1 + np.vectorize(math.erf)(x / 2 ** 0.5))).astype(np.float32)"),
    "soft cap left out": (KEYS, gemma4, "return logit_TV if config.softcap is None else backend.softcap(logit_TV, config.softcap)",
                          "return logit_TV"),
    "embedding not scaled": (KEYS, gemma4, " * np.float32(config.n_embd ** 0.5)", ""),
    "norm weight taken as 1 + w": (KEYS, ops, "return rms_normalise(x, eps) * weight", "return rms_normalise(x, eps) * (1 + weight)"),
}


def functions_of(module) -> dict:
    """Every function and method that a module defines, by qualified name."""
    found = {}
    for owner in (module, *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)):
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and "<string>" not in value.__code__.co_filename:
                found[owner.__name__.split(".")[-1], name] = value
    return found


@contextlib.contextmanager
def planted(module, old: str, new: str):
    """Runs with `old` replaced by `new` in the module's source."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    changed = type(module)(module.__name__)
    changed.__file__ = module.__file__
    exec(compile(source.replace(old, new), module.__file__, "exec"), changed.__dict__)
    theirs, kept = functions_of(changed), {}
    for key, function in functions_of(module).items():
        kept[function] = function.__code__
        function.__code__ = theirs[key].__code__
    try:
        yield
    finally:
        for function, code in kept.items():
            function.__code__ = code


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for shape in (MOE, PLE, KEYS):
        hf = random_model(shape, seed=6)
        made[shape] = (write_model(folder / f"{shape}.gguf", hf), oracle(hf, prompt(24)))
    return made


def first_departure(path, want) -> str:
    """The first layer (or the logits) that differs by more than the tolerance; "" when all agree."""
    got = {}
    reference(path).logits(prompt(24), tap=got.__setitem__)
    return next((name for name, value in want.items() if not worst(got[name], value) < 1e-4), "")


@pytest.mark.parametrize("what", PLANTED)
def test_planted_change_is_caught(what, models):
    shape, module, old, new = PLANTED[what]
    path, want = models[shape]
    with planted(module, old, new):
        assert first_departure(path, want), f"{what}: not noticed"
    assert first_departure(path, want) == "", "the change was not undone"
