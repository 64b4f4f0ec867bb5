"""What the doctor found, in lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from syncbn._doctor.looking import CHOICES, key


def settings_line(found: Mapping[str, Any]) -> str:
    """The choices, and the other variables that change what layers or messages do."""
    chosen = [f"{name}={found[key(name)]}" for name in CHOICES if found[key(name)]]
    others = [f"{name}={text}" for name, text in found["environment"].items() if name not in CHOICES]
    if not any(name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_")) for name in found["environment"]):
        others.append("no MALLOC_* (glibc gives memory back after each step on CPUs; syncbn-launch sets them)")
    return ", ".join([*chosen, *others])


def devices_line(found: Mapping[str, Any]) -> str:
    """The processor, and each accelerator."""
    here = found["cpu"]
    parts = [f"{here['machine']}, {here['cores']} cores, {here['threads']} threads in this process"]
    for device in found["accelerators"]:
        about = [f"capability {device['capability']}"] if "capability" in device else []
        about += [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
        parts.append(f"{device['type']}:{device['index']} {', '.join([device['name'], *about])}")
    if not found["accelerators"]:
        parts.append("no CUDA or XPU device" + (f" ({found['note']})" if found["note"] else ""))
    return "; ".join(parts)


def mpi_line(found: Mapping[str, Any]) -> str:
    """The library, its launcher, and why MPI is not tried."""
    return "; ".join(text for text in (found["library"], found["mpiexec"], found["note"]) if text)


def trial_line(result: Mapping[str, Any]) -> str:
    """How exact and how quick a trial was, and which way its messages took."""
    errors = ", ".join(f"{error:.0e} in {name}" for name, error in result["errors"].items())
    return (
        f"ok: {result['ranks']} rank{'s' if result['ranks'] > 1 else ''}; forward and backward off by {errors}; "
        f"an exchange of 256 channels takes {result['latency_us']:.0f} us, by {result['way']}"
    )


def system_line(found: Mapping[str, Any]) -> str:
    """The system, the processor, the Python, and where the code lies."""
    where = f"syncbn in {found['package']}" + (f" (commit {found['commit']})" if found["commit"] else "")
    return ", ".join([found["system"], found["libc"], found["processor"], found["interpreter"], where])
