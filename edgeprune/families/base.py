# TEMP facade
"""The names that this module had, at their new places."""

from edgeprune.families.architecture import (
    WHERE,
    Architecture,
    Config,
    Encoder,
    LatentSpace,
    Shape,
    Source,
    bounded,
    whole_number,
)
from edgeprune.families.network import Array, Axes, Network
from edgeprune.families.registry import CHANGED, Family, family_of, family_of_model
from edgeprune.families.surgery import Producer, ScalingGroup, Surgery, Swap

whole = whole_number

__all__ = [
    "CHANGED",
    "WHERE",
    "Architecture",
    "Array",
    "Axes",
    "Config",
    "Encoder",
    "Family",
    "LatentSpace",
    "Network",
    "Producer",
    "ScalingGroup",
    "Shape",
    "Source",
    "Surgery",
    "Swap",
    "bounded",
    "family_of",
    "family_of_model",
    "whole",
    "whole_number",
]
