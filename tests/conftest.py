"""No test reaches for a hub, and all see the same number of threads."""

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trl-table", metavar="FILE", help="write what test_trl_trainers.py found to this Markdown file")


@pytest.fixture(scope="module")
def trl_ready() -> Iterator[None]:
    """Our names in TRL's configs. One thread: tensors as small as the tests' are slower on two.

    Each training collects garbage first; all of TRL need not be walked for that.
    """
    pytest.importorskip("trl")
    import datasets

    import hf_lowmem

    hf_lowmem.register()
    datasets.disable_progress_bars()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()
