"""Encoders of others that are worth importing, as data: `embedkit import --list`.

Name, license, pixels and pooling are those of timm 1.0.31; parameters and dim are counted from its networks without
their classifiers. Quality is what the sources state, and was not measured again here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RECOMMENDED", "Recommended"]


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """An encoder that `embedkit import NAME` takes.

    Attributes:
        name: timm's name of the network, with the tag of the weights.
        license: Of the weights, as timm states it.
        parameters: In millions, without a classifier.
        dim: Width D of the embedding.
        pixels: Side of the images that is recommended; where it is not timm's own, give `--image-size`.
        native: Side of the images in timm.
        pooling: `mean` of the map or the patches, `class token`, or `attention`.
        good_at: In words.
        source: Paper or page.
    """

    name: str
    license: str
    parameters: float
    dim: int
    pixels: int
    native: int
    pooling: str
    good_at: str
    source: str

    @property
    def architecture(self) -> str:
        """Timm's name without the tag."""
        return self.name.partition(".")[0]


def _of(
    name: str, license: str, parameters: float, dim: int, pixels: str, pooling: str, good_at: str, source: str
) -> Recommended:
    recommended, _, native = pixels.partition("/")
    return Recommended(
        name=name,
        license=license,
        parameters=parameters,
        dim=dim,
        pixels=int(recommended),
        native=int(native or recommended),
        pooling=pooling,
        good_at=good_at,
        source=source,
    )


#: From small to large.
RECOMMENDED = (
    _of(
        *("vit_pe_core_tiny_patch16_384.fb", "apache-2.0", 6.0, 192, "384", "attention"),
        "general images, very small; vectors of 192 numbers",
        "Perception Encoder, arXiv 2504.13181",
    ),
    _of(
        *("tiny_vit_5m_224.dist_in22k_ft_in1k", "apache-2.0", 5.1, 320, "224", "mean"),
        "objects and scenes on a CPU; ImageNet top-1 80.9 %",
        "TinyViT, ECCV 2022, arXiv 2207.10666",
    ),
    _of(
        *("mobilenetv4_conv_medium.e500_r256_in1k", "apache-2.0", 8.4, 960, "256", "mean"),
        "objects on a CPU, about 0.8 times as fast as EfficientNet-Lite0; ImageNet top-1 79.9 %",
        "MobileNetV4, ECCV 2024, arXiv 2404.10518",
    ),
    _of(
        *("convnext_nano.in12k_ft_in1k", "apache-2.0", 15.0, 640, "224", "mean"),
        "objects and scenes, many classes; a network of convolutions only",
        "ConvNeXt, CVPR 2022, arXiv 2201.03545, weights by timm",
    ),
    _of(
        *("tiny_vit_21m_224.dist_in22k_ft_in1k", "apache-2.0", 20.6, 576, "224", "mean"),
        "objects and scenes; ImageNet top-1 85.1 %",
        "TinyViT, ECCV 2022, arXiv 2207.10666",
    ),
    _of(
        *("vit_small_patch16_dinov3.lvd1689m", "dinov3-license", 21.6, 384, "224/256", "mean"),
        "retrieval, fine detail, satellite images; --pool cls is the authors' own pooling",
        "DINOv3, arXiv 2508.10104",
    ),
    _of(
        *("vit_small_patch16_lingbot.robbyant", "apache-2.0", 21.6, 384, "224/512", "class token"),
        "dense features and depth; squashes images",
        "huggingface.co/belfner/vit_small_patch16_lingbot.robbyant",
    ),
    _of(
        *("vit_small_patch14_reg4_dinov2.lvd142m", "apache-2.0", 22.1, 384, "224/518", "class token"),
        "retrieval, copies, fine-grained classes, other domains; ImageNet kNN 79.1 %",
        "DINOv2, TMLR 2024, arXiv 2304.07193, and registers, arXiv 2309.16588",
    ),
    _of(
        *("vit_pe_core_small_patch16_384.fb", "apache-2.0", 23.6, 384, "384", "attention"),
        "general images, text in images",
        "Perception Encoder, arXiv 2504.13181",
    ),
    _of(
        *("vit_base_patch14_reg1_tipsv2.webli", "apache-2.0", 86.3, 768, "224/448", "class token"),
        "general images and dense features; takes values of 0..1 as they are",
        "TIPS, ICLR 2025, arXiv 2410.16512, second version",
    ),
    _of(
        *("vit_base_patch14_reg4_dinov2.lvd142m", "apache-2.0", 86.6, 768, "224/518", "class token"),
        "as its small one, and better",
        "DINOv2, TMLR 2024, arXiv 2304.07193, and registers, arXiv 2309.16588",
    ),
    _of(
        *("vit_base_patch16_siglip_224.v2_webli", "apache-2.0", 92.9, 768, "224", "attention"),
        "products, web images, concepts that have names in many languages",
        "SigLIP 2, arXiv 2502.14786",
    ),
)
