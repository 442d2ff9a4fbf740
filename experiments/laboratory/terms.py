"""Words that the tables of several studies use."""

from __future__ import annotations

DIVERGED = {
    "Diverged runs": "From there on they count with the loss of their initial model, and no loss counts for more."
}


def intervals(seeds: int, repeated: str = "") -> dict[str, str]:
    """repeated: what is done anew for every resample, as "tuning is repeated"."""
    told = f"95% bootstrap over {seeds} seeds, widened where they are few"
    if repeated:
        told += f"; the same resamples for all that is compared, and {repeated} in each"
    return {"Intervals": f"{told}."}
