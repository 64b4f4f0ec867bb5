"""What is here: versions, settings, devices, backends, and which kernels work on what."""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn import _version, kernels, launch
from syncbn._doctor.words import one_line
from syncbn.comm import handshake
from syncbn.comm.base import checks, gather_limit
from syncbn.kernels import native

PACKAGE = Path(__file__).parents[1]

OPTIONAL = ("mpi4py", "mpich", "openmpi", "triton", "lightning", "accelerate", "scikit-learn", "matplotlib", "tqdm")
"""Distributions that parts of the project, or its examples, use where they are installed."""

VARIABLES = (
    *("SYNCBN_", "GLOO_", "NCCL_", "OMP_", "MKL_NUM_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"),
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG"),
)
"""How the names of environment variables begin that change what the layers, or their messages, do."""

CHOICES: dict[str, Callable[[], str]] = {
    "SYNCBN_CHECKS": checks,
    "SYNCBN_KERNELS": kernels.choice,
    handshake.SWITCH: handshake.chosen,
    "SYNCBN_GATHER": lambda: str(gather_limit()),
    "SYNCBN_PIN": launch.chosen_cores,
}
"""The environment variables that choose how layers and ranks run, and what gives the choice, or raises ValueError."""


def versions() -> dict[str, str | None]:
    """Of Python, torch, syncbn and the optional packages; None for those that are absent."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "syncbn": _version.version()}
    return found | {name: version(name) for name in OPTIONAL}


def version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Cores that this process may use, and threads that torch takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"machine": platform.machine(), "cores": cores, "threads": torch.get_num_threads()}


def kernels_on_cpu(choice: str | None) -> dict[str, str | None]:
    """Which kernels work on a CPU, with which instructions if they are native, and why if they are not."""
    if choice == "aten":
        return {"kernels": "ATen", "instructions": None, "why": "SYNCBN_KERNELS=aten"}
    if not native.available():
        return {"kernels": "ATen", "instructions": None, "why": native.reason()}
    return {"kernels": "native", "instructions": native.instructions(), "why": None}


def backends() -> dict[str, bool]:
    """Which backends this torch was built with."""
    if not dist.is_available():
        return dict.fromkeys(("gloo", "nccl", "xccl", "ucc", "mpi"), False)
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "xccl": dist.is_xccl_available(),
        "ucc": dist.is_ucc_available(),
        "mpi": dist.is_mpi_available(),
    }


def accelerators_possible() -> bool:
    """Whether this torch was built for any."""
    return bool(torch.version.cuda or torch.version.hip or torch.xpu._is_compiled())


def accelerators() -> dict[str, Any]:
    """The CUDA and XPU devices, the kernels that layers on them run in, and what torch warned of."""
    found: list[dict[str, Any]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            memory = torch.cuda.get_device_properties(index).total_memory
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            device = {"type": "cuda", "index": index, "name": torch.cuda.get_device_name(index)}
            device |= {"capability": capability, "memory_gib": round(memory / 2**30, 1)}
            found.append(device | _kernels_on(torch.device("cuda", index)))
        for index in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
            found.append({"type": "xpu", "index": index, "name": torch.xpu.get_device_name(index), "kernels": "ATen"})
    note = next((one_line(warning.message) for warning in caught if issubclass(warning.category, UserWarning)), None)
    return {"accelerators": found, "note": None if found else note}


def _kernels_on(device: torch.device) -> dict[str, str | None]:
    """Which kernels work on a device, and, where Triton does not, why: the package logs it."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("syncbn")
    logger.addHandler(handler)
    try:
        name = kernels.name_of(kernels.choose(torch.zeros(1, 1, device=device), None, direct=True))
    finally:
        logger.removeHandler(handler)
    return {"kernels": name, "why": " ".join(said.getvalue().split()) or None}


def kernels_line(devices: Mapping[str, Any], triton: str | None) -> str:
    """Which kernels work on each device."""
    own = devices["cpu"]
    about = own["instructions"] or own["why"]
    each = [f"{own['kernels']} on CPUs ({about})"]
    for device in devices["accelerators"]:
        why = f" ({device['why']})" if device.get("why") else ""
        each.append(f"{device['kernels']} on {device['type']}:{device['index']}{why}")
    if not devices["accelerators"]:
        each.append("on CUDA devices " + ("Triton" if triton else "ATen, as Triton is not installed"))
    return "; ".join(each)


def key(name: str) -> str:
    """What the choice of a variable is called in the report."""
    return name.removeprefix("SYNCBN_").lower()


def system() -> dict[str, str | None]:
    """What a report of an error needs besides versions: system, processor, interpreter, and which code this is."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip() or "no glibc",
        "processor": _processor(),
        "interpreter": f"{sys.executable} ({platform.python_implementation()})",
        "package": str(PACKAGE),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of a checkout: the commit, with "+" where files differ from it."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    git = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
