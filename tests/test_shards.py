"""Reading a built GRIT for training: by several workers and ranks, each record once an epoch, from any place on."""
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ferret_lite.grit import build
from ferret_lite.mix import GritConfig, Part
from ferret_lite.shards import EpochOrder, GritShards, stream_shards

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Ninety records in nine shards; their ids in the order of the shards."""
    folder = tmp_path_factory.mktemp("grit")
    part = Part("w", "world", {"num": 90}, tasks={"expression": 1.0}, dialogues=1)
    build(GritConfig(str(folder), [part], shard_size=10, objects=True))
    return folder, [r.id for r, _ in GritShards(folder)]


def name(sample): return sample[0].id


class Ids:
    """Only the ids: a worker sends them faster than pictures, and says who read what."""
    def __init__(self, folder): self.shards = GritShards(folder)
    def __len__(self): return len(self.shards)
    def __getitem__(self, i): return self.shards[i][0].id, os.getpid()


def read(folder, **order):
    loader = DataLoader(Ids(folder), sampler=EpochOrder(90, **order), batch_size=None, num_workers=2)
    rows = list(loader)
    assert len({worker for _, worker in rows}) == 2
    return [id for id, _ in rows]


def test_by_number_two_workers_on_each_of_two_ranks_share_an_epoch(built):
    folder, ids = built
    ranks = [read(folder, rank=r, ranks=2) for r in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(ids) and len(set(ids)) == 90
    assert ranks[0] == read(folder, rank=0, ranks=2)                    # the same seed, the same order
    assert ranks[0] != [ids[i] for i in range(0, 90, 2)]                # and not that of the shards
    assert ranks[0] != read(folder, rank=0, ranks=2, epoch=1) != read(folder, rank=0, ranks=2, seed=1)


def test_by_number_a_killed_epoch_goes_on_where_it_was(built):
    folder, ids = built
    whole = read(folder, seed=5, epoch=2)
    assert read(folder, seed=5, epoch=2, seen=37) == whole[37:]
    began = [read(folder, seed=5, rank=r, ranks=2)[:20] for r in range(2)]  # 40 records, then a rank is lost
    rest = read(folder, seed=5, seen=40)
    assert sorted(began[0] + began[1] + rest) == sorted(ids)


STREAM = """
import sys
from torch.utils.data import DataLoader
from ferret_lite.shards import stream_shards
data = stream_shards({folder!r}, shuffle=20, seed={seed}, epoch={epoch}).map(lambda sample: sample[0].id)
print(*DataLoader(data, batch_size=None, num_workers=2), sep="\\n")
"""


def streams(folder, epoch=0, seed=0):
    """What WebDataset gives to each of two ranks, in processes as torchrun starts them."""
    out = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        code = STREAM.format(folder=str(folder), seed=seed, epoch=epoch)
        run = subprocess.run([sys.executable, "-c", code], env=env, cwd=os.path.dirname(os.path.dirname(__file__)),
                             capture_output=True, text=True, timeout=300)
        assert not run.returncode, run.stderr
        out.append(run.stdout.split())
    return out


def test_as_a_stream_two_workers_on_each_of_two_ranks_share_an_epoch(built):
    folder, ids = built
    one, two = streams(folder)
    assert sorted(one + two) == sorted(ids) and not set(one) & set(two)


def test_streams_are_shuffled_from_seed_and_epoch(built):
    folder, ids = built
    order = lambda **more: [name(s) for s in stream_shards(folder, shuffle=20, **more)]
    assert order() == order() != order(epoch=1) and order(seed=1) not in (order(), ids)
    assert sorted(order()) == sorted(order(epoch=1)) == sorted(ids)
    assert [name(s) for s in stream_shards(folder, shuffle=0)] == ids


def test_repeats_of_the_mix_are_read_so_often(tmp_path):
    """git_instruction x3, vg_relations x0.2: each image of the one three times, a fifth of the other's once."""
    tasks, files = {"object": 1.0}, {"num": 100, "seed": 4}
    repeats = {"git_instruction": 3, "vg_objects": 1, "vg_relations": 0.2}
    parts = [Part(name, "world", files, repeat=repeat, tasks=tasks) for name, repeat in repeats.items()]
    build(GritConfig(str(tmp_path / "g"), parts, shard_size=50))
    rows = list(DataLoader(Ids(tmp_path / "g"), batch_size=None, num_workers=2))
    copies = {part: Counter(id.split("/")[1] for id, _ in rows if id.startswith(part + "/")) for part in repeats}
    assert set(copies["git_instruction"].values()) == {3} and set(copies["vg_objects"].values()) == {1}
    assert set(copies["vg_relations"].values()) == {1} and 8 <= len(copies["vg_relations"]) <= 35
    assert copies["git_instruction"].keys() == copies["vg_objects"].keys() > copies["vg_relations"].keys()
    texts = {}
    for record, _ in GritShards(tmp_path / "g"):
        part, image, copy = record.id.split("/")
        if part == "git_instruction": texts.setdefault(image, set()).add(record.dialogues[0].turns[0].text)
    assert np.mean([len(some) for some in texts.values()]) > 2  # each copy in other words


def test_objects_go_along_with_their_masks(built):
    folder, _ = built
    shards = GritShards(folder)
    assert shards.index["names"] and "disc" in " ".join(shards.index["words"])
    for i in range(5):
        (record, image), objects = shards[i], shards.objects(i)
        boxes = {o.box for o in objects}
        assert {(r.x1, r.y1, r.x2, r.y2) for d in record.dialogues for r in d.regions} <= boxes
        for o in objects:
            rows, columns = np.nonzero(o.mask)
            assert o.mask.shape == image.size[::-1]
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == o.box
