"""Which of a model's variants a device should get."""

from collections.abc import Sequence

from liberatai_coordinator.client.views import VariantView


def best_variant(variants: Sequence[VariantView], budget_bytes: int) -> VariantView | None:
    """Return the variant that answers best of those whose file fits a budget; None if none fits.

    Only figures that were measured for all of them are compared: accuracy on test data, else agreement with
    the original, else the length of the file. Of equals the shorter one wins.
    """
    fitting = [one for one in variants if one.bytes <= budget_bytes]
    if not fitting:
        return None
    rated = [[one.accuracy for one in fitting], [one.agreement for one in fitting]]
    figures = next((row for row in rated if None not in row), [float(one.bytes) for one in fitting])
    ranked = sorted(
        zip(figures, fitting, strict=True), key=lambda pair: (-(pair[0] or 0.0), pair[1].bytes, pair[1].id)
    )
    return ranked[0][1]
