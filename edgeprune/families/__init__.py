"""What differs between MMDiTs, with one file per family: sd3.py, flux.py, flux2.py, z_image.py, qwen_image.py.

A family plays three roles: `Architecture` (facts from the config), `Surgery` (what pruning does to its modules) and
`Network` (how to run it). `family_of` finds the family of a config. joint.py, single.py and packing.py hold what
several families share, positions.py SD3's position table, removed.py the modules that replace removed parts, and
encoders.py the text encoders of a pipeline folder; padding.py and real_rotary.py have Z-Image's tokens and positions,
joint_rotary.py and vae_qwen_image.py what Qwen-Image has of its own.
architectures.json has the configs of published models.
"""

from edgeprune.families.architecture import Architecture, Config, Encoder, LatentSpace, Shape, Source
from edgeprune.families.network import Array, Axes, Network
from edgeprune.families.registry import CHANGED, SUPPORTED, Family, family_of, family_of_model, has_family
from edgeprune.families.surgery import Surgery, Swap

__all__ = [
    "CHANGED",
    "SUPPORTED",
    "Architecture",
    "Array",
    "Axes",
    "Config",
    "Encoder",
    "Family",
    "LatentSpace",
    "Network",
    "Shape",
    "Source",
    "Surgery",
    "Swap",
    "family_of",
    "family_of_model",
    "has_family",
]
