"""The towers and the train step in plain PyTorch, as the opponent of a speed comparison.

The weights are random, with the same shapes. Blocks are `nn.Linear`, `nn.LayerNorm`, GELU and
`F.scaled_dot_product_attention`. The step is the locked tower's forward pass, one forward and
backward pass of the other tower, and `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cwcl_jax.losses.torch_reference import cwcl
from cwcl_jax.models.text import TextConfig
from cwcl_jax.models.vit import VitConfig

Stack = VitConfig | TextConfig


class Block(nn.Module):
    """Attention and MLP, each with a residual connection and a preceding norm."""

    def __init__(self, config: Stack) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, config.epsilon) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, config.mlp_width), nn.Linear(config.mlp_width, width)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Maps (b, s, d) to (b, s, d); `mask`, bool (b, 1, 1, s), is True for real keys."""
        b, s, d = x.shape
        split = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind(0), attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=self.approximate))


class Vit(nn.Module):
    """Maps pixels, uint8 (b, y, x, 3), to features (b, d)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.grid**2 + 1, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.epsilon)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patches((pixels.permute(0, 3, 1, 2).float() - 127.5) / 127.5)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x)[:, 0]


class Text(nn.Module):
    """Maps tokens, int64 (b, s), and their mask to features (b, d): the mean over real tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.max_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.epsilon)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        real = mask[:, :, None].to(x.dtype)
        return (self.norm(x) * real).sum(1) / real.sum(1)


def parts(
    image: VitConfig, text: TextConfig, embed_dim: int, batch: dict[str, np.ndarray]
) -> dict[str, Callable[[], None]]:
    """Returns the step's parts by name; each call waits for its result.

    Args:
      batch: "pixels", uint8 (b, y, x, 3); "tokens", int (b, s); "mask", bool (b, s).
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit, encoder = Vit(image).to(device).requires_grad_(False), Text(text).to(device)
    head_u = nn.Linear(image.width, embed_dim).to(device)
    head_v = nn.Linear(text.width, embed_dim).to(device)
    scale = nn.Parameter(torch.tensor(2.659, device=device))
    trained = [*encoder.parameters(), *head_u.parameters(), *head_v.parameters(), scale]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    pixels = torch.from_numpy(batch["pixels"]).to(device)
    tokens = torch.from_numpy(batch["tokens"]).long().to(device)
    mask = torch.from_numpy(batch["mask"]).to(device)

    def locked() -> torch.Tensor:
        with torch.no_grad():
            return vit(pixels)

    def forward() -> None:
        with torch.no_grad():
            encoder(tokens, mask)

    def both_ways() -> None:
        optimizer.zero_grad()
        encoder(tokens, mask).square().sum().backward()

    def step() -> None:
        features = locked()
        optimizer.zero_grad()
        u, v = F.normalize(head_u(features)), F.normalize(head_v(encoder(tokens, mask)))
        cwcl(u, v, F.normalize(features), scale).backward()
        optimizer.step()

    def awaited(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {
        "image forward": locked,
        "text forward": forward,
        "text forward and backward": both_ways,
        "optimizer": optimizer.step,
        "step": step,
    }
    step()  # one step first, because the optimizer needs gradients
    return {name: awaited(call) for name, call in calls.items()}
