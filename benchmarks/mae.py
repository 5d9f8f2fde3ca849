"""A masked autoencoder's encoder and training step against the same with nothing masked, and against a ViT's.

    python -m benchmarks.mae                             # mae_fastvim_base at ratio 0.75, 224 px, batch 8

The peer is MAE (He et al. 2022) put together from timm's parts: a ViT-B whose encoder takes the visible tokens alone,
without a class token, and a decoder of as many attention blocks of the same width as ours has layers. A step is
forward, backward and AdamW. All are timed in turns in one process.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.cases import adamw, model_spec, parse_spec
from benchmarks.command import add_device, add_threads, command, parser
from measure.machine import in_words, machine
from measure.timing import time_in_turns
from models_mae import MaskedAutoencoder, mask_by_noise, visible_count
from utils import UsageError
from utils.flags import number


class VitAutoencoder(nn.Module):
    """MAE with timm's ViT `name` as encoder; targets, masks and loss are those of `like`."""

    def __init__(self, name: str, like: MaskedAutoencoder, heads: int = 16) -> None:
        super().__init__()
        patch, grid = like.patch_embed.patch_size[0], like.patch_embed.grid_size
        size = like.patch_embed.img_size
        self.encoder = timm.create_model(
            name, img_size=size, patch_size=patch, class_token=False, global_pool="avg", num_classes=0
        )
        width = like.decoder_embed_dim
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], width), requires_grad=False)
        self.decoder_blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in like.decoder_blocks))
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, like.decoder_pred.out_features)
        self.loss = like.forward_loss  # a bound method, so that `like` is no part of what is trained

    def forward_encoder(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `MaskedAutoencoder.forward_encoder`."""
        keep, mask, ids_restore = mask_by_noise(noise, visible_count(noise.shape[1], mask_ratio))
        tokens = self.encoder.patch_embed(images) + self.encoder.pos_embed
        tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        tokens = self.encoder.blocks(self.encoder.norm_pre(tokens))
        return self.encoder.fc_norm(self.encoder.norm(tokens)), mask, ids_restore

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `MaskedAutoencoder.forward`."""
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        tokens = self.decoder_embed(latent)
        hidden = self.mask_token.expand(len(tokens), ids_restore.shape[1] - tokens.shape[1], -1)
        tokens = torch.cat([tokens, hidden], 1).gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        tokens = self.decoder_norm(self.decoder_blocks(tokens + self.decoder_pos_embed))
        pred = self.decoder_pred(tokens)
        return self.loss(images, pred, mask), pred, mask


def training_step(model: nn.Module, images: Tensor, noise: Tensor, mask_ratio: float) -> Callable[[], None]:
    """A call that takes one step of AdamW, which moves nothing."""
    optimizer = adamw(model, lr=0.0, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        model(images, mask_ratio, noise)[0].backward()
        optimizer.step()

    return step


@torch.no_grad()
def _encode(model: nn.Module, images: Tensor, noise: Tensor, mask_ratio: float) -> None:
    model.forward_encoder(images, mask_ratio, noise)


@command("benchmarks.mae")
def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table, one row a model and ratio."""
    flags = parser("benchmarks.mae", __doc__)
    flags.add_argument("--model", type=model_spec, default="mae_fastvim_base_patch16_224", help="default: %(default)s")
    flags.add_argument("--peer", type=model_spec, default="vit_base_patch16_224", help="default: %(default)s")
    flags.add_argument("--mask-ratio", type=number(float, 0, 1, below=True), default=0.75, help="default: 0.75")
    flags.add_argument("--batch-size", type=number(int, 1), default=8, help="default: 8")
    flags.add_argument("--rounds", type=number(int, 1), default=3, help="timings of each (default: 3)")
    flags.add_argument(
        "--only", nargs="+", choices=("encoder", "step"), default=["encoder", "step"], help="default: both"
    )
    add_device(flags)
    add_threads(flags)
    args = flags.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    name, keywords = parse_spec(args.model)
    model = timm.create_model(name, **keywords)
    if not isinstance(model, MaskedAutoencoder):
        raise UsageError(f"--model {args.model} is no masked autoencoder; wanted a mae_* name.")
    peer = VitAutoencoder(args.peer, model)
    model, peer = model.to(device), peer.to(device)
    images = torch.randn(args.batch_size, *model.default_cfg["input_size"], device=device)
    noise = torch.rand(args.batch_size, model.patch_embed.num_patches, device=device)
    rows = [("nothing masked", model, 0.0), ("masked", model, args.mask_ratio), (args.peer, peer, args.mask_ratio)]
    kinds = {"encoder": lambda *each: partial(_encode, *each), "step": training_step}
    columns = {}
    for kind in args.only:
        calls = [kinds[kind](each, images, noise, ratio) for _, each, ratio in rows]
        times = time_in_turns(calls, device, min_rounds=args.rounds, max_rounds=args.rounds, warm_up=1, block_seconds=0)
        columns[kind] = [statistics.median(taken) for taken in times]
    print(f"{args.model}, batch {args.batch_size}, {in_words(machine(device))}\n")
    heads = [f"{kind}, s | of nothing masked | of the ViT" for kind in columns]
    print(f"| model | ratio | {' | '.join(heads)} |\n|---|---|{'---|---|---|' * len(heads)}")
    for number_, (title, _, ratio) in enumerate(rows):
        cells = [
            f"{seconds[number_]:.3f} | {seconds[number_] / seconds[0]:.3f} | {seconds[number_] / seconds[2]:.3f}"
            for seconds in columns.values()
        ]
        print(f"| {title} | {ratio:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
