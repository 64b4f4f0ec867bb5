"""The floors of the package: the test of the imports enforces them, and the picture in ``docs`` is drawn from them."""

from __future__ import annotations

FLOORS: dict[str, tuple[str, ...]] = {
    "know nothing of the package": ("launch", "_agent", "_worker", "_check", "_version", "_recipes", "mpi"),
    "formats, values, what torch hides": ("wire", "errors", "moments", "channels", "masked", "_torch", "tracing"),
    "what is handed around": ("messages", "memory", "groups", "checkpointing", "dry_run", "overlooked", "arguments"),
    "the ways of a message, the arithmetic": ("comm", "kernels", "unsynchronized"),
    "the four verbs and their gradient": ("autograd", "compiled", "together", "dtensor", "few_samples"),
    "checks, and which way to go": ("functional", "rounds"),
    "what people call": ("modules", "uneven", "steps", "statistics"),
    "layers that are local again": ("local",),
    "models": ("convert",),
    "tools for whole models": ("accumulation", "agreement", "population", "diagnostics", "lightning", "_doctor"),
    "the command line": ("__main__",),
}
"""From the ground up: what a floor is for, and its rooms. A room is a module or a package directly below ``syncbn``; it
imports only from the floors below it, and a package within itself."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS.values()) for room in rooms}
"""Of each room, counted from the ground."""
