"""The network that is trained: transformers' own Gemma 4 in miniature, with faster attention, experts and loss plugged in.

The arithmetic is transformers' (a test compares loss and gradients); only the order of the work differs.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.integrations.moe import ExpertsInterface

from refimpl.tiny.training import vocabulary
from refimpl.tiny.training.precision import LOW, autocast

SHAPE = dict(
    vocab_size=vocabulary.SIZE, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, num_global_key_value_heads=1, head_dim=32, global_head_dim=64, sliding_window=64,
    layer_types=["sliding_attention"] * 5 + ["full_attention"], attention_k_eq_v=True, num_kv_shared_layers=0,
    hidden_size_per_layer_input=0, vocab_size_per_layer_input=vocabulary.SIZE, enable_moe_block=True, num_experts=128,
    top_k_experts=8, moe_intermediate_size=32, final_logit_softcapping=30.0, max_position_embeddings=4096,
    pad_token_id=vocabulary.PAD, eos_token_id=vocabulary.EOS, bos_token_id=vocabulary.BOS, tie_word_embeddings=True)

E2B_SHAPE = SHAPE | dict(
    num_hidden_layers=8, layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2, num_key_value_heads=1,
    num_global_key_value_heads=None, attention_k_eq_v=False, num_kv_shared_layers=4, intermediate_size=192, use_double_wide_mlp=True,
    hidden_size_per_layer_input=32, enable_moe_block=False, num_experts=None, top_k_experts=None, moe_intermediate_size=None)
SHAPES = {"26B-A4B": SHAPE, "E2B": E2B_SHAPE}       # what the files that ship are miniatures of

NO_MASKS = {"full_attention": None, "sliding_attention": None}      # block_attention masks by itself


def block_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, **_):
    """transformers' attention interface for training: whole sequences, no cache. Sliding layers look at two blocks of keys."""
    b, n, t, h = query.shape
    k = key.shape[1]
    if sliding_window is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    w = sliding_window
    q_blocks = query.reshape(b, k, n // k, t // w, w, h).transpose(2, 3).reshape(b, k, t // w, n // k * w, h)

    def pairs(x):
        x = x.reshape(b, k, t // w, w, h)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3)

    row = torch.arange(w)[:, None]
    col = torch.arange(2 * w)[None]
    seen = (col > row) & (col <= row + w)
    mask = seen.expand(t // w, w, 2 * w).clone()
    mask[0] &= col >= w
    score = q_blocks @ pairs(key).transpose(-1, -2) * scaling
    score = score.reshape(b, k, t // w, n // k, w, 2 * w).masked_fill(~mask[:, None], -1e9)
    weight = score.float().softmax(-1).to(score.dtype).reshape(b, k, t // w, n // k * w, 2 * w)
    out = (weight @ pairs(value)).reshape(b, k, t // w, n // k, w, h)
    return out.permute(0, 2, 4, 1, 3, 5).reshape(b, t, n, h), None


def grouped_experts(module, x_TD, expert_TX, weight_TX):
    """transformers' experts interface for training: picks sorted by expert, one bfloat16 product per expert and projection.

    The router's weight scales the narrow activation instead of the wide output, which is the same product. Groups are padded
    to a multiple of 32 rows, because oneDNN compiles a new kernel for every new shape.
    """
    n_tok, n_used = expert_TX.shape
    expert = expert_TX.reshape(-1)
    count_E = torch.bincount(expert, minlength=module.num_experts)
    padded_E = (count_E + 31) // 32 * 32
    shift_E = (padded_E.cumsum(0) - padded_E) - (count_E.cumsum(0) - count_E)
    order = expert.argsort(stable=True)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order)) + shift_E[expert[order]]
    token = torch.full((int(padded_E.sum()),), n_tok)             # which row of x a slot holds; n_tok is a row of zeros
    token[slot] = torch.arange(len(order)) // n_used
    ends = padded_E.cumsum(0).int()
    x = F.pad(x_TD.bfloat16(), (0, 0, 0, 1)).index_select(0, token)
    gate, up = torch._grouped_mm(x, module.gate_up_proj.bfloat16().mT, offs=ends).float().chunk(2, dim=-1)
    weight = torch.zeros(len(token)).index_copy(0, slot, weight_TX.reshape(-1))
    mid = (module.act_fn(gate.contiguous()) * up * weight[:, None]).bfloat16()
    out = torch._grouped_mm(mid, module.down_proj.bfloat16().mT, offs=ends)
    return out.index_select(0, slot).view(n_tok, n_used, -1).float().sum(1)


AttentionInterface.register("refimpl_block", block_attention)
ExpertsInterface.register("refimpl_grouped", grouped_experts)


# ---- the loss, without all logits in memory

class CappedCrossEntropy(torch.autograd.Function):
    """Mean over tokens of -log softmax(cap * tanh(x_TD @ w_VD.T / cap))[target_T], chunk by chunk, gradients included."""

    @staticmethod
    def forward(ctx, x_TD, w_VD, target_T, cap):
        """The loss; also its gradients, while the logits are in memory."""
        grad_x, grad_w = torch.empty_like(x_TD), torch.zeros_like(w_VD)
        total, n, size = 0.0, x_TD.shape[0], 512
        w_low = w_VD.to(LOW)
        for lo in range(0, n, size):
            x, target = x_TD[lo:lo + size].to(LOW), target_T[lo:lo + size]
            y = torch.tanh((x @ w_low.T).float().div_(cap))
            grad = (y * cap).log_softmax(-1)
            total += -grad.gather(1, target[:, None]).sum()
            grad = grad.exp_()
            grad[torch.arange(len(target)), target] -= 1.0
            grad = grad.mul_(1.0 - y.square_()).div_(n).to(LOW)
            grad_x[lo:lo + size] = (grad @ w_low).float()
            grad_w += (grad.T @ x).float()
        ctx.save_for_backward(grad_x, grad_w)
        return total / n

    @staticmethod
    def backward(ctx, grad):
        """The gradients from forward, times the gradient of the loss."""
        grad_x, grad_w = ctx.saved_tensors
        return grad * grad_x, grad * grad_w, None, None


def router_losses(router_probabilities: list[torch.Tensor], n_used: int) -> torch.Tensor:
    """Load-balancing loss: E * sum_e(share of picks of e * mean probability of e), mean over layers; 1 when even."""
    total = 0.0
    for probability_TE in router_probabilities:
        n_experts = probability_TE.shape[-1]
        picks = probability_TE.topk(n_used, dim=-1).indices
        share_E = torch.bincount(picks.reshape(-1), minlength=n_experts).float() / picks.numel()
        total = total + n_experts * (share_E * probability_TE.mean(0)).sum()
    return total / len(router_probabilities)


def build_model(seed: int, shape: dict[str, object] = SHAPE) -> Gemma4ForCausalLM:
    """A new model. Attention has no 1/sqrt(H) and the router an extra 1/sqrt(D); the initial weights make up for both."""
    torch.manual_seed(seed)
    config = Gemma4TextConfig(**shape)
    config._attn_implementation, config._experts_implementation = "refimpl_block", "refimpl_grouped"
    model = Gemma4ForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            torch.nn.init.normal_(p, std=config.hidden_size ** -0.5)
        elif name.endswith("embed_tokens_per_layer.weight"):
            torch.nn.init.normal_(p, std=config.hidden_size_per_layer_input ** -0.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(p, p.shape[0] ** -0.25)
        elif "router.proj" in name:
            torch.nn.init.normal_(p, std=1.0)
        elif p.ndim >= 2:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 * (0.5 if "o_proj" in name or "down_proj" in name else 1.0))
    return model


def loss_of(model, ids_BT: torch.Tensor, target_BT: torch.Tensor, with_router: bool):
    """(next-token loss in nats, router losses) of a batch."""
    with autocast():
        out = model.model(input_ids=ids_BT, attention_mask=NO_MASKS, use_cache=False, output_router_logits=with_router)
    x_TD = out.last_hidden_state.float().reshape(-1, out.last_hidden_state.shape[-1])
    nats = CappedCrossEntropy.apply(x_TD, model.model.embed_tokens.weight, target_BT.reshape(-1),
                                    model.config.final_logit_softcapping)
    return nats, router_losses(out.router_logits, model.config.top_k_experts) if with_router else None
