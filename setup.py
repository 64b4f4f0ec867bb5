"""The compiled part of the package; everything else is in pyproject.toml.

It is optional: without a compiler the package is installed without it, and works on PyTorch's own operators. One binary
serves every Python from 3.11 on (the stable ABI) and every PyTorch (it sees addresses, no headers of theirs).
"""

import os
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("syncbn", "kernels", "native")
OPTIMIZE = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]  # a level of the caller's wins

setup(
    ext_modules=[
        Extension(
            "syncbn.kernels.native._native",
            sources=sorted(map(str, FOLDER.glob("*.c"))),
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            # Contraction to fused operations would round the output differently in the forward and the backward.
            extra_compile_args=["-std=gnu11", *OPTIMIZE, "-g0", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"],
            extra_link_args=["-fopenmp"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
