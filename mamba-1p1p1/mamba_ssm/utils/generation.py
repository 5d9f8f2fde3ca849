"""Decoding token by token: what a model keeps between tokens, and how the next one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass
class InferenceParams:
    """What is carried from one token to the next: how many have gone, and each layer's states by its number."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin again, in the same memory."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class Generated(NamedTuple):
    """`sequences` (batch, length), prompt and all; `scores`, the logits (batch, vocabulary) of each token chosen."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Choose a token of each row: logits (batch, vocabulary) -> (batch,).

    `top_k` 1 takes the best; else one is drawn among the `top_k` best (0: all), of those the fewest that together have
    the probability `top_p` (0: all; Holtzman et al. 2020, section 3.1), or all with at least `min_p` of the best one's.
    """
    if top_k == 1:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if min_p > 0:
        odds = logits.softmax(-1)
        logits = logits.masked_fill(odds < min_p * odds.amax(-1, keepdim=True), -torch.inf)
    if 0 < top_p < 1:
        ordered, places = logits.sort(descending=True)
        odds = ordered.softmax(-1)
        # a token stays if those before it have less than top_p, so that the first always does
        ordered = ordered.masked_fill(odds.cumsum(-1) - odds >= top_p, -torch.inf)
        logits = logits.scatter(-1, places, ordered)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def modify_logit_for_repetition_penalty(logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0):
    """Make tokens less likely that have come: logits (batch, vocabulary), prev_output_tokens (batch, length).

    Positive logits of those over the penalty, negative ones times it: Keskar et al. 2019 (arXiv:1909.05858), section
    4.1, as it is usually done. Returns logits of the same shape, which are `logits` if the penalty is 1.
    """
    if repetition_penalty == 1.0:
        return logits
    came = logits.gather(1, prev_output_tokens)
    came = torch.where(came < 0, came * repetition_penalty, came / repetition_penalty)
    return logits.scatter(1, prev_output_tokens, came)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Callable[..., object],
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    repetition_penalty: float = 1.0,
    streamer: Any = None,
) -> Generated:
    """Go on from input_ids (batch, length) until `max_length` tokens or until every row has met `eos_token_id`.

    `teacher_outputs` (batch, max_length) are taken instead of what is chosen; of logits beyond `vocab_size`, which pad
    a vocabulary, none is. `repetition_penalty` above 1 makes tokens that have come less likely. A `streamer`, as
    transformers has them, is `put` the prompt and then each token, and told its `end`.
    """
    if streamer is not None:
        streamer.put(input_ids.cpu())
    batch, params = len(input_ids), InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
    sequences, scores, ended = [input_ids], [], torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    fed, length = input_ids, input_ids.shape[1]
    while length < max_length and not (eos_token_id is not None and bool(ended.all())):
        logits = model(fed, inference_params=params, num_last_tokens=1).logits[:, -1]
        logits = logits if vocab_size is None else logits[..., :vocab_size]
        params.seqlen_offset += fed.shape[1]
        scores.append(logits)
        logits = modify_logit_for_repetition_penalty(logits, torch.cat(sequences, dim=1), repetition_penalty)
        if teacher_outputs is not None and teacher_outputs.shape[1] > length:
            chosen = teacher_outputs[:, length]
        else:
            chosen = sample(logits, top_k, top_p, min_p, temperature)
        ended |= torch.zeros_like(ended) if eos_token_id is None else chosen == eos_token_id
        fed, length = chosen.unsqueeze(1), length + 1
        sequences.append(fed)
        if streamer is not None:
            streamer.put(fed.cpu())
    if streamer is not None:
        streamer.end()
    return Generated(torch.cat(sequences, dim=1), tuple(scores))


class GenerationMixin:
    """`generate` for a model that is called with `inference_params` and `num_last_tokens` and gives `.logits`."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs):
        """Each layer's states, by its number."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ) -> Tensor | Generated:
        """`decode` with this model; the sequences (batch, length), or with `return_dict_in_generate` a `Generated`.

        `cg` and `enable_timing` of the published function are accepted, and change nothing.
        """
        for name in ("cg", "enable_timing"):
            kwargs.pop(name, None)
        found = decode(input_ids, self, max_length, top_k, top_p, min_p, temperature, **kwargs)
        if not output_scores:
            found = found._replace(scores=None)
        return found if return_dict_in_generate else found.sequences
