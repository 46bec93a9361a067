"""Recipes of `deepdpm`."""

from __future__ import annotations

import dataclasses

from embedkit.training.clusters import ClustersConfig
from embedkit.training.config import RunConfig
from embedkit.training.data import DataConfig
from embedkit.training.methods import deepdpm
from embedkit.training.optim import Optimizer

__all__ = ["encoder", "recipe", "umap"]


def recipe() -> RunConfig:
    """r10 autoencoder on Fashion-MNIST, alternating with its clusters: figure of the whole run not measured yet.

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
    """The published figures' way, autoencoder, then UMAP in 10 dimensions, then clusters.

    Published for Fashion-MNIST (the authors' fully connected autoencoder): NMI 0.68, K 10.2 +- 0.8, as we remember
    the paper's table. Here, on 12,000 pictures after 220 steps of the autoencoder: NMI 0.65, K 7, from init_k 1 and
    10 alike. Data as `recipe`; UMAP itself takes minutes on one core, within one step.

        embedkit train deepdpm:umap --data fashion-mnist/
    """
    base = recipe()
    clusters = ClustersConfig(init_k=1)
    method = dataclasses.replace(
        base.method, rounds=1, reduce="umap", transform="normalize", clusters=clusters
    )
    return dataclasses.replace(base, recipe="deepdpm:umap", method=method)


def encoder() -> RunConfig:
    """Clusters of the features of an encoder that is trained already, by the directions of 16 principal components.

    Data and backbone as in the encoder's own run; the time is that of encoding the pictures once, and of 200 epochs
    of the clusters.

        embedkit train deepdpm:encoder --data fashion-mnist/ --set method.weights=RUN/encoder.safetensors
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
