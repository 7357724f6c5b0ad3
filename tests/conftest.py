import logging

import pytest
import torch

# Tests run in several processes at once, and tiny models gain nothing from threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_lightning():
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
