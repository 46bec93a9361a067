"""Run by `test_two_processes_are_one`: loss and gradients of a union batch, by one process and by two (gloo).

The backbone is a ViT: BatchNorm's statistics are those of the rank, and would differ.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from embedkit.training.config import Facts
from embedkit.training.methods import simclr, supervised
from embedkit.training.methods.supervised import smoothed_cross_entropy
from embedkit.training.models.backbones import create_backbone

FACTS = Facts(
    image_shape=(1, 28, 28),
    mean=(0.3,),
    std=(0.3,),
    num_classes=4,
    batch_size=8,
    steps_per_epoch=1,
    total_steps=10,
)


class SimCLR(torch.nn.Module):
    """The method's own loss on given views; its projector without BatchNorm."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.projector = backbone, torch.nn.Linear(backbone.dim, 16)

    def forward(self, x, labels):
        z = self.projector(self.backbone(x.flatten(0, 1))).unflatten(0, x.shape[:2])  # (2, N, D)
        return simclr.nt_xent(z[0], z[1], 0.2)


class Supervised(torch.nn.Module):
    """The method's own loss on one given view."""

    def __init__(self, backbone):
        super().__init__()
        self.method = supervised.Supervised(backbone, supervised.Config(), FACTS)
        torch.nn.init.normal_(self.method.classifier.weight)  # at zero no gradient would reach the backbone

    def forward(self, x, labels):
        return smoothed_cross_entropy(self.method.classifier(self.method.backbone(x[0])), labels, 0.1)


def measure(rank, world):
    torch.set_num_threads(1)
    results = {}
    for name, kind in (("simclr", SimCLR), ("supervised", Supervised)):
        torch.manual_seed(0)
        model = kind(create_backbone("vit_t4", in_chans=1, image_size=28)).double()
        x, labels = torch.randn(2, 8, 1, 28, 28, dtype=torch.float64), torch.arange(8) % 4
        wrapped = DistributedDataParallel(model) if world > 1 else model
        loss = wrapped(x[:, rank::world], labels[rank::world])
        loss.backward()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results[name] = (mean / world, gradients)
    return results


def work(rank, folder, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(measure(rank, 2), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = sys.argv[1]
    with tempfile.TemporaryDirectory() as temporary:
        # forked before anything is computed: a spawned process would import torch and timm again
        arguments = (folder, Path(temporary) / "store")
        torch.multiprocessing.start_processes(work, arguments, nprocs=2, start_method="fork")
    torch.save(measure(0, 1), f"{folder}/one.pt")
