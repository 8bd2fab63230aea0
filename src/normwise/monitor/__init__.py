"""Watch norms, effective learning rates and angular updates while training, and forecast them."""

from normwise.monitor.alarms import (
    Alarm,
    AlarmError,
    AlarmRule,
    DeadSlices,
    EffectiveLRFell,
    ExplodingSlices,
    LargeAngularUpdate,
    NotFinite,
    RangeForecast,
    standard_rules,
)
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
    SmallestNorm,
    SteppedSlices,
)
from normwise.monitor.triggers import Trigger, every, first, log_spaced
from normwise.monitor.watched import Layer
from normwise.monitor.writers import JsonLines, MLflow, Parquet, TensorBoard, WandB

__all__ = [
    "STANDARD",
    "Aggregate",
    "Alarm",
    "AlarmError",
    "AlarmRule",
    "AngularUpdate",
    "DeadSlices",
    "DecayPull",
    "EffectiveLR",
    "EffectiveLRFell",
    "ExplodingSlices",
    "GradientCosine",
    "GradientPush",
    "JsonLines",
    "LargeAngularUpdate",
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
    "ScaledGradient",
    "SmallestNorm",
    "SteppedSlices",
    "TensorBoard",
    "Trigger",
    "WandB",
    "every",
    "first",
    "log_spaced",
    "standard_rules",
]
