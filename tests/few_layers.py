"""The five shapes with few layers: at least one of each kind, so that what concerns all layers of a kind alike is quicker to show."""

from shapes import SHAPES, pattern


def few_layers(shape: str) -> dict:
    """Overrides for `random_model`: a layer of each kind. Where layers share keys and values three: the last has those of the second."""
    if "num_kv_shared_layers" in SHAPES[shape]:
        return dict(layer_types=pattern(1, 3), num_hidden_layers=6, num_kv_shared_layers=2)
    return dict(layer_types=pattern(1, 1), num_hidden_layers=2)
