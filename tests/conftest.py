"""What all tests share: one thread each, since they run side by side."""

import os

# Before torch is imported, and for the processes that tests start: two processes with two OpenMP
# threads each on two cores spend their time waiting for one another (16 ms for a call of 30 us).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
