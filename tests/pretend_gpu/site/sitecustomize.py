"""On PYTHONPATH, every Python process that is started runs on the pretend GPU."""

from tests.pretend_gpu.install import install

install()
