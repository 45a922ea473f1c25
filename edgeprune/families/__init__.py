"""What differs between MMDiTs: one file per family, all else in the project is written once."""

from edgeprune.families.base import Config, Family, Source, Swap, family_of, family_of_model

__all__ = ["Config", "Family", "Source", "Swap", "family_of", "family_of_model"]
