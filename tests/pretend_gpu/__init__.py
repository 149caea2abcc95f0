"""A pretend GPU: tensors that say they are on cuda:0 and hold CPU data, for the code around them.

What a real device would refuse is refused: operators on tensors of two devices, and reads by the
host while a pass is captured. What it would be slow at is counted, see `ledger.Ledger`. Captured
passes are recorded and replayed, as by tests/decode/recorder.py. The ops of std_kernels compute
with their CPU code; beside that their Triton launchers run, on a driver that binds, specialises
and compiles for an H100 and launches nothing.

What it cannot show is what kernels compute on a GPU, streams that overlap, and time.

    python -m pytest -p tests.pretend_gpu.plugin -m gpu tests/decode/test_gpu.py
    PYTHONPATH=.:tests/pretend_gpu/site python -m bench decode ...  # any command, and its children
"""
