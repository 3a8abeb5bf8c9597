"""How often to save: checkpoints cost time, and so does what a failure throws away.

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (9), 1974, and J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22 (3),
2006: failures come at random (exponential), with a mean time between them of M; a checkpoint takes C, a restart R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """What interrupts a training, in seconds."""

    mean_s: float  # between failures of any of its machines
    checkpoint_s: float  # during which it doesn't train
    restart_s: float

    def goodput(self, interval_s: float) -> float:
        """The share of the time that trains, with a checkpoint after every `interval_s` of training.

        Daly's expected time of an interval: M exp(R/M) (exp((interval + C) / M) - 1).
        """
        mean = self.mean_s
        exponent = (interval_s + self.checkpoint_s) / mean
        if exponent > 700:  # beyond what a float holds: it never gets through an interval
            return 0.0
        return interval_s / (mean * math.exp(self.restart_s / mean) * math.expm1(exponent))

    @property
    def best_interval_s(self) -> float:
        """Daly's estimate, sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C; M itself where C isn't below 2 M."""
        mean, checkpoint = self.mean_s, self.checkpoint_s
        if checkpoint >= 2 * mean:
            return mean
        ratio = checkpoint / (2 * mean)
        return self.young_interval_s * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint

    @property
    def young_interval_s(self) -> float:
        """Young's estimate: sqrt(2 C M)."""
        return math.sqrt(2 * self.checkpoint_s * self.mean_s)
