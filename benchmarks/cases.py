"""What is measured: models by name and keywords, and one model in one setting."""

from __future__ import annotations

import argparse
import difflib
import tempfile
import warnings
from ast import Name, literal_eval
from ast import parse as parse_python
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.peers  # noqa: F401 - its models join the registry
import models_mamba  # noqa: F401 - so do these
from measure.memory import peak_memory
from utils import UsageError, first_line

DTYPES = ("float32", "bfloat16", "float16")


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read "NAME" or "NAME:key=value,..." into a registry name and keywords; bare words are strings.

    Raises UsageError for a name that is not registered or keywords that cannot be read.
    """
    name, _, text = spec.partition(":")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UsageError(f"{name!r} is no registry name; the nearest are {', '.join(close) or 'none'}.")
    try:
        call = parse_python(f"_({text})", mode="eval").body
        keywords = call.keywords
        if call.args or None in [word.arg for word in keywords]:
            raise ValueError("a value without a key")
        values = [word.value.id if isinstance(word.value, Name) else literal_eval(word.value) for word in keywords]
        return name, {word.arg: value for word, value in zip(keywords, values)}
    except (SyntaxError, ValueError):
        raise UsageError(f"{text!r} cannot be read as keywords; wanted key=value,key=value.") from None


def model_spec(text: str) -> str:
    """An argparse type: what `parse_spec` can read, as it stands."""
    try:
        parse_spec(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def build(spec: str, img_size: int | tuple[int, int] | None, **keywords: Any) -> nn.Module:
    """The model of `spec`, whose own keywords come before `keywords`, for images of `img_size` (its own size by
    default), with random weights, in eval mode. Raises UsageError for keywords that it does not take."""
    name, own = parse_spec(spec)
    keywords |= own
    ours = timm.list_models(module="models_mamba")
    if img_size is not None and (name in ours or timm.get_pretrained_cfg(name).fixed_input_size):
        keywords["img_size"] = img_size
    try:
        return timm.create_model(name, **keywords).eval()
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"{spec} cannot be built: {error}") from error


def without_drop_path(model: nn.Module) -> nn.Module:
    """`model`, no layer of which is skipped at random: a setting of training, in which registries differ."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def own_size(model: nn.Module) -> int | tuple[int, int]:
    """The image side that `model` was built for, or (height, width) where these differ."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.default_cfg["input_size"][1:]
    return int(size[0]) if size[0] == size[1] else (int(size[0]), int(size[1]))


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    """The optimiser that the program trains a model with (`engine.build_optimizer`): on a CPU in one pass."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, fused=parameters[0].device.type == "cpu" or None, **settings)


class Case:
    """One model in one setting: what to call, and what is known of it before any timing."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        dtype: str = "float32",
        compiled: bool = False,
        train: bool = False,
    ) -> None:
        self.model, self.images, self.dtype = model, images, getattr(torch, dtype)
        self.run: Callable[[Tensor], Any] = torch.compile(model) if compiled else model
        self.targets = torch.randint(model.num_classes, (len(images),), device=images.device) if train else None
        self.optimizer = adamw(model, lr=0.0, weight_decay=0.0) if train else None

    def _logits(self) -> Tensor:
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.run(self.images)
        return out if isinstance(out, Tensor) else out[0]

    def __call__(self) -> None:
        """One batch of inference, or one training step whose update is zero."""
        if self.optimizer is None:
            self.model.eval()
            with torch.inference_mode():
                self._logits()
            return
        self.model.train()
        F.cross_entropy(self._logits().float(), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self) -> int:
        """Bytes in use at the peak of a call, weights, optimiser state and images included."""
        self()
        states = self.optimizer.state.values() if self.optimizer else ()
        kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        kept = [tensor for tensor in kept if tensor.device.type == self.images.device.type]
        return peak_memory(
            self, self.images.device, [*self.model.parameters(), *self.model.buffers(), self.images, *kept]
        )


class OnnxCase:
    """Inference of a model as ONNX Runtime runs its export, on as many threads as torch; float32, on a CPU.

    The program's own operators are exported in operators that ONNX has (`mamba_ssm.ops.exporting`). Raises UsageError
    without the packages, or for a model that cannot be exported.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        try:
            import onnxruntime
            import onnxscript  # noqa: F401 - torch's exporter wants it
        except ImportError as error:
            raise UsageError(f"--onnx wants the packages onnx, onnxscript and onnxruntime: {error}.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own future
            file = str(Path(folder, "model.onnx"))
            try:
                torch.onnx.export(model.eval(), (images,), file, external_data=False, verbose=False)
                self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # exporters fail in many ways
                raise UsageError(f"a {type(model).__name__} has no ONNX export: {first_line(error)}") from error
        self.inputs = {self.session.get_inputs()[0].name: images.numpy()}

    def __call__(self) -> Tensor:
        """The logits of the images."""
        return torch.from_numpy(self.session.run(None, self.inputs)[0])
