"""The family of losses in one formula, and its published members in one table.

N pairs (u_i, v_i), s = 1/tau = exp(logit_scale), l_ij = s <u_i, v_j>. The softmax losses are

    L         = a L(U->V) + b L(V->U) + sum_k c_k R_k             (a, b): direction_weights
    L(U->V)   = -1/N sum_ij t_ij log softmax_j(l_ij)              over the j that are not masked
    t_ij      = mix [i = j] + (1 - mix) w_ij / (sum_j w_ij + epsilon)
    w_ij      = f(similarity of i and j)                          f: weight_function

and the same with rows and columns exchanged for L(V->U). A direction that is not `weighted` has
t_ij = [i = j]. The rows of w are normalised before mixing, so `mix` has the same meaning for every
f and N. If f is calibrated, the positive pair's share of w is set for every batch instead. The
sigmoid losses (with bias beta) are

    L         = 1/N sum_ij [t_ij log(1 + exp(-z_ij)) + (a - b t_ij) log(1 + exp(z_ij))] + ...
    z_ij      = l_ij + beta,   t_ij = mix [i = j] + (1 - mix) w_ij      (a, b): `negatives`

Similarities are cosines of the locked tower's features p (any third array, `weights_from`), squared
distances of unnormalised features, or labels: integers, or sets of integers. With weighted="own",
each direction uses its own modality's similarities (p for U->V, q for V->U).

Pairs i != j are left out of both softmaxes and of the targets (`duplicates`) where labels are equal
("masked"), or where the locked tower finds them too similar: from row i where <p_i, p_j> > |p_i|^2
- m ("absolute"), or > |p_i|^2 (1 - m) ("relative"), and from column j likewise.

The further terms R_k (`terms`, "name=factor"):

    negatives         the weighted directions' softmax and targets over i != j alone; rows without
                      any target among them are left out of the mean
    replicates        the same for u against u, with the labels' weights 1 and 0
    cyclic_within     1/N sum_ij (<u_i, u_j> - <v_i, v_j>)^2
    cyclic_across     1/N sum_ij (<u_i, v_j> - <u_j, v_i>)^2
    cosine            1/N sum_i (1 - <u_i, v_i>), u constant
    squared           1/N sum_i |u_i - v_i|^2, u constant (twice `cosine` for rows of unit norm)

Losses that keep a state for each example over the run (FastCLIP, SogCLR) are not covered: a loss
here is a function of one batch.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

TERMS = ("negatives", "replicates", "cyclic_within", "cyclic_across", "cosine", "squared")
_TARGETS = ("weight_function", "weighted", "mix", "detach_weights")
_REST = ("duplicates", "direction_weights", "terms")


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of a published loss.

    Attributes:
      source: the paper, and how the published code differs.
      kind: "softmax", "sigmoid", or "none" (further terms alone).
      weight_function, weighted, duplicates, mix, direction_weights, terms, detach_weights: as the
          options of `LossConfig`; "identity" weights are 1 for positive pairs and 0 for all others.
      row_sum_epsilon: added to the row sums of the weights.
      negatives: (a, b) of the sigmoid losses.
      open: the options that may be changed without making it a different loss.
    """

    source: str
    kind: str = "softmax"
    weight_function: str = "identity"
    weighted: str = "both"
    duplicates: str = "negatives"
    mix: tuple[float, ...] = (0.0,)
    direction_weights: tuple[float, ...] = (1.0, 1.0)
    terms: tuple[str, ...] = ()
    detach_weights: bool = True
    row_sum_epsilon: float = 0.0
    negatives: tuple[float, float] = (1.0, 1.0)
    open: tuple[str, ...] = _REST


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "cwcl": Preset(
            "Srinivasa et al., NeurIPS 2023, arXiv 2309.14580",
            weight_function="affine",
            weighted="u_to_v",
            open=(*_TARGETS, *_REST),
        ),
        "contrastive": Preset(
            "InfoNCE in both directions, arXiv 1807.03748; CLIP (arXiv 2103.00020) takes half"
        ),
        "sigmoid": Preset(
            "SigLIP, arXiv 2303.15343; big_vision", kind="sigmoid", open=("duplicates", "terms")
        ),
        "supervised": Preset(
            "several positives by labels, arXiv 2004.11362 (its L_out)",
            weight_function="labels",
            open=("weight_function", "weighted", "mix", *_REST),
        ),
        "uniform": Preset(
            "the control without similarities: label smoothing",
            weight_function="uniform",
            weighted="u_to_v",
            open=("weight_function", "weighted", "mix", *_REST),
        ),
        "cellclip": Preset(
            "CellCLIP, arXiv 2506.06290, cwcl_loss in its code: raw profiles give the weights",
            weight_function="affine",
            weighted="u_to_v",
            detach_weights=False,
            row_sum_epsilon=1e-8,
            open=("mix", "detach_weights", *_REST),
        ),
        "cellclip_both": Preset(
            "bi_cwcl_loss in CellCLIP's code, which leaves the text's weights unnormalised (N/2 "
            "times larger) and adds 1e-8 to norms and row sums; here both are normalised",
            weight_function="affine",
            weighted="own",
            open=("mix", "detach_weights", *_REST),
        ),
        "morphoclip": Preset(
            "MorphoCLIP, arXiv 2608.22690: labels are sets (perturbation, target genes); 1 for "
            "equal sets, less for sets that overlap; replicates: its image-image term",
            weight_function="labels0.5",
            direction_weights=(0.5, 0.5),
            terms=("replicates=0.1",),
            open=("weight_function", "mix", *_REST),
        ),
        "gist": Preset(
            "GIST, arXiv 2402.16829; as GISTEmbedLoss of sentence-transformers without its "
            "anchor-anchor and positive-positive columns, the guide being the locked tower",
            duplicates="absolute0.05",
        ),
        "softclip": Preset(
            "SoftCLIP, arXiv 2303.17561, no public code: softmax of each modality's own "
            "similarities, mixed with the positive pair; again over the negatives alone",
            weight_function="exp0.1",
            weighted="own",
            mix=(0.5,),
            direction_weights=(0.5, 0.5),
            terms=("negatives=0.5",),
            open=(*_TARGETS, *_REST),
        ),
        "s2l": Preset(
            "S2L of MolPhenix, arXiv 2409.08302, with the constants of s2l_loss in CellCLIP's "
            "code: weights from distances of features that are not normalised",
            kind="sigmoid",
            weight_function="distance0.3_0.75",
            negatives=(1.7, 0.75),
            open=("weight_function", "mix", "duplicates", "terms"),
        ),
        "xclr": Preset(
            "X-CLR, arXiv 2407.18134: softmax of the similarities in both directions",
            weight_function="exp0.1",
            open=("weight_function", "mix", "detach_weights", *_REST),
        ),
        "cyclip": Preset(
            "CyCLIP, arXiv 2205.14459, cylambda1 and cylambda2 of its code at 0.25",
            direction_weights=(0.5, 0.5),
            terms=("cyclic_within=0.25", "cyclic_across=0.25"),
        ),
        "regression": Preset(
            "SAMU-XLSR, arXiv 2205.08180 (cosine), SONAR, arXiv 2308.11466 (squared): no negatives",
            kind="none",
            terms=("cosine=1",),
            open=("terms",),
        ),
        "astroclip": Preset(
            "AstroCLIP, arXiv 2310.03024: CLIP's loss at a fixed inverse temperature of 15.5",
            direction_weights=(0.5, 0.5),
        ),
    }
)
