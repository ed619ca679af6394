"""What the keys and values of the published models take in memory, and what each of their savings saves."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refimpl.files.synth import N_VOCAB, config_of, model_tensors
from refimpl.loading.hf_names import gguf_metadata
from refimpl.model.cache import cache_bytes
from refimpl.model.config import AttentionType, Config, config_from_gguf

HALF = np.dtype(np.float16)


def true_config(name: str) -> Config:
    """The configuration of a published model, from its shape. Raises ValueError for an unknown name."""
    settings = config_of(name)
    return config_from_gguf(gguf_metadata(settings), dict(model_tensors(settings)), N_VOCAB, name)


def only(config: Config, attention: AttentionType) -> Config:
    """The same model with the layers of one kind alone."""
    return replace(config, layers=tuple(layer for layer in config.layers if layer.attention is attention))


def without_sharing(config: Config) -> Config:
    """The same model, every layer with keys and values of its own."""
    return replace(config, layers=tuple(replace(layer, kv_from=layer.index, has_own_kv=True) for layer in config.layers))


def without_windows(config: Config) -> Config:
    """The same model, every layer looking at everything."""
    return replace(config, layers=tuple(replace(layer, window=None) for layer in config.layers))


def savings(config: Config, n_ctx: int, max_rows: int) -> dict[str, int]:
    """Bytes of a full cache in float16: if every layer kept all positions for itself, with windows alone, and as it is."""
    alone = without_sharing(config)
    return {"all positions in every layer": cache_bytes(without_windows(alone), n_ctx, max_rows, HALF),
            "with sliding windows": cache_bytes(alone, n_ctx, max_rows, HALF),
            "with shared layers too": cache_bytes(config, n_ctx, max_rows, HALF)}


def by_kind(config: Config, n_ctx: int, max_rows: int) -> tuple[int, int]:
    """Bytes of a full cache in float16: of the full layers, and of the windows of the sliding ones."""
    full, sliding = (cache_bytes(only(config, attention), n_ctx, max_rows, HALF)
                     for attention in (AttentionType.FULL, AttentionType.SLIDING))
    return full, sliding


def value_projections(config: Config) -> int:
    """Weights that the model does not have because the values of its full layers are their keys."""
    return sum(layer.n_kv * layer.head_dim * config.n_embd for layer in config.layers if layer.values_are_keys)


# ---- pictures

def layers_picture(configs: dict[str, Config]):
    """One square for each layer of each model: how far it sees, and whether its keys and values are its own."""
    from matplotlib.patches import Patch, Rectangle

    from refimpl.lab.explain.show import BLUE, ORANGE, figure, legend, picture

    colour = {AttentionType.SLIDING: ORANGE, AttentionType.FULL: BLUE}
    fig, axes = figure(9, 0.42 * len(configs) + 1.1)
    for row, config in enumerate(configs.values()):
        for layer in config.layers:
            axes.add_patch(Rectangle((layer.index, row + 0.16), 0.72, 0.68, lw=1.2, ec=colour[layer.attention],
                                     fc=colour[layer.attention] if layer.has_own_kv else "white"))
    most = max(config.n_layer for config in configs.values())
    axes.set(xlim=(-0.3, most), ylim=(len(configs), 0), xlabel="layer", yticks=np.arange(len(configs)) + 0.5, yticklabels=list(configs))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    legend(axes, handles=[Patch(fc=ORANGE, ec=ORANGE, label="sliding"), Patch(fc=BLUE, ec=BLUE, label="full"),
                          Patch(fc="white", ec=ORANGE, label="sliding, reads another layer's"),
                          Patch(fc="white", ec=BLUE, label="full, reads another layer's")],
           ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return picture(fig, "The layers of each model: sliding or full, with their own keys and values or those of another layer.")


def cache_picture(configs: dict[str, Config], contexts: Sequence[int], max_rows: int):
    """Bars of what a full cache takes, full layers and windows, one panel for each context; models that do not reach it have no bar."""
    from refimpl.lab.explain.show import BLUE, ORANGE, figure, legend, picture

    fig, panels = figure(9, 2.6, 1, len(contexts), sharex=True, sharey=True)
    for axes, n_ctx in zip(panels, contexts):
        for row, config in enumerate(configs.values()):
            if config.n_ctx < n_ctx:
                axes.text(0, row, f"  ends at {config.n_ctx:,} tokens", va="center", fontsize=8, color="0.4")
                continue
            full, sliding = (n_bytes / 1e9 for n_bytes in by_kind(config, n_ctx, max_rows))
            axes.barh(row, full, color=BLUE, label="full layers" if row == len(configs) - 1 else None)
            axes.barh(row, sliding, left=full, color=ORANGE, label="sliding layers" if row == len(configs) - 1 else None)
            axes.text(full + sliding, row, f" {full + sliding:.2f}", va="center", fontsize=8)
        axes.set(title=f"{n_ctx:,} tokens", xlabel="keys and values in float16, GB", yticks=range(len(configs)), yticklabels=list(configs),
                 ylim=(len(configs) - 0.4, -0.6))
        axes.margins(x=0.14)
    legend(panels[0], loc="lower right")
    return picture(fig, "What the cache of each model takes, split into full and sliding layers.")
