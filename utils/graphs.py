"""What keeps a device from waiting for the host: work replayed from a CUDA graph, and numbers read beside the work.

A graph is recorded once and costs the host one launch from then on. It does again exactly what was recorded, with the
same shapes at the same addresses: what the host decides or draws on the way is decided for good.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from utils.errors import RunError, first_line

WARM_UP = 3  # calls that run as they are before the one that is recorded: kernels and workspaces are made in them


def available(device: str | None) -> bool:
    """Whether a run on `device`, a name (None: CUDA where there is one), can record graphs."""
    return torch.cuda.is_available() and (device is None or device.startswith("cuda"))


class Recorder:
    """Records CUDA graphs, on a stream of its own, on which the calls before have to run too."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run a block on the recorder's stream, behind what the current one was given and before what it will be."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What `work` returns, in memory that is the graph's, and what computes it: `work` itself is not done yet.

        Raises RuntimeError where it cannot be recorded, as work cannot that waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        # a loader's thread goes on calling CUDA meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


class Replayed:
    """`call(*given)`, trees of tensors to a tree of tensors, that a graph computes once it has run `WARM_UP` times.

    One graph is recorded, for the shapes, dtypes and strides, and whatever else the trees hold, that came so often
    first; calls with others run as they are. What a call returns is overwritten by the next one.
    """

    def __init__(self, call: Callable[..., Any], recorder: Recorder) -> None:
        self.call, self.recorder = call, recorder
        self.replays = 0
        self._seen: Counter[Any] = Counter()
        self._recorded: Any = None  # what kind of call
        self._inputs: list[Tensor] = []
        self._result: Any = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, *given: Any) -> Any:
        leaves, spec = tree_flatten(given)
        kind = repr(spec), tuple(_kind(leaf) for leaf in leaves)  # before torch 2.7 specs cannot be hashed
        if self._replay is None:
            if self._seen[kind] < WARM_UP:
                self._seen[kind] += 1
                with self.recorder.aside():
                    return self.call(*given)
            self._record(leaves, spec, kind)
        elif kind != self._recorded:
            return self.call(*given)
        for own, leaf in zip(self._inputs, (leaf for leaf in leaves if isinstance(leaf, Tensor))):
            own.copy_(leaf, non_blocking=True)
        self._replay()
        self.replays += 1
        return self._result

    def _record(self, leaves: list[Any], spec: Any, kind: Any) -> None:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._recorded = kind
        given = tree_unflatten(leaves, spec)
        try:
            self._result, self._replay = self.recorder.record(lambda: self.call(*given))
        except RuntimeError as error:
            raise RunError(f"No CUDA graph could be recorded ({first_line(error)}); wanted no --cuda-graph.") from error


def _kind(leaf: Any) -> Any:
    """All of a leaf that a graph takes for granted."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class Reading:
    """Numbers on their way from a device to the host, behind the work that makes them; other work may follow at once.

    `tensors`, of any real dtype and shape, arrive as float64; all are wanted where the first is.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        to = dict(device=tensors[0].device, dtype=torch.float64, non_blocking=True)
        self._numbers = torch.cat([tensor.detach().to(**to).flatten() for tensor in tensors])
        self._event: torch.cuda.Event | None = None
        if self._numbers.is_cuda:
            # a copy to page-locked memory is the only one that the host need not wait for
            host = torch.empty(self._numbers.shape, dtype=torch.float64, pin_memory=True)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> list[Tensor]:
        """The numbers, on the host; waits until the work is done that makes them, not for any behind it."""
        if self._event is not None:
            self._event.synchronize()
        parts = self._numbers.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes)]
