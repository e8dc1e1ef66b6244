"""Equal computing time: what the benchmarks count, and how many training steps fit into it."""

import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits shall sleep, else its waiting counts

import torch

from dm_course.settings import sync

GPU = torch.accelerator.is_available()


def clock():
    """Seconds of computing, of all threads together; on a GPU, of the clock."""
    if GPU:
        sync()
    return time.perf_counter() if GPU else time.process_time()


def steps_for(seconds, train):
    """How many steps `train(steps)` can take in so many seconds of the clock above, by trying a few."""
    train(2)  # warms up
    begin = clock()
    train(6)
    return max(2, round(seconds * 6 / (clock() - begin)))
