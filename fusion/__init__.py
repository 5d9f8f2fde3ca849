"""The three efficiency methods, and nothing else: token merging, alternating spatial pooling, learned pruning."""

from __future__ import annotations

from fusion.config import MethodConfig
from fusion.dynamic_pruning import DynamicPruning
from fusion.spatial_pooling import SpatialPooling
from fusion.token_merging import TokenMerging
from fusion.token_state import SiteMethod


def build_site_methods(config: MethodConfig) -> list[SiteMethod]:
    """The methods that `config` switches on, outermost first."""
    kinds = (DynamicPruning, config.pruning), (TokenMerging, config.merging), (SpatialPooling, config.pooling)
    return [kind(settings) for kind, settings in kinds if settings is not None]
