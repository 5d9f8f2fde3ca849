"""Build of the `causal_conv1d` package; the C++ part is optional and free of torch's headers and ABI."""

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

SOURCES = sorted(str(path) for path in Path("causal_conv1d/csrc").glob("*.cpp"))
# The structs that Python hands over: it asks the library for this, and takes none that was built from others.
HEADERS = b"".join(path.read_bytes() for path in sorted(Path("causal_conv1d/csrc").glob("*_abi.h")))
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-uninitialized",  # of the values that compilers' own intrinsics leave open on purpose
    "-Wno-maybe-uninitialized",
]

# One portable library: it is loaded with ctypes, picks AVX-512, AVX2 or plain code at run time, and links no OpenMP.
extensions = [
    Extension(
        "causal_conv1d._cpu",
        sources=SOURCES,
        depends=sorted(str(path) for path in Path("causal_conv1d/csrc").glob("*.h")),
        include_dirs=["causal_conv1d/csrc"],
        define_macros=[("KERNEL_ABI", f'"{hashlib.sha256(HEADERS).hexdigest()}"')],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=[] if sys.platform == "darwin" else ["-ldl", "-lpthread"],
        language="c++",
        optional=True,
    )
]

setup(
    name="causal_conv1d",
    version="1.1.1+portable",
    description="Causal depthwise 1-D convolution for state-space models, on CPU and CUDA",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The authors of this project",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=["torch>=2.6"],
    # NVRTC itself comes with torch's CUDA wheels; the bindings must be of torch's major version of CUDA.
    extras_require={"cuda": ["cuda-bindings"]},
    packages=find_packages(include=["causal_conv1d", "causal_conv1d.*"]),
    py_modules=["causal_conv1d_cuda"],
    # The explicit root makes an editable install a plain path entry, which a same-named folder cannot shadow.
    package_dir={"": "."},
    package_data={"causal_conv1d": ["csrc/*", "py.typed"]},
    ext_modules=extensions if SOURCES and sys.platform != "win32" else [],
    zip_safe=False,
)
