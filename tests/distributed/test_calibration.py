"""Two processes that measure second moments choose alike, and write what they measured once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel
import hf_lowmem
from hf_lowmem.snr import SnrTracker

dist.init_process_group("gloo")
folder, rank = sys.argv[1], dist.get_rank()
torch.manual_seed(0)
dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, **dropout))
parallel = DistributedDataParallel(model)
args = "rules=auto,calibration_steps=4,snr_cutoff=0.5,min_8bit_size=0"
optimizer = hf_lowmem.build_optimizer(model, "slim_adamw_8bit", lr=1e-2, optim_args=args)
tracker = SnrTracker(model, f"{folder}/snr.csv")
for step in range(1, 7):
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(10 * step + rank))
    parallel(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step < 4:
        tracker.measure(optimizer, step)
torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(optimizer.chosen_rules(), file)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_choose_the_same_rules_and_write_one_set_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch.distributed.run import main

    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["torchrun"])
    main(["--nproc_per_node", "2", "--standalone", str(tmp_path / "train.py"), str(tmp_path)])
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len({json.dumps(rule) for rule in first.values()}) > 1
    weights = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    rows = [line.rsplit(",", 3)[0] for line in (tmp_path / "snr.csv").read_text().splitlines()[1:]]
    assert {row.partition(",")[0] for row in rows} == {"1", "2", "3"}
    assert set(Counter(rows).values()) == {1}
