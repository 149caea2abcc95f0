"""For pytest: tests run on the pretend GPU. ``pytest -p tests.pretend_gpu.plugin -m gpu ...``"""

from tests.pretend_gpu.install import install

install()
