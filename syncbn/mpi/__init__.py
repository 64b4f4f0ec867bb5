"""The ``"mpi4py"`` backend: torch.distributed over MPI, for CPU tensors, with the stock PyTorch wheels.

Importing this package imports mpi4py, which initializes MPI, and registers the backend. Then one of these::

    dist.init_process_group("mpi4py", init_method="mpi://")   # ranks and addresses from MPI itself
    dist.init_process_group("mpi4py")                         # from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    group = syncbn.mpi.process_group(comm)                    # around a communicator; no default group needed

in a script started with ``mpiexec -n 4 python -m mpi4py script.py``.

How an operation runs: every collective is the non-blocking MPI call, and ``wait()`` tests it in a loop. That costs
about a microsecond more than the blocking call, and it gives what MPI does not have: a deadline (the group's timeout),
a wait that Ctrl-C ends, and ranks that need not agree on who waits at once (in MPI, a blocking collective never matches
a non-blocking one). ``docs/mpi.md`` has the measurements, and what happens when a rank fails.
"""

_INSTALL = "pip install mpi4py mpich (the extra [mpi])"

try:
    import mpi4py.MPI  # noqa: F401 (tried first, so that its failure is explained)
except ImportError as error:
    raise ImportError(f"syncbn.mpi needs mpi4py, which cannot be imported ({error}). Install it: {_INSTALL}") from error
except RuntimeError as error:
    raise ImportError(
        f"syncbn.mpi needs an MPI library, and mpi4py could not load one ({' '.join(str(error).split())}). Install "
        f"one: {_INSTALL}, or load your cluster's MPI module, or name the library in the variable MPI4PY_LIBMPI."
    ) from error

from syncbn.mpi.group import MPIProcessGroup  # noqa: E402
from syncbn.mpi.setup import process_group  # noqa: E402

__all__ = ["MPIProcessGroup", "process_group"]
