"""The two released kinds of detection heads, as values: what differs between them, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = 3
# a proposal belongs to a true box from this IoU on, stage by stage (Cai and Vasconcelos 2018, arXiv:1712.00726)
STAGE_IOU = (0.5, 0.6, 0.7)

Deltas = tuple[float, float, float, float]


@dataclass(frozen=True)
class HeadKind:
    """What one release's heads do their own way.

    `norm_eps` is added to the variance in the heads' and the pyramid's norms. `delta_weights[k]` multiply the box
    deltas (x, y, w, h) of stage k, which are predicted for each class if `by_class`, else once. With `resample` the
    true boxes leave the boxes that a stage hands on, those are refined by their true class, and the next stage draws
    a new sample with the true boxes back in; without, all boxes are refined and matched anew. `stage_weights` scale
    the losses of the stages, `pooled_gradient` the gradient that reaches the maps through pooled box features.
    `num_masks` mask heads, the first on the positives of stage 0 and so on; their probabilities are averaged.
    `mean_of_logits` says whether scores are the softmax of mean logits or the mean of softmaxes. `rpn_beta` is where
    the box loss of the proposals turns from square to linear; `rpn_post_nms_top_n_train` proposals an image are left
    in training.
    """

    name: str
    norm_eps: float
    delta_weights: tuple[Deltas, Deltas, Deltas]
    by_class: bool
    resample: bool
    stage_weights: tuple[float, float, float]
    pooled_gradient: float
    num_masks: int
    mean_of_logits: bool
    rpn_beta: float
    rpn_post_nms_top_n_train: int


VIM = HeadKind(
    name="vim",
    norm_eps=1e-6,
    delta_weights=((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)),
    by_class=False,
    resample=False,
    stage_weights=(1, 1, 1),
    pooled_gradient=1 / STAGES,
    num_masks=1,
    mean_of_logits=False,
    rpn_beta=0.0,
    rpn_post_nms_top_n_train=1000,
)

FASTVIM = HeadKind(
    name="fastvim",
    norm_eps=1e-5,
    # one over the standard deviations that the release divides its deltas by
    delta_weights=tuple((1 / xy, 1 / xy, 1 / wh, 1 / wh) for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))),
    by_class=True,
    resample=True,
    stage_weights=(1, 0.5, 0.25),
    pooled_gradient=1,
    num_masks=STAGES,
    mean_of_logits=True,
    rpn_beta=1 / 9,
    rpn_post_nms_top_n_train=2000,
)

KINDS = {kind.name: kind for kind in (VIM, FASTVIM)}
