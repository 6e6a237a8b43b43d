"""Processes that work for this one."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def exit_with_parent() -> None:
    """In a spawned process: end it when its parent is gone, because a pool's workers outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
