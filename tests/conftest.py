import logging
import socket

import pytest
import torch
from helpers import problems
from hypothesis import HealthCheck, settings

# Tests run in several processes at once, and tiny models gain nothing from threads.
torch.set_num_threads(1)
# No test depends on how fast the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption(
        "--accelerator", default="cpu", choices=["cpu", "gpu"], help="where the small runs train"
    )


def pytest_configure(config):
    problems.ACCELERATOR = config.getoption("--accelerator")


@pytest.fixture(autouse=True)
def _quiet_lightning():
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
