"""Calls with little memory and time: in a fork that ends where more is asked for."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def outcome(call: Callable[[], Any], *, megabytes: int = 512, seconds: int = 20) -> str:
    """Describes what a call returns or raises, with a limit on the memory that it may take beyond the present use."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_call, args=(call, sender, megabytes, seconds))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "the process was ended"
    finally:
        process.join()


def _call(call: Callable[[], Any], sender: Connection, megabytes: int, seconds: int) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(seconds)
    torch.set_num_threads(1)  # the threads that the parent may have are not in a fork, and would be waited for
    try:
        sender.send(f"returned {call()!r:.200}")
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")
