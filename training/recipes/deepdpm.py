"""Recipes of `deepdpm`."""

from __future__ import annotations

import dataclasses

from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import deepdpm
from embedkit.training.methods.deepdpm.clusters import ClustersConfig
from embedkit.training.optim import Optimizer

__all__ = ["encoder", "recipe", "umap"]

#: What was measured, by function; see `recipes.summaries`.
RESULTS = {"umap": {"data": "fashion-mnist", "metrics": {"clusters": 10, "nmi": 0.663, "acc": 0.596}}}


def recipe() -> RunConfig:
    """r10 autoencoder on Fashion-MNIST, alternating with its clusters.

    One round of 440 steps found K 34 at NMI 0.57 and kNN 0.795: the codes of a garment are no Gaussian, and 54,000
    of them are reason enough to split it.

    Data: the four IDX files of Fashion-MNIST; no label is used. Time: 30 minutes on 2 cores.

        embedkit train deepdpm --data fashion-mnist/ --max-minutes 30
    """
    return RunConfig(
        recipe="deepdpm",
        method=deepdpm.Config(clusters=ClustersConfig(init_k=3)),
        backbone="r10",
        data=DataConfig(color="gray", image_size=28),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.01, schedule="one_cycle", warmup_steps=200),
        batch_size=512,
        epochs=40,
    )


def umap() -> RunConfig:
    """r10 autoencoder on Fashion-MNIST, UMAP in 10 dimensions, clusters from one on.

    So the published figures were made, with the authors' fully connected autoencoder: NMI 0.68, ACC 0.62 and K 10.2
    +- 0.8 for Fashion-MNIST, as we remember the paper's table. Ours are of the 53,760 training images that were
    clustered; another run, whose autoencoder stopped at a larger rate, had K 12, NMI 0.677, ACC 0.638. The exported
    mixture, Gaussians of the encoder's own codes, gives test images NMI 0.645, ACC 0.581; linear probe 0.778, kNN
    0.847 of the 10 columns (random features of 256: 0.751 and 0.770).

    Data: as `recipe`. Time: 1,470 steps, 13 minutes on one core, two of them UMAP's, within one step.

        embedkit train deepdpm:umap --data fashion-mnist/
    """
    base = recipe()
    clusters = ClustersConfig(init_k=1)
    method = dataclasses.replace(
        base.method, rounds=1, reduce="umap", transform="normalize", clusters=clusters
    )
    return dataclasses.replace(base, recipe="deepdpm:umap", method=method, epochs=14)


def encoder() -> RunConfig:
    """Clusters of the features of an encoder that is trained already, by the directions of 16 principal components.

    Data and backbone as in the encoder's own run; the time is that of encoding the images once, and of 200 epochs
    of the clusters.

        embedkit train deepdpm:encoder --data fashion-mnist/ --set method.weights=RUN
    """
    base = recipe()
    method = dataclasses.replace(
        base.method,
        rounds=1,
        transform="normalize",
        reduce="pca",
        reduce_dim=16,
        clusters=ClustersConfig(init_k=1, psi="data_std"),
    )
    return dataclasses.replace(base, recipe="deepdpm:encoder", method=method, epochs=3)
