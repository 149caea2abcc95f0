"""Make fixtures of tests/decode known to these tests too."""

from tests.decode.conftest import make_case  # noqa: F401
