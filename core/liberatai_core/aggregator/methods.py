"""The ways to find an ensemble's weights."""

from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.label_free import label_free
from liberatai_core.aggregator.stacking import stacking
from liberatai_core.aggregator.tpe import tpe
from liberatai_core.aggregator.uniform import uniform

ENSEMBLES: dict[str, Method] = {
    "uniform": uniform,
    "label_free": label_free,
    "stacking": stacking,
    "tpe": tpe(),
}
"""By name, as a job chooses them; the last two need labelled validation data."""
