"""No test reaches for a hub, and all see the same number of threads."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock

# Several workers share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def one_launch_at_a_time(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Launchers of all workers take the same port."""
    if request.node.get_closest_marker("distributed") is None:
        yield
        return
    folder = tmp_path_factory.getbasetemp()
    with FileLock((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "launch.lock"):
        yield


@pytest.fixture
def force() -> Iterator[Callable[..., None]]:
    """Take the steps of the rest of the test by the backends that are named: `force("rule")`."""
    from hf_lowmem.kernels import forced

    with ExitStack() as stack:
        yield lambda *names: stack.enter_context(forced(*names))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, because tensors as small as the tests' cost more to share between threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Tests that ask for it run on each."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not (shutil.which("g++") or shutil.which("clang++")):
        missing["compiler"] = "torch.compile finds no C++ compiler here"
    if not torch.cuda.is_available():
        missing["gpu"] = "there is no CUDA device"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Each training collects garbage first, and need not walk all that the tests have imported for that."""
    import torch._dynamo  # noqa: F401  which the first training imports

    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


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
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of single characters and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
