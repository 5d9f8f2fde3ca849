"""Build of the `mamba_ssm` package; the C++ part is optional and free of torch's headers and ABI."""

import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

SOURCES = sorted(str(path) for path in Path("mamba_ssm/csrc").glob("*.cpp"))
# The structs that Python hands over: it asks the library for this, and takes none that was built from others.
HEADERS = b"".join(path.read_bytes() for path in sorted(Path("mamba_ssm/csrc").glob("*_abi.h")))
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


def shared_headers() -> str | None:
    """The header folder of `causal_conv1d`: of the installed package, else of the checkout beside this one."""
    spec = find_spec("causal_conv1d")
    candidates = [Path(folder) / "csrc" for folder in (spec.submodule_search_locations or [])] if spec else []
    candidates.append(Path(__file__).resolve().parent.parent / "causal_conv1d" / "causal_conv1d" / "csrc")
    return next((str(folder) for folder in candidates if (folder / "parallel.h").is_file()), None)


headers = shared_headers()


class Build(build_py):
    """Refuse to make a package that lacks its kernels by oversight; a missing compiler is another matter."""

    def run(self) -> None:
        if SOURCES and headers is None and sys.platform != "win32" and not os.environ.get("MAMBA_SSM_WITHOUT_KERNELS"):
            raise SystemExit(
                "mamba_ssm: its C++ kernels share headers with causal_conv1d, which is neither installed nor beside"
                " this folder; wanted `pip install --no-build-isolation` after causal_conv1d, both in one checkout, or"
                " MAMBA_SSM_WITHOUT_KERNELS=1 for a package that runs on torch alone"
            )
        super().run()


extensions = [
    Extension(
        "mamba_ssm._cpu",
        sources=SOURCES,
        depends=sorted(str(path) for path in Path("mamba_ssm/csrc").glob("*.h")),
        include_dirs=["mamba_ssm/csrc", headers],
        define_macros=[("KERNEL_ABI", f'"{hashlib.sha256(HEADERS).hexdigest()}"')],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=[] if sys.platform == "darwin" else ["-ldl", "-lpthread"],
        language="c++",
        optional=True,
    )
]

setup(
    name="mamba_ssm",
    version="1.1.1+portable",
    description="Selective state-space operators and the Mamba mixer, on CPU and CUDA",
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
    # The local version keeps pip from taking another project's package of the same name.
    install_requires=["torch>=2.6", "causal_conv1d==1.1.1+portable"],
    extras_require={"cuda": ["causal_conv1d[cuda]==1.1.1+portable"]},
    packages=find_packages(include=["mamba_ssm", "mamba_ssm.*"]),
    py_modules=["faster_mamba_ssm", "selective_scan_cuda"],
    # The explicit root makes an editable install a plain path entry.
    package_dir={"": "."},
    package_data={"mamba_ssm": ["csrc/*", "py.typed"]},
    cmdclass={"build_py": Build},
    ext_modules=extensions if SOURCES and headers and sys.platform != "win32" else [],
    zip_safe=False,
)
