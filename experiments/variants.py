"""What can be compared: algorithms, what their clients upload, what the server does, and who attacks."""

import dataclasses
from typing import Any

ALGORITHMS = ("cedar", "fedavg", "fedprox", "reptile", "maml", "fomaml", "scratch")
SCORES = ("rcs", "update_norm", "fisher", "taylor", "cosine", "random")
ATTACKS = ("none", "sign_flip", "gaussian", "label_flip")
SERVERS = ("mean", "similarity", "screening")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a result table."""

    name: str
    """Key in tables, plots and folders."""
    algorithm: str = "cedar"
    """One of `ALGORITHMS`; `scratch` trains nothing together and adapts a random initialisation."""
    budget: float | None = None
    """Bytes a client may upload for its judged layers each round, as a share of all their bytes."""
    num_skipped: int | None = None
    """Judged layers left out each round."""
    score: str = "rcs"
    """Importance of a layer, one of `SCORES`."""
    carry: float = 0.0
    """Unspent bytes that a client may carry into its next round, as a share of the budget."""
    server: str = "mean"
    """`mean`; `similarity`: Cedar's similarity weights; `screening`: the same with detection."""
    min_gap: float = 0.3
    """Detection drops the lower cluster only if the gap between the clusters exceeds this."""
    attack: str = "none"
    """One of `ATTACKS`."""
    attack_fraction: float = 0.2
    """Share of the training clients that attack."""
    attack_scale: float = 5.0
    """Scale of `sign_flip`, standard deviation of `gaussian`."""

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        for field, allowed in {"algorithm": ALGORITHMS, "score": SCORES, "attack": ATTACKS, "server": SERVERS}.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget must satisfy 0 < budget <= 1, got {self.budget}.")
        if not 0 <= self.attack_fraction < 1:
            raise ValueError(f"attack_fraction must satisfy 0 <= attack_fraction < 1, got {self.attack_fraction}.")
        if self.budget is not None and self.num_skipped is not None:
            raise ValueError(f"budget and num_skipped exclude each other, got {self.budget} and {self.num_skipped}.")
        if self.carry < 0:
            raise ValueError(f"carry must be at least 0, got {self.carry}.")

    @property
    def filters(self) -> bool:
        """Whether clients leave layers out."""
        return self.budget is not None or self.num_skipped is not None


def _suite_algorithms() -> tuple[Variant, ...]:
    return (
        Variant("FedAvg", "fedavg"),
        Variant("Cedar", "cedar"),
        Variant("Reptile", "reptile"),
        Variant("MAML", "maml"),
        Variant("from scratch", "scratch"),
    )


def _suite_demo() -> tuple[Variant, ...]:
    return (
        Variant("FedAvg + fine-tuning", "fedavg"),
        Variant("MAML, second order", "maml"),
        Variant("Cedar", "cedar"),
        Variant("Cedar, 75 % budget", "cedar", budget=0.75),
        Variant("20 % poisoned, mean", "cedar", budget=0.75, attack="sign_flip"),
        Variant("20 % poisoned, screen", "cedar", budget=0.75, server="screening", attack="sign_flip"),
        Variant("from scratch", "scratch"),
    )


def _suite_filter() -> tuple[Variant, ...]:
    rows = [Variant("everything")]
    for budget in (0.75, 0.5):
        for score in ("rcs", "random", "update_norm"):
            rows.append(Variant(f"{score}, {budget:.0%}", budget=budget, score=score))
    rows.append(Variant("rcs, 1 layer", num_skipped=1))
    return tuple(rows)


def _suite_screening() -> tuple[Variant, ...]:
    rows = [
        Variant("no attack, mean"),
        Variant("no attack, screening", server="screening"),
        Variant("no attack, screening, gap .5", server="screening", min_gap=0.5),
    ]
    attacks = {
        "sign flip x5": ("sign_flip", 5.0),
        "label flip": ("label_flip", 1.0),
        "sign flip x1": ("sign_flip", 1.0),
        "Gaussian": ("gaussian", 0.1),
    }
    for name, (attack, scale) in attacks.items():
        for server in SERVERS if name == "sign flip x5" else ("mean", "screening"):
            rows.append(Variant(f"{name}, {server}", server=server, attack=attack, attack_scale=scale))
    return tuple(rows)


SUITES = {
    "algorithms": _suite_algorithms,
    "demo": _suite_demo,
    "filter": _suite_filter,
    "screening": _suite_screening,
}

SUITE_SETTINGS: dict[str, dict[str, Any]] = {
    "filter": {"rounds": 60},
    "screening": {"rounds": 50, "participation": 1.0},
}
"""What a suite changes in the data set's preset."""
