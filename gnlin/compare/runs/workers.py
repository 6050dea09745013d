"""Executors: processes of this machine, or the workers of a Dask cluster."""

import concurrent.futures
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import loky

from gnlin.compare.entrants.entry import UsageError


@contextlib.contextmanager
def executor_of(workers: int, dask: str | None) -> Iterator[concurrent.futures.Executor | None]:
    """An executor that makes runs; `None` for this process.

    Args:
        workers: number of processes.
        dask: address of a Dask scheduler, whose workers are then taken.

    Raises:
        UsageError: there is no scheduler at that address, or Dask is not installed.
    """
    if dask is not None:
        with _client(dask) as client:
            yield client.get_executor(pure=False)
    elif workers > 1:
        executor = loky.ProcessPoolExecutor(
            workers, initializer=_follow, initargs=(os.getpid(),), env=_one_thread()
        )
        try:
            yield executor
        finally:
            executor.shutdown(kill_workers=True)
    else:
        yield None


def _client(address: str):
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise UsageError("--dask needs the extra cluster: pip install distributed") from None
    try:
        return Client(address)
    except (ValueError, OSError) as error:
        raise UsageError(f"--dask {address}: no scheduler answers there ({error})") from None


def _one_thread() -> dict[str, str]:
    """The environment of a worker.

    Workers of several threads each would get in each other's way. Those of LAPACK spin while they
    wait for each other.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    return {"XLA_FLAGS": flags, **threads}


def _follow(parent: int) -> None:
    """In a worker: leave Ctrl-C to the process that keeps the records, and end with that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
