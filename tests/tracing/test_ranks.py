"""Two processes of DistributedDataParallel write one run: each its own documents, none of the other's."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

import omnigene_fast

from ..helpers import TOP_K, gemma4, tokens

WORLD, STEPS = 2, 3


def _worker(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=WORLD)
    try:
        model = DistributedDataParallel(omnigene_fast.accelerate(gemma4()))
        with omnigene_fast.trace(model, f"{path}/run", labels={"rank": str(rank)}, segment_tokens=20) as tr:
            for step in range(STEPS):
                batch = tokens(2 * WORLD, 9, seed=step).chunk(WORLD)[rank]
                model(input_ids=batch, labels=batch).loss.backward()
        assert tr.tokens == STEPS * 2 * 9
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_worker, args=(str(path),), nprocs=WORLD)
    return omnigene_fast.open_trace(path / "run")


def test_each_rank_has_its_documents(run):
    assert run.verify() == []
    assert run.documents.groupby("rank").size().to_dict() == {"0": 6, "1": 6}
    assert run.documents["doc_id"].is_unique
    assert len({segment.rank for segment in run.segments}) == WORLD


def test_together_they_hold_what_one_process_would(run):
    model = omnigene_fast.accelerate(gemma4()).train()
    with torch.no_grad(), omnigene_fast.trace(model) as tr:
        for step in range(STEPS):
            model(tokens(2 * WORLD, 9, seed=step))
    assert run.counts.sum() == STEPS * 4 * 9 * 3 * TOP_K
    assert np.array_equal(run.counts.sum(0), tr.counts.sum(0))
    assert np.array_equal(run.recount(), run.counts)  # the tokens say the same as the documents
