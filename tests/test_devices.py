"""Several devices: two real processes, joined by gloo, that train one small model together."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RUN = '''
import hashlib, json, sys, warnings
from pathlib import Path
import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from ferret_lite.data import FerretDataModule
from ferret_lite.stages import Stage
from ferret_lite.training import FerretModule

warnings.filterwarnings("ignore")
folder = Path(sys.argv[1])
digest = lambda tensors: hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


class Diary(L.Callback):
    """Each process writes down what it read, and its gradients and weights."""
    def __init__(self): self.batches, self.grads, self.own = [], [], []
    def on_train_batch_start(self, trainer, module, batch, i): self.batches.append(digest([batch["pixel_values"]]))
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.grads.append(digest(p.grad for _, p in sorted(module.named_parameters()) if p.grad is not None))
    def on_train_end(self, trainer, module):
        weights = digest(p for _, p in sorted(module.named_parameters()))
        said = dict(batches=self.batches, grads=self.grads, weights=weights, steps=trainer.global_step)
        (folder/f"{trainer.global_rank}.json").write_text(json.dumps(said))


torch.manual_seed(0)
stages = [Stage(1, 2, loss="dense"), Stage(2, 2)]
data = FerretDataModule(stages, num_workers=0, num_scenes=50, num_points=16, max_length=128)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
vision = dict(model_type="ferret_lite_vision", stem_channels=16, **sizes)
text = dict(model_type="llama", num_attention_heads=2, **sizes)
ferret = dict(vision_feature_layer=-1, vision_feature_select_strategy="full", sampler_num_points=[16, 8, 4],
              sampler_k=4)
module = FerretModule(data.processor, vision, text, ferret, stages, data.words)
strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", find_unused_parameters=True)
trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=3, max_epochs=-1,
                    accumulate_grad_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                    enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False, callbacks=[Diary()])
trainer.fit(module, data)
'''


@pytest.fixture(scope="module")
def diaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    (folder / "run.py").write_text(RUN)
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, folder / "run.py", folder], env={**os.environ, **env}, capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_read_different_images_and_stay_one_model(diaries):
    a, b = diaries
    assert a["steps"] == b["steps"] == 3 and len(a["batches"]) == len(b["batches"]) == 6  # two batches a step
    assert len({*a["batches"], *b["batches"]}) == 12  # no image is read twice
    assert a["grads"] == b["grads"] and len(set(a["grads"])) == 3  # equal after they were averaged, other in each step
    assert a["weights"] == b["weights"]
