"""Names of the released detectors' weights -> names of `build_detector`'s: detectron2's for Vim, mmdetection's for
FastVim. Values stay as they are."""

from __future__ import annotations

import re

# what follows from the model's size, and the norm that no map is read behind
_DROPPED = re.compile(r"(proposal_generator\.anchor_generator|pixel_mean$|pixel_std$|backbone\.(net\.)?norm_f\.)")

_PARTS = {"norm_layer": "1", "norm": "1", "conv": "0", "": "0"}


def _pyramid(level: int, place: int, part: str, kind: str) -> str:
    return f"backbone.pyramid.p{level}.{place}.{part}{kind}"


def _simple_pyramid(match: re.Match[str]) -> str:
    level, place, norm, kind = int(match[1]), int(match[2]), match[3], match[4]
    # the last two places of a level are convolutions with a norm, those before it plain layers
    is_conv = place >= {2: 4, 3: 1, 4: 0, 5: 1}[level]
    return _pyramid(level, place, f"{_PARTS[norm or '']}." if is_conv else "", kind)


def _neck(match: re.Match[str]) -> str:
    place, part, kind = int(match[2]), match[3], match[4]
    first = (4, 1, 0, 1)[place]
    return _pyramid(place + 2, first + (match[1] == "fpn"), f"{_PARTS[part]}.", kind)


def _conv_or_norm(target: str) -> object:
    """A rule for detectron2's numbered convolutions from 1, whose norm hangs under them."""

    def name(match: re.Match[str]) -> str:
        stage = match["stage"] or "0"
        return f"roi_heads.{target}.{stage}.{int(match['n']) - 1}.{_PARTS[match['norm'] or '']}.{match['kind']}"

    return name


_KIND = r"(weight|bias)$"
_STAGE = r"roi_head\.{0}\.(\d)\."
_RULES = [
    # both: the body, and the norms of FastVim's maps
    (r"^backbone\.simfp_(\d)\.(\d)\.(?:(norm)\.)?" + _KIND, _simple_pyramid),
    (r"^backbone\.outnorm_(\d)\.", r"backbone.dense.outnorm.\1."),
    (r"^backbone\.(?:net\.)?", "backbone.dense.body."),
    # detectron2
    (r"^proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"rpn.head.conv.\1.0."),
    (r"^proposal_generator\.rpn_head\.conv\." + _KIND, r"rpn.head.conv.0.0.\1"),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (
        r"^roi_heads\.box_head\.(?P<stage>\d)\.conv(?P<n>\d)\.(?:(?P<norm>norm)\.)?(?P<kind>weight|bias)$",
        _conv_or_norm("box_head"),
    ),
    (r"^roi_heads\.box_head\.(\d)\.fc1\.", r"roi_heads.box_head.\1.5."),
    (
        r"^roi_heads\.mask_head\.mask_fcn(?P<stage>)(?P<n>\d)\.(?:(?P<norm>norm)\.)?(?P<kind>weight|bias)$",
        _conv_or_norm("mask_head"),
    ),
    (r"^roi_heads\.mask_head\.deconv\.", "roi_heads.mask_predictor.0.conv5_mask."),
    (r"^roi_heads\.mask_head\.predictor\.", "roi_heads.mask_predictor.0.mask_fcn_logits."),
    # mmdetection
    (r"^neck\.fpn1\.", "backbone.pyramid.p2."),
    (r"^neck\.fpn2\.", "backbone.pyramid.p3."),
    (r"^neck\.(lateral|fpn)_convs\.(\d)\.(conv|norm_layer)\." + _KIND, _neck),
    (r"^rpn_head\.rpn_conv\.(\d)\.conv\.", r"rpn.head.conv.\1.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (_STAGE.format("bbox_head") + r"fc_cls\.", r"roi_heads.box_predictor.\1.cls_score."),
    (_STAGE.format("bbox_head") + r"fc_reg\.", r"roi_heads.box_predictor.\1.bbox_pred."),
    (_STAGE.format("bbox_head") + r"shared_convs\.(\d)\.conv\.", r"roi_heads.box_head.\1.\2.0."),
    (_STAGE.format("bbox_head") + r"shared_convs\.(\d)\.norm_layer\.", r"roi_heads.box_head.\1.\2.1."),
    (_STAGE.format("bbox_head") + r"shared_fcs\.0\.", r"roi_heads.box_head.\1.5."),
    (_STAGE.format("mask_head") + r"convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.\2.0."),
    (_STAGE.format("mask_head") + r"convs\.(\d)\.norm_layer\.", r"roi_heads.mask_head.\1.\2.1."),
    (_STAGE.format("mask_head") + r"upsample\.", r"roi_heads.mask_predictor.\1.conv5_mask."),
    (_STAGE.format("mask_head") + r"conv_logits\.", r"roi_heads.mask_predictor.\1.mask_fcn_logits."),
]


def detector_name(name: str) -> str | None:
    """The name here of a released weight; None for what a detector here does not hold. Unknown names stay."""
    if _DROPPED.match(name):
        return None
    for pattern, target in _RULES:
        renamed, count = re.subn(pattern, target, name)
        if count:
            return renamed
    return name
