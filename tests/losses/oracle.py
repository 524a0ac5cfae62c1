"""An independent float64 numpy implementation of the losses, and embeds to try them on."""

import numpy as np


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


def weights_of(options: dict, p, labels, targets) -> np.ndarray:
    """The N x N weights of the options of a `LossConfig`."""
    n = len(p)
    own = np.eye(n)
    same = (labels[:, None] == labels[None, :]).astype(float)
    name, kind = options.get("name", "cwcl"), options.get("weight_function", "affine")
    kind = {"supervised": "labels", "astroclip": "exp", "contrastive": "own"}.get(name, kind)
    if kind == "centred":
        p = unit_rows(p - p.mean(axis=0))
    cosines = p @ p.T
    power, temperature = options.get("weight_power", 2), options.get("weight_temperature", 0.1)
    sharper = {
        "calibrated": lambda x: np.exp((cosines - 1) * x),
        "calibrated_relu": lambda x: np.maximum(cosines, 0) ** x,
    }
    others, duplicates = same - own, options.get("duplicates")

    def counted(weights):
        if duplicates == "masked":
            return np.where(others > 0, 0, weights)
        return np.where(others > 0, 1, weights) if duplicates == "positives" else weights

    if targets is not None:
        weights = targets
    elif kind in sharper:
        weights = sharper[kind](calibrated(lambda x: counted(sharper[kind](x)), options))
    else:
        weights = {
            "affine": cosines / 2 + 0.5,
            "centred": cosines / 2 + 0.5,
            "own": own,
            "labels": same,
            "uniform": np.where(own > 0, 1, options.get("weight_offdiagonal", 1.0)),
            "exp": np.exp((cosines - 1) / temperature),
            "relu": np.maximum(cosines, 0) ** power,
        }[kind]
    if options.get("duplicates") == "positives":
        weights = np.where(same > 0, 1, weights)
    return weights


def calibrated(weights, options: dict) -> float:
    """The sharpness with the wanted peakedness, by halving."""
    low, high = np.log(1e-3), np.log(1e5)
    for _ in range(60):
        middle = (low + high) / 2
        w = weights(np.exp(middle))
        if options.get("target_positives"):
            flat = np.exp(entropy(w)) > options["target_positives"]
        else:
            flat = (np.diagonal(w) / w.sum(axis=1)).mean() < options.get("target_diagonal", 0.5)
        low, high = (middle, high) if flat else (low, middle)
    return float(np.exp((low + high) / 2))


def solve(options: dict, u, v, p, labels, scale: float, bias: float, targets=None):
    """Loss and gradients for u, v, log scale and bias, from dense matrices by hand."""
    n = len(u)
    own = np.eye(n)
    same = labels[:, None] == labels[None, :]
    left_out = (same & (own == 0)) if options.get("duplicates") == "masked" else own < 0
    products = scale * u @ v.T
    if options.get("name") == "sigmoid":
        positive = same if options.get("duplicates") == "positives" else own > 0
        signs = np.where(positive, 1, -1) * ~left_out
        loss = np.where(left_out, 0, np.logaddexp(0, -signs * (products + bias))).sum() / n
        g = -signs / (1 + np.exp(signs * (products + bias))) / n
        return loss, gradients(g, u, v, scale, products)
    epsilon = 1e-8 if options.get("name") == "cellclip" else options.get("row_sum_epsilon", 0.0)
    weights = np.where(left_out, 0, weights_of(options, p, labels, targets))
    logits = np.where(left_out, -np.inf, products)
    weighted = options.get("weighted", "u_to_v")
    if options.get("name") in ("supervised", "contrastive"):
        weighted = "both"
    reverse = options.get("reverse_weight", 1.0)
    factors = {"u_to_v": 1.0, "v_to_u": reverse}
    if options.get("reduction") == "mean" or options.get("name") == "astroclip":
        factors = {k: x / (1 + reverse) for k, x in factors.items()}
    if options.get("direction", "both") != "both":
        factors = {k: float(k == options["direction"]) for k in factors}
    loss, g = 0.0, np.zeros((n, n))
    for name, turn in (("u_to_v", lambda x: x), ("v_to_u", np.transpose)):
        w = turn(weights) if weighted in (name, "both") else own
        t = w / (w.sum(axis=1, keepdims=True) + (epsilon if weighted in (name, "both") else 0))
        log_p = log_softmax(turn(logits))
        loss -= factors[name] * np.where(t > 0, t * np.where(t > 0, log_p, 0), 0).sum() / n
        residual = t.sum(axis=1, keepdims=True) * np.exp(log_p) - t
        g += factors[name] * turn(residual) / n
    return loss, gradients(g, u, v, scale, products)


def gradients(g, u, v, scale, products):
    return scale * g @ v, scale * g.T @ u, (g * products).sum(), g.sum()
