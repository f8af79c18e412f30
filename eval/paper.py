"""The paper's Tables 1, 2 and 3: its numbers, and the settings of its rows.

WarpingError is of an unknown scale. Table 2 contradicts the text, which says that WarpingError falls as p and t0 grow:
it rises with both. None of its rows equals one of Tables 1 and 3, so it was made with another model, setting or seed.
Table 3's full model is Table 1's of SDXL, whose t0 and p are not stated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

METRICS = ("dover_vqa", "clip_temp", "flow_score", "warping_error")


@dataclass(frozen=True)
class Row:
    """A row: the four metrics in the order of METRICS, and the fields of a `Request` that are its own."""

    name: str
    numbers: tuple[float, float, float, float]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return dict(zip(METRICS, self.numbers, strict=True))


OURS = {"i2v-sd15": "I2V-Adapter (SD1.5)", "i2v-sdxl": "I2V-Adapter (SDXL)"}  # Table 1's rows by preset
TABLE_1 = (
    Row("Gen-2", (0.0800, 0.9252, 0.2490, 12.5976)),
    Row("Pika", (0.0691, 0.9021, 0.1316, 9.4587)),
    Row("DynamiCrafter", (0.0848, 0.9275, 0.4185, 14.3825)),
    Row("I2VGen-XL", (0.0459, 0.6904, 0.6111, 12.6566)),
    Row("SVD", (0.0847, 0.9365, 0.6883, 20.8362)),
    Row("I2V-Adapter (SD1.5)", (0.0873, 0.9379, 0.7069, 9.8967)),
    Row("I2V-Adapter (SDXL)", (0.0887, 0.9389, 0.7124, 11.8388)),
)
_PRIOR = {
    (1.0, 1.0): (0.0900, 0.9393, 0.8395, 11.7421),
    (0.9, 1.0): (0.0933, 0.9445, 0.4168, 10.0771),
    (0.8, 1.0): (0.0940, 0.9454, 0.2712, 9.1360),
    (0.7, 1.0): (0.0929, 0.9485, 0.1912, 8.3508),
    (0.6, 1.0): (0.0925, 0.9449, 0.1428, 7.6332),
    (1.0, 0.9): (0.0904, 0.9379, 0.9895, 12.0888),
    (1.0, 0.7): (0.0907, 0.9389, 0.9064, 11.8403),
    (1.0, 0.5): (0.0894, 0.9391, 0.8046, 11.6175),
    (1.0, 0.3): (0.0902, 0.9404, 0.7477, 11.4993),
    (1.0, 0.1): (0.0901, 0.9415, 0.6918, 11.3017),
}
TABLE_2 = tuple(Row(f"t0 {t0}, p {p}", numbers, {"t0": t0, "p": p}) for (t0, p), numbers in _PRIOR.items())
TABLE_3 = (
    Row("without both", (0.0264, 0.7013, 1.5671, 24.5928), {"i2v_scale": 0.0, "ip_scale": 0.0}),
    Row("without I2V-Adapter", (0.0428, 0.8841, 0.2684, 13.7764), {"i2v_scale": 0.0}),
    Row("without Content-Adapter", (0.0813, 0.9158, 1.3533, 19.5557), {"ip_scale": 0.0}),
    Row("full model", (0.0887, 0.9389, 0.7124, 11.8388)),
)
TABLES = {"table1": TABLE_1, "table2": TABLE_2, "table3": TABLE_3}
