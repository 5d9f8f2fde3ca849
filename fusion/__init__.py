"""The efficiency methods, and nothing else: token merging, alternating spatial pooling, learned pruning.

Methods know no model, task or program: those ask the registry and the methods themselves.
"""

import utils.packages  # noqa: F401 - says so where another project's kernel packages are installed
from fusion.dynamic_pruning import DynamicPruning
from fusion.method import Meter, Settings, SiteMethod, SitePlan, added_parameters, methods_of, option, plans_of, varies
from fusion.registry import (
    METHODS,
    Methods,
    accept,
    add_arguments,
    build_site_methods,
    check,
    describe,
    draw,
    meters_of,
    method_keywords,
    model_keywords,
    register,
    unregister,
)
from fusion.spatial_pooling import SpatialPooling
from fusion.token_merging import TokenMerging

__all__ = [
    "METHODS",
    "Meter",
    "Methods",
    "Settings",
    "SiteMethod",
    "SitePlan",
    "accept",
    "add_arguments",
    "added_parameters",
    "build_site_methods",
    "check",
    "describe",
    "draw",
    "meters_of",
    "method_keywords",
    "methods_of",
    "model_keywords",
    "option",
    "plans_of",
    "register",
    "unregister",
    "varies",
]

for _method in (DynamicPruning, TokenMerging, SpatialPooling):
    register(_method)
