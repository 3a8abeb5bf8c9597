"""The rule that stops a job over bad samples."""

from __future__ import annotations

from collections import Counter

import pytest

from nexusgen.errors import QuarantineError
from pipelines.quarantine import check_fraction


def test_a_fraction_up_to_the_allowed_one_passes() -> None:
    check_fraction(0, 0, 0.0, Counter(), "folder")
    check_fraction(5, 100, 0.05, Counter(image_invalid=5), "folder")
    check_fraction(7, 7, 1.0, Counter(image_invalid=7), "folder")  # 1: never stop


def test_more_stop_with_the_reasons_and_the_place() -> None:
    codes = Counter(image_invalid=5, member_missing=1, taken_down=3)
    with pytest.raises(QuarantineError) as caught:
        check_fraction(6, 100, 0.05, codes, "s3://bucket/embedded/mine/vision")
    assert str(caught.value) == (
        "6 of 100 samples are bad (6.0%; at most 5.0% are allowed): image_invalid 5, taken_down 3, member_missing 1. "
        "See s3://bucket/embedded/mine/vision/quarantine, mend the data, or raise max_quarantine_fraction"
    )
