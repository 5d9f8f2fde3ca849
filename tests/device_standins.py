"""What stands in for a GPU where there is none: who would wait for it, its compiler, and a CUDA graph of operations on
the CPU."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_conv1d.ops.convolution import OPERATORS as CONV_OPERATORS
from mamba_ssm.ops.operators import OPERATORS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount")


def read_by(func: Any, args: Any) -> str:
    """The name of an operation whose result's size or values the host must know; "" for others."""
    name = func._schema.name.removeprefix("aten::")
    masks = [index for index in tree_leaves(args[1:]) if isinstance(index, Tensor) and index.dtype == torch.bool]
    return name if name in READS or (name in ("index", "index_put", "index_put_") and masks) else ""


class _Reads(TorchDispatchMode):
    """Counts the operations that read."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = read_by(func, args)
        if name:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads(monkeypatch: pytest.MonkeyPatch, found: Counter[str] | None = None) -> Iterator[Counter[str]]:
    """Counts what is read back to the host in the `with` block, by name."""
    found = Counter() if found is None else found

    def counted(name, own):
        def read(self, *args, **kwargs):
            found[name] += 1
            return own(self, *args, **kwargs)

        return read

    with monkeypatch.context() as patched, _Reads(found):
        for name in ("tolist", "cpu", "numpy"):
            patched.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
        yield found


class Compiler:
    """`_nvrtc.Device` without a GPU: compiles and launches nothing, and writes down who would wait for a compiler."""

    multiprocessors = 132

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []  # kernel and template arguments, once each
        self.prepared: dict[tuple[str, str], int] = {}  # and how many kernels had been asked for by then
        self.waits: list[str] = []  # kernels that nobody foretold before the one that was asked for last

    def kernel(self, path: Path, arguments: str, threads: int) -> Callable[..., None]:
        job = path.stem, arguments
        if job not in self.asked:
            if self.prepared.get(job, len(self.asked)) == len(self.asked):
                self.waits.append(path.stem)
            self.asked.append(job)
        return lambda *launch: None

    def prepare(self, wanted: Iterable[tuple[Path, str]]) -> None:
        for path, arguments in wanted:
            self.prepared.setdefault((path.stem, arguments), len(self.asked))


class Unlaunched(TorchDispatchMode):
    """Runs the operators of the kernel packages by the kernel set at hand, and has zeros in memory that only kernels
    would fill."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for operators in (CONV_OPERATORS, OPERATORS):
            namespace, _, name = func._schema.name.partition("::")
            if namespace == operators.namespace:
                with self, torch.no_grad():
                    return operators.kernels[name](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        return out.zero_() if "empty" in func.name() else out


class _Tape(TorchDispatchMode):
    """Writes down every operation with its arguments and results, and what others' tensors were before."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, Any, Any, list[Any]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if read_by(func, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name)):
                    self._remember(tensor)
        out = func(*args, **kwargs)
        leaves = tree_leaves(out)
        self._own |= {_memory(leaf) for leaf in leaves if isinstance(leaf, Tensor)} - self.before.keys()
        self.lines.append((func, args, kwargs, leaves))
        return out

    def _remember(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and _memory(tensor) not in self._own:
            whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            self.before.setdefault(_memory(tensor), (whole, whole.clone()))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """`utils.graphs.Recorder` without a GPU: operations are written down and done again, into the same memory.

    As with a graph, recording leaves nothing done, what Python does in between is not done again, what waits cannot be
    recorded, and random numbers are drawn anew. Wants the kernels of torch, whose every operation can be seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape, random = _Tape(), torch.get_rng_state()
        with tape:
            result = work()
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in tape.before.values():
                tensor.copy_(value)

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, leaves in tape.lines:
                for old, new in zip(leaves, tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, Tensor) and _memory(old) != _memory(new):
                        old.copy_(new)

        return result, replay
