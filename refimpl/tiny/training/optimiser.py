"""The optimiser: Muon for matrices, AdamW for the rest."""

import torch

from refimpl.tiny.training.precision import LOW

OF_LAYERS = ("per_layer_model_projection.weight", "per_layer_input_gate.weight", "per_layer_projection.weight")


def orthogonalised(g: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration: moves the singular values of each matrix of a batch (..., rows <= cols) towards 1."""
    x = g.to(LOW)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.float()


class Optimiser:
    """Muon for matrices, AdamW for the rest, over the parameters this worker owns."""

    def __init__(self, named, muon_lr, adam_lr):
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.state = {name: [torch.zeros_like(p)] if is_matrix(name) else [torch.zeros_like(p), torch.zeros_like(p)]
                      for name, p in named}
        self.named, self.n_steps = named, 0

    @torch.no_grad()
    def step(self, factor: float):
        """One update from the gradients; `factor` scales both learning rates."""
        self.n_steps += 1
        for name, p in self.named:
            g = p.grad
            if is_matrix(name):
                m, = self.state[name]
                m.lerp_(g, 0.05)
                update = g.lerp(m, 0.95)
                if name.endswith("gate_up_proj"):       # two matrices stacked
                    update = update.reshape(-1, update.shape[-2] // 2, update.shape[-1])
                tall = update.shape[-2] > update.shape[-1]
                update = orthogonalised(update.mT).mT if tall else orthogonalised(update)
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                p.mul_(1 - 0.1 * self.muon_lr * factor)
                p.add_(update.reshape(p.shape), alpha=-self.muon_lr * factor * scale)
            else:
                m, v = self.state[name]
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.05)
                update = (m / (1 - 0.9 ** self.n_steps)) / ((v / (1 - 0.95 ** self.n_steps)).sqrt() + 1e-8)
                lr = self.adam_lr * (0.5 if p.ndim == 1 else 1.0)
                p.add_(update, alpha=-lr * factor)


def is_matrix(name: str) -> bool:
    """Does Muon train it? Projections and experts; not the embedding (also the head), the router or vectors."""
    return name.endswith(("proj.weight", "gate_up_proj", "down_proj", *OF_LAYERS)) and "router" not in name


def is_quantized(name: str) -> bool:
    """Is it Q4_0 in the file? All matrices but the router's."""
    return is_matrix(name) or name.endswith(("embed_tokens.weight", "embed_tokens_per_layer.weight"))
