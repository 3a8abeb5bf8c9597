"""Too many bad samples stop a job: the rule, once for every job that sets samples aside."""

from __future__ import annotations

from collections import Counter

from nexusgen.errors import QuarantineError
from pipelines import embedded, storage


def check_fraction(num_bad: int, num_samples: int, allowed: float, codes: Counter[str], folder: str) -> None:
    """See that at most `allowed` of the samples so far, from 0 to 1, are bad; 1 never stops. `codes`: rows by reason.

    Raises: QuarantineError; it names the most frequent reasons, and the quarantine of `folder`.
    """
    if allowed < 1 and num_bad > allowed * num_samples:
        reasons = ", ".join(f"{code} {count}" for code, count in codes.most_common(5))
        raise QuarantineError(
            f"{num_bad} of {num_samples} samples are bad ({num_bad / num_samples:.1%}; at most {allowed:.1%} are "
            f"allowed): {reasons}. See {storage.join(folder, embedded.QUARANTINE_FOLDER)}, mend the data, or raise "
            f"max_quarantine_fraction"
        )
