"""What may be said about a fault outside the device (promise P9)."""

LOCAL_ONLY = frozenset({"E_DATA", "E_TRAIN", "E_NONFINITE", "E_INTERNAL"})
"""Codes whose text may quote the data: a label, a row, a path, what a library says about a batch."""


def outward(code: str, text: str) -> str:
    """Return what may be told about a fault outside the device: never words about its data.

    The whole text stays in the device's log, in `status` and in `doctor`.
    """
    if code not in LOCAL_ONLY:
        return text
    return f"{code}: the device's log and `liberatai-agent doctor` there say why"
