"""Run by `test_devices.py`: loss and gradients of a union batch, by one process and by two (gloo).

Backbones are ViTs: BatchNorm's statistics are those of the rank, and would differ; so are heads with BatchNorm left out
of what is compared. Views are fixed, and each rank takes the columns of the batch that its sampler gives it.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from embedkit.training.data import IdentityBalanced, LabeledAndUnlabeled, Shuffled
from embedkit.training.data.targets import cross_entropy
from embedkit.training.distributed import gather
from embedkit.training.methods import fixmatch, mixae, simclr, simsiam, sphereface, vae
from embedkit.training.methods.autoencoder import reconstruction_loss
from embedkit.training.methods.mae import masked_loss
from embedkit.training.models.backbones import create_backbone

N, D, K = 8, 16, 4
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


class Model(torch.nn.Module):
    """A ViT, a linear layer, and one loss on it; `x` (2, N, 1, 28, 28) are two fixed views."""

    def __init__(self, loss):
        super().__init__()
        self.backbone = create_backbone("vit_t4", in_chans=1, image_size=28, depth=1, embed_dim=48)
        self.head = torch.nn.Linear(self.backbone.dim, D)
        self.own = loss

    def forward(self, x, labels):
        z = self.head(self.backbone(x.flatten(0, 1))).unflatten(0, x.shape[:2])  # (2, N, D)
        return self.own(z, labels, x)


def labeled(z, labels, x):
    """Some images have no label, and not as many on one rank as on the other."""
    return cross_entropy(z[0, :, :K], torch.where(x[0, :, 0, 0, 0] > 0.3, labels, -1), 0.1)


def few_labels(z, labels, x):
    """The first quarter is labeled, on each rank; the others are taught by their weak views."""
    count = len(labels) // 4
    supervised = cross_entropy(z[0, :count, :K], labels[:count])
    return supervised + fixmatch.consistency_loss(20 * z[0, count:, :K], z[1, count:, :K], 0.5)[0]


def identities(z, labels, x):
    """A margin on unit vectors; and a check that the images of an identity are together."""
    assert (labels.reshape(-1, 2)[:, 0] == labels.reshape(-1, 2)[:, 1]).all(), "an identity is torn apart"
    weights = torch.eye(K, D, dtype=z.dtype)
    return sphereface.detached_margin(z[0], weights, labels, 1.7, 30.0)


def pairs(z, labels, x):
    """All pairs of the union batch, anchored at the rank's own rows: a loss over identities."""
    everyone, their = gather(z[0]), gather(labels)
    same = labels[:, None] == their[None]
    return (torch.where(same, 1.0, -1.0) * (z[0][:, None] - everyone[None]).square().sum(2)).tanh().mean()


def clusters(z, labels, x):
    """MIXAE's terms, of which one is of the mean assignment."""
    p = z[0, :, :K].softmax(1)
    errors = (z[1, :, :K] - z[0, :, :K]).square()
    rec, sample, batch = mixae.mixae_terms(errors, p)
    return rec + 0.3 * sample - 0.7 * batch


def posterior(z, labels, x):
    """A VAE's bound with a fixed draw."""
    mu, log_var = z[0, :, :8], z[0, :, 8:]
    code = vae.reparameterize(mu, log_var, x[0].flatten(1)[:, :8])
    nll = vae.negative_log_likelihood(code, x[1].flatten(1)[:, 300:308].sigmoid())
    return (nll + vae.kl_divergence(mu, log_var).sum(1)).mean()


def adversary(z, labels, x):
    """A discriminator's loss on logits of the two views."""
    return F.softplus(-z[0, :, 0]).mean() + F.softplus(z[1, :, 1]).mean()


def hidden(z, labels, x):
    """MAE's loss, the same number of patches hidden of each image."""
    pred, target = z.transpose(0, 1), x.flatten(2)[..., :D].transpose(0, 1)  # (N, 2 patches, D)
    return masked_loss(pred, target, torch.tensor([0.0, 1.0]).expand(len(pred), 2))


def several(z, labels, x):
    """A task of which some images have labels, and one that needs none, on one trunk."""
    return labeled(z, labels, x) + reconstruction_loss(z[1], x[1].flatten(1)[:, :D].sigmoid())


LOSSES = {
    "labels": (labeled, Shuffled()),
    "few labels": (few_labels, LabeledAndUnlabeled(ratio=3)),
    "identities": (identities, IdentityBalanced(images_per_identity=2)),
    "pairs": (pairs, IdentityBalanced(images_per_identity=2)),
    "views": (lambda z, labels, x: simclr.nt_xent(z[0], z[1], 0.2), Shuffled()),
    "views without negatives": (
        lambda z, _, x: simsiam.simsiam_loss(z[0], z[1], z[1] * 2, z[0] + 1),
        Shuffled(),
    ),
    "clusters": (clusters, Shuffled()),
    "reconstruction": (
        lambda z, _, x: reconstruction_loss(z[0], x[1].flatten(1)[:, :D].sigmoid()),
        Shuffled(),
    ),
    "a draw": (posterior, Shuffled()),
    "masks": (hidden, Shuffled()),
    "an adversary": (adversary, Shuffled()),
    "several tasks": (several, Shuffled()),
    "a pretext task": (lambda z, labels, x: F.cross_entropy(z[0, :, :4], labels % 4), Shuffled()),
}


def measure(rank, world):
    torch.set_num_threads(1)
    results = {}
    for name, (loss, sampler) in LOSSES.items():
        torch.manual_seed(0)
        model = Model(loss).double()
        x = torch.randn(2, N, 1, 28, 28, dtype=torch.float64)
        own = sampler.columns(N, rank, world)
        wrapped = DistributedDataParallel(model) if world > 1 else model
        value = wrapped(x[:, own], LABELS[own])
        value.backward()
        mean = value.detach().clone()
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
