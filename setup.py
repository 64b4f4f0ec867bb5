"""The compiled parts of the package, loops and exchanges; everything else is in pyproject.toml.

They are optional: without a compiler the package is installed without them, and works on PyTorch's own operators and in
Python. One binary of each serves every Python from 3.11 on (the stable ABI) and every PyTorch (they see addresses, no
headers of theirs).
"""

import os
import re
from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("syncbn", "kernels", "native")
PACKETS = Path("syncbn", "comm", "packets.c")
OPTIMIZE = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]  # a level of the caller's wins
COMMON = {
    "define_macros": [("Py_LIMITED_API", "0x030b0000")],
    "py_limited_api": True,
    "optional": True,
}
FLAGS = ["-std=gnu11", *OPTIMIZE, "-g0", "-fvisibility=hidden"]


def description() -> str:
    """The README as a package index can show it: there, paths into the repository lead nowhere."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https:)[^)]*\)\n+", "", text, flags=re.MULTILINE)  # pictures
    return re.sub(r"\[([^\]]*)\]\((?!https:|#)[^)]*\)", r"\1", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            "syncbn.kernels.native._native",
            sources=sorted(map(str, KERNELS.glob("*.c"))),
            depends=sorted(map(str, KERNELS.glob("*.h"))),
            # Contraction to fused operations would round the output differently in the forward and the backward.
            extra_compile_args=[*FLAGS, "-fopenmp", "-ffp-contract=off"],
            extra_link_args=["-fopenmp"],
            **COMMON,
        ),
        Extension("syncbn.comm._packets", sources=[str(PACKETS)], extra_compile_args=FLAGS, **COMMON),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
