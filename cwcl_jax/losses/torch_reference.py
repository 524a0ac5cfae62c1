"""The losses in PyTorch, straight from the equations: dense, autograd, no tiling.

This module is for comparison only, and the only one of the losses that imports torch. The equations
are those of `cwcl_jax.losses.reference`.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

Tensor = torch.Tensor


def similarity_weights(p: Tensor) -> Tensor:
    """Returns <p_i, p_j> / 2 + 1/2, without gradient."""
    p = p.detach()
    return p @ p.T / 2 + 0.5


def soft_cross_entropy(logits: Tensor, weights: Tensor, epsilon: float = 0.0) -> Tensor:
    """Returns -1/N sum_i (1 / sum_j w_ij) sum_j w_ij log softmax_j."""
    targets = weights / (weights.sum(dim=1, keepdim=True) + epsilon)
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def cwcl(u: Tensor, v: Tensor, p: Tensor, logit_scale: Tensor) -> Tensor:
    """Returns L_CWCL(U->V) + L_CL(V->U)."""
    logits = logit_scale.exp() * u @ v.T
    pairs = torch.arange(len(u), device=u.device)
    return soft_cross_entropy(logits, similarity_weights(p)) + F.cross_entropy(logits.T, pairs)


def contrastive(u: Tensor, v: Tensor, p: Tensor, logit_scale: Tensor) -> Tensor:
    """Returns InfoNCE summed over both directions; p is not used."""
    logits = logit_scale.exp() * u @ v.T
    pairs = torch.arange(len(u), device=u.device)
    return F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)


def sigmoid(u: Tensor, v: Tensor, p: Tensor, logit_scale: Tensor, bias: float = -10.0) -> Tensor:
    """Returns SigLIP's loss; p is not used."""
    logits = logit_scale.exp() * u @ v.T + bias
    signs = 2 * torch.eye(len(u), dtype=u.dtype, device=u.device) - 1
    return -F.logsigmoid(signs * logits).sum(dim=1).mean()


def cellclip(u: Tensor, v: Tensor, profiles: Tensor, logit_scale: Tensor) -> Tensor:
    """Returns CellCLIP's loss with weights from raw profiles (n, channels, features).

    The similarity of two profiles is the mean cosine over their channels. Weights are divided by
    their row sums + 1e-8.
    """
    normed = profiles / (profiles.norm(dim=-1, keepdim=True) + 1e-8)
    channels = profiles.shape[1]
    similarity = torch.stack([normed[:, c] @ normed[:, c].T for c in range(channels)]).mean(dim=0)
    logits = logit_scale.exp() * u @ v.T
    pairs = torch.arange(len(u), device=u.device)
    weighted = soft_cross_entropy(logits, similarity / 2 + 0.5, 1e-8)
    return weighted + F.cross_entropy(logits.T, pairs)


def xclr(u: Tensor, v: Tensor, p: Tensor, logit_scale: Tensor, temperature: float = 0.1) -> Tensor:
    """Returns X-CLR's loss: kernel exp((cos - 1) / temperature), diagonal 1, both directions."""
    p = p.detach()
    weights = torch.exp(((p @ p.T).clamp(-1, 1) - 1) / temperature).fill_diagonal_(1.0)
    logits = logit_scale.exp() * u @ v.T
    return soft_cross_entropy(logits, weights) + soft_cross_entropy(logits.T, weights)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cwcl": cwcl,
    "contrastive": contrastive,
    "sigmoid": sigmoid,
    "cellclip": cellclip,
    "xclr": xclr,
}


def value_and_gradients(
    name: str, u: np.ndarray, v: np.ndarray, p: np.ndarray, logit_scale: float, dtype: str
) -> tuple[float, list[np.ndarray]]:
    """Returns the loss and its gradients for u, v and logit_scale, by autograd, as float64 numpy.

    bfloat16 and float16 embeddings are converted to float32 first, as the JAX forms sum in float32;
    the gradients are rounded to the narrow dtype.
    """
    kind = getattr(torch, dtype)
    leaves = [torch.tensor(x).to(kind).requires_grad_() for x in (u, v)]
    wide = torch.float32 if kind in (torch.bfloat16, torch.float16) else kind
    scale = torch.tensor(logit_scale, dtype=wide, requires_grad=True)
    weights_from = torch.tensor(p).to(kind).to(wide)
    loss = LOSSES[name](leaves[0].to(wide), leaves[1].to(wide), weights_from, scale)
    loss.backward()
    gradients = [x.grad for x in (*leaves, scale)]
    return loss.item(), [g.double().numpy() for g in gradients if g is not None]


class _Gather(torch.autograd.Function):
    """Gathers all processes' rows; backward returns the summed gradients to each row's owner."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gathered_gradients(
    rank: int, world: int, address: str, arrays: dict[str, np.ndarray], name: str, out: str
) -> None:
    """Runs one of several processes: gathers its part with gradient and saves its gradients."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    part = slice(rank * len(arrays["u"]) // world, (rank + 1) * len(arrays["u"]) // world)
    u, v = (torch.tensor(arrays[k][part]).requires_grad_() for k in "uv")
    scale = torch.tensor(float(arrays["logit_scale"]), dtype=u.dtype, requires_grad=True)
    every_u, every_v = (_Gather.apply(x) for x in (u, v))
    loss = LOSSES[name](every_u, every_v, torch.tensor(arrays["p"]), scale)
    # Every process computes the whole loss, so each gradient arrives once from every process.
    (loss / world).backward()
    assert u.grad is not None
    assert v.grad is not None
    assert scale.grad is not None
    dist.all_reduce(scale.grad)
    np.savez(
        f"{out}.{rank}.npz",
        loss=loss.item(),
        u=u.grad.numpy(),
        v=v.grad.numpy(),
        logit_scale=scale.grad.numpy(),
    )
    dist.destroy_process_group()


def train_two_towers(
    weights: dict[str, np.ndarray],
    batches: list[dict[str, np.ndarray]],
    name: str,
    learning_rate: float,
    weight_decay: float,
) -> list[float]:
    """Returns the losses of a tiny tower trained against a locked one: AdamW, one step a batch."""
    params = {k: torch.tensor(x).requires_grad_() for k, x in weights.items()}
    groups = [
        {"params": [x for x in params.values() if x.ndim > 1], "weight_decay": weight_decay},
        {"params": [x for x in params.values() if x.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for batch in batches:
        hidden = torch.tanh(torch.tensor(batch["v"]) @ params["hidden"] + params["bias"])
        v = F.normalize(hidden @ params["out"], dim=1)
        p = torch.tensor(batch["p"])
        loss = LOSSES[name](p, v, p, params["logit_scale"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def benchmark_calls(
    name: str, u: np.ndarray, v: np.ndarray, dtype: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns two calls: a loss with its gradient (p = u), and a square matrix product."""
    kind = getattr(torch, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = [torch.tensor(x, dtype=kind, device=device).requires_grad_() for x in (u, v)]
    scale = torch.tensor(2.66, dtype=kind, device=device, requires_grad=True)
    # Random numbers, because a matrix of ones would draw less power than real data.
    square = torch.randn(4096, 4096, dtype=kind, device=device)

    def run() -> list[Tensor]:
        loss = LOSSES[name](*leaves, leaves[0], scale)
        gradients = torch.autograd.grad(loss, [*leaves, scale])
        if device == "cuda":
            torch.cuda.synchronize()
        return [loss.detach(), *gradients]

    def product() -> Tensor:
        result = square @ square
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run, product


def device_peak_bytes() -> int:
    """Returns this process's peak GPU memory in bytes; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
