"""The models and the stand-in for CUDA graphs of tests/decode."""

from tests.decode.conftest import make_case, recording  # noqa: F401
