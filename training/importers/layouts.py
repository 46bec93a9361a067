"""The layouts of checkpoint files as data: what other training code writes, and what its weights need.

A layout says where the state dict lies in the file, which prefix the encoder's keys have, which other keys are heads,
and what the published weights are under. The networks are timm's: torchvision's ResNets have timm's names, shapes and
padding, and the ViTs of DINO, MAE and MoCo v3 began as timm's. Where a twin of equal names and shapes would compute
something else, the layout says so (`model_args`, `layer4_stride`).

SwAV and VICReg pad by 1 before a first convolution that pads by 2: together timm's 3. ResNets of other widths
(`resnet50w2`) and stems (3x3 for CIFAR, MoCo v3's `vit_conv_*`) have no equal in timm, and are refused by their
shapes or names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedkit.model.preprocess import Preprocess

__all__ = ["LAYOUTS", "STEMS", "Layout"]

RESNETS = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152")
VITS = (
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_tiny_patch16_224",
    "vit_huge_patch14_224",
)
#: What a first layer's name begins with, and the architectures that have it.
STEMS = {"conv1.": RESNETS, "patch_embed.": (*VITS, "vit_small_patch8_224", "vit_base_patch8_224")}

BILINEAR = Preprocess(
    size=(224, 224),
    resize_size=256,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
BICUBIC = dataclasses.replace(BILINEAR, interpolation="bicubic")
#: L* of 0..100 minus 50, from L* scaled to 0..255.
LIGHTNESS = dataclasses.replace(BILINEAR, color="lab_l", mean=(0.5,), std=(0.01,))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one training code writes its checkpoints.

    Attributes:
        name: As `--layout` takes it.
        title: Whose it is.
        places: Where the state dict may lie (keys joined by dots, "" for the file itself), and the prefix of the
            encoder's keys there, the likeliest first. A state dict saved alone is recognized, too.
        heads: What the keys begin with, prefix included, that belong to no encoder.
        methods: What the entry's name may begin with; anything when empty.
        license: Of the published weights; None where the layout is that of a library.
        paper: The method's source; "" where the layout is that of many methods.
        preprocess: As in the source's evaluation.
        architectures: timm names, of which the shapes decide.
        renames: Beginnings of keys, after the prefix, and what they are in timm.
        model_args: Architecture -> what timm's has otherwise.
        layer4_stride: Stride of a ResNet's last stage.
    """

    name: str
    title: str
    places: tuple[tuple[str, str], ...]
    heads: tuple[str, ...]
    methods: tuple[str, ...] = ()
    license: str | None = None
    paper: str = ""
    preprocess: Preprocess = BILINEAR
    architectures: tuple[str, ...] = RESNETS
    renames: tuple[tuple[str, str], ...] = ()
    model_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layer4_stride: int = 2


LAYOUTS = (
    Layout(
        name="simsiam",
        title="SimSiam (facebookresearch/simsiam)",
        places=(("state_dict", "module.encoder."),),
        heads=("module.encoder.fc.", "module.predictor."),
        methods=("simsiam",),
        license="CC-BY-NC-4.0",
        paper="Exploring Simple Siamese Representation Learning (Chen and He, CVPR 2021, arXiv 2011.10566)",
    ),
    Layout(
        name="moco_v2",
        title="MoCo v1 and v2 (facebookresearch/moco)",
        places=(("state_dict", "module.encoder_q."),),
        heads=("module.encoder_q.fc.", "module.encoder_k.", "module.queue"),
        methods=("moco_v2", "moco_v1"),
        license="CC-BY-NC-4.0",
        paper="Improved Baselines with Momentum Contrastive Learning (Chen et al., 2020, arXiv 2003.04297)",
    ),
    Layout(
        name="moco_v3",
        title="MoCo v3 (facebookresearch/moco-v3)",
        places=(("state_dict", "module.base_encoder."),),
        heads=(
            "module.base_encoder.fc.",
            "module.base_encoder.head.",
            "module.momentum_encoder.",
            "module.predictor.",
        ),
        methods=("moco_v3",),
        license="CC-BY-NC-4.0",
        paper="An Empirical Study of Training Self-Supervised Vision Transformers (Chen, Xie and He, ICCV 2021, "
        "arXiv 2104.02057)",
        architectures=(*RESNETS, *VITS),
        # Its ViT-S has twice as many heads as everyone else's; no shape tells.
        model_args={"vit_small_patch16_224": {"num_heads": 12}},
    ),
    Layout(
        name="swav",
        title="SwAV, DeepCluster-v2 and SeLa-v2 (facebookresearch/swav)",
        places=(("state_dict", "module."),),
        heads=("module.projection_head.", "module.prototypes."),
        methods=("swav", "deepcluster_v2", "sela_v2"),
        license="CC-BY-NC-4.0",
        paper="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al., NeurIPS "
        "2020, arXiv 2006.09882)",
    ),
    Layout(
        name="dino",
        title="DINO (facebookresearch/dino)",
        places=(("teacher", "module.backbone."), ("teacher", "backbone."), ("", "")),
        heads=("module.head.", "head.", "fc."),
        methods=("dino",),
        license="Apache-2.0",
        paper="Emerging Properties in Self-Supervised Vision Transformers (Caron et al., ICCV 2021, arXiv 2104.14294)",
        preprocess=BICUBIC,
        architectures=(*RESNETS, *VITS, "vit_small_patch8_224", "vit_base_patch8_224"),
    ),
    Layout(
        name="barlow_twins",
        title="Barlow Twins (facebookresearch/barlowtwins)",
        places=(("model", "module.backbone."), ("", "")),
        heads=("module.projector.", "module.bn."),
        methods=("barlow_twins",),
        license="MIT",
        paper="Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al., ICML 2021, arXiv "
        "2103.03230)",
    ),
    Layout(
        name="vicreg",
        title="VICReg (facebookresearch/vicreg)",
        places=(("model", "module.backbone."), ("", "")),
        heads=("module.projector.",),
        methods=("vicreg",),
        license="MIT",
        paper="VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning (Bardes, Ponce and "
        "LeCun, ICLR 2022, arXiv 2105.04906)",
    ),
    Layout(
        name="mae",
        title="MAE (facebookresearch/mae)",
        places=(("model", ""),),
        heads=("mask_token", "decoder_", "head."),
        methods=("mae",),
        license="CC-BY-NC-4.0",
        paper="Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377)",
        preprocess=BICUBIC,
        architectures=VITS,
    ),
    Layout(
        name="vissl",
        title="VISSL (facebookresearch/vissl)",
        places=(
            ("classy_state_dict.base_model.model.trunk", "_feature_blocks."),
            ("classy_state_dict.base_model.model", "trunk._feature_blocks."),
            ("classy_state_dict", "trunk._feature_blocks."),
            ("model_state_dict", "_feature_blocks."),
        ),
        heads=("heads.",),
        paper="Scaling and Benchmarking Self-Supervised Visual Representation Learning (Goyal et al., ICCV 2019, arXiv "
        "1905.01235)",
    ),
    Layout(
        name="vissl_colorization",
        title="VISSL's colorization, one channel (facebookresearch/vissl)",
        places=(
            ("model_state_dict", "_feature_blocks."),
            ("classy_state_dict.base_model.model.trunk", "_feature_blocks."),
            ("classy_state_dict.base_model.model", "trunk._feature_blocks."),
        ),
        heads=("heads.",),
        methods=("colorization",),
        license="CC-BY-NC-4.0",
        paper="Colorful Image Colorization (Zhang, Isola and Efros, ECCV 2016, arXiv 1603.08511)",
        preprocess=LIGHTNESS,
        layer4_stride=1,
    ),
    Layout(
        name="lightly",
        title="Lightly (lightly-ai/lightly)",
        places=(("state_dict", "backbone.vit."), ("state_dict", "backbone.")),
        heads=(
            "backbone.fc.",
            "backbone.head.",
            "backbone.mask_token",
            "backbone_momentum.",
            "classification_head.",
            "criterion.",
            "decoder.",
            "online_classifier.",
            "prediction_head.",
            "projection_head",
            "prototypes.",
            "query_",
            "queues.",
            "student_",
        ),
        architectures=(*RESNETS, *VITS),
        # nn.Sequential(*list(resnet.children())[:-1]), as in its examples
        renames=(
            ("0.", "conv1."),
            ("1.", "bn1."),
            ("4.", "layer1."),
            ("5.", "layer2."),
            ("6.", "layer3."),
            ("7.", "layer4."),
        ),
    ),
    Layout(
        name="solo_learn",
        title="solo-learn (vturrisi/solo-learn)",
        places=(("state_dict", "backbone."), ("state_dict", "encoder.")),
        heads=(
            "backbone.fc.",
            "classifier.",
            "decoder.",
            "dino_loss_func.",
            "encoder.fc.",
            "head.",
            "mask_token",
            "momentum_",
            "predictor.",
            "projector.",
            "prototypes.",
            "queue",
        ),
        paper="solo-learn: A Library of Self-supervised Methods for Visual Representation Learning (da Costa et al., "
        "JMLR 2022, arXiv 2108.01775)",
        architectures=(*RESNETS, *VITS),
    ),
)
