"""The three efficiency methods, and nothing else: token merging, alternating spatial pooling, learned pruning."""

from __future__ import annotations

from fusion.config import MethodConfig
from fusion.token_state import SiteMethod


def build_site_methods(config: MethodConfig) -> list[SiteMethod]:
    """The methods that `config` switches on, outermost first."""
    methods: list[SiteMethod] = []
    if config.pruning is not None:
        from fusion.dynamic_pruning import DynamicPruning

        methods.append(DynamicPruning(config.pruning))
    if config.merging is not None:
        from fusion.token_merging import TokenMerging

        methods.append(TokenMerging(config.merging))
    if config.pooling is not None:
        from fusion.spatial_pooling import SpatialPooling

        methods.append(SpatialPooling(config.pooling))
    return methods
