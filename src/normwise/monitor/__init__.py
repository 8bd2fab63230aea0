"""Watch norms, effective learning rates and angular updates while training, and forecast them."""

from normwise.monitor.alarms import (
    Alarm,
    AlarmError,
    DeadSlices,
    EffectiveLRFell,
    ExplodingSlices,
    NotFinite,
    RangeForecast,
    Rule,
    Tumbling,
    standard_rules,
)
from normwise.monitor.layout import Layer
from normwise.monitor.measurement import Measurement
from normwise.monitor.monitor import Monitor
from normwise.monitor.quantities import (
    STANDARD,
    Aggregate,
    AngularUpdate,
    DecayPull,
    EffectiveLR,
    GradientCosine,
    GradientPush,
    LargestInverseNorm,
    Norm,
    Quantity,
    RadialShare,
    ScaledGradient,
    Slices,
    SmallestNorm,
)
from normwise.monitor.schedules import Schedule, every, first, log_spaced
from normwise.monitor.writers import JsonLines, MLflow, Parquet, TensorBoard, WandB

__all__ = [
    "STANDARD",
    "Aggregate",
    "Alarm",
    "AlarmError",
    "AngularUpdate",
    "DeadSlices",
    "DecayPull",
    "EffectiveLR",
    "EffectiveLRFell",
    "ExplodingSlices",
    "GradientCosine",
    "GradientPush",
    "JsonLines",
    "LargestInverseNorm",
    "Layer",
    "MLflow",
    "Measurement",
    "Monitor",
    "Norm",
    "NotFinite",
    "Parquet",
    "Quantity",
    "RadialShare",
    "RangeForecast",
    "Rule",
    "ScaledGradient",
    "Schedule",
    "Slices",
    "SmallestNorm",
    "TensorBoard",
    "Tumbling",
    "WandB",
    "every",
    "first",
    "log_spaced",
    "standard_rules",
]
