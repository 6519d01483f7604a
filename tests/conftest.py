"""What all rooms' tests share: how hypothesis searches, and a model directory for tests that only need one to be there.

Under CI the examples are the same in every run; elsewhere they are drawn anew, to find what nobody thought of.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A shell starts its background jobs deaf to Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("search", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "search")

WEIGHTS = Path(__file__).parent.parent / "src" / "openm3" / "weights" / "openm3-nano"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The products in tests are tiny: a second thread only costs, and on a busy machine a hundredfold."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled tokenizer and template on two layers of random weights, talk of no meaning. Not to be written to."""
    import torch

    from openm3.checkpoint import save_model
    from openm3.config import M3Config
    from openm3.model import M3

    nano = M3Config.preset("nano")
    text = dataclasses.replace(nano.text, num_hidden_layers=2, sparse_layers=(False, True), moe_layers=(False, True))
    config = dataclasses.replace(nano, text=text, vision=dataclasses.replace(nano.vision, num_hidden_layers=1))
    torch.manual_seed(0)
    model = M3(config)
    model.reset_parameters(std=0.05)
    directory = tmp_path_factory.mktemp("random") / "nano"
    save_model(model, directory, dtype=torch.bfloat16, max_shard_bytes=1_500_000, extra_files_from=WEIGHTS)
    return directory
