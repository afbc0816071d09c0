"""How loader workers take signals: a run that is asked to stop needs them until its last step."""

import os
import signal
import threading


def ignore_stop_signals(worker_id: int) -> None:
    """Makes a DataLoader's worker deaf to SIGINT and SIGTERM unless its own training process sends it (worker_init_fn).

    Ctrl-C goes to the whole process group and Slurm signals every process of a step; a worker that died of it would
    end the run before it has saved. The training process ends its workers itself, and where it was killed they notice.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows: there SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == os.getppid():
            os._exit(0)
