"""The emulator that CUDA kernels are checked under must itself notice what it is there to notice."""

import importlib.util
import struct
import sys
from pathlib import Path

import pytest
import torch

HELPER = Path(__file__).parent / "cuda_emulation.py"


def load_emulation():
    spec = importlib.util.spec_from_file_location("cuda_emulation", HELPER)
    module = sys.modules.setdefault("cuda_emulation", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


emulation = load_emulation()
pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"no emulator: {emulation.missing()}")

PLANTED = """
#include "device.h"

struct Params {
    float *x;
    int which;
};

DEVICE void misbehave(const Params &p) {
    SHARED_ARRAY(float, shared, 4);
    switch (p.which) {
        case 0: p.x[threadIdx.x] = threadIdx.x; break;
        case 1: *reinterpret_cast<Pack<float, 4> *>(p.x + 1) = Pack<float, 4>{}; break;
        case 2: p.x[1ll << 45] = 1.f; break;
        case 3: if (threadIdx.x == 3) shared[5] = 1.f; break;
        case 4: if (threadIdx.x < 32) __syncthreads(); break;
        case 5: if (threadIdx.x < 5) p.x[0] = __shfl_xor_sync(WHOLE_WARP, 1.f, 1); break;
        case 6: p.x[threadIdx.x] = shared[0]; break;
        case 7:
            shared[0] = threadIdx.x;
            __syncthreads();
            p.x[threadIdx.x] = shared[0];
            break;
    }
}

KERNEL(planted, Params, 64, 1) { misbehave(p); }
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "planted.cu"
    path.write_text(PLANTED, encoding="utf-8")

    def run(which: int, order: int = 0) -> torch.Tensor:
        x = torch.zeros(64)
        kernel = emulation.EmulatedDevice(order=order).kernel(path, "", 64)
        kernel((1, 1, 1), struct.pack("qii", x.data_ptr(), which, 0))
        return x

    return run


def test_a_sound_kernel_runs(planted):
    torch.testing.assert_close(planted(0), torch.arange(64.0))


@pytest.mark.parametrize(
    ("which", "said"),
    [(1, "misaligned"), (2, "wild"), (3, "past the end"), (4, "different barriers"), (5, "different barriers")],
)
def test_faults_are_errors(planted, which, said):
    with pytest.raises(RuntimeError, match=said):
        planted(which)
    torch.testing.assert_close(planted(0), torch.arange(64.0))


def test_shared_memory_starts_as_nan(planted):
    assert planted(6).isnan().all()


def test_a_race_shows_in_the_order_of_threads(planted):
    assert not torch.equal(planted(7, order=0), planted(7, order=1))
