"""Gives a trained drafter a centroid head: `python -m refimpl.tiny.training.centroids drafter-run`.

The vocabulary is cut into N_CENTROID groups of equal size whose rows of the head point the same way (k-means on their directions, no group
larger than its share). Then each group gets a centroid such that the group of the drafter's most probable token has a high score, with the
drafter fixed:

    loss = - mean over states z of  log softmax(centroid_ZD @ z)[group of the token that the whole head takes for z]

The result is in `drafter.pt` and `config.json` of the folder, for `export`. How Google's centroids were made is not published.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from refimpl.tiny.groups import balanced_groups
from refimpl.tiny.training.grids import Q4_0
from refimpl.tiny.training.network import SHAPES
from refimpl.tiny.training.train_drafter import OF, PROMPT, build_drafter, load_target, rollout

N_CENTROID, N_TOP = 64, 8


@torch.no_grad()
def states_of(target, drafter, ids_NT: np.ndarray) -> torch.Tensor:
    """The normed states of all steps of all rounds on these texts, float32 (n, D)."""
    batches = [torch.from_numpy(ids_NT[i:i + 4]) for i in range(0, len(ids_NT), 4)]
    return torch.cat([z_TD for ids_BT in batches for z_TD, _, _ in rollout(target, drafter, ids_BT, PROMPT)])


def train_centroids(z_TD: torch.Tensor, label_T: torch.Tensor, start_ZD: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    """Centroids, float32 (Z, D), whose largest score is that of the group `label_T`."""
    w_ZD = torch.nn.Parameter(start_ZD.clone())
    optimiser, shuffle = torch.optim.Adam([w_ZD], lr=0.02), torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(z_TD), (2048,), generator=shuffle)
        loss = F.cross_entropy(z_TD[rows] @ w_ZD.T, label_T[rows])
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return w_ZD.detach()


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.training.centroids", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished `python -m refimpl.tiny.training.train_drafter`")
    parser.add_argument("--target", choices=list(OF), default="built-in:e2b")
    parser.add_argument("--texts", type=int, default=160, help="of the target's own, for training")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    target = load_target(args.target)
    drafter = build_drafter(target, args.seed, SHAPES[OF[args.target]])
    state = torch.load(args.run / "drafter.pt", weights_only=True)
    drafter.load_state_dict({name: value for name, value in state.items() if not name.startswith("masked_embedding.")})
    for p in drafter.parameters():
        if p.ndim == 2:
            p.data.copy_(Q4_0.round(p.data))
    w_VD = drafter.model.embed_tokens.weight.detach()
    group_V = torch.from_numpy(balanced_groups(w_VD.numpy(), N_CENTROID, 20, args.seed))
    ordering_V = group_V.argsort(stable=True)
    start_ZD = w_VD[ordering_V].reshape(N_CENTROID, -1, w_VD.shape[1]).mean(1)
    seen, unseen = (states_of(target, drafter, np.load(args.run / name)[:args.texts]) for name in ("own.npy", "watched.npy"))
    label, unseen_label = (group_V[torch.cat([(z @ w_VD.T).argmax(-1) for z in part.split(1024)])] for part in (seen, unseen))
    centroid_ZD = train_centroids(seen, label, start_ZD, args.steps, args.seed)
    top = (unseen @ Q4_0.round(centroid_ZD).T).topk(N_TOP).indices
    found = (top == unseen_label[:, None]).any(1).float().mean()
    print(f"the whole head's token is in the {N_TOP} best of {N_CENTROID} groups in {found:.1%} of {len(unseen)} states")
    torch.save(state | {"masked_embedding.centroids.weight": centroid_ZD, "masked_embedding.token_ordering": ordering_V},
               args.run / "drafter.pt")
    config = json.loads((args.run / "config.json").read_text())
    config |= {"use_ordered_embeddings": True, "num_centroids": N_CENTROID, "centroid_intermediate_top_k": N_TOP}
    (args.run / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
