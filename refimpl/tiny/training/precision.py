"""The type of the large products in training: bfloat16 where the processor multiplies it fast, else float32."""

import torch

LOW = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def autocast():
    """Inside, products are in LOW."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=LOW is torch.bfloat16)
