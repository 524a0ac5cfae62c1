"""An independent float64 implementation of the losses, and embeds to try them on.

Dense PyTorch with autograd, written from the papers' formulas and not from the package's table.
"""

import numpy as np
import torch
from torch.nn import functional as F


def unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def embeds(seed: int, n: int, d: int, k: int | None = None) -> tuple[np.ndarray, ...]:
    """u, v of width d and p of width k: related, as a trained model's are."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, d))
    v = u + rng.normal(size=(n, d))
    p = rng.normal(size=(n, k or d)) + 0.3
    return unit_rows(u), unit_rows(v), unit_rows(p)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def directional(logits: np.ndarray, weights: np.ndarray, epsilon: float = 0.0) -> float:
    """One direction's loss, by loops over rows as the paper writes it."""
    n = len(logits)
    log_p = log_softmax(logits)
    total = 0.0
    for i in range(n):
        total -= (weights[i] * log_p[i]).sum() / (weights[i].sum() + epsilon)
    return total / n


def cwcl(u, v, p, scale: float) -> float:
    weights = p @ p.T / 2 + 0.5
    logits = scale * u @ v.T
    return directional(logits, weights) + directional(logits.T, np.eye(len(u)))


def contrastive(u, v, scale: float) -> float:
    logits = scale * u @ v.T
    own = np.eye(len(u))
    return directional(logits, own) + directional(logits.T, own)


def sigmoid(u, v, scale: float, bias: float) -> float:
    logits = scale * u @ v.T + bias
    signs = 2 * np.eye(len(u)) - 1
    return np.logaddexp(0, -signs * logits).sum() / len(u)


def entropy(weights: np.ndarray) -> float:
    t = weights / weights.sum(axis=1, keepdims=True)
    return float(-(t * np.log(np.where(t > 0, t, 1))).sum(axis=1).mean())


def label_matrices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have equal labels (or sets), and which sets overlap, by Python's own sets."""
    sets = [frozenset(np.atleast_1d(row)[np.atleast_1d(row) >= 0].tolist()) for row in labels]
    equal = np.array([[bool(a) and a == b for b in sets] for a in sets])
    return equal, np.array([[bool(a & b) for b in sets] for a in sets])


def kernel(kind: str, numbers, features, counted, labels) -> torch.Tensor:
    """Weights of all pairs by one modality's features."""
    n = len(features)
    own = torch.eye(n, dtype=torch.float64)
    equal, overlap = (torch.tensor(x).double() for x in label_matrices(labels))
    if kind == "distance":
        squared = torch.cdist(features, features).square()
        weights = 1 - torch.atan(squared / numbers[0]) * 4 / torch.pi
        return torch.where(weights < numbers[1], 0.0, weights)
    if kind == "centred":
        features = F.normalize(features - features.mean(dim=0), dim=1)
    cosines = features @ features.T
    sharper = {
        "calibrated": lambda x: torch.exp((cosines - 1) * x),
        "calibrated_relu": lambda x: cosines.clamp(min=0) ** x,
    }
    if kind in sharper:
        make = sharper[kind]
        return make(calibrated(lambda x: counted(make(x)).numpy(), numbers[0]))
    return {
        "own": lambda: own,
        "affine": lambda: cosines / 2 + 0.5,
        "centred": lambda: cosines / 2 + 0.5,
        "labels": lambda: torch.maximum(torch.maximum(equal, numbers[0] * overlap), own),
        "uniform": lambda: own + (1 - own) * numbers[0],
        "exp": lambda: torch.exp((cosines - 1) / numbers[0]),
        "relu": lambda: cosines.clamp(min=0) ** numbers[0],
    }[kind]()


def calibrated(weights, wanted: float) -> float:
    """The sharpness with the wanted peakedness, by halving."""
    low, high = np.log(1e-3), np.log(1e5)
    for _ in range(60):
        middle = (low + high) / 2
        w = weights(np.exp(middle))
        if wanted > 1:
            flat = np.exp(entropy(w)) > wanted
        else:
            flat = (np.diagonal(w) / w.sum(axis=1)).mean() < wanted
        low, high = (middle, high) if flat else (low, middle)
    return float(np.exp((low + high) / 2))


def alone(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the other pairs, row by row; rows without weight there do not count."""
    losses = []
    for i in range(len(logits)):
        others = [j for j in range(len(logits)) if j != i and bool(torch.isfinite(logits[i, j]))]
        w = weights[i, others]
        if w.sum().item() > 0:
            losses.append(-(w / w.sum() * F.log_softmax(logits[i, others], dim=0)).sum())
    return torch.stack(losses).mean() if losses else logits.new_zeros(())


def loss_of(case: dict, u, v, p, q, labels, log_scale, bias, targets) -> torch.Tensor:
    """The loss of a case: what it needs, by names of its own (see `CASES` of test_fused)."""
    n = len(u)
    own = torch.eye(n, dtype=torch.float64)
    equal = torch.tensor(label_matrices(labels)[0])
    scale = log_scale.exp()
    left_out = torch.zeros(n, n, dtype=torch.bool)
    if case.get("mask") == "labels":
        left_out = equal & (own == 0)
    elif "mask" in case:
        kind, margin = case["mask"]
        diagonal = (p * p).sum(dim=1, keepdim=True)
        limit = diagonal - margin if kind == "absolute" else diagonal * (1 - margin)
        left_out = (p @ p.T > limit) & (own == 0)

    def counted(weights):
        weights = torch.where(left_out, 0.0, weights)
        return torch.where(equal, 1.0, weights) if case.get("positives") else weights

    def weights_from(features):
        kind, *numbers = case.get("weights", ("own",))
        made = kernel(kind, numbers, features, counted, labels) if targets is None else targets
        return counted(made)

    mix = case.get("mix", 0.0)
    if "sigmoid" in case:
        a, b = case["sigmoid"]
        z = scale * u @ v.T + bias
        t = mix * own + (1 - mix) * weights_from(p)
        losses = -t * F.logsigmoid(z) - (a - b * t) * F.logsigmoid(-z)
        total = torch.where(left_out, 0.0, losses).sum() / n
    else:
        total = u.new_zeros(())
    directions = zip(("rows", "columns"), case.get("directions", (1.0, 1.0)), strict=True)
    for side, factor in [] if "sigmoid" in case or case.get("alone") else directions:
        logits = scale * u @ v.T if side == "rows" else scale * v @ u.T
        logits = torch.where(left_out, -torch.inf, logits)
        t, w = own, None
        if side in case.get("weighted", ("rows",)):
            w = weights_from(q if side == "columns" and case.get("own") else p)
            w = w.T if side == "columns" else w
            soft = w / (w.sum(dim=1, keepdim=True) + case.get("epsilon", 0.0))
            t = mix * own + (1 - mix) * soft
        log_p = torch.where(t > 0, F.log_softmax(logits, dim=1), 0.0)
        total = total - factor * (t * log_p).sum() / n
        if "negatives" in case.get("terms", {}) and w is not None:
            total = total + factor * case["terms"]["negatives"] * alone(logits, w)
    for name, factor in case.get("terms", {}).items():
        total = total + factor * term(name, u, v, scale, equal)
    return total


def term(name: str, u, v, scale, equal) -> torch.Tensor:
    match name:
        case "replicates":
            return alone(scale * u @ u.T, equal.double())
        case "cyclic_within":
            return (u @ u.T - v @ v.T).square().sum() / len(u)
        case "cyclic_across":
            return (u @ v.T - v @ u.T).square().sum() / len(u)
        case "cosine":
            return (1 - (u.detach() * v).sum(dim=1)).mean()
        case "squared":
            return (u.detach() - v).square().sum(dim=1).mean()
    return u.new_zeros(())


def solve(case: dict, u, v, p, q, labels, scale: float, bias: float, targets=None):
    """Loss and gradients for u, v, log scale and bias."""
    given = [torch.tensor(np.asarray(x), dtype=torch.float64) for x in (u, v, np.log(scale), bias)]
    leaves = [x.requires_grad_() for x in given]
    u, v, log_scale, b = leaves
    p, q = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in (p, q))
    targets = None if targets is None else torch.tensor(targets)
    loss = loss_of(case, u, v, p, q, np.asarray(labels), log_scale, b, targets)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves]
    return loss.item(), [(z if g is None else g).numpy() for g, z in zip(found, zeros, strict=True)]
