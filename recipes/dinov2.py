"""DINOv2, ViT-L/16 on ImageNet: the authors' short setting (Oquab et al. 2023, https://arxiv.org/abs/2304.07193).

    accelerate launch pretrain.py --recipe dinov2                                # demo(): minutes on two CPU cores
    accelerate launch --multi_gpu pretrain.py --recipe dinov2 --data '/data/in1k/train-{000000..001281}.tar' \
        --val '/data/in1k/val-{000000..000049}.tar' --out runs/dinov2            # recipe(): 100 epochs

The same command again goes on from the newest checkpoint in --out. A smaller ViT; four registers (Darcet et al. 2023);
the setting of the authors' larger runs and of DINOv3's ViT-L; Gram anchoring in the last tenth (DINOv3):

    --encoder.name vit_small_patch14_dinov2
    --encoder.name vit_large_patch14_reg4_dinov2
    --method.centring sinkhorn --method.separate-heads
    --method.gram-weight 2 --method.gram-start-epochs 90

Expect   recipe(): unmeasured here. The authors: k-NN 81.6, linear 82.9 on ImageNet, about a day on 32 A100 (README.md).
         demo(), 2026-11-22, 2 busy cores of a Xeon server, one thread, built-in sample, k-NN against untrained:
         0.677 / 0.499, 0.637 / 0.490, 0.631 / 0.512 (seeds 0, 1, 2; about 200 s of one core each); raw pixels 0.264.
         With the paper's KoLeo weight, 0.1, and half the rate: 0.618 / 0.499.
Numbers  facebookresearch/dinov2 dinov2/configs/ssl_default_config.yaml, which vitl16_short.yaml is, and
         dinov2/data/augmentations.py, unless marked "ours"; Gram's are DINOv3's dinov3_vit7b16_gram_anchor.yaml.
"""

from dataclasses import replace

from ssl_global.encoders.vit import VitConfig
from ssl_global.methods.dinov2 import Dinov2Config
from ssl_global.recipe import Checkpoint, Crops, Data, Eval, Explain, Log, Optim, Recipe, Train, Views


def recipe() -> Recipe:
    return Recipe(
        data=Data(),  # ImageNet's mean and deviation
        views=Views(
            globals=Crops(
                count=2, pixels=224, area=(0.32, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(1.0, 0.1), solarize=(0.0, 0.2),
            ),
            locals=Crops(
                count=8, pixels=96, area=(0.05, 0.32), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(0.5,), solarize=(0.0,),
            ),
        ),
        encoder=VitConfig(
            name="vit_large_patch14_dinov2",  # with scaled layers, from 1e-5 on
            patch=16,
            drop_path=0.3,  # ours: rising from 0, where theirs is the same in all blocks
        ),
        method=Dinov2Config(
            prototypes=65_536,
            head_hidden=2048,
            head_bottleneck=256,
            separate_heads=False,
            student_temp=0.1,
            teacher_temp=(0.04, 0.07),
            teacher_temp_warmup_epochs=30,
            teacher_momentum=(0.992, 1.0),
            centring="softmax",
            centre_momentum=0.9,
            freeze_prototypes_epochs=1,
            ibot_weight=1.0,
            hidden_share=0.5,
            hidden_ratio=(0.1, 0.5),
            koleo_weight=0.1,
            koleo_images=64,  # of a GPU
            layer_decay=0.9,
            patch_embed_lr=0.2,
        ),
        optim=Optim(
            lr_per_256_images=7.07e-4,  # 0.004 * sqrt(2048 / 1024) / 8: theirs goes with the root of the batch
            lr_end=1e-6,
            warmup_epochs=10,
            weight_decay=(0.04, 0.4),
            betas=(0.9, 0.999),
            clip_norm=3.0,  # theirs clips encoder and heads by themselves, ours the whole gradient
        ),
        train=Train(
            epochs=100,
            global_batch=2048,  # 64 on each of 32 GPUs
            micro_batch=64,
            precision="bf16",  # ours: theirs is fp16
        ),
        eval=Eval(every=12_500),
        log=Log(every=50),  # ours
        explain=Explain(every=12_500, attention_every=500),  # ours
        checkpoint=Checkpoint(every=1250, keep=2),  # ours
    )  # fmt: skip


def demo() -> Recipe:
    """The same road on two CPU cores: small views, a small ViT, few prototypes. All its numbers are ours."""
    paper = recipe()
    # As in dino's demo: colour is what tells the photographs apart, so it stays.
    return replace(
        paper,
        views=Views(
            globals=replace(paper.views.globals, pixels=32, area=(0.2, 1.0), saturation=0.0, hue=0.0, grey=0.0),
            locals=replace(paper.views.locals, pixels=16, area=(0.05, 0.3), count=4, saturation=0.0, hue=0.0, grey=0.0),
        ),
        encoder=VitConfig(name="vit_tiny_patch16_224", patch=8, depth=3),
        method=replace(
            paper.method,
            prototypes=1024, head_hidden=512, head_bottleneck=128, teacher_momentum=(0.99, 1.0),
            teacher_temp=(0.04, 0.04), teacher_temp_warmup_epochs=0, layer_decay=1.0, patch_embed_lr=1.0,
            koleo_weight=0.02,  # of seventeen photographs each image's nearest neighbour is of its own
        ),
        optim=replace(paper.optim, lr_per_256_images=2e-3, warmup_epochs=1, weight_decay=(0.04, 0.1)),
        train=Train(epochs=8, global_batch=64),
        eval=Eval(every=94),
        log=Log(every=20),
        explain=Explain(every=94, attention_every=94),
        checkpoint=Checkpoint(every=100),
    )  # fmt: skip
