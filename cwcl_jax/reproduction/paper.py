"""Results reported in the paper: arXiv 2309.14580, appendix, in per cent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Published:
    """A table as printed: method -> one value per column."""

    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


TABLES: dict[int, Published] = {
    4: Published(
        ("I->T R@1", "I->T R@5", "I->T R@10", "T->I R@1", "T->I R@5", "T->I R@10"),
        {
            "CL": (30.42, 54.32, 65.82, 24.17, 49.04, 61.05),
            "CWCL": (35.10, 61.52, 73.0, 25.69, 50.04, 61.59),
        },
    ),
    5: Published(
        ("random initialisation", "pretrained"),
        {"CL": (13.80, 22.73), "CWCL": (26.17, 53.12)},
    ),
    6: Published(
        ("none locked", "speech", "text", "both"),
        {"CL": (18.77, 7.89, 24.03, 9.82), "CWCL": (17.50, 27.39, 53.12, 16.70)},
    ),
    7: Published(
        ("batch 20", "40", "80"),
        {"CL": (24.03, 25.20, 24.51), "CWCL": (53.12, 53.94, 51.80)},
    ),
    8: Published(
        ("SLURP", "SLURP#", "STOP", "STOP#", "KWS", "KWS#"),
        {
            "CL, RoBERTa+S": (69.57, 49.86, 98.19, 94.03, 82.22, 82.53),
            "CL, BART+Y": (52.97, 24.87, 95.27, 81.63, 84.02, 78.14),
            "CWCL, RoBERTa+S": (84.53, 68.58, 99.38, 96.52, 91.20, 92.42),
            "CWCL, BART+Y": (79.48, 57.34, 99.48, 97.71, 93.79, 94.30),
            "text itself, RoBERTa+S": (95.66, 83.36, 98.93, 95.20, 100.0, 98.20),
            "text itself, BART+Y": (99.58, 73.82, 99.45, 98.40, 100.0, 100.0),
        },
    ),
}
